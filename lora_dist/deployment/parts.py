"""Splits a prediction into parts, so that several processes share it and the same command continues a killed one.

Each part is a file of JSON lines, written atomically in `OUTPUT.parts`. Every process writes those of its parts that
are missing. The first one waits for the others and joins the parts, in order.
"""

import base64
import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, groupby, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_dist import waiting
from lora_dist.deployment.classify import Row
from lora_dist.deployment.inputs import Inputs, files_of
from lora_dist.deployment.progress import Progress
from lora_dist.errors import UserError
from lora_dist.processes.failure import format_ranks, read_failure
from lora_dist.processes.rendezvous import launch_store
from lora_dist.processes.run_lock import RunLock
from lora_dist.storage.atomic import remove_directory, replace_files
from lora_dist.storage.writable import writing

MAX_IMAGES = 512
"""Images of a part. A killed prediction loses at most one part of each process."""
_TARGET_PARTS = 64
_PLAN = "plan.json"
_STORE_TIMEOUT = timedelta(seconds=1800)
_POLL_SECONDS = 0.2


RowsOf = Mapping[str | None, Callable[[Sequence[int]], Iterator[Row]]]
"""Classifies the images of these indices, by name of the adapter; None for a model without a name."""

logger = logging.getLogger(__name__)


def digest_of(root: Path) -> str:
    """Returns a digest of a file, or of the files of a directory, that does not depend on where they are and when."""
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


class Part(NamedTuple):
    """Images that one process classifies with one adapter: `number` of the part, name of the adapter, and indices."""

    number: int
    adapter: str | None
    indices: range


class Parts:
    """The parts of one prediction.

    Attributes:
        directory: of their files.
    """

    def __init__(self, output: Path, adapters: Sequence[str | None], inputs: Inputs, plan: dict[str, Any]) -> None:
        """
        Args:
            output: the file that the parts become.
            adapters: names of the adapters; None for a model without a name.
            inputs: all images, in order.
            plan: all that the rows depend on besides the images, as JSON values.

        Raises:
            UserError: the directory has parts of another prediction, is in use by one, or cannot be written.
        """
        self.directory = output.with_name(f"{output.name}.parts")
        count = len(inputs)
        size = min(MAX_IMAGES, -(-count // _TARGET_PARTS))
        self._parts = [
            Part(number, adapter, range(start, min(start + size, count)))
            for number, (adapter, start) in enumerate(product(adapters, range(0, count, size)))
        ]
        self._plan = {**plan, "adapters": list(adapters), "files": inputs.fingerprint(), "part_size": size}
        self._store = launch_store(_STORE_TIMEOUT)
        self._rank, self._world_size = 0, 1
        if self._store is not None:
            self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # The others wait, so that only the first process reports an error of the directory.
        if self._rank:
            self._wait_for("begun", [0])
        self._lock = RunLock("--output", output)
        with writing(self.directory, "output"):
            if not self._rank:
                self._lock.take(self.directory)
            try:
                self._begin(files_of(inputs))
            except BaseException:
                self._lock.release()
                raise
        self._tell("begun")

    @property
    def is_first(self) -> bool:
        """Whether this process is the first one, which joins the parts."""
        return self._rank == 0

    def _begin(self, files: Sequence[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        plan = self.directory / _PLAN
        if not plan.exists():
            with replace_files(self.directory) as aside:
                (aside / _PLAN).write_text(json.dumps(self._plan), encoding="utf-8")
        if json.loads(plan.read_text(encoding="utf-8")) != self._plan:
            raise UserError(
                f"{self.directory} has parts of a prediction of other images, or by another model or settings: run "
                f"that one to its end, delete the directory, or choose another --output"
            )
        # The others begin later, when the first one already counts on the parts that are there.
        if self.is_first and files:
            self._remove_outdated(files)

    def _remove_outdated(self, files: Sequence[str]) -> None:
        """Removes the parts of files that were changed, replaced or repaired after they were classified."""
        outdated = []
        with waiting.log_wait(lambda: "looking for images that changed since they were classified"):
            for number in self._written():
                path, indices = self._path(self._parts[number]), self._parts[number].indices
                written = path.stat().st_ctime
                if any(_change_time(files[index]) > written for index in indices):
                    path.unlink()
                    outdated.append(number)
        if outdated:
            count = self._images_of(outdated)
            logger.info("%s: %s rows are made again, because images changed since", self.directory, f"{count:,}")

    def write(self, rows_of: RowsOf) -> None:
        """Classifies the images of this process and writes their parts, except those that an earlier run has written.

        The first process then waits until the others have written theirs.

        Raises:
            UserError: the disk is full or cannot be written, or another process has failed.
        """
        written = self._written()
        pending = [part for part in self._parts[self._rank :: self._world_size] if part.number not in written]
        done, total = self._images_of(written), self._images_of(range(len(self._parts)))
        if written:
            logger.info("continuing %s, which has %s rows", self.directory, f"{done:,}")
        with Progress(total, done, silent=self._rank > 0) as progress:

            def show() -> None:
                if self._rank == 0:
                    progress.advance_to(self._images_of(self._written()))

            for adapter, group in groupby(pending, key=lambda part: part.adapter):
                mine = list(group)
                indices = array("q", chain.from_iterable(part.indices for part in mine))
                rows = rows_of[adapter](indices)
                for part in mine:
                    self._write(part, islice(rows, len(part.indices)))
                    show()
            self._tell("written")
            if self._rank == 0:
                self._wait_for("written", range(self._world_size), show)

    @contextmanager
    def kept_rows_reported(self) -> Iterator[None]:
        """Says how much is kept if this block ends with an error, such as a full disk, or with Ctrl-C."""
        try:
            yield
        except BaseException:
            if self._rank == 0:
                self._say_kept()
            self._lock.release()
            raise

    def _say_kept(self) -> None:
        kept, total = self._images_of(self._written()), self._images_of(range(len(self._parts)))
        if kept:
            rows = f"{kept:,} of {total:,} rows"
            logger.warning("%s has %s: the same command continues from them", self.directory, rows)

    def _written(self) -> set[int]:
        """Numbers of the parts that are written, by any process."""
        return {int(path.stem.partition("-")[2]) for path in self.directory.glob("part-*.jsonl")}

    def _images_of(self, numbers: Iterable[int]) -> int:
        return sum(len(self._parts[number].indices) for number in numbers)

    def _write(self, part: Part, rows: Iterable[Row]) -> None:
        content = "".join(f"{json.dumps(row._asdict(), default=_encoded)}\n" for row in rows)
        with writing(self.directory, "output"), replace_files(self.directory) as aside:
            (aside / self._path(part).name).write_text(content, encoding="utf-8")

    def _tell(self, stage: str) -> None:
        if self._store is not None:
            self._store.set(f"predict/{stage}/{self._rank}", "")

    def _wait_for(self, stage: str, ranks: Iterable[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        if self._store is None:
            return
        waited_for = list(ranks)
        with waiting.log_wait(lambda: f"waiting for {format_ranks(waited_for, self._world_size)} (stage: {stage})"):
            while waited_for := [rank for rank in waited_for if not self._store.check([f"predict/{stage}/{rank}"])]:
                if failure := read_failure(self._store):
                    raise failure
                meanwhile()
                time.sleep(_POLL_SECONDS)
        meanwhile()

    def rows(self) -> Iterator[Row]:
        """Yields the rows of all parts, in the order of adapters and files.

        Raises:
            UserError: a part is missing, for example because machines do not share the directory.
        """
        for part in self._parts:
            if not self._path(part).exists():
                raise UserError(f"{self._path(part)} is missing: do all processes see the same directory?")
            for line in self._path(part).read_text(encoding="utf-8").splitlines():
                fields = json.loads(line)
                fields["top_k"] = _pairs(fields["top_k"])
                fields["values"] = None if fields["values"] is None else _decoded(fields["values"])
                fields["labels"] = None if fields["labels"] is None else _pairs(fields["labels"])
                yield Row(**fields)

    def remove(self) -> None:
        """Removes the parts, after they have been joined."""
        with suppress(OSError):
            remove_directory(self.directory, self._lock.release)

    def _path(self, part: Part) -> Path:
        return self.directory / f"part-{part.number:06d}.jsonl"


def _change_time(file: str) -> float:
    """When a file was last written, replaced or touched; 0 if it is gone, or never was there."""
    try:
        return os.stat(file).st_ctime  # noqa: PTH116
    except (OSError, ValueError):
        return 0.0


def _pairs(classes: list[list[Any]]) -> list[tuple[str, float]]:
    return [(label, score) for label, score in classes]


def _encoded(values: np.ndarray) -> str:
    """The values of a row as text without loss, and shorter than as numbers."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")
