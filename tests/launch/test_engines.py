"""DDP, DeepSpeed ZeRO-1, 2 and 3, and FSDP2 on two real processes: one loss, one adapter, one kind of checkpoint."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from lora_dist_testing.launching import (
    EVERY_UPDATE,
    ROOT,
    TIMEOUT,
    command,
    environment,
    flags,
    free_port,
    lines_of,
    results_of,
    run_flags,
    train,
)
from lora_dist_testing.tiny import ARCHITECTURES, make_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.load import load_data
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.train import DataSettings
from lora_dist.training.saving import checkpoint

LAUNCH_FILES = {
    "single": None,
    "ddp": "ddp_cpu.yaml",
    "zero1": "zero1_cpu.yaml",
    "zero2": "zero2_cpu.yaml",
    "zero3": "zero3_cpu.yaml",
    "fsdp2": "fsdp2_cpu.yaml",
}
RUNNING = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
DISTRIBUTED = tuple(engine for engine in LAUNCH_FILES if engine != "single")
ELASTIC = ("single", "ddp", "zero2", "zero3")
ALWAYS = [
    ("single", "zero3"),
    ("zero3", "ddp"),
    ("ddp", "zero2"),
    ("zero2", "single"),
    ("single", "fsdp2"),
    ("fsdp2", "single"),
]
"""Every engine as the source and as the target of a checkpoint; the other pairs are slow."""
OTHERS = sorted({*itertools.product(ELASTIC, ELASTIC), ("fsdp2", "fsdp2")} - {*ALWAYS})
PAIRS = [*ALWAYS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
STEPS, MIDDLE = 8, 3

# DeepSpeed compiles in the first of its launches.
pytestmark = pytest.mark.timeout(1500)


def _train(engine: str, accumulation: int, vit: Path, photos: Path, out: Path, *more: object) -> Path:
    """Two epochs of 27 samples in updates of 8 (the last of 3): effective batches are equal for every engine.

    With class weights, mixed images and balanced sampling, which are exact for every split of an update as well.
    """
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    batch = 8 // accumulation // (1 if engine == "single" else 2)
    weights = out.with_name(f"{out.name}_weights.yaml")
    names = sorted(path.name for path in photos.glob("train/*"))
    weights.write_text("".join(f"{name}: {2**number}\n" for number, name in enumerate(names)))
    train(
        *run_flags(
            vit,
            photos,
            out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            class_weights=weights,
            focal_gamma=1,
            mixup_alpha=1,
            head_learning_rate=3e-3,
            weight_decay=0.01,
            ema_decay=0.5,
            layer_decay=0.7,
            lora_rank_pattern="layers.1.attention.q_proj=2",
            train_norms="true",
            **EVERY_UPDATE,
        ),
        "--balanced_sampling",
        *more,
        launch_file=LAUNCH_FILES[engine],
    )
    return out


Runs = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def run_of(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Gives a whole run of an engine with an accumulation, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("engines")
    return cache(lambda engine, steps: _train(engine, steps, vit, photos, root / f"{engine}_{steps}"))


def _losses(out: Path, name: str = "train/loss") -> list[float]:
    return [line[name] for line in lines_of(out) if name in line]


def _last_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "trained.safetensors")


def _averages(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.path_of(out / "checkpoints", STEPS)).average


@pytest.mark.parametrize(
    ("engine", "accumulation"),
    [
        *((engine, 4) for engine in DISTRIBUTED),
        *((engine, 1) for engine in ("zero2", "fsdp2")),
        *(pytest.param(engine, 1, marks=pytest.mark.slow) for engine in ("ddp", "zero1", "zero3")),
    ],
)
def test_every_engine_computes_the_same(run_of: Runs, engine: str, accumulation: int) -> None:
    reference, out = run_of("single", 4), run_of(engine, accumulation)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert _losses(out, name) == pytest.approx(_losses(reference, name), rel=1e-5, abs=1e-5), name
    assert len(_losses(out)) == STEPS
    assert results_of(out)["distributed_type"] == RUNNING[engine]
    for name, tensor in _last_weights(reference).items():
        torch.testing.assert_close(_last_weights(out)[name], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(_averages(out)[name], _averages(reference)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_adapters_are_complete_and_of_one_format(run_of: Runs, engine: str) -> None:
    expected = load_file(run_of("single", 4) / "adapter" / "adapter_model.safetensors")
    found = load_file(run_of(engine, 4) / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(tensor.numel() and tensor.dtype == torch.float32 for tensor in found.values())
    files = [{path.name for path in (run_of(key, 4) / "adapter").iterdir()} for key in ("single", engine)]
    assert files[0] == files[1]


@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_checkpoints_are_of_one_size(run_of: Runs, engine: str) -> None:
    checkpoint = f"checkpoints/step-{STEPS:08d}"
    for name in ("trained.safetensors", "optimizer.safetensors"):
        sizes = {(run_of(key, 4) / checkpoint / name).stat().st_size for key in ("single", engine)}
        assert len(sizes) == 1, name


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_checkpoint_goes_on_under_any_engine(
    run_of: Runs, source: str, target: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    """From the middle of an epoch; on the same engine to the same bits, elsewhere to float error."""
    whole, out = run_of(source, 4), tmp_path / "run"
    checkpoints = f"checkpoints/step-{MIDDLE:08d}"
    shutil.copytree(whole / checkpoints, out / checkpoints)
    _train(target, 4, vit, photos, out, "--resume_from_checkpoint", "auto")
    assert [line["step"] for line in lines_of(out) if "train/loss" in line] == list(range(MIDDLE + 1, STEPS + 1))
    tolerance = 0 if source == target else 1e-5
    assert _losses(out) == pytest.approx(_losses(whole)[MIDDLE:], rel=tolerance, abs=tolerance)
    for name, tensor in _last_weights(whole).items():
        torch.testing.assert_close(_last_weights(out)[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_sgd_is_the_same_on_every_engine_and_goes_on_elsewhere(
    engine: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    more = ("--optim", "sgd", "--learning_rate", 0.1, "--head_learning_rate", 0.2)
    whole = _train("single", 4, vit, photos, tmp_path / "whole", *more)
    out = _train(engine, 4, vit, photos, tmp_path / "run", *more)
    other = tmp_path / "other"
    checkpoints = f"checkpoints/step-{MIDDLE:08d}"
    for source, target in ((whole, engine), (out, "single"), (out, engine)):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(source / checkpoints, other / checkpoints)
        _train(target, 4, vit, photos, other, *more, "--resume_from_checkpoint", "auto")
        for name in ("trained.safetensors", "optimizer.safetensors"):
            paths = [root / "checkpoints" / f"step-{STEPS:08d}" / name for root in (whole, out, other)]
            expected, *found = (load_file(path) for path in paths)
            for tensors in found:
                assert tensors.keys() == expected.keys() != set()
                for key, tensor in expected.items():
                    torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-5)


def test_fsdp2_that_keeps_weights_whole_after_the_forward_pass_saves_the_same(
    run_of: Runs, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an evaluation the model holds whole tensors, of which the optimizer knows nothing. Nothing is offloaded."""
    text = (ROOT / "accelerate_configs" / "fsdp2_cpu.yaml").read_text(encoding="utf-8")
    file = tmp_path / "other.yaml"
    other = "reshard_after_forward: false\n  fsdp_offload_params: true"
    file.write_text(text.replace("reshard_after_forward: true", other), encoding="utf-8")
    monkeypatch.setitem(LAUNCH_FILES, "fsdp2", str(file))
    whole = run_of("single", 4)
    out = _train("fsdp2", 4, vit, photos, tmp_path / "run", "--eval_steps", 1)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(root / "checkpoints" / f"step-{STEPS:08d}" / name) for root in (whole, out))
        assert found.keys() == expected.keys() != set()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)


def test_all_processes_evaluate_with_the_statistics_that_are_handed_over(photos: Path, tmp_path: Path) -> None:
    """Batch norms that train have gathered them on each process from its own samples."""
    base = make_model(tmp_path / "resnet", "resnet")
    train(
        *run_flags(
            base,
            photos,
            tmp_path / "run",
            per_device_train_batch_size=2,
            max_train_steps=4,
            tuning="full",
            eval_steps="no",
            learning_rate=1e-2,
        ),
        launch_file="fsdp2_cpu.yaml",
    )
    written = load_classifier(tmp_path / "run" / "model")
    data = load_data(DataSettings(train_dir=str(photos / "train"), validation_dir=str(photos / "validation")), 0)
    pixels = ImageTransforms(written.processor).batch([data.validation.image(row) for row in range(9)])
    with torch.inference_mode():
        logits = written.model(pixel_values=pixels).logits
    loss = float(cross_entropy(logits, torch.from_numpy(data.validation.labels)))
    assert results_of(tmp_path / "run")["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_a_deepspeed_file_that_contradicts_the_settings_is_an_error_naming_both(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    text = (Path(__file__).parents[2] / "accelerate_configs" / "zero2_cpu.yaml").read_text(encoding="utf-8")
    file = tmp_path / "other.yaml"
    file.write_text(text.replace("gradient_clipping: auto", "gradient_clipping: 0.5"), encoding="utf-8")
    result = train(
        *flags(model_name_or_path=vit, train_dir=photos / "train", output_dir=tmp_path / "run"),
        launch_file=str(file),
        code=None,
    )
    assert "gradient_clipping: 0.5, but --max_grad_norm makes it 1.0" in result.stderr


@pytest.mark.parametrize("name", ["ddp_bf16", "fsdp2", pytest.param("zero1", marks=pytest.mark.slow), "zero3_offload"])
def test_launch_files_for_gpus_train_on_two_cpu_processes(name: str, vit: Path, photos: Path, tmp_path: Path) -> None:
    """All but precision and the number of processes as it stands in the file."""
    out = _launch(name, 0, vit, photos, tmp_path)
    assert out.wait(TIMEOUT) == 0
    assert results_of(tmp_path / "run")["num_processes"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_two_nodes_join_one_run(vit: Path, photos: Path, tmp_path: Path) -> None:
    port = free_port()
    nodes = [_launch("multi_node", port, vit, photos, tmp_path, "--machine_rank", str(rank)) for rank in (1, 0)]
    assert [node.wait(TIMEOUT) for node in nodes] == [0, 0]
    assert results_of(tmp_path / "run")["num_processes"] == 2


def _launch(name: str, port: int, vit: Path, photos: Path, root: Path, *more: str) -> subprocess.Popen[bytes]:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    arguments = flags(
        model_name_or_path=vit,
        train_dir=photos / "train",
        validation_dir=photos / "validation",
        output_dir=root / "run",
        per_device_train_batch_size=2,
        max_train_steps=2,
        deterministic=True,
    )
    words = command("lora_dist.train", arguments, f"{name}.yaml")
    here = words.index("-m", words.index("--config_file"))
    address = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
    words[here:here] = ["--num_processes", "2", "--mixed_precision", "no", *address, *more]
    return subprocess.Popen(words, env=environment())


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_files_open_with_what_they_are_for(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    comment = text[: text.index("compute_environment")]
    assert f"accelerate launch --config_file accelerate_configs/{file.name}" in comment
    assert "Choose it" in comment
    assert "Costs" in comment
    assert load_config_from_file(str(file)).num_processes >= 1


HALF_PRECISION = [
    pytest.param(*pair, marks=() if pair == ("zero1", "resnet") else pytest.mark.slow)
    for pair in itertools.product(("zero1", "zero3", "fsdp2"), ARCHITECTURES)
]


@pytest.mark.parametrize(("engine", "architecture"), HALF_PRECISION)
def test_every_architecture_trains_in_bf16_without_autocast(
    engine: str, architecture: str, photos: Path, tmp_path: Path
) -> None:
    """ZeRO and FSDP2 cast the parameters to bf16, but neither pixel values nor buffers."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    train(
        *run_flags(
            make_model(tmp_path / "base", architecture),
            photos,
            tmp_path / "run",
            per_device_train_batch_size=2,
            max_train_steps=2,
            mixed_precision="bf16",
            tuning="full" if architecture in ("resnet", "mobilevit") else "lora",
        ),
        launch_file=LAUNCH_FILES[engine],
    )
    results = results_of(tmp_path / "run")
    assert (results["mixed_precision"], results["step"], results["skipped_updates"]) == ("bf16", 2, 0)


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").glob("*_cpu.yaml")), ids=lambda file: file.stem)
def test_launch_files_for_cpus_hide_all_gpus(file: Path) -> None:
    """What accelerate hands to the processes; `use_cpu` reaches none of them."""
    words = ["--config_file", str(file), "--main_process_port", "0", "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, exported = prepare_deepspeed_cmd_env(arguments)
    else:
        exported = prepare_multi_gpu_env(arguments)
    assert exported["CUDA_VISIBLE_DEVICES"] == "-1,-1"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_a_base_in_bf16_trains_under_each_engine_but_deepspeed(
    engine: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {"max_train_steps": 3, "per_device_train_batch_size": 2, "base_dtype": "bfloat16"}
    train(
        *run_flags(vit, photos, tmp_path / "run", **settings | {"mixed_precision": "auto"}),
        launch_file=LAUNCH_FILES[engine],
    )
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert load_classifier(tmp_path / "run" / "adapter").model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "reads"), [("ddp", 1), ("fsdp2", 1), ("zero1", 5)])
def test_an_update_of_several_processes_reads_from_the_device_as_often_as_documented(engine: str, reads: int) -> None:
    """Once, but for DeepSpeed's own reads."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    script = ROOT / "tests" / "benchmarks" / "collectives.py"
    words = command("-", [], LAUNCH_FILES[engine])
    words[words.index("-m", words.index("--config_file")) :] = [str(script)]
    result = subprocess.run(
        words, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["an update"]["reads"] == reads


@pytest.mark.slow
def test_sixteen_processes_compute_what_one_does(vit: Path, photos: Path, tmp_path: Path) -> None:
    """An update of 16 samples, one a process; the last one of an epoch has fewer, so that processes pad it."""
    settings = {"num_train_epochs": 2, "logging_steps": 1, "lora_dropout": 0, "learning_rate": 1e-3}
    out = tmp_path / "sixteen"
    words = command(
        "lora_dist.train", run_flags(vit, photos, out, per_device_train_batch_size=1, **settings), "ddp_cpu.yaml"
    )
    here = words.index("-m", words.index("--config_file"))
    words[here:here] = ["--num_processes", "16"]
    subprocess.run(words, env=environment(), timeout=TIMEOUT, check=True)
    one = tmp_path / "one"
    train(*run_flags(vit, photos, one, per_device_train_batch_size=16, **settings))
    assert results_of(out)["num_processes"] == 16
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert _losses(out, name) == pytest.approx(_losses(one, name), rel=1e-5, abs=1e-5), name
