"""Tracks the metrics of a run: TensorBoard, other trackers, JSON lines and a progress bar, from one process."""

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lora_dist.processes.lifetime import at_end
from lora_dist.training.reporting.curve_files import EventFile, JsonLines
from lora_dist.training.reporting.external_trackers import ExternalTrackers
from lora_dist.training.reporting.hyperparameters import add_hyperparameters

logger = logging.getLogger(__name__)
HPARAM_TYPES = (bool, str, float, int)


class Tracker:
    """Writes a run's curves, pictures and log.

    On other processes than the first it does nothing, so that callers need no condition.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        enabled: bool,
        first_step: int,
        total_steps: int,
        evaluated: bool = True,
        report_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            output_dir: gets `tensorboard/` and `metrics.jsonl`.
            enabled: whether this is the process that writes.
            first_step: updates done before; entries of later updates, from an interrupted run, are removed from both.
            total_steps: updates in the whole run.
            evaluated: whether the evaluation that was due after `first_step` has been made; if not, it will be logged
                again.
            report_to: other trackers; see `ExternalTrackers`, also for errors.
            settings: by flat name, for these.
        """
        self.enabled = enabled
        self._total = total_steps
        if not enabled:
            return
        self._external = ExternalTrackers(report_to, output_dir, resumes=first_step > 0, settings=settings or {})
        self._lines = JsonLines(output_dir / "metrics.jsonl", first_step, evaluated)
        self._events = EventFile(output_dir / "tensorboard", first_step, evaluated)
        if not evaluated:
            # TensorBoard hides whole steps only: the valid entries of this step are written again.
            for line in self._lines.last:
                self._write_scalars(first_step, {name: value for name, value in line.items() if "/" in name})
        at_end(self.flush)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty() or first_step >= total_steps,
            delay=1e-3,  # shown from the first update on, below earlier messages
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
            file=sys.stderr,
        )

    def advance(self, step: int, loss: float, samples_per_second: float) -> None:
        """Moves the progress bar to `step` updates."""
        if self.enabled:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {samples_per_second:.0f} images/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def scalars(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Logs numbers under names such as `train/loss`, to the curves and as a JSON line."""
        if not self.enabled:
            return
        self._write_scalars(step, values)
        self._external.scalars(step, values)
        # JSON has no infinity, which is the gradient's norm in an update that fp16 skips.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "epoch": round(epoch, 4), **finite}) + "\n")

    def _write_scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            self._events.write(SummaryWriter.add_scalar, name, math.inf if value is None else value, step)

    def say(self, message: str) -> None:
        """Logs a message on the process that writes."""
        if self.enabled:
            logger.info(message)

    def progress_line(self, step: int, epoch: float, values: Mapping[str, float], seconds_left: float) -> None:
        """The progress bar's content as a line, where there is no terminal."""
        if self.enabled and self._bar.disable:
            logger.info(
                "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.0f images/s  left %s",
                step,
                self._total,
                epoch,
                values["train/loss"],
                values["train/learning_rate"],
                values["train/samples_per_second"],
                tqdm.format_interval(seconds_left),
            )

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Adds a picture to the trackers."""
        if self.enabled:
            self._external.picture(name, image, step)
            self._events.write(SummaryWriter.add_image, name, np.asarray(image), step, dataformats="HWC")
            self._events.write(SummaryWriter.flush)

    def settings(self, flat: Mapping[str, Any]) -> None:
        """Adds the settings as text."""
        if self.enabled:
            text = yaml.safe_dump(dict(flat), sort_keys=False, allow_unicode=True)
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self._events.write(SummaryWriter.add_text, "settings", indented)

    def hyperparameters(self, flat: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Adds the settings with the final metrics, for TensorBoard's comparison of runs."""
        if self.enabled:
            hparams = {
                name: value if isinstance(value, HPARAM_TYPES) else json.dumps(value) for name, value in flat.items()
            }
            results = {f"hparam/{name}": value for name, value in metrics.items()}
            self._events.write(add_hyperparameters, hparams, results)

    def flush(self) -> None:
        """Flushes the files before a checkpoint: a run that resumes from it logs nothing twice.

        Hides the progress bar until the next update, so that messages about the checkpoint have lines of their own.
        """
        if self.enabled:
            self._bar.clear()
            self._events.write(SummaryWriter.flush)

    def close(self) -> None:
        """Ends the progress bar and the files."""
        if self.enabled:
            self._bar.close()
            self._external.close()
            self._events.write(SummaryWriter.close)
