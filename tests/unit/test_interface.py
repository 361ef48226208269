"""The interface for Python: light to import, typed, and a run that returns what it leaves."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import results_of

import lora_dist
from lora_dist.errors import UserError


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, lora_dist; print(sorted(dir(lora_dist)))\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'PIL', 'pydantic', 'yaml'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"ImageClassifier", "TrainingResult", "fit", "load"} <= set(eval(result.stdout))


def test_every_name_leads_somewhere() -> None:
    from lora_dist.deployment import image_classifier
    from lora_dist.train import fit

    assert lora_dist.fit is fit
    assert lora_dist.load is image_classifier.load
    assert all(getattr(lora_dist, name).__doc__ for name in lora_dist.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'loda'"):
        _ = lora_dist.loda


def test_a_run_returns_its_results(vit: Path, photos: Path, tmp_path: Path) -> None:
    matmul, flag, value = torch.backends.cuda.matmul, "fp32_precision", "tf32"
    if not hasattr(matmul, flag):  # before torch 2.9
        flag, value = "allow_tf32", True
    before = getattr(matmul, flag)
    setattr(matmul, flag, value)
    torch.backends.cudnn.benchmark = True
    result = lora_dist.fit(
        model_name_or_path=vit,
        train_dir=photos / "train",
        validation_dir=photos / "validation",
        output_dir=tmp_path / "run",
        max_train_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        lora_target_modules=["query", "value"],
        test_dir=None,
        deterministic=True,
    )
    assert not torch.are_deterministic_algorithms_enabled(), "what follows in the process is not of the run"
    assert getattr(matmul, flag) == value
    assert torch.backends.cudnn.benchmark
    setattr(matmul, flag, before)
    torch.backends.cudnn.benchmark = False
    assert result.path == tmp_path / "run" / "adapter"
    assert result.output_dir == tmp_path / "run"
    assert result.metrics == results_of(tmp_path / "run")
    adapter = json.loads((result.path / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    assert len(lora_dist.load(result.path)(photos / "train" / "a" / "000.png")) == 3


def test_all_wrong_settings_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        lora_dist.fit("demo", learning_rat=1e-3, lora_r="many", output_dir=tmp_path / "run")
    assert "learning_rat: unknown setting; did you mean --learning_rate?" in str(caught.value)
    assert "--lora_r: 'many' is not valid" in str(caught.value)
    with pytest.raises(UserError, match=r"--config dmo: no such file or recipe; did you mean demo\?"):
        lora_dist.fit("dmo")
    with pytest.raises(UserError, match="--train_dir, --dataset_name: no data"):
        lora_dist.fit(output_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"use python -m lora_dist\.train"):
        lora_dist.fit("demo", dry_run=True)


def test_another_thread_is_refused_before_anything_is_loaded() -> None:
    caught: list[Exception] = []

    def run() -> None:
        try:
            lora_dist.fit("demo")
        except UserError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert "main thread" in str(caught[0])


def test_the_package_lists_its_commands() -> None:
    listed = subprocess.check_output([sys.executable, "-m", "lora_dist"], text=True, timeout=60)
    package = Path(lora_dist.__file__).parent
    mains = {path for path in package.rglob("*.py") if "run_command(main)" in path.read_text(encoding="utf-8")}
    commands = {path.stem for path in mains if path.parent == package}
    commands |= {path.parent.name for path in mains if path.name == "__main__.py"}
    assert commands == set(re.findall(r"python -m lora_dist\.(\w+)", listed))
