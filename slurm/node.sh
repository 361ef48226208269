#!/usr/bin/env bash
# Runs the training on one node of train.sbatch: stages the data, starts the node's processes, returns their exit code.
set -euo pipefail

# These signals would end the launcher but not the training. They are ignored here, and so by all processes that this
# shell starts; the training sets its own handlers.
trap '' USR2 TERM INT

# On GPUs, `no` lets the training choose: bf16 where the GPU has it, or else fp16. On CPUs, the processes use gloo.
if [ -n "${LAUNCH_FILE:-}" ]; then
  launch=(--config_file "$LAUNCH_FILE")
elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  launch=(--config_file "$PROJECT_DIR/accelerate_configs/ddp_bf16.yaml" --mixed_precision no)
else
  launch=(--config_file "$PROJECT_DIR/accelerate_configs/ddp_cpu.yaml")
fi
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
threads=$((${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} / processes))

NODE_DIR=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/lora_dist-$SLURM_JOB_ID-XXXXXX")
export NODE_DIR
trap 'rm -rf "$NODE_DIR"' EXIT

arguments=("$@")
if [ -n "${STAGE_DIR:-}" ]; then
  source_dir=${STAGE_DIR%/}
  copy=$NODE_DIR/$(basename "$source_dir")
  echo "$SLURMD_NODENAME: copying $source_dir to $copy"
  cp -RL "$source_dir" "$copy"
  arguments=()
  for argument in "$@"; do
    case $argument in
      "$source_dir" | "$source_dir"/*) argument=$copy${argument#"$source_dir"} ;;
      --*="$source_dir" | --*="$source_dir"/*) argument=${argument%%=*}=$copy${argument#*="$source_dir"} ;;
    esac
    arguments+=("$argument")
  done
fi

# deepspeed_multinode_launcher: DeepSpeed's own launcher would start the other nodes by ssh. Others ignore it.
code=0
accelerate launch \
  "${launch[@]}" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * processes)) \
  --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" --deepspeed_multinode_launcher standard \
  --num_cpu_threads_per_process $((threads > 0 ? threads : 1)) \
  --no_python bash "$PROJECT_DIR/slurm/rank.sh" "${arguments[@]}" || code=$?

# accelerate makes every failure a 1, and srun gives the highest code of the nodes, which is up to 128 + 64 for signals.
# So the codes that decide whether the job is requeued are mapped to higher ones, which train.sbatch maps back: a usage
# error (2) has priority over a saved stop (75), and that over a stall (124).
if [ "$code" != 0 ]; then
  for pair in 203:2 202:75 201:124; do
    if grep -qsx "${pair#*:}" "$NODE_DIR"/code-*; then
      exit "${pair%:*}"
    fi
  done
fi
exit "$code"
