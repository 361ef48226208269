"""Which precision a run trains in, and that what was launched is what is running."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from lora_dist.errors import UserError
from lora_dist.processes.devices import computes_on_cpu
from lora_dist.processes.runtime import (
    PACKAGES,
    be_deterministic,
    choose_precision,
    environment,
    git_commit,
    half_precision,
    launch,
    prepare_fsdp,
    require_bf16,
    require_devices,
)


@pytest.mark.parametrize(
    ("asked", "launched", "half", "expected"),
    [
        ("no", "no", "no", "no"),
        ("auto", "no", "no", "no"),
        ("auto", "bf16", "no", "bf16"),
        ("bf16", "no", "no", "bf16"),
        ("auto", "fp16", "bf16", "fp16"),
        ("auto", "bf16", "fp16", "bf16"),
        ("fp16", "fp16", "bf16", "fp16"),
        ("fp16", "no", "bf16", "fp16"),
        ("no", "no", "bf16", "no"),
        ("auto", "no", "bf16", "bf16"),
        ("auto", "no", "fp16", "fp16"),
    ],
)
def test_the_precision_follows_the_setting_then_the_launch_file_then_the_device(
    asked: str, launched: str, half: str, expected: str
) -> None:
    assert choose_precision(asked, launched, half == "no", half) == expected


def test_a_host_with_gpus_computes_on_the_cpu_if_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` took the half precision of the GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    assert not computes_on_cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert computes_on_cpu()
    assert half_precision() == "no"


def test_deterministic_algorithms_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    be_deterministic()
    found = torch.are_deterministic_algorithms_enabled(), os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    assert found == (True, ":4096:8")


@pytest.mark.parametrize("tf32", [True, False])
def test_matrix_products_take_tf32_where_that_is_asked_for(tf32: bool) -> None:
    launch("no", tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("has_bf16", [True, False])
def test_slow_bf16_is_told_where_the_cpu_has_no_instructions_for_it(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_dist.processes.runtime.cpu_has_bf16", lambda: has_bf16)
    choose_precision("bf16", "no", True, "no")
    require_bf16("no", True, "NO")
    assert caplog.text.count("very slow on this CPU") == (0 if has_bf16 else 2)


def test_fp8_is_refused() -> None:
    with pytest.raises(UserError, match="fp8, which is not supported: set bf16"):
        choose_precision("auto", "fp8", False, "bf16")


def test_torch_dynamo_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would wrap the model, and its result could not be written."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match=r"torch dynamo \(INDUCTOR\).*--torch_compile"):
        launch("no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launch("no").num_processes == 1


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", r"Megatron-LM.*distributed_type"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", r"parallelism_config.*remove"),
        ("FSDP_ACTIVATION_CHECKPOINTING", r"fsdp_activation_checkpointing.*--gradient_checkpointing"),
    ],
)
def test_what_only_a_launch_file_can_ask_for_is_refused(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would end with a traceback, or the request would be lost without a word."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=message):
        launch("no")
    monkeypatch.setenv(variable, "false")
    assert launch("no").num_processes == 1


def test_a_launch_file_that_accelerate_cannot_use_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "all"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="accelerate cannot use the launch file or the environment: Invalid auto wrap"):
        launch("no")


def test_gradient_accumulation_of_the_environment_does_not_divide_the_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`Accelerator.backward` would divide it a second time."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    launch("no").backward(weight * 3)
    assert weight.grad == 3
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is ignored" in caplog.text


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would give two of them the same GPU, which NCCL reports as `Duplicate GPU`."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    require_devices(1)  # A scheduler may show each process its own.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    require_devices(8)
    with pytest.raises(UserError, match=r"8 processes were started on this machine, which has 2 GPUs.*--num_processes"):
        require_devices(2)


@pytest.mark.parametrize(("asked", "launched"), [("no", "bf16"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_a_launch_file_of_another_precision_is_an_error_naming_both(asked: str, launched: str) -> None:
    with pytest.raises(UserError, match=f"--mixed_precision {asked}, but the launch file says .* {launched}"):
        choose_precision(asked, launched, False, "bf16")


@pytest.mark.parametrize(("asked", "launched"), [("fp16", "no"), ("auto", "fp16")])
def test_fp16_needs_a_gpu(asked: str, launched: str) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision(asked, launched, True, "no")


def test_without_a_gpu_auto_is_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision on a CPU is some hundred times slower."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert launch("auto").mixed_precision == "no"


@pytest.mark.parametrize(
    ("variable", "value", "way_out"),
    [
        ("MASTER_ADDR", "127.0.0.1", "distributed_type: MULTI_GPU"),
        ("SLURM_STEP_NUM_TASKS", "2", "slurm/train.sbatch"),
        ("OMPI_COMM_WORLD_SIZE", "4", "accelerate launch"),
        ("PMI_SIZE", "2", "accelerate launch"),
        ("RANK", "1", "Set WORLD_SIZE, MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_process_that_would_run_alone_among_others_is_refused(
    variable: str, value: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would train the whole run, into the same files."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}.*{way_out}"):
        launch("no")


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_single_task_of_a_scheduler_is_a_run_of_one_process(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "1")
    assert launch("no").num_processes == 1


@pytest.mark.parametrize("version", ["1", None])
def test_the_first_fsdp_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        launch("no")


def test_no_process_of_fsdp_loads_a_model_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` would, on all but the first, if a launch file asks for that or leaves it open."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    prepare_fsdp()
    assert FullyShardedDataParallelPlugin().cpu_ram_efficient_loading is False
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"


def test_the_record_of_a_run_names_versions_and_hardware() -> None:
    record = environment(launch("no"))
    assert set(PACKAGES) | {"python"} == record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["num_processes"] == 1
    assert record["device"]


def test_the_commit_on_record_is_that_of_the_code_and_not_of_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the working directory, nor of a project in whose environment the code is installed."""

    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x")
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    code, installed = tmp_path / "code", tmp_path / ".venv" / "code"
    for directory in (code, installed):
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("", encoding="utf-8")
    assert git_commit(code) is None
    git("init")
    git("add", "code")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert git_commit(code) == commit
    assert git_commit(installed) is None
    (code / "__init__.py").write_text("x = 1", encoding="utf-8")
    assert git_commit(code) == f"{commit}+"
    before = environment(launch("no"))["git_commit"]
    monkeypatch.chdir(tmp_path)
    assert environment(launch("no"))["git_commit"] == before


def test_a_later_run_in_the_process_has_its_own_precision() -> None:
    assert [launch(precision).mixed_precision for precision in ("no", "bf16", "no")] == ["no", "bf16", "no"]
