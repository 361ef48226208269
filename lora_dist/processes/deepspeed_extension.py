"""Compiles the extension with which DeepSpeed communicates on CPUs, before the processes connect."""

from lora_dist import extras, waiting
from lora_dist.errors import UserError


def compile_extension() -> None:
    """Compiles or loads the extension. Otherwise DeepSpeed would do so while it connects, and an error would look
    like one of the network.

    Raises:
        UserError: DeepSpeed is not installed, or the extension cannot be compiled.
    """
    extras.require("deepspeed", "the launch file's distributed_type: DEEPSPEED", "deepspeed")
    from deepspeed.comm.torch import build_shm_op

    try:
        with waiting.log_wait("waiting for DeepSpeed to compile its extension for CPUs; it does so once"):
            build_shm_op()
    except (RuntimeError, OSError) as error:
        reason = f"{error}{f' ({error.__cause__})' if error.__cause__ else ''}".splitlines()[0]
        raise UserError(f"DeepSpeed cannot compile its extension for CPUs; it needs g++ and ninja: {reason}") from error
