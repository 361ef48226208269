"""What a sweep searches: ranges and choices in the words of a command line, checked like the settings themselves."""

from pathlib import Path

import pytest
from lora_dist_testing.launching import flags

from lora_dist.errors import UserError
from lora_dist.settings.cli import parse
from lora_dist.settings.sweep import (
    Axis,
    SweepSettings,
    as_given,
    axes_of,
    contradictions,
    given_settings,
    with_alpha,
    with_values,
)


def _parsed(*search: str, **settings: object) -> SweepSettings:
    words = flags(**{"config": "demo"} | settings) + (["--search", *search] if search else [])
    return parse(SweepSettings, words, prog="lora_dist.sweep", description="", contradictions=contradictions)


def test_ranges_and_choices_have_the_type_of_their_setting() -> None:
    settings = _parsed(
        "learning_rate=log:1e-4..1e-2",
        "lora-r=4..32",
        "lora_dropout=0..0.5",
        "optim=sgd,adamw_torch",
        "use_rslora=true,false",
        "model_name_or_path=../vit,demo:vit",
    )
    assert axes_of(settings) == [
        Axis("learning_rate", low=1e-4, high=1e-2, log=True),
        Axis("lora_r", low=4, high=32),
        Axis("lora_dropout", low=0.0, high=0.5),
        Axis("optim", choices=("sgd", "adamw_torch")),
        Axis("use_rslora", choices=("true", "false")),
        Axis("model_name_or_path", choices=("../vit", "demo:vit")),
    ]
    assert [type(axis.low) for axis in axes_of(settings)[1:3]] == [int, float]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("learning_rat=log:1e-4..1e-2", "learning_rat: unknown setting; did you mean --learning_rate?"),
        ("lr=log:1e-4..1e-2", "lr: unknown setting; use --learning_rate"),
        ("learning_rate", "learning_rate: expected NAME=LOW..HIGH, NAME=log:LOW..HIGH or NAME=VALUE,VALUE"),
        ("learning_rate=1e-2..1e-4", "learning_rate=1e-2..1e-4: a range is two ascending numbers"),
        ("weight_decay=log:0..1", "weight_decay=log:0..1: a logarithmic range begins above 0"),
        ("learning_rate=0..1", "learning_rate=0: Input should be greater than 0"),
        ("learning_rate=1e-5:1e-3", "unable to parse string as a number; a range is LOW..HIGH"),
        ("lora_r=4,many", "lora_r=many: Input should be a valid integer"),
        ("lora_r=1.5..4", "lora_r=1.5: Input should be a valid integer"),
        ("lora_alpha=8..inf", "lora_alpha=inf: Input should be a valid integer"),
        ("optim=a..b", "optim=a..b: Input should be 'adamw_torch' or 'sgd'"),
        ("seed=1,2", "seed decides what is measured or written, which is the same in all trials"),
        ("fold=1/5,2/5", "fold decides what is measured or written"),
        ("momentum=0.5..0.9", "--search, --momentum, --optim: with momentum 0.5: adamw_torch does not use --momentum"),
    ],
)
def test_what_cannot_be_searched_is_refused(search: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        _parsed(search)
    assert message in str(refused.value)


def test_a_setting_is_searched_once() -> None:
    with pytest.raises(UserError, match="--search: lora_r is there twice"):
        _parsed("lora_r=4,8", "lora_r=1..2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dry_run": True}, "--dry_run: a sweep trains"),
        ({"resume_from_checkpoint": "auto"}, "--resume_from_checkpoint: the same command continues a sweep"),
        ({"push_to_hub": True}, "--push_to_hub: a sweep pushes nothing"),
        ({"eval_steps": "no"}, "--eval_steps, --pruner: nothing is evaluated to prune by: add --pruner none"),
    ],
)
def test_what_a_sweep_does_not_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        _parsed(**settings)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["learning_rate", "head_learning_rate", "weight_decay", "lora_r", "lora_dropout"]),
        ({"adapter_name_or_path": "a"}, ["learning_rate", "head_learning_rate", "weight_decay"]),
        ({"tuning": "head"}, ["learning_rate", "weight_decay"]),
        ({"tuning": "full"}, ["learning_rate", "head_learning_rate", "weight_decay"]),
    ],
)
def test_each_tuning_has_ranges_of_its_own(settings: dict[str, object], names: list[str]) -> None:
    assert [axis.name for axis in axes_of(_parsed(**settings))] == names


def test_alpha_keeps_its_ratio_to_the_rank() -> None:
    settings = _parsed(lora_r=8, lora_alpha=16)
    assert with_alpha(settings, {"lora_r": "4"}) == {"lora_r": "4", "lora_alpha": 8}
    assert with_alpha(settings, {"lora_r": 3, "lora_alpha": 5}) == {"lora_r": 3, "lora_alpha": 5}
    assert with_alpha(settings, {"lora_r": 4, "use_rslora": "true"}) == {"lora_r": 4, "use_rslora": "true"}
    assert with_alpha(settings, {"learning_rate": 0.1}) == {"learning_rate": 0.1}


def test_the_settings_as_given_are_a_point_of_the_search_if_they_lie_in_its_ranges() -> None:
    settings = _parsed()
    rates = {"learning_rate": 8e-3, "head_learning_rate": 8e-3}
    assert as_given(settings, axes_of(settings)) == {**rates, "weight_decay": "0", "lora_r": "16", "lora_dropout": 0.1}
    for outside in (_parsed(learning_rate=1), _parsed(lora_r=5)):
        assert as_given(outside, axes_of(outside)) is None


def test_full_training_begins_at_its_own_learning_rate() -> None:
    settings = _parsed("learning_rate=log:1e-6..1e-3", config=None, train_dir="demo:digits/train", tuning="full")
    assert as_given(settings, axes_of(settings)) == {"learning_rate": 5e-5}


def test_a_trial_has_the_settings_that_were_given_and_its_values() -> None:
    settings = _parsed("lora_r=4,8", learning_rate="1e-3", output_dir="runs/x")
    given = given_settings(settings)
    assert given["learning_rate"] == 1e-3
    assert given["train_dir"] == "demo:digits/train"
    assert not {"output_dir", "search", "lora_r"} & given.keys()
    trained = with_values(settings, {"lora_r": "4"})
    assert (trained.lora.lora_r, trained.optimization.learning_rate, trained.run.output_dir) == (4, 1e-3, "runs/x")
    assert "weight_decay" not in trained.optimization.model_fields_set


def test_words_of_a_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("train_dir: demo:digits/train\nsearch:\n- lora_r=4,8\n- learning_rate=log:1e-4..1e-2\ntrials: 3\n")
    settings = _parsed(config=file)
    assert [axis.name for axis in axes_of(settings)] == ["lora_r", "learning_rate"]
    assert settings.sweep.trials == 3
