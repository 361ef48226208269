"""The evaluations at the end of a run: of the best weights, on the validation data and on the test data."""

from dataclasses import replace

from lora_dist.data.sources.load import ImageData
from lora_dist.training.problems.problem_types import EvaluationResult
from lora_dist.training.run import TrainingRun


def final_evaluations(run: TrainingRun, data: ImageData) -> tuple[EvaluationResult, EvaluationResult | None]:
    """Evaluates the current weights on the validation data, and on the test data if there are any.

    Both evaluations keep logits if a temperature is fitted from them; the first one of a run with --fold keeps
    probabilities, for out-of-fold predictions. Thresholds that are chosen on the validation data are measured on the
    test data. Must be called on every process.
    """
    problem = run.evaluator.problem
    evaluation = run.evaluate(
        "the final evaluation", with_probabilities=data.fold is not None, keep_logits=problem.is_calibrated
    )
    if data.test is None:
        return evaluation, None
    decided = problem.fixed(problem.decision(evaluation))
    evaluator = replace(run.evaluator, split=data.test, name="test", problem=decided, features=None)
    return evaluation, run.evaluate("the evaluation on the test data", evaluator, keep_logits=problem.is_calibrated)
