"""Tasks in several processes, results as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hidream.errors import HidreamError

WAITING = 3  # tasks handed out per worker, so that none waits for its next


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int
) -> Iterator[Any]:
    """`function` of every task, in any order; in this very process for one worker.

    The processes are spawned: function and tasks must be picklable, and a script that calls this
    needs its `if __name__ == "__main__"`. They end when this process does, however it ends.

    Raises what a task raises; HidreamError for a worker that was killed.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start)
    running: set[Future[Any]] = set()
    rest = iter(tasks)
    try:
        while True:
            for task in rest:
                running.add(pool.submit(function, task))
                if len(running) >= WAITING * num_workers:
                    break
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise HidreamError(
            "a worker process ended before its work was done.",
            "If memory ran out, use fewer workers; run it again to go on from here.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """In a new worker: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
