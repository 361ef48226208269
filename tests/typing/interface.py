"""What a type checker sees of the interface for Python. Nothing runs this: `make quality` checks it."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from PIL import Image

import lora_dist
from lora_dist.deployment.image_classifier import Score

result = lora_dist.fit("demo", max_train_steps=2, output_dir=Path("runs/x"))
assert_type(result, lora_dist.TrainingResult)
assert_type(result.path, Path)
assert_type(result.metrics, dict[str, Any])
classifier = lora_dist.load(result.path, device="cpu")
assert_type(classifier, lora_dist.ImageClassifier)
assert_type(classifier("a.jpg", top_k=2), list[Score])
assert_type(classifier(Image.new("RGB", (8, 8))), list[Score])
assert_type(classifier(["a.jpg", "b.jpg"], batch_size=2), list[list[Score]])
assert_type(classifier([Path("a.jpg"), np.zeros((8, 8, 3), dtype=np.uint8)]), list[list[Score]])
assert_type(classifier("a.jpg")[0]["label"], str)
classifier(3)  # type: ignore[call-overload]
lora_dist.load(3)  # type: ignore[arg-type]
lora_dist.loda  # type: ignore[attr-defined]  # noqa: B018
