#!/usr/bin/env bash
# What needs a GPU, in one call of at most 9 minutes: benchmarks/gpu.sh FOLDER
# (all but the models' times, which are a call of their own: python -m benchmarks --suite gpu)
# Leaves at most 8 small files there; a part that fails or runs out of its time does not stop the others.
set -u
out=${1:?usage: benchmarks/gpu.sh FOLDER}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
export PYTHONUNBUFFERED=1
started=$SECONDS
limit=535 # seconds for all parts together

part() { # part SECONDS FILE COMMAND...: run with what time is left, at most SECONDS; the output's end goes to FILE
    local seconds=$1 file=$2 left=$((limit - (SECONDS - started)))
    shift 2
    [ "$left" -lt "$seconds" ] && seconds=$left
    [ "$seconds" -lt 5 ] && { echo "no time left" >"$out/$file"; return; }
    echo "== $file ($seconds s at most)"
    timeout -k 5 "$seconds" "$@" >"$out/$file.full" 2>&1
    echo "exit status $?" >>"$out/$file.full"
    tail -c 200000 "$out/$file.full" >"$out/$file"
    rm -f "$out/$file.full"
    tail -n 3 "$out/$file"
}

# The extension is built for this GPU alone, at its first use.
TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
export TORCH_CUDA_ARCH_LIST
part 20 info.txt "$python" -m mosa_fast.info
part 90 extension.txt "$python" -c "from mosa_fast.ops import extension; print(extension.operators())"
part 210 tests.txt "$python" -m pytest tests/gpu -q --durations=10
# Two minutes by itself, and what the start and a compilation that does not end in time take.
part 160 operator.txt "$python" -m benchmarks --suite operator --out "$out/operator.json"
if command -v ncu >/dev/null; then
    part 60 ncu.csv ncu --csv --kernel-name regex:'sparse_adapter|sum_' \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum,launch__registers_per_thread \
        "$python" -m benchmarks --suite operator --profile
fi
if command -v compute-sanitizer >/dev/null; then
    small="tests/gpu/test_on_gpu.py -q -k sanitized"
    # shellcheck disable=SC2086
    part 60 sanitizer.txt bash -c "for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool \$tool --error-exitcode 9 '$python' -m pytest $small || exit; done"
fi
ls -l "$out"
