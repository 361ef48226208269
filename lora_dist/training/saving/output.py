"""The directory of a run: what stands where, and that no run overwrites another."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lora_dist.errors import UserError
from lora_dist.model import adapters
from lora_dist.processes.run_lock import LOCK
from lora_dist.storage.files import replace_file, unused, whole_directory
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

MEASURED_BY = ("validation_dir", "validation_split", "max_eval_samples", "metric_for_best_model")
"""Settings that count for a run with no update left as well: they decide how its result is chosen and evaluated."""


@dataclass(frozen=True)
class Output:
    """Paths in a run's `output_dir`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """What a run needs to go on."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result of `--tuning lora` and `head`."""
        return self.root / "adapter"

    @property
    def adapter_init(self) -> Path:
        """The adapter before training, where it was taken out of the base (PiSSA)."""
        return self.root / "adapter_init"

    @property
    def model(self) -> Path:
        """The result of `--tuning full`."""
        return self.root / "model"

    @property
    def outbox(self) -> Path:
        """Bundles on their way to the Hub; gone at the end."""
        return self.root / "outbox"

    @property
    def save_request(self) -> Path:
        """Asks a run for a checkpoint by being there."""
        return self.root / "SAVE"

    @property
    def config(self) -> Path:
        """The settings as used, for `--config`."""
        return self.root / "config.yaml"

    @property
    def split(self) -> Path:
        """Which rows of the data train and which validate."""
        return self.root / "split.json"

    @property
    def results(self) -> Path:
        """Final metrics and the record of the run."""
        return self.root / "all_results.json"

    @property
    def evaluation(self) -> Path:
        """Report by class and confusion matrix."""
        return self.root / "evaluation.json"

    @property
    def metrics(self) -> Path:
        """The curves as JSON lines."""
        return self.root / "metrics.jsonl"

    def results_found(self) -> list[Path]:
        """What a run has left at its end."""
        return [path for path in (self.adapter, self.model, self.results, self.evaluation) if path.exists()]

    def begin(
        self, settings: Mapping[str, Any], splits: Mapping[str, Any], model: nn.Module, step: int, total_steps: int
    ) -> dict[str, Any]:
        """Writes down what a run starts from, after saying which settings changed since it was interrupted.

        Checkpoints and results of later updates are put aside.

        Args:
            settings: flat.
            splits: which samples train and which validate.
            model: as it stands.
            step: updates done.
            total_steps: updates in the whole run.

        Returns:
            What the result is made with, flat: of a run with no update left, what was written down before, but for
            what it is evaluated by.

        Raises:
            UserError: the run cannot be finished, because what its adapter started from is gone; or results cannot be
                put aside.
        """
        if adapters.mutates_base(model) and not self.adapter_init.exists() and step:
            raise UserError(f"{self.adapter_init} is gone, and without it the trained adapter cannot be converted")
        self.root.mkdir(parents=True, exist_ok=True)
        self._abandon_results_after(step)
        checkpoint.abandon_after(self.checkpoints, step)
        used = {name: value for name, value in settings.items() if name != "resume_from_checkpoint"}
        before = dict(read_settings(self.config))
        finished = bool(before) and step >= total_steps
        for name, value in used.items():
            if before.get(name, value) != value:
                note = ", with no update left to make" if finished and name not in MEASURED_BY else ""
                logger.warning("--%s was %s when the run began and is now %s%s", name, before[name], value, note)
        lines = "# The settings of this run; to run it again: --config THIS_FILE --output_dir ANOTHER_DIRECTORY\n"
        kept = {name: value for name, value in before.items() if name not in MEASURED_BY}
        made_with = used | kept if finished else used
        _replace(self.config, lines + yaml.safe_dump(made_with, sort_keys=False, allow_unicode=True))
        _replace(self.split, _as_json(splits))
        if adapters.mutates_base(model) and step == 0:
            with whole_directory(self.adapter_init) as aside:
                adapters.save_adapter(model, aside)
        return made_with

    def _abandon_results_after(self, step: int) -> None:
        """Puts aside the results of a run that had made more than `step` updates, with its settings and metrics."""
        found = self.results_found()
        if not found or not self._results_are_beyond(step):
            return
        aside = unused(self.root / "abandoned-results")
        logger.warning("the results in %s are of a run beyond update %d: put aside in %s", self.root, step, aside)
        try:
            with whole_directory(aside) as copies:
                for path in (self.config, self.split, self.metrics):
                    if path.is_file():
                        shutil.copy2(path, copies)
            for path in found:
                path.rename(aside / path.name)
        except OSError as error:
            raise UserError(f"cannot put aside the results in {self.root}: {error.strerror or error}") from error

    def _results_are_beyond(self, step: int) -> bool:
        """Whether the results are of more than `step` updates; where they do not say, whether a checkpoint is."""
        try:
            return int(json.loads(self.results.read_text(encoding="utf-8"))["step"]) > step
        except (OSError, ValueError, KeyError, TypeError):
            return bool(checkpoint.listed_after(self.checkpoints, step))


def find_resume(output: Output, resume_from_checkpoint: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a run from scratch.

    Raises:
        UserError: the run would overwrite files of another one, or the checkpoint named is damaged.
    """
    root = output.root
    if resume_from_checkpoint == "auto":
        return _find_newest(output)
    in_use = root.exists() and (not root.is_dir() or any(entry.name != LOCK for entry in root.iterdir()))
    if resume_from_checkpoint is None:
        if in_use:
            raise UserError(
                f"--output_dir {root} is not empty. Go on with the run in it by --resume_from_checkpoint auto, or name "
                f"another directory."
            )
        return None
    path = Path(resume_from_checkpoint)
    content = checkpoint.read(path)
    if in_use and path.resolve().parent != output.checkpoints.resolve():
        raise UserError(
            f"{path} is no checkpoint of the run in --output_dir {root}, which is not empty. Go on with the run in "
            f"that directory by --resume_from_checkpoint auto, or name another --output_dir for the run that goes on "
            f"from the checkpoint."
        )
    return content


def _find_newest(output: Output) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None where there is none, and no result either."""
    newest = checkpoint.read_newest(output.checkpoints)
    if newest is not None:
        path, content = newest
        logger.info("resuming from %s", path)
        return content
    if found := output.results_found():
        raise UserError(
            f"{output.root} holds results ({', '.join(path.name for path in found)}) but no whole checkpoint to go on "
            f"from. A start from scratch would overwrite them: move them away, or name another --output_dir."
        )
    logger.info("no complete checkpoint in %s: starting from scratch", output.checkpoints)
    return None


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """The same for JSON, which has neither NaN nor infinity: a number that could not be computed is null."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_settings(path: Path) -> Mapping[str, Any]:
    """The flat settings that a run has written down, if it has and they can be read."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("cannot read %s, so nobody knows which settings have changed: %s", path, error)
        return {}
    if isinstance(found, Mapping):
        return found
    logger.warning("cannot read %s, so nobody knows which settings have changed: it is no mapping", path)
    return {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that people may read as well."""
    path.write_text(_as_json(content), encoding="utf-8")


def _replace(path: Path, content: str) -> None:
    """Writes what a run can go on without."""
    try:
        replace_file(path, content.encode())
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error.strerror or error)
