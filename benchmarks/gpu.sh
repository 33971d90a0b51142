#!/usr/bin/env bash
# What needs a GPU, in one call of at most 9 minutes: benchmarks/gpu.sh FOLDER
# (all but the whole suite's times, which are a call of their own: python -m benchmarks --suite gpu)
# First whether the kernels are right, then what they cost. Leaves some twenty small files there, and all of them in
# FOLDER.tar.gz to be carried away; a part that fails or runs out of its time does not stop the others.
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

# The extension is built for this GPU alone, while the Triton kernels are checked; its own tests come after that.
TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
export TORCH_CUDA_ARCH_LIST
part 20 info.txt "$python" -m mosa_fast.info
timeout -k 5 180 "$python" -c "from mosa_fast.ops import extension; print(extension.operators())" >"$out/extension.txt" 2>&1 &
extension=$!

# Right?
if command -v compute-sanitizer >/dev/null; then
    part 70 sanitizer.txt bash -c "for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool \$tool --error-exitcode 9 \
            '$python' -m pytest tests/gpu -q -k 'sanitized and not cuda' || exit; done"
fi
part 120 tests_triton.txt "$python" -m pytest tests/gpu/test_on_gpu.py -q --durations=10 -k "not sanitized and not cuda"

# What they cost: each kernel beside the model, as it is and with other tiles; bytes and stalls; a training step.
part 40 kernels.txt "$python" -m benchmarks.gpu_kernels kernels --out "$out/kernels.json"
if command -v ncu >/dev/null; then
    stalls=$(printf ',smsp__average_warps_issue_stalled_%s_per_issue_active.ratio' \
        long_scoreboard short_scoreboard barrier wait mio_throttle lg_throttle math_pipe_throttle)
    for suite in operator gpu; do # their first operator is plain, in bfloat16, and under autocast
        part 35 "ncu_$suite.csv" ncu --csv --clock-control none --kernel-name regex:'sparse_adapter|sum_' --metrics \
            "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,smsp__inst_executed.sum,gpu__time_duration.sum,launch__registers_per_thread$stalls" \
            "$python" -m benchmarks --suite "$suite" --profile
    done
fi
part 130 step.txt "$python" -m benchmarks --suite step --out "$out/step.json"
part 60 tiles.txt "$python" -m benchmarks.gpu_kernels tiles --out "$out/tiles.json"
part 20 products.txt "$python" -m benchmarks.gpu_kernels products --out "$out/products.json"

# The CUDA C++ kernels, and with what time is left whole runs, and the operators against everybody else's.
wait "$extension"
part 60 tests_cuda.txt "$python" -m pytest tests/gpu/test_on_gpu.py -q --durations=10 -k "cuda and not sanitized"
part 60 tests_training.txt "$python" -m pytest tests/gpu/test_training.py -q --durations=10
part 160 operator.txt "$python" -m benchmarks --suite operator --out "$out/operator.json"
tar -czf "$out.tar.gz" -C "$out" .
ls -l "$out" "$out.tar.gz"
