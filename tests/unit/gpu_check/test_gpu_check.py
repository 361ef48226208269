"""The check of the machine: what it says without a GPU, and that it notices what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_dist.gpu_check import __main__, commands, in_process
from lora_dist.gpu_check.outcome import Failed, Machine, Skipped, run_checks
from lora_dist.processes.runtime import launch


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(launch("no"), tmp_path)


def test_help_and_an_unknown_flag_run_no_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, code in ((["--help"], 0), (["--config", "demo"], 2)):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code == code
    said = capsys.readouterr()
    assert "Check this machine" in said.out
    assert "unrecognized arguments: --config demo" in said.err


def test_each_check_has_a_line_and_those_that_fail_are_named(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    def passes(_: Machine) -> str:
        return "good"

    def skips(_: Machine) -> str:
        raise Skipped("needs more")

    def fails(_: Machine) -> str:
        raise Failed("wrong")

    def raises(_: Machine) -> str:
        raise ValueError("broken")

    assert run_checks([passes, skips, fails, raises], machine) == ["fails", "raises"]
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("PASS", "passes", "good"),
        ("SKIP", "skips", "needs more"),
        ("FAIL", "fails", "wrong"),
        ("FAIL", "raises", "ValueError: broken"),
    ]


def test_the_checks_of_tensors_pass_or_say_what_is_missing(machine: Machine) -> None:
    assert "float32" in in_process.lora_layer(machine)
    assert "in each" in in_process.splits(machine)
    for check in (in_process.model_input, in_process.waits):
        with pytest.raises(Skipped, match="needs a GPU"):
            check(machine)
    with pytest.raises(Skipped, match="several processes"):
        in_process.bandwidth(machine)


def test_bf16_is_checked_where_the_cpu_has_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "cpu_has_bf16", lambda: False)
    for check in (commands.train_bf16, commands.train_bf16_base):
        with pytest.raises(Skipped, match="this CPU has no instructions for bf16"):
            check(machine)


def test_a_wrong_layer_and_a_wrong_gradient_are_noticed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = in_process.LoraLinear.apply
    monkeypatch.setattr(in_process.LoraLinear, "apply", lambda *tensors: layer(*tensors) * 1.001)
    with pytest.raises(Failed, match=r"float32, dropout 0\.0: error 1\.0e-03"):
        in_process.lora_layer(machine)
    monkeypatch.undo()
    update = in_process._update
    monkeypatch.setattr(
        in_process, "_update", lambda run, parts: update(run, parts)._replace(grad_norm=float(len(parts)))
    )
    with pytest.raises(Failed, match="grad_norm in micro-batches of 4 is 2, and in one of 8 1"):
        in_process.splits(machine)


def test_layers_in_every_precision_are_compared() -> None:
    assert set(in_process.LAYER_TOLERANCES) == {torch.float32, torch.bfloat16, torch.float16}


def test_deepspeed_has_time_to_compile() -> None:
    assert commands.limit_of("zero1") == commands.limit_of("zero3") > commands.limit_of("fsdp2") + 300
    with pytest.raises(Failed, match=r"http.server did not end within 0.5 s"):
        commands._run("http.server", "0", seconds=0.5)


@pytest.mark.slow
def test_a_machine_without_a_gpu_passes_what_it_can() -> None:
    result = subprocess.run([sys.executable, "-m", "lora_dist.gpu_check"], capture_output=True, text=True, check=True)
    assert "FAIL" not in result.stdout
    assert result.stdout.count("\nPASS") >= 7
    assert "SKIP  waits" in result.stdout
