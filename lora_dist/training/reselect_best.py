"""Re-evaluates the best checkpoint of a resumed run if the metric or the validation data has changed."""

from lora_dist.data.sources.split import Split
from lora_dist.settings.train import Settings
from lora_dist.training.progress import Progress
from lora_dist.training.run import TrainingRun


def must_reselect(settings: Settings, validation: Split, progress: Progress) -> bool:
    """Whether the metric or the validation data has changed since the best update was selected."""
    now = settings.optimization.metric_for_best_model, validation.fingerprint()
    # Checkpoints of older releases do not record them.
    return now != (progress.best_metric or now[0], progress.best_data or now[1])


def reselect_best(run: TrainingRun) -> None:
    """Selects the best update again if `metric_for_best_model` or the validation data has changed.

    Evaluates the best checkpoint and, if it was evaluated before, the current one; then restores the current weights.
    Resets the early-stopping counter. Must be called on every process, before the first update.

    Raises:
        StopRequested: a stop was requested; the checkpoint to resume from has not changed.
        NothingToEvaluateError: no validation image can be read.
    """
    progress, metric = run.progress, run.settings.optimization.metric_for_best_model
    data = run.evaluator.split.fingerprint()
    selects_again = must_reselect(run.settings, run.evaluator.split, progress)
    old_metric, old_data = progress.best_metric or metric, progress.best_data or data
    old_step, old_value = progress.best_step, progress.best_value
    progress.best_metric, progress.best_data = metric, data
    if not selects_again:
        return
    current = run.engine.trainable_state()
    candidates = {}
    if old_step is not None and (weights := run.checkpointer.best_weights(progress)) is not None:
        candidates[old_step] = weights
    if progress.last_evaluated_step == progress.step and run.settings.run.eval_steps != "no":
        candidates[progress.step] = run.result_weights()
    values, chosen = {}, Progress()
    for step, weights in candidates.items():
        run.engine.load_trainable_state(weights)
        metrics = run.evaluate(f"re-evaluating update {step}").metrics
        values[step] = metrics[metric]
        chosen.step = step
        chosen.note_evaluation(values[step], metrics["loss"], lower_is_better=metric == "loss")
    run.engine.load_trainable_state(current)
    progress.best_step, progress.best_value, progress.best_loss = chosen.best_step, chosen.best_value, chosen.best_loss
    progress.stale_evaluations = 0
    run.save()
    if old_value is not None and values:
        elsewhere = " on other validation data" if old_data != data else ""
        measured = ", ".join(f"update {step} has {metric} {value:.4f}" for step, value in values.items())
        run.tracker.say(
            f"the best so far, update {old_step}, was selected by {old_metric} {old_value:.4f}{elsewhere}. "
            f"Re-evaluated, {measured}: the best is update {progress.best_step}"
        )
