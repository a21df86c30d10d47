"""What a run writes down while it goes: one JSON object a line, and a line for people."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

OnLog = Callable[[dict[str, Any]], None]


class Meter:
    """Means since the last report, per task, and the speed. Time is given from outside."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Forget everything and start the clock again."""
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples = 0
        self.started = self.clock()

    def add(self, values: dict[str, float], samples: int) -> None:
        """One step's values and the number of its samples over all processes."""
        for name, value in values.items():
            self.totals[name] += value
            self.counts[name] += 1
        self.samples += samples

    def report(self) -> dict[str, float]:
        """The mean of every value, and samples per second; then starts again."""
        seconds = max(self.clock() - self.started, 1e-9)
        means = {name: total / self.counts[name] for name, total in sorted(self.totals.items())}
        means["samples_per_second"] = self.samples / seconds
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
    return (
        f"step {record['step']}/{record['num_steps']}  {losses}  lr {record['lr']:.2e}  "
        f"|g| {record['grad_norm']:.2f}  {record['samples_per_second']:.0f} pictures/s  "
        f"{duration(record['seconds_left'])} left"
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
