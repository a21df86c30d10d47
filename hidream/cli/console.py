"""What the commands write where: results to stdout, messages and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, cast

INTERRUPTED = 130
SECONDS_FOR_THE_FIRST = 10.0


def say(text: str, *, end: str = "\n") -> None:
    """A message to stderr; a closed stderr loses it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text + end)
            sys.stderr.flush()


def warn(text: str) -> None:
    say(f"warning: {text}")


def show(result: Any) -> None:
    """A result to stdout as JSON, readable by people too."""
    print(json.dumps(result, indent=2, ensure_ascii=False))


def use_any_text() -> None:
    """Let names of files that are no valid text pass through stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")


def in_group() -> bool:
    """Whether torchrun or accelerate started this process, as one of a group."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def let_first_process_say_it() -> None:
    """Wait, in any other process of a group, for it to end the group with the message of all.

    What only this process knows is said a little later.
    """
    if in_group() and os.environ["RANK"] != "0":
        time.sleep(SECONDS_FOR_THE_FIRST)


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s` or `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """`1.5 GB`; decimal units."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def show_compact(result: Any) -> None:
    """A long result to stdout as one line of JSON."""
    print(json.dumps(result, ensure_ascii=False))


class Progress:
    """Steps done, time left, on stderr: one line rewritten on a terminal, else one a second.

    `num_rounds` batches follow each other, each taken to last as long as those before it.
    """

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.round = 0
        self.start = time.perf_counter()
        self.said = -1.0
        self.live = sys.stderr is not None and sys.stderr.isatty()

    def step(self, step: int, num_steps: int) -> None:
        """After each step, 1 … num_steps, of the current round."""
        self.round += step == 1
        passed = time.perf_counter() - self.start
        rounds_done = self.round - 1 + step / num_steps
        left = passed * max(0, self.num_rounds / rounds_done - 1)
        last = step == num_steps
        if not (self.live or last or passed - self.said >= 1 or self.said < 0):
            return
        self.said = passed
        text = f"step {step}/{num_steps}, {duration(left)} left"
        if self.num_rounds > 1:
            text = f"batch {self.round}/{self.num_rounds}, {text}"
        say(f"\r\x1b[K{text}" if self.live else text, end="" if self.live else "\n")

    def close(self) -> None:
        if self.live and self.round:
            say("")
