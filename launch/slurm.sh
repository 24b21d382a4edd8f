#!/usr/bin/env bash
# Train under Slurm, on whole nodes of 8 GPUs. Five minutes before its time is up the run saves and
# ends, and the job requeues itself; it goes on until the run is finished.
#
#   sbatch --nodes 2 launch/slurm.sh runs/vits16 --data /imagenet --arch dino_vits16
#
# From the repository's folder, with the environment active: first the run's folder, which all nodes
# have to see, then dino_train.py's flags. FSDP: sbatch --export ALL,ACCELERATE_USE_FSDP=true ...
#SBATCH --job-name=dino
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

run=$1
shift
job=${run%/}.job-$SLURM_JOB_ID # tells what this job's run wrote from what was there before
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then mkdir -p "$(dirname "$run")" && touch "$job"; fi
if [ "$run/config.yaml" -nt "$job" ]; then
    set -- # the run has all its settings in its folder, with what --minutes came to
    start=--resume
elif [ -f "$run/config.yaml" ] && [[ " $* " != *" --overwrite "* ]]; then
    start=--resume
else
    start=--output-dir
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# A task is a process of the run: no launcher stands between it and Slurm's signal. All end by
# themselves, one after the other: killed with the first, they would not exit with its code.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    exec python dino_train.py "$@"' _ "$start" "$run" "$@"
code=$?
# 128 + SIGUSR1: stopped and saved, not finished
if [ "$code" -eq 138 ]; then scontrol requeue "$SLURM_JOB_ID"; else rm -f "$job"; fi
exit "$code"
