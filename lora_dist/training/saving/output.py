"""The layout of a run's output directory, and checks that no run overwrites another."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from torch import nn

from lora_dist.errors import UserError
from lora_dist.metrics.predictions import FILE
from lora_dist.model.lora import adapters
from lora_dist.processes.run_lock import LOCK
from lora_dist.storage.atomic import replace_file, unused, whole_directory
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MEASURED_BY = (
    "validation_dir", "validation_split", "max_eval_samples", "metric_for_best_model", "test_dir", "test_split",
    "slice_columns",
)  # fmt: skip
"""Settings that also apply when a finished run is resumed, because they affect only selection and evaluation."""


class Output:
    """Paths in a run's `output_dir`.

    Attributes:
        root: this directory.
        checkpoints: checkpoints to resume from.
        adapter: the result of `--tuning lora` and `head`.
        adapter_init: the adapter before training, if its initialization changes the base weights (PiSSA).
        model: the result of `--tuning full`.
        outbox: files waiting to be pushed to the Hub; deleted at the end of the run.
        save_request: file that requests a checkpoint if it exists.
        config: the settings of the run, which `--config` can read.
        split: the rows of the data that train, and those that validate.
        results: final metrics and the record of the run.
        evaluation: report by class and confusion matrix.
        predictions: the prediction of the result for each validation image.
        probe: accuracies of a linear probe and of nearest neighbours before training.
        metrics: the logged metrics as JSON lines.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.adapter_init = root / "adapter_init"
        self.model = root / "model"
        self.outbox = root / "outbox"
        self.save_request = root / "SAVE"
        self.config = root / "config.yaml"
        self.split = root / "split.json"
        self.results = root / "all_results.json"
        self.evaluation = root / "evaluation.json"
        self.predictions = root / FILE
        self.probe = root / "probe.json"
        self.metrics = root / "metrics.jsonl"

    def results_found(self) -> list[Path]:
        """Returns the existing results of a finished run."""
        found = (self.adapter, self.model, self.results, self.evaluation, self.predictions)
        return [path for path in found if path.exists()]

    def begin(
        self,
        settings: Mapping[str, Any],
        splits: Mapping[str, Any],
        model: nn.Module,
        step: int,
        is_over: bool,
        origin: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Writes the settings and splits of a run, and logs which settings changed since it was interrupted.

        Moves checkpoints and results of later updates to `abandoned-…`.

        Args:
            settings: all settings, by flat name.
            splits: which samples train and which validate.
            model: the model before further training.
            step: updates done.
            is_over: whether no update is left.
            origin: settings of the run whose checkpoint is resumed, for a new directory.

        Returns:
            The settings that produce the result, by flat name. For a run with no update left: the saved settings,
            except those in `MEASURED_BY`.

        Raises:
            UserError: the initial adapter, without which the run cannot be finished, is missing; or results cannot be
                moved.
        """
        if adapters.mutates_base(model) and not self.adapter_init.exists() and step:
            raise UserError(
                f"{self.adapter_init} is missing, and the trained adapter cannot be converted without it: copy it from "
                f"the directory of the run that is resumed"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        used = {name: value for name, value in settings.items() if name != "resume_from_checkpoint"}
        before = dict(read_settings(self.config))
        if not before:
            before = {name: value for name, value in origin.items() if name != "output_dir"}
        finished = bool(before) and is_over
        measured_by = [name for name in MEASURED_BY if name in before and before[name] != used.get(name)]
        if self._results_are_beyond(step):
            self._abandon_results(f"from after update {step}")
        elif measured_by:
            self._abandon_results(f"selected and measured by another --{measured_by[0]}")
        checkpoint.abandon_after(self.checkpoints, step)
        for name, value in used.items():
            if before.get(name, value) != value:
                note = "; ignored, because no update is left" if finished and name not in MEASURED_BY else ""
                was, now = ("not set" if one is None else one for one in (before[name], value))
                logger.warning("--%s was %s when the run began and is now %s%s", name, was, now, note)
        lines = "# The settings of this run; to run it again: --config THIS_FILE --output_dir ANOTHER_DIRECTORY\n"
        kept = {name: value for name, value in before.items() if name not in MEASURED_BY}
        made_with = used | kept if finished else used
        _replace(self.config, lines + yaml.safe_dump(made_with, sort_keys=False, allow_unicode=True))
        _replace(self.split, _as_json(splits))
        if adapters.mutates_base(model) and step == 0:
            with whole_directory(self.adapter_init) as aside:
                adapters.save_adapter(model, aside)
        return made_with

    def _abandon_results(self, reason: str) -> None:
        """Moves results to `abandoned-results`, with their settings and metrics."""
        found = self.results_found()
        if not found:
            return
        aside = unused(self.root / "abandoned-results")
        logger.warning("the results in %s are %s: moved to %s", self.root, reason, aside)
        try:
            with whole_directory(aside) as copies:
                for path in (self.config, self.split, self.metrics):
                    if path.is_file():
                        shutil.copy2(path, copies)
            for path in found:
                path.rename(aside / path.name)
        except OSError as error:
            raise UserError(f"cannot move the results in {self.root}: {error.strerror or error}") from error

    def _results_are_beyond(self, step: int) -> bool:
        """Whether the results are from after update `step`; if they do not record it, whether a checkpoint is."""
        try:
            return int(json.loads(self.results.read_text(encoding="utf-8"))["step"]) > step
        except (OSError, ValueError, KeyError, TypeError):
            return bool(checkpoint.listed_after(self.checkpoints, step))


def require_empty(root: Path) -> None:
    """Raises `UserError` if the directory of a run has files of another run."""
    if _is_in_use(root):
        raise UserError(
            f"--output_dir {root} is not empty. Resume its run with --resume_from_checkpoint auto, or choose another "
            f"directory."
        )


def _is_in_use(root: Path) -> bool:
    return root.exists() and (not root.is_dir() or any(entry.name != LOCK for entry in root.iterdir()))


def find_resume(output: Output, resume_from_checkpoint: str | None) -> Checkpoint | None:
    """Returns the checkpoint to resume from, or None to start from scratch.

    Raises:
        UserError: the run would overwrite files of another run, or the given checkpoint is damaged.
    """
    if resume_from_checkpoint == "auto":
        return _find_newest(output)
    if resume_from_checkpoint is None:
        require_empty(output.root)
        return None
    root, path = output.root, Path(resume_from_checkpoint)
    content = checkpoint.read(path)
    if _is_in_use(root) and path.resolve().parent != output.checkpoints.resolve():
        raise UserError(
            f"{path} is not a checkpoint of the run in --output_dir {root}, which is not empty. Resume the run in "
            f"that directory with --resume_from_checkpoint auto, or choose an empty --output_dir to resume "
            f"from this checkpoint."
        )
    return content


def _find_newest(output: Output) -> Checkpoint | None:
    """Returns the newest complete checkpoint; None for a new run.

    Raises:
        UserError: there are results, or damaged checkpoints, but no complete one.
    """
    newest = checkpoint.read_newest(output.checkpoints)
    if newest is not None:
        path, content = newest
        logger.info("resuming from %s", path)
        return content
    if found := output.results_found():
        raise UserError(
            f"{output.root} holds results ({', '.join(path.name for path in found)}) but no complete checkpoint to "
            f"resume from. Starting from scratch would overwrite them: move them, or choose another --output_dir."
        )
    logger.info("no complete checkpoint in %s: starting from scratch", output.checkpoints)
    return None


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinity with None, because JSON has neither."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_settings(path: Path) -> Mapping[str, Any]:
    """Reads the flat settings that a run saved; empty if there are none or they cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("cannot read %s, so changed settings are not reported: %s", path, error)
        return {}
    if isinstance(found, Mapping):
        return found
    logger.warning("cannot read %s, so changed settings are not reported: it is not a mapping", path)
    return {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that people may read as well."""
    path.write_text(_as_json(content), encoding="utf-8")


def _replace(path: Path, content: str) -> None:
    """Writes a file that a run does not depend on; an error is only logged."""
    try:
        replace_file(path, content.encode())
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error.strerror or error)
