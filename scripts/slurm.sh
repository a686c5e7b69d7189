#!/usr/bin/env bash
# Training under SLURM, on one node or several. It requeues and resumes when its time is up or it is preempted:
#   sbatch --nodes=1 --gpus-per-node=4 scripts/slurm.sh experiment=cityscapes_resnext101 key=value ...
# `segtrain train --print-slurm key=value ...` prints it with your options written in.
#SBATCH --job-name=segtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u
options=("$@")

warned=
training=
# SLURM warns the batch shell; the training saves itself within a step.
trap 'warned=1; [ -z "$training" ] || kill -USR1 "$training"' USR1
trap '[ -z "$training" ] || kill -USR1 "$training"' TERM
run=$(segtrain train --print-run "${options[@]}") || exit
rm -f "$run/requeue" # of the session before
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
  --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=100 \
  -m segtrain train "${options[@]}" &
training=$!
status=1
while kill -0 "$training" 2>/dev/null; do # a trapped signal ends `wait` before the training ends
  wait "$training"
  status=$?
done

# torchrun has one exit status for everything; the run itself says whether it wants to go on.
if [ -e "$run/requeue" ] || { [ -n "$warned" ] && [ "$status" -ne 0 ]; }; then
  echo "$run is saved and goes on later"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
