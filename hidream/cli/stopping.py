"""Ctrl-C while pictures are drawn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hidream.cancel import CancelToken


@contextmanager
def stopped_by_ctrl_c() -> Iterator[CancelToken]:
    """A token that Ctrl-C cancels; a second Ctrl-C interrupts at once.

    What is between two layers of the network, or a picture on its way to the disk, is finished
    first. Outside the main thread, which alone gets signals, the token stays as it is.
    """
    token = CancelToken()
    if threading.current_thread() is not threading.main_thread():
        yield token
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        if token.cancelled:
            raise KeyboardInterrupt
        token.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield token
    finally:
        signal.signal(signal.SIGINT, before)
