"""Work on files in processes, of which one may die: that costs the file it was at, and nothing else."""

import multiprocessing
import os
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

R = TypeVar("R")

FILES_AT_ONCE = 16
SILENT_SECONDS = 300.0
"""How long all processes may take over their files before those count as dead."""


def in_processes(
    work: Callable[[str], R], paths: Sequence[str], workers: int, died: R
) -> Generator[tuple[int, R], None, None]:
    """Yields the place of each path with what `work` makes of it, in the order in which they are done.

    Closed early, or interrupted, it ends its processes at once.

    Args:
        work: a function of a module, which raises nothing.
        paths: to work on.
        workers: processes.
        died: stands for the result where a process died, of a crash in a decoder or for want of memory, or hung.
    """
    chunks = deque(range(len(paths))[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE))
    while chunks:
        lost = yield from _run(work, paths, chunks, workers, ahead=2 * workers)
        # One at a time, to see which one it was.
        suspects = deque(range(index, index + 1) for chunk in lost for index in chunk)
        while suspects:
            for (index,) in (yield from _run(work, paths, suspects, workers=1, ahead=1)):
                yield index, died


def _run(
    work: Callable[[str], R], paths: Sequence[str], chunks: deque[range], workers: int, ahead: int
) -> Generator[tuple[int, R], None, list[range]]:
    """Takes chunks off the left until none is left or a process dies; returns those that were lost with it."""
    running: dict[Future[list[R]], range] = {}
    # A fork would have the threads' locks of this process, but not its threads.
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
                    # One hangs, in a file that cannot be read. Without its processes the pool fails, and tells which.
                    _kill({*multiprocessing.active_children()} - others)
                for future in done:
                    yield from zip(running[future], future.result(), strict=True)
                    del running[future]
        except BrokenProcessPool:
            pass
        except BaseException:
            # Whoever asked has gone, or it was Ctrl-C: what is being read is not waited for.
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
    """Ctrl-C waits for the end of this block, and never reaches a process that is started in it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # A process inherits the mask. Here it is this thread's alone: a signal that another thread receives is kept.
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
    # What Pillow warns of is in the report.
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
