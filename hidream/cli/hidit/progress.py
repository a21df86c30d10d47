"""How far a stage is: items done, items a second, time left, on stderr."""

from __future__ import annotations

import sys
import time

from hidream.cli.console import duration, say


class Items:
    """One line rewritten on a terminal, else a line every ten seconds, and the last one.

    What an earlier run did counts as done, and not for the speed.
    """

    def __init__(self, what: str):
        self.what = what
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.first: int | None = None
        self.start = self.said = time.perf_counter()

    def step(self, num_done: int, num_all: int) -> None:
        """After some items: how many of all are done."""
        now = time.perf_counter()
        if self.first is None:
            self.first, self.start = num_done, now
        if num_done < num_all and now - self.said < (0.2 if self.live else 10):
            return
        self.said = now
        text = f"{num_done}/{num_all} {self.what}"
        passed, num_new = now - self.start, num_done - self.first
        if num_new > 0 and passed > 0:
            speed = num_new / passed
            text += f", {speed:.0f} a second, {duration((num_all - num_done) / speed)} left"
        say(f"\r\x1b[K{text}" if self.live else text, end="" if self.live else "\n")

    def close(self) -> None:
        if self.live and self.first is not None:
            say("")
