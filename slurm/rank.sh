#!/usr/bin/env bash
# Runs one process of the training and logs to its own file; the output of rank 0 also goes to the job's log.
set -uo pipefail

# This shell and tee must ignore the signals that stop the training. (torchrun resets the signals that node.sh ignores.)
trap '' USR2 TERM INT

rank=${RANK:-0}
log=$LOG_DIR/rank-$rank.log
echo "== job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, rank $rank on $SLURMD_NODENAME" >>"$log"
if [ "$rank" = 0 ]; then
  python -m lora_dist.train "$@" 2>&1 | tee -a "$log"
else
  python -m lora_dist.train "$@" >>"$log" 2>&1
fi
code=${PIPESTATUS[0]}
echo "== exit code $code" >>"$log"

# For node.sh: accelerate does not pass the exit code on.
echo "$code" >"$NODE_DIR/code-$rank"
exit "$code"
