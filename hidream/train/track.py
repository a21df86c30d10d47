"""Where a run's log lines go besides log.jsonl: TensorBoard or Weights & Biases, if asked for."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hidream.errors import UsageError

TRACKERS = ("none", "tensorboard", "wandb")
Track = Callable[[Mapping[str, Any]], None]
Log = Callable[[dict[str, float], int], None]


@contextmanager
def tracker(kind: str, run_dir: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """A function that takes a run's records, one of `TRACKERS`; numbers are drawn over `step`.

    The package is imported at once; nothing is written or sent before the first record.

    Raises UsageError for a kind whose package is not installed.
    """
    if kind not in TRACKERS:
        raise UsageError(f'unknown tracker "{kind}"; known: {", ".join(TRACKERS)}.')
    if kind == "none":
        yield lambda record: None
        return
    try:
        if kind == "wandb":
            import wandb

            def start() -> tuple[Log, Callable[[], object]]:
                told = dict(settings)
                run = wandb.init(project="hidream", name=name, dir=run_dir, config=told)
                return lambda values, step: run.log(values, step=step), run.finish
        else:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            def start() -> tuple[Log, Callable[[], object]]:
                writer = EventFileWriter(str(run_dir / "tensorboard"))

                def log(values: dict[str, float], step: int) -> None:
                    rows = [Summary.Value(tag=key, simple_value=v) for key, v in values.items()]
                    writer.add_event(Event(step=step, summary=Summary(value=rows)))

                return log, writer.close
    except ImportError as error:
        raise UsageError(
            f"{kind} is not installed ({error}).", f"pip install {kind}, or track with none."
        ) from error
    started = cache(start)
    try:
        yield lambda record: _pass_on(started()[0], record)
    finally:
        if started.cache_info().currsize:
            started()[1]()


def _pass_on(log: Log, record: Mapping[str, Any]) -> None:
    values = {
        key: float(value)
        for key, value in record.items()
        if key not in ("step", "num_steps") and isinstance(value, numbers.Real)
    }
    if values:
        log(values, int(record["step"]))
