"""The problem types by name, and the results of their evaluations; `problem.py` has their interface."""

from lora_dist.settings.fields import MULTI_LABEL, SINGLE_LABEL
from lora_dist.training.problems.multi_label_problem import LabelSetEvaluation, MultiLabel
from lora_dist.training.problems.problem import ProblemType
from lora_dist.training.problems.single_label_problem import SingleLabel, SingleLabelEvaluation

PROBLEM_TYPES: dict[str, ProblemType] = {SINGLE_LABEL: SingleLabel(), MULTI_LABEL: MultiLabel()}

EvaluationResult = SingleLabelEvaluation | LabelSetEvaluation
