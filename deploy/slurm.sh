#!/usr/bin/env bash
# A cohort on SLURM: sbatch --nodes=4 deploy/slurm.sh cohort.csv -o out/
# What follows the script's name goes to `hover-batch segment`. Submit from the checkout, in which `uv sync` has made
# .venv; checkout, slides and output must lie where all nodes see them. The same command again resumes.
#SBATCH --job-name=hover-batch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Whole nodes: at the end `ray symmetric-run` stops every Ray of this user on them.
#SBATCH --exclusive
set -euo pipefail

# shellcheck source=/dev/null
source .venv/bin/activate

# Known to this job alone, and handed to all nodes in their environment.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# Of this job alone, since /tmp is everybody's; short, since sockets lie in it.
export RAY_TMPDIR=/tmp/hb-$SLURM_JOB_ID
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# This script runs on the first node, which becomes the head. HEAD_IP chooses among its addresses (InfiniBand, say).
address=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}:6379

exec srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --dashboard-host 127.0.0.1 --disable-usage-stats \
    -- hover-batch segment "$@" --address "$address"
