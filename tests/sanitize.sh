#!/usr/bin/env bash
# Runs the tests of the loop over rows under the address and the undefined-behaviour sanitizer. Takes the Python to use
# as PYTHON; writes to a temporary folder alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r weighted_soft_labels tests "$work"
rm -f "$work"/weighted_soft_labels/_rows*.so
include=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['include'])")
gcc -O0 -g1 -fopenmp-simd -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -fno-omit-frame-pointer -Wall -Wextra -Werror -I"$include" \
    weighted_soft_labels/_rows.c -o "$work/weighted_soft_labels/_rows.abi3.so"
cd "$work" # torch's own allocations are the sanitizer's, too: what lies beside a tensor is out of bounds
LD_PRELOAD="$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work" OMP_NUM_THREADS=2 \
    "$python" -m pytest -q -p no:cacheprovider tests/test_native.py -k "any_problem and not dtype2 or misaligned"
