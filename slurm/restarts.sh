# shellcheck shell=bash
# Decides whether a crashed job is restarted. Sourced by train.sbatch, which defines `say`.

MAX_CRASH_RESTARTS=${MAX_CRASH_RESTARTS:-3}

# One line for each start of the job, and one for how it ended. A requeued job keeps its number, and so this file.
starts=$LOG_DIR/starts

# A failed write must not prevent the requeue: the disk of the logs may be full.
record() {
  echo "$1" >>"$starts" || say "cannot write $starts"
}

# Prints the update of the newest checkpoint that this job has saved, 0 without one.
newest_checkpoint() {
  awk '/^saved a checkpoint after update [0-9]+$/ && $NF > newest { newest = $NF } END { print newest + 0 }' \
    "$LOG_DIR/rank-0.log"
}

# Records a start. Prints a message and fails if the previous start crashed and the job may not be restarted.
begin_start() {
  touch "$LOG_DIR/rank-0.log" "$starts"
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    : >"$starts"
  fi
  # Slurm requeues a job whose node fails, and the batch script dies with the node or soon after.
  if tail -n 1 "$starts" | grep -E '^(started|lost a node)' >/dev/null; then
    local what="the previous start did not end properly: a node failed or the job was killed"
    if ! crashed; then
      say "$what; $reason: not restarted"
      return 1
    fi
    say "$what; $reason: resuming"
  fi
  record "started, newest checkpoint $(newest_checkpoint)"
}

# Records a crash and sets `reason`. Succeeds if the job may be restarted.
crashed() {
  record crashed
  local crashes before
  crashes=$(grep -cx crashed "$starts")
  before=$(sed -n 's/^started, newest checkpoint //p' "$starts" | tail -n 1)
  if ! [ "$crashes" -le "$MAX_CRASH_RESTARTS" ]; then
    reason="crash $crashes of the job exceeds MAX_CRASH_RESTARTS=$MAX_CRASH_RESTARTS"
    return 1
  fi
  if ! [ "$(newest_checkpoint)" -gt "$before" ]; then
    reason="no checkpoint was saved since the last start"
    return 1
  fi
  reason="a checkpoint was saved since the last start (crash $crashes of at most $MAX_CRASH_RESTARTS)"
}
