"""Batches made ahead of the step that needs them, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `make(step)` of `steps`, made in order by a thread, `ahead` of them waiting."""

    def __init__(self, make: Callable[[int], T], steps: Sequence[int], *, ahead: int = 1):
        self._make = make
        self._steps = steps
        self._ready: queue.Queue[T | BaseException] = queue.Queue(max(ahead, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="hidream-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        for _ in self._steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for step in self._steps:
                self._put(self._make(step))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # handed to the reader, which raises it
            self._put(error)

    def _put(self, item: T | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
