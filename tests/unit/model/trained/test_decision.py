"""What becomes of logits: the most likely class, or the labels above their thresholds."""

import json
import logging
from pathlib import Path

import pytest
import torch
from lora_dist_testing.edits import edit_json
from lora_dist_testing.tiny import write_bundle

from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import load_weighted_sum
from lora_dist.model.trained.bundle import read_decision
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.decision import AboveThresholds, MostLikely, decision_of, mean_decision

LABELS = ["a", "b", "c"]


def test_the_labels_at_or_above_their_thresholds_come_with_the_highest_score_first() -> None:
    decision = AboveThresholds((0.5, 0.25, 0.9))
    scores = torch.tensor([[0.5, 0.7, 0.89], [0.1, 0.2, 0.3], [0.9, 0.9, 0.9]])
    assert decision.chosen(scores) == [[1, 0], [], [0, 1, 2]]
    logits = torch.tensor([[0.0, 3.0]])
    assert decision.scores(logits).tolist() == [[0.5, pytest.approx(0.95257, abs=1e-5)]]
    assert MostLikely().scores(logits).sum() == pytest.approx(1)
    assert MostLikely().chosen(scores) is None


def test_a_record_gives_the_thresholds_back_exactly() -> None:
    decision = AboveThresholds((float(torch.tensor(0.1)), 0.5, 1 / 3))
    assert decision_of("multi_label_classification", decision.record(LABELS), LABELS) == decision
    assert decision_of("multi_label_classification", None, LABELS) == AboveThresholds((0.5, 0.5, 0.5))
    for problem_type in (None, "single_label_classification", "regression"):
        assert decision_of(problem_type, None, LABELS) == MostLikely()
    for record, message in (({"a": 0.1}, "other labels"), ({"a": 1, "b": "x", "c": 1}, "not a number")):
        with pytest.raises(UserError, match=message):
            decision_of("multi_label_classification", record, LABELS)


def test_a_weighted_sum_has_the_mean_of_the_thresholds_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    one, other = AboveThresholds((0.2, 0.4)), AboveThresholds((0.6, 0.4))
    assert mean_decision([one], [1.0]) is one
    assert mean_decision([MostLikely(), MostLikely()], [0.5, 0.5]) == MostLikely()
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        found = mean_decision([one, other], [0.75, 0.25])
    assert found == AboveThresholds((pytest.approx(0.3), pytest.approx(0.4)))  # type: ignore[arg-type]
    assert "may not suit it" in caplog.text


def test_bundles_keep_their_problem_type(vit: Path, tmp_path: Path) -> None:
    """One of an older release has one class per image; thresholds may be edited."""
    for name in ("one", "several"):
        write_bundle(tmp_path / name, vit, LABELS)
    assert load_classifier(tmp_path / "one").decision == MostLikely()
    config = tmp_path / "several" / "config.json"
    assert json.loads(config.read_text())["problem_type"] == "single_label_classification"
    edit_json(config, problem_type="multi_label_classification")
    (tmp_path / "several" / "thresholds.json").write_text('{"c": 0.3, "a": 0.1, "b": 0.2}')
    classifier = load_classifier(tmp_path / "several")
    assert classifier.decision == AboveThresholds((0.1, 0.2, 0.3))
    assert classifier.model.config.problem_type == "multi_label_classification"
    with pytest.raises(UserError, match="have different problem types"):
        load_weighted_sum({"one": tmp_path / "one", "several": tmp_path / "several"}, [0.5, 0.5])
    (tmp_path / "several" / "thresholds.json").write_text('{"c": 0.3}')
    with pytest.raises(UserError, match=r"thresholds\.json is damaged: the thresholds are those of other labels"):
        read_decision(tmp_path / "several", LABELS)
