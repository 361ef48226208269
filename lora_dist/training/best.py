"""The best update of a run that goes on, measured anew where it was chosen by another metric or on other data."""

from lora_dist.training.loop import Job, evaluate
from lora_dist.training.saving.state import Progress


def measure_best_anew(job: Job, progress: Progress) -> None:
    """Chooses the best update again, if the run goes by another metric or validates on other data than before.

    It evaluates the best checkpoint and, if that was evaluated too, the current one, which it then puts back. Early
    stopping counts from there. Called on every process, before the first update.

    Raises:
        StopRequested: a stop was asked for; the checkpoint that the run goes on from is still the newest one.
        NothingToEvaluateError: no validation image can be read.
    """
    metric, data = job.settings.optimization.metric_for_best_model, job.evaluator.split.fingerprint()
    # Checkpoints of older releases do not say.
    old_metric, old_data = progress.best_metric or metric, progress.best_data or data
    old_step, old_value = progress.best_step, progress.best_value
    progress.best_metric, progress.best_data = metric, data
    if (old_metric, old_data) == (metric, data):
        return
    current = job.engine.trainable_state()
    candidates = {}
    if old_step is not None and (weights := job.checkpointer.best_weights(progress)) is not None:
        candidates[old_step] = weights
    if progress.last_evaluated_step == progress.step and job.settings.run.eval_steps != "no":
        candidates[progress.step] = current
    values, chosen = {}, Progress()
    for step, weights in candidates.items():
        job.engine.load_trainable_state(weights)
        values[step] = evaluate(job, f"evaluating update {step} anew", job.preemption.check).metrics[metric]
        chosen.step = step
        chosen.note_evaluation(values[step], lower_is_better=metric == "loss")
    job.engine.load_trainable_state(current)
    progress.best_step, progress.best_value, progress.stale_evaluations = chosen.best_step, chosen.best_value, 0
    job.watch.now(f"saving after update {progress.step}", first=True)
    job.checkpointer.save(progress)
    if old_value is not None and values:
        elsewhere = " on other validation data" if old_data != data else ""
        measured = ", ".join(f"update {step} has {metric} {value:.4f}" for step, value in values.items())
        job.tracker.say(
            f"the best so far, update {old_step}, was chosen by {old_metric} {old_value:.4f}{elsewhere}. Measured "
            f"anew, {measured}: the best is update {progress.best_step}"
        )
