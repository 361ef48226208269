"""Trackers besides TensorBoard, such as W&B and MLflow (`--report_to`), through the classes of accelerate."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from lora_dist.errors import UserError
from lora_dist.storage.atomic import replace_file

logger = logging.getLogger(__name__)

PROJECT = "lora_dist"
"""Name of the project or experiment in which runs appear."""
_RUN_IDS = "tracker_runs.json"
"""File of a run's directory: the id of its run in each tracker that can resume one."""


def require_trackers(names: Sequence[str]) -> None:
    """Raises a `UserError` that says what to install unless all these trackers are installed."""
    missing = [name for name in names if name not in map(str, get_available_trackers())]
    if missing:
        packages = " ".join("comet-ml" if name == "comet_ml" else name for name in missing)
        raise UserError(f"--report_to {','.join(missing)}: not installed; pip install {packages}")


class ExternalTrackers:
    """Sends curves and pictures to other trackers. One that fails is logged and not called again."""

    def __init__(self, names: Sequence[str], output_dir: Path, resumes: bool, settings: Mapping[str, Any]) -> None:
        """Starts the trackers.

        Args:
            names: of accelerate; `tensorboard` is written elsewhere and is skipped here.
            output_dir: of the run, whose name the runs get.
            resumes: whether to continue the runs that are recorded in `output_dir`.
            settings: by flat name.

        Raises:
            UserError: a tracker does not start, for example because nobody is logged in.
        """
        self._trackers: dict[str, GeneralTracker] = {}
        ids = _read_ids(output_dir / _RUN_IDS) if resumes else {}
        for name in names:
            if name == "tensorboard":
                continue
            try:
                self._trackers[name] = _start(name, output_dir, ids.get(name))
            except (Exception, SystemExit) as error:
                raise UserError(f"--report_to {name}: cannot start it: {error}") from error
        started = {name: _run_id(name, tracker) for name, tracker in self._trackers.items()}
        if started:
            output_dir.mkdir(parents=True, exist_ok=True)
            replace_file(output_dir / _RUN_IDS, json.dumps({name: id for name, id in started.items() if id}).encode())
        # MLflow refuses to change the parameters of a run; trackio forgets them when it resumes one.
        told = [name for name in self._trackers if name == "trackio" or name not in ids]
        self._call(lambda tracker: tracker.store_init_configuration(dict(settings)), told)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers, without those that are not finite, which some trackers refuse."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._call(lambda tracker: tracker.log(finite, step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Logs a picture to the trackers that take pictures."""
        able = [key for key, tracker in self._trackers.items() if hasattr(tracker, "log_images")]
        self._call(lambda tracker: tracker.log_images({name: [image]}, step=step), able)

    def close(self) -> None:
        """Ends the runs in the trackers."""
        self._call(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _call(self, call: Callable[[Any], object], names: Sequence[str] | None = None) -> None:
        for name in list(self._trackers if names is None else names):
            try:
                call(self._trackers[name])
            except Exception as error:
                logger.error("%s failed and gets nothing more from this run: %s", name, error)
                del self._trackers[name]


def _start(name: str, output_dir: Path, run_id: str | None) -> GeneralTracker:
    run_name = output_dir.resolve().name
    if name == "wandb":
        resume = {"id": run_id, "resume": "allow"} if run_id else {}
        options: dict[str, Any] = {"name": run_name, "dir": str(output_dir), **resume}
        output_dir.mkdir(parents=True, exist_ok=True)
        tracker = LOGGER_TYPE_TO_CLASS[name](os.environ.get("WANDB_PROJECT", PROJECT), **options)
    elif name == "mlflow":
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, run_id=run_id, run_name=run_name)
    elif name == "trackio":
        # It finds a run by its name alone, and other directories may have the same name.
        own = run_id or f"{run_name}-{uuid4().hex[:8]}"
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=own, resume="allow")
    elif LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, logging_dir=str(output_dir))
    else:
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT)
    tracker.start()
    return tracker


def _run_id(name: str, tracker: GeneralTracker) -> str | None:
    """Returns the id with which a later process continues this run, if the tracker has one."""
    if name == "wandb":
        return str(tracker.tracker.id)
    if name == "trackio":
        return str(tracker.tracker.name)
    return str(tracker.tracker.info.run_id) if name == "mlflow" else None


def _read_ids(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
