"""Fine-tunes an image classifier: `accelerate launch -m lora_dist.train --config NAME|FILE [--setting value …]`."""

from lora_dist.cli import argv_or, flatten, parse
from lora_dist.config import Settings
from lora_dist.contradictions import contradictions
from lora_dist.errors import Problems, exit_on_user_error
from lora_dist.failure import others_told
from lora_dist.launcher import end_with_launcher


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Reads the settings, then trains or evaluates."""
    end_with_launcher()
    with others_told():
        settings = parse(
            Settings,
            argv_or(argv),
            prog="lora_dist.train",
            description="Fine-tune an image classifier with LoRA, on one process or many.",
            contradictions=contradictions,
        )
        if settings.run.do_eval_only:
            evaluate_only(settings)
        else:
            train(settings)


def train(settings: Settings) -> None:
    """Trains, evaluates the best checkpoint, and hands over the adapter."""
    # Imported here, because the settings are to be read, and a mistake in them reported, before torch is loaded.
    from datetime import timedelta
    from pathlib import Path

    from lora_dist import streamed
    from lora_dist.agreement import VISIBLE_SECONDS, require_agreement
    from lora_dist.batch import TrainImages
    from lora_dist.batch_size import fit_batch_size
    from lora_dist.data import load_data
    from lora_dist.engine import make_engine
    from lora_dist.evaluation import Evaluator
    from lora_dist.handover import Handover
    from lora_dist.loop import Job, fit, stopped_on_request
    from lora_dist.model import count_parameters, make_trainable
    from lora_dist.optimizer import make_optimizer
    from lora_dist.order import Order
    from lora_dist.output import Output, find_resume
    from lora_dist.plan import rehearse
    from lora_dist.preemption import Preemption
    from lora_dist.preflight import Preflight
    from lora_dist.publisher import open_publisher, require_token
    from lora_dist.report import announce, show_inputs
    from lora_dist.room import Sizes, require_room, require_writable
    from lora_dist.runtime import launch
    from lora_dist.schedule import Schedule
    from lora_dist.start import load_start
    from lora_dist.state import Checkpointer, Progress
    from lora_dist.tracking import Tracker
    from lora_dist.transforms import ImageTransforms

    optimization, run = settings.optimization, settings.run
    if settings.data.streaming:
        streamed.prepare(settings.data)
    accelerator = launch(optimization.mixed_precision, run.ddp_timeout)
    output, problems, resumed, publisher = Output(Path(run.output_dir)), Problems(run.dry_run), None, None
    with problems.noted():
        require_writable(output.root)
        resumed = find_resume(output, run.resume_from_checkpoint)
    with problems.noted():
        require_token(settings.hub)
    if not run.dry_run:
        publisher = open_publisher(accelerator, settings.hub, output, going_on=resumed is not None)

    preflight = Preflight(timedelta(seconds=run.ddp_timeout))
    with preflight.first_process_first("loaded", accelerator):
        if settings.data.streaming:
            data = streamed.load_streamed(settings.data, run.seed, accelerator.num_processes)
        else:
            data = load_data(settings.data, run.seed)
        settings, base, start = load_start(settings, data.labels)
    transforms = ImageTransforms(base.processor, settings.augmentation)
    model = make_trainable(base, settings.model, settings.lora)
    if start is not None:
        start.load_into(model)
    if optimization.auto_batch_size:
        optimization = fit_batch_size(accelerator, model, transforms, optimization)
        settings = settings.model_copy(update={"optimization": optimization})
    parameters = count_parameters(model)
    sizes = Sizes.of(model, settings.model.tuning == "full", run.save_total_limit)
    with problems.noted():
        if accelerator.is_main_process:
            require_room(output.root, sizes)
    optimizer = make_optimizer(model, optimization, settings.lora.loraplus_lr_ratio)
    order = Order(
        arrangement=data.train.arrangement(run.seed),
        per_device_batch=optimization.per_device_train_batch_size,
        accumulation=optimization.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    schedule = Schedule.of(optimization, order.steps_per_epoch)
    identity = {
        "base": base.fingerprint,
        "start": start.fingerprint() if start is not None else None,
        "tuning": settings.model.tuning,
        "seed": run.seed,
        "effective_batch": order.effective_batch,
        "train_data": data.train.fingerprint(),
        "order": order.arrangement.description,
    }
    facts = {
        "update to go on from": resumed.state["progress"]["step"] if resumed is not None else 0,
        "validation_data": data.validation.fingerprint(),
        **identity,
        **optimization.model_dump(),
        **settings.lora.model_dump(),
        **settings.augmentation.model_dump(),
    }
    preflight.arrive("ready")
    shared = None if run.dry_run else output.root
    require_agreement(accelerator, shared, facts, min(VISIBLE_SECONDS, run.ddp_timeout / 2))

    engine = make_engine(accelerator, model, optimizer, optimization)
    checkpointer = Checkpointer(output.checkpoints, engine, identity, run.save_total_limit)
    progress = Progress()
    with problems.noted():
        progress = checkpointer.restore(resumed) if resumed is not None else progress
    writes = accelerator.is_main_process and not run.dry_run
    if writes:
        output.begin(flatten(settings), data.describe_splits(), engine.bare, progress.step)
    announce(data, order, schedule, parameters, accelerator)
    handover = Handover(base, data, parameters, output, publisher)
    job = Job(
        settings=settings,
        engine=engine,
        images=TrainImages(
            data.train, transforms, settings.augmentation, run.seed, settings.data.on_bad_image == "skip"
        ),
        order=order,
        schedule=schedule,
        evaluator=Evaluator(
            accelerator,
            engine.model,
            data.validation,
            transforms,
            data.labels,
            optimization.per_device_eval_batch_size,
            settings.data,
        ),
        checkpointer=checkpointer,
        preemption=Preemption(accelerator, output.save_request),
        tracker=Tracker(
            output.root,
            enabled=writes,
            first_step=progress.step,
            total_steps=schedule.total_steps,
        ),
        on_best=handover.after_best,
    )
    if run.dry_run:
        rehearse(job, data, parameters, sizes, progress.step, problems)
        return
    job.tracker.settings(flatten(settings))
    show_inputs(job.tracker, job.images, order, progress.step, data.labels)
    with stopped_on_request(job, progress):
        fit(job, progress)
        checkpointer.restore_best(progress)
        handover.at_the_end(job, progress, job.evaluator(after_batch=job.preemption.check))
        job.preemption.saved()
    accelerator.end_training()
    # When no process waits for another any more, and all files of the run are there.
    handover.publish(job, progress)


def evaluate_only(settings: Settings) -> None:
    """Evaluates an adapter, or a whole model, on the validation data; prints the metrics as JSON."""
    import json
    from datetime import timedelta
    from pathlib import Path

    from lora_dist.bundle import load_classifier
    from lora_dist.data import load_validation
    from lora_dist.evaluation import Evaluator
    from lora_dist.hub import local_directory
    from lora_dist.output import Output, find_resume
    from lora_dist.preflight import Preflight
    from lora_dist.report import write_evaluation
    from lora_dist.runtime import launch
    from lora_dist.transforms import ImageTransforms

    accelerator = launch(settings.optimization.mixed_precision, settings.run.ddp_timeout)
    output = Output(Path(settings.run.output_dir))
    find_resume(output, None)
    preflight = Preflight(timedelta(seconds=settings.run.ddp_timeout))
    with preflight.first_process_first("adapter", accelerator):
        directory = local_directory(settings.model.adapter_name_or_path or "")
    classifier = load_classifier(directory, trust_remote_code=settings.model.trust_remote_code)
    with preflight.first_process_first("loaded", accelerator):
        split = load_validation(settings.data, settings.run.seed, classifier.labels)
    preflight.arrive("ready")
    evaluation = Evaluator(
        accelerator,
        classifier.model.to(accelerator.device),
        split,
        ImageTransforms(classifier.processor),
        classifier.labels,
        settings.optimization.per_device_eval_batch_size,
        settings.data,
    )()
    if accelerator.is_main_process:
        output.root.mkdir(parents=True, exist_ok=True)
        write_evaluation(output.evaluation, evaluation, classifier.labels)
        print(json.dumps({f"eval_{name}": value for name, value in evaluation.metrics.items()}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
