#!/usr/bin/env bash
# The runs that docs/evidence.md describes. Whatever is done is a whole table: those wanted most come first.
#
#   benchmarks/evidence.sh [DIR [OPTION ...]]   # stop it at will, the same command goes on
#
# DIR: of the runs (runs/evidence). OPTIONs go to every sweep, and from there to every run: where the data are, on what to
# compute, how many runs at a time (docs/evidence.md, Repeat it). Those that change results need a DIR of their own.
# Every finished run is a line of DIR/evidence.jsonl, and what is a line there is done: to go on from our runs, copy
# benchmarks/results/evidence.jsonl to it. Two processes of one thread; give it idle time with `nice -n 19`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/evidence}
options=("${@:2}")
export OMP_NUM_THREADS=1 TIMM_FUSED_ATTN=0 # with 64 tokens, plain attention is faster on a CPU

# run "RECIPES" FOLDER EPOCHS OPTION ...
run() {
    local recipes=() folder=$2 epochs=$3
    for name in $1; do recipes+=("configs/evidence/$name.yaml"); done
    shift 3
    "${PYTHON:-python}" -m mosa_fast.sweep --configs "${recipes[@]}" --out "$out/$folder" --processes 2 \
        --grid --search uphill --search-seeds 101,102 --seeds 1,2,3,4,5 --seed-options seed adapter.seed \
        --records "$out/evidence.jsonl" --optim.epochs="$epochs" --optim.warmup_epochs="$((epochs / 10)).$((epochs % 10))" "$@" \
        "${options[@]}"
}

# About 520 steps of 16 images; then four and sixteen times as many.
few() { run "$1" fashion-20 40 --data.shots=20; }
more() { run "$1" fashion-100 8 --data.shots=100; }
fewest() { run "$1" fashion-5 130 --data.shots=5; }
long() { run "$1" fashion-20-steps-4x 160 --data.shots=20; }
longest() { run "$1" fashion-20-steps-16x 640 --data.shots=20; }
digits() {
    run "$1" digits-10 74 --data.name=digits --data.shots=10
    run "$1" digits-50 16 --data.name=digits --data.shots=50
}

few "linear dense mosa_e4 dense_two_views" # the primary comparison and its control
few "full lora random_mask mosa_e2"
more "linear dense mosa_e4 dense_two_views"
more "full lora random_mask mosa_e2"
few "mosa_e4_one_view mosa_e2_one_view"
more "mosa_e4_one_view mosa_e2_one_view"
long "dense mosa_e4 dense_two_views mosa_e2"
digits "linear dense mosa_e4 full scratch"
few "bias mosa_e4_none mosl_e4"
fewest "linear dense mosa_e4 dense_two_views mosa_e2 full"
longest "dense mosa_e4"
