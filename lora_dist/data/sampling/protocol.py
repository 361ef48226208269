"""What training asks of its data: a split whose samples can be had in the order that it is arranged in."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lora_dist.data.sampling.order import SampleOrder


class EncodedSample(NamedTuple):
    """A sample as it is stored.

    Attributes:
        source: path or bytes of an encoded image, or an opened one.
        name: what to call the image in an error.
        label: index of its class in the label map.
    """

    source: Any
    name: str
    label: int


class Reader(Protocol):
    """Gets at the samples of a training split."""

    def read(self, epoch: int, rows: Sequence[int]) -> Mapping[int, EncodedSample]:
        """The samples at `rows`, which are asked for in the order of the split's arrangement.

        Raises:
            UnreadableImageError: names what cannot be read.
        """
        ...


class TrainingSplit(Protocol):
    """What can be trained on: a `Split`, or a stream of shards."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file of sample `index`, or its row where the data set has no files."""
        ...

    def fingerprint(self) -> str:
        """Digest of the samples that are used, with their labels."""
        ...

    def describe(self) -> dict[str, Any]:
        """What is used, to be written down."""
        ...

    def sample_order(self, seed: int) -> SampleOrder:
        """The order in which it is read."""
        ...

    def reader(self) -> Reader:
        """A new way to read it."""
        ...
