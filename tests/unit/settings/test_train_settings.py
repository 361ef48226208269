"""Settings from flags, YAML and recipes: precedence, and every mistake reported at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lora_dist_testing.launching import flags
from pydantic import BaseModel

from lora_dist.errors import UserError
from lora_dist.settings import cli, trainer_flags
from lora_dist.settings.audit import AuditSettings
from lora_dist.settings.bench import BenchSettings
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.sweep import SweepSettings
from lora_dist.settings.train import Settings
from lora_dist.settings.train_contradictions import contradictions
from lora_dist.settings.yaml_text import parse_yaml

ROOT = Path(__file__).parents[3]
STREAM = ["--dataset_name", "x", "--streaming", "--validation_split", "test"]


def parse(*argv: object) -> Settings:
    return cli.parse(
        Settings,
        [str(word) for word in argv],
        prog="train",
        description="",
        contradictions=contradictions,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def problems_of(*argv: object) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


def test_the_defaults_are_the_recipe_of_the_guide(folder: Path) -> None:
    settings = parse("--train_dir", folder)
    assert settings.model.model_name_or_path == "google/vit-base-patch16-224-in21k"
    lora, optimization = settings.lora, settings.optimization
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (16, 16, 0.1, "none")
    assert (optimization.learning_rate, optimization.num_train_epochs) == (5e-3, 5)
    assert (optimization.per_device_train_batch_size, optimization.gradient_accumulation_steps) == (128, 4)


def test_flags_override_yaml_and_yaml_overrides_defaults(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train_dir: {folder}\nlora_r: 4\nseed: 7\nlearning_rate: 5e-3\nmixed_precision: no\n")
    settings = parse("--config", file, "--lora_r", 8)
    assert (settings.lora.lora_r, settings.run.seed, settings.lora.lora_alpha) == (8, 7, 16)
    assert settings.optimization.learning_rate == 5e-3  # which YAML 1.1 reads as a string
    assert settings.optimization.mixed_precision == "no"  # which YAML 1.1 reads as False


def test_dashes_equals_signs_bare_booleans_and_comma_lists(folder: Path) -> None:
    settings = parse(
        f"--train-dir={folder}",
        "--learning-rate=1e-4",
        "--use_dora",
        *flags(lora_target_modules="query, value", checkpointing_steps=50),
    )
    assert settings.optimization.learning_rate == 1e-4
    assert settings.lora.use_dora is True
    assert settings.lora.lora_target_modules == ["query", "value"]
    assert settings.run.checkpointing_steps == 50


def test_flags_of_trainer_are_answered_with_the_flags_of_this_command(folder: Path) -> None:
    message = problems_of(
        *flags(train_dir=folder),
        "--bf16",
        *flags(save_steps=500),
        "--eval-strategy=steps",
        *flags(overwrite_output_dir="true", learning_rat=1),
    )
    assert message.splitlines()[1:] == [
        "  --bf16: unknown flag; use --mixed_precision bf16",
        "  --save_steps: unknown flag; use --checkpointing_steps",
        "  --eval_strategy: unknown flag; use --eval_steps",
        "  --overwrite_output_dir: unknown flag; remove it: runs do not overwrite each other; use another --output_dir",
        "  --learning_rat: unknown flag; did you mean --learning_rate?",
    ]


@pytest.mark.parametrize(
    ("words", "engine", "file"),
    [
        (["--deepspeed", "ds.json"], "DeepSpeed", "zero2.yaml"),
        (["--fsdp", "full_shard auto_wrap"], "FSDP", "fsdp2.yaml"),
        (["--fsdp-config=fsdp.json"], "FSDP", "fsdp2.yaml"),
    ],
)
def test_flags_of_trainer_for_engines_are_answered_with_a_launch_file(
    words: list[str], engine: str, file: str, folder: Path
) -> None:
    _, problem = problems_of("--train_dir", folder, *words).splitlines()
    assert f"the launch file selects {engine}: accelerate launch --config_file accelerate_configs/{file} " in problem
    assert (ROOT / "accelerate_configs" / file).is_file()
    assert "lora_dist.launch_files" in problem


def test_a_flag_of_trainer_for_ddp_is_answered(folder: Path) -> None:
    message = problems_of("--train_dir", folder, "--ddp_find_unused_parameters", "false")
    assert "--ddp_find_unused_parameters: unknown flag; remove it: every update computes a gradient of" in message


def test_every_replacement_of_a_foreign_flag_is_a_flag() -> None:
    known = cli.flat_fields(Settings)
    replacements = [*trainer_flags.RENAMED.values(), *trainer_flags.OF_TIMM.values()]
    assert {name.split()[0] for name in replacements} <= known.keys()
    tables = trainer_flags.RENAMED, trainer_flags.OF_TIMM, trainer_flags.UNNECESSARY, trainer_flags.LAUNCH_FILES
    foreign = [name for table in tables for name in table]
    assert len(foreign) == len(set(foreign))
    assert not set(foreign) & known.keys()


def test_foreign_flags_are_answered_with_what_they_mean_and_not_with_the_nearest_name(folder: Path) -> None:
    """--eval_delay is near --ema_decay, --sched near --seed, --reprob near --probe."""
    message = problems_of(
        *flags(train_dir=folder, eval_delay=2, greater_is_better="true", hub_token="hf_x"),
        *("--sched", "cosine", "--reprob", 0.25, "--workers", 4, "--checkpoint-hist", 3),
    )
    assert message.splitlines()[1:] == [
        "  --eval_delay: unknown flag; remove it: --eval_steps says when to evaluate",
        "  --greater_is_better: unknown flag; remove it: --metric_for_best_model knows which values are better",
        "  --hub_token: unknown flag; remove it: run `hf auth login`, or set HF_TOKEN",
        "  --sched: unknown flag; use --lr_scheduler_type",
        "  --reprob: unknown flag; use --random_erasing",
        "  --workers: unknown flag; use --dataloader_num_workers",
        "  --checkpoint_hist: unknown flag; use --save_total_limit",
    ]


def test_hidden_folders_of_the_data_may_have_outputs(folder: Path) -> None:
    """They become no classes, and their files no images."""
    hidden = {"output_dir": f"{folder}/.runs/1", "cache_dir": f"{folder}/rose/.cache"}
    assert parse("--train_dir", folder, *flags(**hidden)).run.output_dir == hidden["output_dir"]
    with pytest.raises(UserError, match="would become part of the data"):
        parse("--train_dir", folder, "--output_dir", f"{folder}/runs/.1/../2")


def test_values_of_trainer_are_understood(folder: Path) -> None:
    told = *flags(train_dir=folder), "--metric_for_best_model", "eval_loss", "--resume_from_checkpoint", "True"
    settings = parse(*told)
    assert settings.optimization.metric_for_best_model == "loss"
    assert settings.run.resume_from_checkpoint == "auto"
    assert parse(*told, "--resume_from_checkpoint", "false").run.resume_from_checkpoint is None
    assert parse(*told, "--resume_from_checkpoint", "runs/x").run.resume_from_checkpoint == "runs/x"
    given = {"train_dir": folder, "resume_from_checkpoint": True}
    read = cli.from_keywords(Settings, None, given, prog="", contradictions=contradictions)
    assert read.run.resume_from_checkpoint == "auto"


def test_typical_slips_of_users_of_trainer_and_timm_are_answered(folder: Path) -> None:
    message = problems_of(
        *("run.yaml", "-b", 32, "--train_dir", folder, "--eval_steps", 0.1, "--train_batch_size", 8),
        *("--model-ema", "--input-size", 3, 224, 224, "--early_stopping_threshold", 0.1),
    )
    assert message.splitlines()[1:] == [
        "  run.yaml: value without a flag; did you mean --config run.yaml?",
        "  -b: unknown flag; use --per_device_train_batch_size",
        "  --train_batch_size: unknown flag; use --per_device_train_batch_size",
        "  --model_ema: unknown flag; use --ema_decay",
        "  --input_size: unknown flag; use --image_size",
        "  --early_stopping_threshold: unknown flag; remove it: every improvement counts",
        "  --eval_steps: '0.1' is not valid: expected a number of updates, epoch or no",
    ]


def test_every_problem_is_reported_at_once_with_the_nearest_name(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("learning_rat: 1\nlora_dropout: 2\n")
    message = problems_of(
        "--seed",
        *flags(config=file, lora_rank=3, train_dir=folder, dataset_name="x"),
        *flags(mixed_precision="fp8", warmup_steps=5, warmup_ratio=0.1),
    )
    for part in (
        "7 problems",
        "learning_rat: unknown setting",
        f"(in {file})",
        "did you mean --learning_rate?",
        "--lora_dropout: 2 is not valid",
        "--lora_rank: unknown flag; did you mean --lora_r?",
        "--seed: needs a value",
        "--train_dir, --dataset_name: two data sources",
        "--mixed_precision: 'fp8' is not valid",
        "--warmup_steps, --warmup_ratio",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "no data"),
        (["--train_dir", "/nowhere"], "no such directory: /nowhere"),
        (["--train_dir", "/tmp", "--exclude", "/nowhere.txt"], "--exclude: no such file: /nowhere.txt"),
        (["--train_dir", "/tmp", "--exclude", "/tmp"], "--exclude: no such file: /tmp"),
        (["--train_dir", "/tmp", "--class_weights", "w.yaml"], "--class_weights: no such file: w.yaml; the values are"),
        (["--dataset_name", "x", "--exclude", __file__], "only images in folders can be excluded"),
        (["--dataset_name", "x", "--validation_dir", "/tmp"], "--validation_split"),
        (["--train_dir", "/tmp", "--validation_dir", "/tmp/../tmp"], "--validation_dir, --train_dir: the same folder"),
        (["--train_dir", "/tmp", "--test_dir", "/tmp"], "--test_dir, --train_dir: the same folder"),
        (
            ["--train_dir", "/tmp", "--output_dir", "/tmp/x/run"],
            "--output_dir, --train_dir: /tmp/x/run would become part",
        ),
        (
            ["--train_dir", "/usr", "--test_dir", "/tmp", "--cache_dir", "/tmp/c"],
            "--cache_dir, --test_dir: /tmp/c would",
        ),
        (["--dataset_name", "x", "--validation_split", "train"], "--validation_split, --train_split: the same split"),
        (["--dataset_name", "x", "--do_eval_only"], "set --adapter_name_or_path"),
        (["--train_dir", "/tmp", "--streaming"], "folders cannot be streamed"),
        (["--dataset_name", "x", "--streaming"], "a stream cannot be held out"),
        ([*STREAM, "--max_train_samples", "9"], "use --max_train_steps"),
        ([*STREAM, "--train_split", "train[:9]"], "do not support slices or sums"),
        ([*STREAM, "--train_split", "train+more"], "do not support slices or sums"),
        (["--dataset_name", "x", "--streaming_lanes", "4"], "add --streaming"),
        (["--dataset_name", "x", "--init_from_config"], "--tuning full"),
        (["--dataset_name", "x", "--early_stopping_patience", "2", "--eval_steps", "no"], "needs evaluations"),
        (["--dataset_name", "x", "--layer_decay", "0.7", "--tuning", "head"], "its rate does not decay"),
        (["--dataset_name", "x", "--momentum", "0.8"], "adamw_torch does not use --momentum"),
        (["--dataset_name", "x", "--optim", "sgd", "--adam_beta1", "0.8"], "sgd does not use --adam_beta1"),
        (["--dataset_name", "x", "--train_norms", "--tuning", "full"], "norms train in addition to LoRA"),
        (["--dataset_name", "x", "--lora_rank_pattern", "fc1"], "expected NAME=N"),
        (["--dataset_name", "x", "--lora_rank_pattern", "fc1=0"], "greater than 0"),
        (["--dataset_name", "x", "--layers_to_transform", "last:0"], "is not valid: expected last:N, such as last:4"),
        (["--dataset_name", "x", "--report_to", "none"], "is not valid: TensorBoard is always written"),
        (["--dataset_name", "x", "--layers_to_transform", "first"], "--layers_to_transform: 'first' is not valid"),
        (["--dataset_name", "x", "--init_lora_weights", "orthogonal", "--lora_r", "3"], "and 3 is odd"),
        (["--dataset_name", "x", "stray"], "stray: value without a flag"),
        (["--config", "fod101"], "did you mean food101?"),
        (["--dataset_name", "x", "--checkpointing_steps", "0"], "--checkpointing_steps: '0' is not valid"),
        (["--dataset_name", "x", "--learning_rate", "nan"], "--learning_rate: 'nan' is not valid"),
    ],
)
def test_impossible_settings_say_how_to_resolve_them(argv: list[str], part: str) -> None:
    assert part in problems_of(*argv)


@pytest.mark.parametrize("content", ["- a list", "just text", "a: [1", "a: b: c", "\x00"])
def test_an_invalid_settings_file_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(content)
    assert str(file) in problems_of("--config", file)


@pytest.mark.parametrize("name", cli.recipe_names())
def test_every_packaged_recipe_parses_and_says_its_command(name: str) -> None:
    assert parse("--config", name).run.output_dir == f"runs/{name}"
    text = (cli.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"lora_dist.train --config {name}" in text


def test_settings_survive_a_round_trip_through_yaml(folder: Path, tmp_path: Path) -> None:
    more = ("--lora_rank_pattern", "fc1=2", "--layers_to_transform", "last:2", "--drop_path", 0.1, "--optim", "sgd")
    words = ("--eval_steps", 3, "--lora_target_modules", "a,b", "--mixed_precision=no", *more)
    settings = parse("--train_dir", folder, *words)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(cli.flatten(settings)))
    assert parse("--config", file) == settings


def test_mistakes_end_with_code_2_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom lora_dist.train import main\n"
        "try: main(['--nonsense'])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_dora", "true"], True),
        (["--use_dora=True"], True),
        (["--use_dora=false"], False),
        (["--use_dora", "no"], False),
        (["--use_dora", "--lora_r", "4"], True),
    ],
)
def test_a_boolean_may_have_a_value(words: list[str], expected: bool) -> None:
    assert parse("--dataset_name", "x", *words).lora.use_dora is expected


def test_the_last_of_two_equal_flags_counts_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    settings = parse("--dataset_name", "x", "--lora_r", 4, "--lora-r=8", "--seed", 1, "--seed", 1)
    assert settings.lora.lora_r == 8
    assert caplog.messages == ["--lora_r was given twice; the last value counts, 8"]


def test_another_configuration_file_is_refused() -> None:
    assert parse("--config", "demo", "--config", "demo").model.model_name_or_path == "demo:vit"
    assert "--config: given twice, and one file is read" in problems_of("--config", "demo", "--config", "food101")


def test_dashes_in_a_value_stay() -> None:
    assert parse("--dataset_name", "x", "--output-dir", "my-runs/a-b").run.output_dir == "my-runs/a-b"


def test_a_flag_overrides_a_wrong_value_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: x\nlora_r: many\n")
    assert parse("--config", file, "--lora_r", 4).lora.lora_r == 4


@pytest.mark.parametrize("text", ["lora_target_modules: query, value", "lora_target_modules:\n- query\n- value"])
def test_a_list_in_yaml_is_a_list_or_words_with_commas(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: x\n{text}\nmax_train_steps: null\n")
    settings = parse("--config", file)
    assert settings.lora.lora_target_modules == ["query", "value"]
    assert settings.optimization.max_train_steps is None


def test_patterns_and_blocks_have_a_flag_and_a_form_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: x\nlora_rank_pattern:\n  fc1: 32\n  q_proj: 4\nlayers_to_transform: [0, 3]\n")
    lora = parse("--config", file).lora
    flags_ = ("--lora_rank_pattern", "fc1=32, q_proj=4", "--layers_to_transform", "0,3")
    assert parse("--dataset_name", "x", *flags_).lora == lora
    assert (lora.lora_rank_pattern, lora.layers_to_transform) == ({"fc1": 32, "q_proj": 4}, [0, 3])
    assert parse("--dataset_name", "x", "--layers_to_transform", "last:4").lora.layers_to_transform == "last:4"
    assert parse("--dataset_name", "x", "--layers_to_transform", 7).lora.layers_to_transform == [7]


def test_yaml_no_is_an_interval_and_yes_is_not_the_interval_of_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: x\neval_steps: no\n")
    assert parse("--config", file).run.eval_steps == "no"
    file.write_text("dataset_name: x\neval_steps: 500.0\n")
    assert parse("--config", file).run.eval_steps == 500
    file.write_text("dataset_name: x\neval_steps: yes\n")
    assert "--eval_steps: True is not valid" in problems_of("--config", file)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lora_r", "4.5"], "--lora_r: '4.5' is not valid"),
        (["--lora_dropout", "1"], "--lora_dropout: '1' is not valid: Input should be less than 1"),
        (["--horizontal_flip", "nan"], "--horizontal_flip: 'nan' is not valid"),
        (["--learning_rate", "-1"], "--learning_rate: '-1' is not valid"),
        (["--seed", "4294967296"], "--seed: '4294967296' is not valid"),
        (["--tuning", "lor"], "--tuning: 'lor' is not valid: Input should be 'lora', 'head' or 'full'"),
        (["--lora_target_modules", ","], "--lora_target_modules: ',' is not valid"),
        (["--eval_steps", "sometimes"], "--eval_steps: 'sometimes' is not valid"),
        (["--learn", "1e-3"], "--learn: unknown flag"),
        (["-c", "demo"], "-c: unknown flag"),
        (["--config"], "--config: needs a path or a recipe: cars"),
        (["--early_stopping_patience", "many", "--eval_steps", "no"], "--early_stopping_patience: 'many' is not valid"),
        (["--init_from_config", "--tuning", "ful"], "--tuning: 'ful' is not valid"),
        (["--adapter_name_or_path", "y", "--tuning", "full"], "adapters continue as LoRA"),
        (["--adapter_name_or_path", "y", "--tuning", "head"], "adapters continue as LoRA"),
        (["--adapter_name_or_path", "y", "--init_lora_weights", "pissa"], "the adapter sets the initial weights"),
    ],
)
def test_a_wrong_setting_is_one_problem_by_name(words: list[str], part: str) -> None:
    message = problems_of("--dataset_name", "x", *words)
    assert message.startswith("1 problem with the settings of train\n")
    assert part in message


def test_a_missing_config_is_refused_with_the_names_of_recipes() -> None:
    assert "nowhere.yaml: no such file or recipe. Recipes: cars" in problems_of("--config", "nowhere.yaml")


def test_a_file_named_like_a_recipe_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text("dataset_name: x\nlora_r: 3\n")
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "demo").lora.lora_r == 3


def test_packaged_data_need_not_exist_as_a_path() -> None:
    assert parse("--train_dir", "demo:digits/train").data.train_dir == "demo:digits/train"


@pytest.mark.parametrize(
    ("module", "words", "parts"),
    [
        ("lora_dist.train", ["--lora_rank", "3"], ["2 problems", "--lora_rank: unknown flag", "no data"]),
        ("lora_dist.predict", ["--adaptr", "x", "--top_k", "0"], ["did you mean --adapter?", "--top_k: '0'"]),
        ("lora_dist.audit", ["--trian_dir", "x", "--max_aspect_ratio", "1"], ["did you mean --train_dir?", "'1'"]),
    ],
)
def test_a_command_ends_with_code_2_and_no_traceback(module: str, words: list[str], parts: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (
            "lora_dist.train",
            "--config demo --output_dir FILE",
            "--output_dir FILE: cannot write there (Not a directory)",
        ),
        (
            "lora_dist.train",
            "--config demo --do_eval_only --adapter_name_or_path x --output_dir FILE/run",
            "--output_dir FILE/run: cannot write there",
        ),
        (
            "lora_dist.predict",
            "--adapter x --images demo:digits --output FILE/p.csv",
            "--output FILE: cannot write there",
        ),
        ("lora_dist.predict", "--adapter x --merge_to FILE", "--merge_to FILE is not empty"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_before_torch_is_loaded(
    module: str, words: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("taken")
    code = (
        "import sys, importlib\n"
        "try: importlib.import_module(sys.argv[1]).main(sys.argv[2:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, module, *words.replace("FILE", str(file)).split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.replace("FILE", str(file)) in result.stderr
    assert result.stdout == "2 False\n"


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("lora_dist.train", Settings),
        ("lora_dist.predict", PredictSettings),
        ("lora_dist.audit", AuditSettings),
        ("lora_dist.bench", BenchSettings),
    ],
)
def test_help_is_quick_and_has_a_heading_for_each_group_and_a_line_for_each_setting(
    module: str, settings: type[BaseModel]
) -> None:
    """In time on a processor: what else the machine does is not counted."""
    seconds = []
    for _ in range(3):
        before = os.times()
        result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(seconds) < 1
    assert all(field.info.description for field in cli.flat_fields(settings).values())
    lines = result.stdout.splitlines()
    indices = []
    own_first = sorted(settings.model_fields, key=lambda name: name not in settings.__annotations__)
    for field in (settings.model_fields[name] for name in own_first):
        assert field.annotation is not None
        indices.append(lines.index(f"{(field.annotation.__doc__ or '').splitlines()[0]}:"))
        text = "\n".join(lines[indices[-1] :]).partition("\n\n")[0]
        assert all(re.search(rf"^  --{name} ", text, re.MULTILINE) for name in field.annotation.model_fields)
    assert indices == sorted(indices)


def test_long_choices_are_in_the_text_of_help() -> None:
    field = cli.flat_fields(Settings)["metric_for_best_model"]
    assert field.metavar() == "NAME"
    assert "One of accuracy, balanced_accuracy, top5_accuracy, mAP, micro_f1, macro_f1, loss." in field.help()
    assert cli.flat_fields(Settings)["tuning"].metavar() == "lora|head|full"
    classes = (Settings, PredictSettings, AuditSettings, BenchSettings)
    assert all(len(one.metavar()) <= 60 for kind in classes for one in cli.flat_fields(kind).values())


def test_a_flag_of_several_words_shows_one_of_them() -> None:
    fields = {name: field for kind in (SweepSettings, PredictSettings) for name, field in cli.flat_fields(kind).items()}
    shown = {name: field.metavar() for name, field in fields.items() if field.takes_several}
    assert shown == {
        "adapter": "ADAPTER", "weights": "X", "images": "FILE", "image_size": "N", "pixel_range": "X",
        "search": "NAME=RANGE",
    }  # fmt: skip


@pytest.mark.parametrize("name", cli.recipe_names())
def test_a_recipe_survives_a_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    settings = parse("--config", name)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(cli.flatten(settings)))
    assert parse("--config", file) == settings


@pytest.mark.parametrize(
    ("name", "word"),
    [("lora_r", "yes"), ("seed", "no"), ("learning_rate", "on"), ("max_train_steps", "true"), ("mixup_alpha", "off")],
)
def test_a_yes_or_no_in_yaml_is_not_a_number(name: str, word: str, tmp_path: Path) -> None:
    """Python's True is a 1, and pydantic takes it for one."""
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: x\n{name}: {word}\n")
    assert re.search(
        rf"--{name}: (True|False) is not valid: .* \(in {re.escape(str(file))}\)", problems_of("--config", file)
    )


@pytest.mark.parametrize(("word", "expected"), [("yes", True), ("off", False), ("'true'", True), ("1", True)])
def test_a_yes_or_no_in_yaml_is_a_boolean(word: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: x\nuse_dora: {word}\n")
    assert parse("--config", file).lora.use_dora is expected


def test_a_config_that_is_not_found_hides_no_other_mistake() -> None:
    message = problems_of("--config", "fod101", "--bogus", "1", "--lora_r", "x")
    for part in ("3 problems", "did you mean food101?", "--bogus: unknown flag", "--lora_r: 'x' is not valid"):
        assert part in message, part
    assert "no data" not in message


def test_a_stream_with_a_validation_split_is_no_contradiction() -> None:
    data = parse(*STREAM, "--streaming_lanes", 4, "--shuffle_buffer_size", 64).data
    assert (data.streaming, data.streaming_lanes, data.shuffle_buffer_size) == (True, 4, 64)


def test_pushing_to_the_hub_has_its_contradictions(folder: Path) -> None:
    assert not parse("--train_dir", folder).hub.push_to_hub
    settings = parse("--train_dir", folder, "--push_to_hub", "--hub_model_id", "ada/x", "--hub_private_repo")
    assert (settings.hub.hub_model_id, settings.hub.hub_private_repo) == ("ada/x", True)
    for lonely in (("--hub_model_id", "ada/x"), ("--hub_private_repo",)):
        assert "nothing is pushed: add --push_to_hub" in problems_of("--train_dir", folder, *lonely)
    evaluation = ("--do_eval_only", "--adapter_name_or_path", "x", "--validation_dir", folder)
    assert "evaluations have nothing to push" in problems_of(*evaluation, "--push_to_hub")


def test_a_token_is_not_a_setting_and_is_not_printed(folder: Path) -> None:
    said = problems_of("--train_dir", folder, "--push_to_hub", "--hub_token", "hf_secret0123456789")
    assert "--hub_token: unknown flag" in said
    assert "hf_secret" not in said


def test_a_stream_is_not_cached(folder: Path) -> None:
    assert parse("--train_dir", folder, "--cache_dir", "x").data.cache_dir == "x"
    assert "--streaming, --cache_dir: streams are not cached" in problems_of(*STREAM, "--cache_dir", "x")


def test_the_device_supports_only_crops_and_flips(folder: Path) -> None:
    assert parse("--train_dir", folder, "--augment_on_device").augmentation.augment_on_device
    for augmentation in ("none", "randaugment"):
        said = problems_of("--train_dir", folder, "--augment_on_device", "--augmentation", augmentation)
        assert "--augment_on_device, --augmentation: the device supports only crops and flips" in said


def test_pretrained_weights_trained_in_full_have_a_lower_default_rate() -> None:
    def rate(*flags: str) -> float:
        return parse("--train_dir", "/usr", *flags).with_default_learning_rate().optimization.learning_rate

    assert rate() == rate("--tuning", "head") == 5e-3
    assert rate("--tuning", "full") == 5e-5
    assert rate("--tuning", "full", "--learning_rate", "5e-3") == 5e-3
    assert rate("--tuning", "full", "--init_from_config", "true") == 5e-3


def test_a_key_that_is_set_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("# run\nlearning_rate: 0.1\nseed: 3\nlearning_rate: 0.2\n")
    with pytest.raises(UserError, match="learning_rate is set on line 2 and again on line 4"):
        parse("--config", str(tmp_path / "twice.yaml"))


@pytest.mark.parametrize("text", ["&a {b: *a}", "- &a [*a, {c: 1}]", "{a: {b: 1}, c: {b: 2}}", "1", ""])
def test_other_yaml_is_parsed(text: str) -> None:
    assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))


def test_settings_in_sections_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "nested.yaml").write_text("training:\n  learning_rate: 0.1\n  seed: 3\n")
    with pytest.raises(UserError, match="training: settings have no sections; move learning_rate, seed to the top"):
        parse("--config", str(tmp_path / "nested.yaml"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--transparent_background", "black"),
        ("--pixel_range", "0", "4095"),
        ("--image_size", "384"),
        ("--pooling", "mean"),
    ],
)
def test_an_evaluation_converts_images_as_the_model_records(flags: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"--do_eval_only, {flags[0]}: the model records how it was trained"):
        parse("--validation_dir", ".", "--do_eval_only", "true", "--adapter_name_or_path", "x", *flags)


def test_one_number_is_height_and_width(folder: Path, tmp_path: Path) -> None:
    assert parse("--train_dir", folder).model.input_size is None
    assert parse("--train_dir", folder, "--image_size", 384).model.input_size == (384, 384)
    assert parse("--train_dir", folder, "--image_size", 384, 512).model.input_size == (384, 512)
    for content in ("384", "[384, 384]"):
        file = tmp_path / "run.yaml"
        file.write_text(f"train_dir: {folder}\nimage_size: {content}\n")
        assert parse("--config", file).model.input_size == (384, 384)
    for wrong in (("0",), ("x",), (), ("1", "2", "3")):
        assert "--image_size" in problems_of("--train_dir", folder, "--image_size", *wrong)


def test_other_channels_than_rgb_are_refused_in_a_sentence(folder: Path) -> None:
    assert "models see RGB images" in problems_of("--train_dir", folder, "--num_channels", 1)


def test_the_batch_size_of_evaluations_has_a_default_unless_given() -> None:
    sizes = [
        parse("--train_dir", "/usr", *flags).with_default_eval_batch_size(8).optimization.per_device_eval_batch_size
        for flags in ((), ("--per_device_eval_batch_size", "64"), ("--per_device_train_batch_size", "64"))
    ]
    assert sizes == [8, 64, 8]
