"""Where a run's log lines go besides log.jsonl: TensorBoard or Weights & Biases, if asked for."""

from __future__ import annotations

import numbers
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from hidream.errors import UsageError

TRACKERS = ("none", "tensorboard", "wandb")
Track = Callable[[Mapping[str, Any]], None]


class Writer(Protocol):
    """One tracker's run."""

    def log(self, values: dict[str, float], picture: Path | None, step: int) -> None:
        """Numbers by name, and a picture, which is named after its folder."""

    def close(self) -> None: ...


@contextmanager
def tracker(kind: str, run_dir: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """A function that takes a run's records, one of `TRACKERS`: numbers are drawn over `step`, and
    the file under `picture` is shown.

    The package is imported at once; nothing is written or sent before the first record. A run
    that goes on, goes on in its tracker.

    Raises UsageError for a kind whose package is not installed.
    """
    if kind not in TRACKERS:
        raise UsageError(f'unknown tracker "{kind}"; known: {", ".join(TRACKERS)}.')
    if kind == "none":
        yield lambda record: None
        return
    try:
        start = _wandb(run_dir, name, settings) if kind == "wandb" else _tensorboard(run_dir)
    except ImportError as error:
        raise UsageError(
            f"{kind} is not installed ({error}).", f"pip install {kind}, or track with none."
        ) from error
    started = cache(start)
    try:
        yield lambda record: _pass_on(started(), record)
    finally:
        if started.cache_info().currsize:
            started().close()


def _wandb(run_dir: Path, name: str, settings: Mapping[str, Any]) -> Callable[[], Writer]:
    import wandb

    class Run:
        def __init__(self) -> None:
            told = {"name": name, "dir": run_dir, "config": dict(settings)}
            self.run = wandb.init(project="hidream", id=_id(run_dir), resume="allow", **told)

        def log(self, values: dict[str, float], picture: Path | None, step: int) -> None:
            shown = {} if picture is None else {picture.parent.name: wandb.Image(str(picture))}
            self.run.log({**values, **shown}, step=step)

        def close(self) -> None:
            self.run.finish()

    return Run


def _id(run_dir: Path) -> str:
    """What W&B knows the run in this folder by; drawn once."""
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return file.read_text().strip()


def _tensorboard(run_dir: Path) -> Callable[[], Writer]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    class Events:
        def __init__(self) -> None:
            self.writer = EventFileWriter(str(run_dir / "tensorboard"))

        def log(self, values: dict[str, float], picture: Path | None, step: int) -> None:
            rows = [Summary.Value(tag=key, simple_value=v) for key, v in values.items()]
            if picture is not None:
                with Image.open(picture) as opened:
                    width, height = opened.size
                image = Summary.Image(
                    width=width, height=height, encoded_image_string=picture.read_bytes()
                )
                rows.append(Summary.Value(tag=picture.parent.name, image=image))
            self.writer.add_event(Event(step=step, summary=Summary(value=rows)))

        def close(self) -> None:
            self.writer.close()

    return Events


def _pass_on(writer: Writer, record: Mapping[str, Any]) -> None:
    values = {
        key: float(value)
        for key, value in record.items()
        if key not in ("step", "num_steps") and isinstance(value, numbers.Real)
    }
    picture = Path(record["picture"]) if "picture" in record else None
    if values or picture:
        writer.log(values, picture, int(record["step"]))
