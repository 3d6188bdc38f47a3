#!/usr/bin/env bash
# Runs the C backend's tests under the address and undefined-behaviour sanitizers, in a copy.
# PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp -r weighted_soft_labels tests "$work"
backends="$work/weighted_soft_labels/backends"
rm -f "$backends"/cpu_kernel*.so
include=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['include'])")
gcc -O0 -g1 -fopenmp-simd -fPIC -shared -Wall -Wextra -Werror -I"$include" \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
    "$backends/cpu_kernel.c" -o "$backends/cpu_kernel.abi3.so"
# The sanitizer also owns torch's allocations, so that memory beside a tensor is out of bounds.
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work" OMP_NUM_THREADS=2
LD_PRELOAD=$(gcc -print-file-name=libasan.so)
cd "$work"
"$python" -m pytest -q -p no:cacheprovider tests/test_cpu.py \
    -k "any_problem and not dtype2 or misaligned"
