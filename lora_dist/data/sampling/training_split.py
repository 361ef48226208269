"""The interface of the data to training: a split whose samples are read in the order that the split chooses."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lora_dist.data.sampling.order import SampleOrder


class EncodedSample(NamedTuple):
    """A sample as it is stored.

    Attributes:
        source: path or bytes of an encoded image, an opened image, or pixels.
        name: of the image in errors.
        label: index of the class in the label map, or 0 and 1 for each of several labels, uint8 [labels].
    """

    source: Any
    name: str
    label: Any


class Reader(Protocol):
    """Reads the samples of a training split."""

    def read(self, epoch: int, indices: Sequence[int]) -> Mapping[int, EncodedSample]:
        """The samples at `indices`. Successive calls follow the split's `sample_order`.

        Raises:
            UnreadableImageError: names the sample.
        """


class TrainingSplit(Protocol):
    """Training data: a `Split`, or shards that are streamed."""

    def __len__(self) -> int: ...

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the label of a sample: () of one class, (labels,) of several labels."""

    def name(self, index: int) -> str:
        """The file of sample `index`, or its row where the data set has no files."""

    def fingerprint(self) -> str:
        """Digest of the samples and their labels."""

    def describe(self) -> dict[str, Any]:
        """The selected samples as JSON, for the record of the run."""

    def sample_order(self, seed: int) -> SampleOrder:
        """The order in which training reads the samples."""

    def reader(self) -> Reader:
        """A new reader, private to the calling process."""
