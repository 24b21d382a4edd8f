#!/usr/bin/env bash
# All benchmarks on a machine with a GPU, in one call of at most 8 minutes; prints the whole table.
#
#   benchmarks/gpu.sh FOLDER_OF_PHOTOGRAPHS [CHECKOUT_OF_facebookresearch_dino]
#
# For 16 cores and one H200: batch 128 of ViT-S/16 in bf16, 15 workers. A part that fails or takes
# too long is said, and the next goes on.
set -uo pipefail
folder=$(realpath "$1")
original=()
if [ $# -gt 1 ]; then original=(--original "$(realpath "$2")"); fi
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore

run() { # seconds, command
    local seconds=$1
    shift
    echo "\$ python benchmarks/$*"
    timeout "$seconds" python benchmarks/"$@" || echo "failed or took more than $seconds s: $1"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
run 130 bench_step.py --arch dino_vits16 --batch 128 --rounds 5 "${original[@]}"
run 130 bench_train.py "$folder" --arch dino_vits16 --batch 128 --steps 30 --no-plain "${original[@]}"
run 60 bench_loss.py --k 65536 --batch 64 256 --rounds 5 "${original[@]}"
run 45 bench_data.py "$folder" --canvas 384 --rounds 2 --images 64 "${original[@]}"
run 30 bench_knn.py --rounds 2
run 80 bench_step.py --arch resnet50 --batch 64 --rounds 3 --no-plain --no-compile "${original[@]}"
