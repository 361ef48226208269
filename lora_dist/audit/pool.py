"""A process pool that survives crashed and hung workers; only the file that a worker was reading is lost."""

import multiprocessing
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TypeVar

from lora_dist.processes.parent_death import end_with_starter

R = TypeVar("R")

CHUNK_SIZE = 16
SILENT_SECONDS = 300.0
"""Workers that finish no chunk in this time count as hung."""


def in_processes(
    work: Callable[[str], R], paths: Sequence[str], workers: int, failed: R
) -> Generator[tuple[int, R], None, None]:
    """Yields the index of each path and the result of `work`, in the order of completion.

    Closing the generator or interrupting it kills the workers at once.

    Args:
        work: Module-level function that raises no exceptions.
        workers: Number of processes.
        failed: Result for a path on which a worker crashed, ran out of memory or hung.
    """
    chunks = deque(range(len(paths))[start : start + CHUNK_SIZE] for start in range(0, len(paths), CHUNK_SIZE))
    while chunks:
        lost = yield from _run(work, paths, chunks, workers, ahead=2 * workers)
        # One file at a time, to find the one that failed.
        suspects = deque(range(index, index + 1) for chunk in lost for index in chunk)
        while suspects:
            for (index,) in (yield from _run(work, paths, suspects, workers=1, ahead=1)):
                yield index, failed


def _run(
    work: Callable[[str], R], paths: Sequence[str], chunks: deque[range], workers: int, ahead: int
) -> Generator[tuple[int, R], None, list[range]]:
    """Processes chunks until none is left or a worker dies; returns the unfinished chunks."""
    running: dict[Future[list[R]], range] = {}
    # A forked process would inherit locks that no thread of its own releases.
    context = multiprocessing.get_context("spawn")
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(workers, context, initializer=_set_up) as pool:
        try:
            while chunks or running:
                while chunks and len(running) < ahead:
                    with _no_interrupt():
                        future = pool.submit(_work_on, work, [paths[index] for index in chunks[0]])
                    running[future] = chunks.popleft()
                done = wait(running, SILENT_SECONDS, FIRST_COMPLETED).done
                if not done:
                    # A worker hangs. Killing the workers raises BrokenProcessPool below.
                    _kill({*multiprocessing.active_children()} - others)
                for future in done:
                    yield from zip(running[future], future.result(), strict=True)
                    del running[future]
        except BrokenProcessPool:
            pass
        except BaseException:
            # The caller is gone or pressed Ctrl-C; do not wait for the workers.
            _kill({*multiprocessing.active_children()} - others)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return list(running.values())


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _work_on(work: Callable[[str], R], paths: list[str]) -> list[R]:
    return [work(path) for path in paths]


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until the end of this block, and keeps it from processes that the block starts."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # New processes inherit the mask, but other threads have their own: the handler keeps signals that they receive.
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if received:
            signal.raise_signal(signal.SIGINT)


def _set_up() -> None:
    # The report covers what Pillow warns about.
    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_starter, daemon=True).start()
