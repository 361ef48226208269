"""A prediction in parts, so that several processes share it and a killed one is continued by the same command.

Each part is a file of JSON lines, written atomically in `OUTPUT.parts`. Every process writes those of its parts that
are missing. The first one waits for the others and joins the parts, in order.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lora_dist import waiting
from lora_dist.deployment.classify import Row
from lora_dist.errors import UserError
from lora_dist.processes.failure import format_ranks, read_failure
from lora_dist.processes.rendezvous import launch_store
from lora_dist.storage.files import replace_files
from lora_dist.storage.writable import writing

MAX_IMAGES = 512
"""Images of a part. A killed prediction loses at most one part of each process."""
_TARGET_PARTS = 64
_PLAN = "plan.json"
_STORE_TIMEOUT = timedelta(seconds=1800)
_POLL_SECONDS = 0.2


RowsOf = Mapping[str | None, Callable[[Sequence[str]], Iterator[Row]]]
"""Classifies files, by name of the adapter; None for a model without a name."""

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
    """Files that one process classifies with one adapter: `number` of the part, name of the adapter, and paths."""

    number: int
    adapter: str | None
    files: Sequence[str]


class Parts:
    """The parts of one prediction.

    Attributes:
        directory: where they lie.
    """

    def __init__(
        self, output: Path, adapters: Sequence[str | None], files: Sequence[str], plan: dict[str, Any]
    ) -> None:
        """
        Args:
            output: the file that the parts become.
            adapters: names of the adapters; None for a model without a name.
            files: all images, in order.
            plan: what the rows depend on besides the files, as JSON values.

        Raises:
            UserError: parts of another prediction lie there, or the directory cannot be written.
        """
        self.directory = output.with_name(f"{output.name}.parts")
        size = min(MAX_IMAGES, -(-len(files) // _TARGET_PARTS))
        starts = range(0, len(files), size)
        self._parts = [
            Part(number, adapter, files[start : start + size])
            for number, (adapter, start) in enumerate(product(adapters, starts))
        ]
        digest = hashlib.sha256("\0".join(files).encode("utf-8", "surrogateescape")).hexdigest()
        self._plan = {**plan, "adapters": list(adapters), "files": digest, "part_size": size}
        self._store = launch_store(_STORE_TIMEOUT)
        self._rank, self._world_size = 0, 1
        if self._store is not None:
            self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # The first process alone says what is wrong, before another one ends the launch.
        if self._rank:
            self._wait_for("begun", [0])
        with writing(self.directory, "output"):
            self._begin()
        self._tell("begun")

    def _begin(self) -> None:
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

    def write_mine(self, rows_of: RowsOf) -> None:
        """Classifies the images of this process and writes their parts, except those that an earlier run has written.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        written = [part for part in self._parts if self._path(part).exists()]
        pending = [part for part in self._parts[self._rank :: self._world_size] if part not in written]
        if written:
            images = sum(len(part.files) for part in written)
            logger.info("going on with %s, which has %d rows", self.directory, images)
        silent = self._rank > 0 or not sys.stderr.isatty()
        with tqdm(total=sum(len(part.files) for part in pending), unit=" rows", disable=silent) as bar:
            for adapter, group in groupby(pending, key=lambda part: part.adapter):
                mine = list(group)
                rows = rows_of[adapter]([file for part in mine for file in part.files])
                for part in mine:
                    self._write(part, islice(rows, len(part.files)))
                    bar.update(len(part.files))

    def _write(self, part: Part, rows: Iterable[Row]) -> None:
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        with writing(self.directory, "output"), replace_files(self.directory) as aside:
            (aside / self._path(part).name).write_text(content, encoding="utf-8")

    def wait_for_others(self) -> bool:
        """Waits on the first process until the others have written their parts; returns whether to join them here.

        Raises:
            UserError: another process has failed.
        """
        self._tell("written")
        if self._rank == 0:
            self._wait_for("written", range(self._world_size))
        return self._rank == 0

    def _tell(self, stage: str) -> None:
        if self._store is not None:
            self._store.set(f"predict/{stage}/{self._rank}", "")

    def _wait_for(self, stage: str, ranks: Iterable[int]) -> None:
        if self._store is None:
            return
        waited_for = list(ranks)
        with waiting.log_wait(lambda: f"waiting for {format_ranks(waited_for, self._world_size)} (stage: {stage})"):
            while waited_for := [rank for rank in waited_for if not self._store.check([f"predict/{stage}/{rank}"])]:
                if failure := read_failure(self._store):
                    raise failure
                time.sleep(_POLL_SECONDS)

    def rows(self) -> Iterator[Row]:
        """Yields the rows of all parts, in the order of adapters and files.

        Raises:
            UserError: a part is missing, because processes on several machines share no directory.
        """
        for part in self._parts:
            if not self._path(part).exists():
                raise UserError(f"{self._path(part)} is missing: do all processes see the same directory?")
            for line in self._path(part).read_text(encoding="utf-8").splitlines():
                # Parts of older releases have no labels.
                path, top_k, error, adapter, *labels = json.loads(line)
                chosen = labels[0] if labels else None
                yield Row(path, _pairs(top_k), error, adapter, None if chosen is None else _pairs(chosen))

    def remove(self) -> None:
        """Removes the parts, after they have been joined."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, part: Part) -> Path:
        return self.directory / f"part-{part.number:06d}.jsonl"


def _pairs(classes: list[list[Any]]) -> list[tuple[str, float]]:
    return [(label, score) for label, score in classes]
