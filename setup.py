"""The extension module, which pyproject.toml cannot describe: optional, and for every Python from 3.10 at once."""

import os
import sys
import sysconfig

from setuptools import Extension, setup

# Free-threaded Python has no limited API; there, and where there is no compiler, `_eager` does all.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
rows = Extension(
    "weighted_soft_labels._rows",
    ["weighted_soft_labels/_rows.c"],
    # The pragma that asks for vectors; nothing of OpenMP is linked.
    extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-g0", "-fopenmp-simd"],
    py_limited_api=True,
    optional=os.environ.get("CIBUILDWHEEL")
    != "1",  # a release without it would pass for one with it
)
setup(
    ext_modules=[] if free_threaded else [rows],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
