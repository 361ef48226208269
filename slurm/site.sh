# shellcheck shell=bash
# All cluster-specific settings. Sourced by the batch scripts; edit the block below.

# ---- site block: begin -------------------------------------------------------------------------------------------
# module load python cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export HF_HOME=/shared/cache/huggingface HF_HUB_OFFLINE=1
if [ -f "$PROJECT_DIR/.venv/bin/activate" ]; then
  # shellcheck source=/dev/null
  . "$PROJECT_DIR/.venv/bin/activate"
fi
# ---- site block: end ---------------------------------------------------------------------------------------------
