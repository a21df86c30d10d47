"""What a run writes down while it goes: one JSON object a line, and a line for people."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hidream.errors import HidreamError

OnLog = Callable[[dict[str, Any]], None]
T = TypeVar("T")

COUNTED = ("corrupt",)
MAX_SKIPPED = 100  # steps in a row that fp16 cannot hold: the scale has fallen to nothing by then


class Meter:
    """Means since the last report, per task, the speed, and the share of time spent on waiting.

    Values may be tensors on a GPU: they are read together, by `check`, so that a step need not wait
    for the device. `bounded`: whether a value that is not finite is an error; with a gradient scale
    (fp16) it makes a step that changes nothing, and is left out of the means, which count it as
    `skipped`. Time is given from outside.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, bounded: bool = True):
        self.clock = clock
        self.bounded = bounded
        self.unread: list[tuple[int, dict[str, Any]]] = []
        self.in_a_row = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything that is read and start the clock again."""
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples = 0
        self.waited = 0.0
        self.skipped = 0
        self.started = self.clock()

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts as waiting."""
        iterator = iter(items)
        while True:
            before = self.clock()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited += self.clock() - before
            yield item

    def add(self, step: int, values: Mapping[str, Any], samples: int) -> None:
        """One step's values, numbers or tensors, and its samples over all processes."""
        self.unread.append((step, dict(values)))
        self.samples += samples

    def check(self) -> None:
        """Read what was added; HidreamError where it is not finite."""
        for step, values in self.unread:
            read = {name: float(value) for name, value in values.items()}
            if all(math.isfinite(value) for value in read.values()):
                self.in_a_row = 0
                for name, value in read.items():
                    self.totals[name] += value
                    self.counts[name] += 1
                continue
            self.skipped += 1
            self.in_a_row += 1
            if self.bounded or self.in_a_row > MAX_SKIPPED:
                raise HidreamError(
                    f"the loss or its gradient is not finite at step {step} ({read}).",
                    "Resume from the last checkpoint with a lower learning rate.",
                )
        self.unread.clear()

    def report(self) -> dict[str, float]:
        """The mean of every value, samples per second, the share of waiting; then starts again.

        Of `COUNTED` it is the sum.
        """
        self.check()
        seconds = max(self.clock() - self.started, 1e-9)
        means = {
            name: total if name in COUNTED else total / self.counts[name]
            for name, total in sorted(self.totals.items())
        }
        means["samples_per_second"] = self.samples / seconds
        means["waiting"] = self.waited / seconds
        if not self.bounded:
            means["skipped"] = self.skipped
        self.reset()
        return means


class RunLog:
    """Appends records to `path` (JSON lines) and hands each to `on_log`.

    On resume, records of steps that will run again are removed first, so that every step is
    in the file once.
    """

    def __init__(self, path: Path, on_log: OnLog | None = None, *, first_step: int = 0):
        self.path = path
        self.on_log = on_log
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= first_step]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.on_log is not None:
            self.on_log(record)


def _step(line: str) -> float:
    """The record's step; infinity for a line cut short by a crash."""
    try:
        return float(json.loads(line).get("step", 0))
    except ValueError:
        return float("inf")


def readable(record: dict[str, Any]) -> str:
    """One line for a person from a step's record, or the message of another one."""
    if "message" in record:
        return str(record["message"])
    losses = "  ".join(
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in record.items()
        if name.startswith("loss_")
    )
    corrupt = f"  {record['corrupt']:.0f} corrupt" if record.get("corrupt") else ""
    return (
        f"step {record['step']}/{record['num_steps']}  {losses}  lr {record['lr']:.2e}  "
        f"|g| {record.get('grad_norm', math.nan):.2f}  "
        f"{record['samples_per_second']:.0f} pictures/s  "
        f"{duration(record['seconds_left'])} left{corrupt}"
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
