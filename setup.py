"""Builds the C extension, which pyproject.toml cannot describe."""

import os
import sys
import sysconfig

from setuptools import Extension, setup

# The compiler reads these flags after CFLAGS, so that they win. Fast math would optimise the tests
# for NaN away. A library linked with fast math flushes subnormals in the whole process.
PRECISE = ["-O3", "-fno-fast-math"]
if sys.platform == "win32":
    compile_flags, link_flags = ["/fp:precise"], []
else:
    compile_flags = [*PRECISE, "-g0", "-fopenmp-simd"]  # for its pragma; nothing links OpenMP
    link_flags = [*PRECISE, "-fno-unsafe-math-optimizations"]

kernel = Extension(
    "weighted_soft_labels.backends.cpu_kernel",
    ["weighted_soft_labels/backends/cpu_kernel.c"],
    extra_compile_args=compile_flags,
    extra_link_args=link_flags,
    py_limited_api=True,
    # Without a compiler, the eager backend does the work. A release must not lack the extension.
    optional=os.environ.get("CIBUILDWHEEL") != "1",
)
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no limited API
setup(
    ext_modules=[] if free_threaded else [kernel],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
