"""Evaluates an adapter, or a whole model, on validation data (`--do_eval_only`)."""

import json
from datetime import timedelta
from pathlib import Path

from lora_dist.data.pixels.limits import allow_pixels
from lora_dist.data.sources.load import load_validation
from lora_dist.engines.engine import unsharded
from lora_dist.errors import TrainingStoppedError, UserError
from lora_dist.hub import local_directory
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.processes.devices import inference_batch_size
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.run_lock import RunLock
from lora_dist.processes.watch import Watch
from lora_dist.settings.train import Settings
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.launching import launch_run, lock_output
from lora_dist.training.problems.problem_types import PROBLEM_TYPES
from lora_dist.training.reporting.report import measured, write_evaluation
from lora_dist.training.saving.output import Output, require_empty, without_nan


def evaluate_only(settings: Settings, lock: RunLock) -> None:
    """Evaluates an adapter, or a whole model, on the validation data; prints the metrics as JSON."""
    allow_pixels(settings.data.max_image_pixels)
    accelerator = launch_run(settings)
    watch = Watch(settings.run.stall_timeout)
    watch.watch_peers()
    output = Output(Path(settings.run.output_dir))
    lock_output(lock, output.root, accelerator, settings.run.ddp_timeout)
    require_empty(output.root)
    preflight = Preflight(timedelta(seconds=settings.run.ddp_timeout))
    with preflight.first_process_first("adapter"):
        directory = local_directory(settings.model.adapter_name_or_path or "")
    classifier = load_classifier(directory, trust_remote_code=settings.model.trust_remote_code)
    if classifier.decision.problem_type != settings.data.problem_type:
        raise UserError(f"the model was trained with --problem_type {classifier.decision.problem_type}: add it")
    problem = PROBLEM_TYPES[settings.data.problem_type].fixed(classifier.decision)
    with preflight.first_process_first("loaded"):
        split = load_validation(settings.data, settings.run.seed, classifier.labels)
    preflight.arrive("ready")
    transforms = classifier.transforms()
    settings = settings.with_default_eval_batch_size(
        inference_batch_size(accelerator.device, transforms.height, transforms.width)
    )
    evaluator = Evaluator(
        accelerator,
        unsharded(accelerator, classifier.model),
        split,
        transforms,
        classifier.labels,
        settings.optimization.per_device_eval_batch_size,
        settings.data,
        temperature=classifier.calibration.temperature,
        problem=problem,
    )
    with watch.watching():
        evaluation = evaluator(after_batch=watch.progressed, with_probabilities=settings.data.fold is not None)
    if accelerator.is_main_process:
        metrics = {f"eval_{name}": value for name, value in measured(evaluation).items()}
        print(json.dumps(without_nan(metrics)), flush=True)
        try:
            output.root.mkdir(parents=True, exist_ok=True)
            write_evaluation(output.evaluation, problem, evaluation, classifier.labels)
            problem.write_predictions(output.predictions, evaluation, split, classifier.labels)
        except OSError as error:
            raise TrainingStoppedError(
                f"cannot write {output.predictions} or {output.evaluation}: {error.strerror or error}. The metrics are "
                f"those printed above."
            ) from error
    accelerator.end_training()
