#!/usr/bin/env bash
# Everything that only a GPU can show: tests, memory and race checks, benchmarks, figures.
# The summary stays in benchmarks/results/gpu_checks.txt. Needs the extra "test".
set -uo pipefail
cd "$(dirname "$0")/.."
summary=benchmarks/results/gpu_checks.txt
mkdir -p "$(dirname "$summary")"
failed=0
# The kernel tests compile a few hundred kernels, minutes of CPU time. The sanitizers reuse them.
if [[ -z ${TRITON_CACHE_DIR:-} ]]; then
    TRITON_CACHE_DIR=$(mktemp -d)
    trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT
fi
export TRITON_CACHE_DIR

check() { # name, command...
    local name=$1 log result last
    log=$(mktemp)
    shift
    echo "=== $name: $*"
    if "$@" 2>&1 | tee "$log"; then result=passed; else result=FAILED failed=1; fi
    last=$(grep -E "$last_lines" "$log" | tail -1)
    printf '%-22s %s  %s\n' "$name" "$result" "$last" >>"$summary"
    rm -f "$log"
}
last_lines='passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|kernels, '

describe='import torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
hardware=$(python -c "$describe") || exit 1
echo "$hardware" >"$summary"
git describe --always --dirty >>"$summary"

check tests python -m pytest -q
regimes=(python -m pytest -q -p no:cacheprovider tests/test_kernels.py
    -k "every_regime or either_end or no_neighbours or mean_over or in_parts or scaled")
if command -v compute-sanitizer >/dev/null; then
    check memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "${regimes[@]}"
    check racecheck compute-sanitizer --tool racecheck --error-exitcode 1 "${regimes[@]}"
else
    echo "memcheck, racecheck    skipped: compute-sanitizer of the CUDA toolkit is not in PATH" |
        tee -a "$summary"
fi
check compile_report python benchmarks/compile_report.py
check benchmark python benchmarks/bench_loss.py
check training_step python benchmarks/bench_step.py
check cifar_epoch python examples/cifar.py --loss ce --fake-data 50000 --epochs 1 \
    --out "$(mktemp -d)"
check figures python benchmarks/plot.py
cat "$summary"
exit $failed
