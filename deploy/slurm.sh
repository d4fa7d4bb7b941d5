#!/usr/bin/env bash
# Run a cohort on SLURM: sbatch --nodes=4 deploy/slurm.sh cohort.csv -o out/
# The arguments are passed to `hover-batch segment`. Submit from a checkout in which `uv sync` has created .venv. All
# nodes must see the checkout, the slides and the output. The same command again resumes.
#SBATCH --job-name=hover-batch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Whole nodes, because at the end `ray symmetric-run` stops all Ray processes of this user on them.
#SBATCH --exclusive
set -euo pipefail

fail() {
    echo "deploy/slurm.sh: $1" >&2
    exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a SLURM job; submit it: sbatch deploy/slurm.sh cohort.csv -o out/"
[ -f .venv/bin/activate ] || fail "$PWD has no .venv; run \`uv sync\` in the checkout, and submit from there"
[ "$#" -gt 0 ] || fail "no arguments for \`hover-batch segment\`; give them, such as cohort.csv -o out/"

# shellcheck source=/dev/null
source .venv/bin/activate

# A token for this job only; the nodes receive it in their environment.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# A folder for this job only, because /tmp is shared. The path is short, because it is part of socket names.
export RAY_TMPDIR=/tmp/hb-$SLURM_JOB_ID
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# This script runs on the first node, which becomes the head. HEAD_IP selects one of its addresses (e.g. InfiniBand).
head=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
case $head in
    "") fail "\`hostname -I\` gives no address; set HEAD_IP to one of this node's" ;;
    *:*) head=[${head#[}; head=${head%]}] ;; # IPv6
esac
address=$head:6379

exec srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --dashboard-host 127.0.0.1 --disable-usage-stats \
    -- hover-batch segment "$@" --address "$address"
