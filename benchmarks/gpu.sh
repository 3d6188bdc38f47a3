#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests, memory and race checks, benchmark, figures.
# The summary stays in benchmarks/results/gpu_checks.txt. Needs the extra test.
set -uo pipefail
cd "$(dirname "$0")/.."
summary=benchmarks/results/gpu_checks.txt
mkdir -p "$(dirname "$summary")"
failed=0

check() { # name, command...
    local name=$1 log
    log=$(mktemp)
    shift
    echo "=== $name: $*"
    if "$@" 2>&1 | tee "$log"; then result=passed; else result=FAILED failed=1; fi
    printf '%-22s %s  %s\n' "$name" "$result" "$(grep -E 'passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|kernels, ' "$log" | tail -1)" >>"$summary"
    rm -f "$log"
}

hardware=$(python -c 'import torch, triton; print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")') || exit 1
echo "$hardware" >"$summary"
git describe --always --dirty >>"$summary"

check tests python -m pytest -q
regimes=(python -m pytest -q -p no:cacheprovider tests/test_kernels.py -k "every_regime or either_end or mean_over or in_parts or scaled")
check memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "${regimes[@]}"
check racecheck compute-sanitizer --tool racecheck --error-exitcode 1 "${regimes[@]}"
check compile_report python benchmarks/compile_report.py
check benchmark python benchmarks/bench_loss.py
check training_step python benchmarks/bench_step.py
check cifar_epoch python examples/cifar.py --loss ce --fake-data 50000 --epochs 1 --out "$(mktemp -d)"
check figures python benchmarks/plot.py
cat "$summary"
exit $failed
