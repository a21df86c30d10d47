"""`--preview-every`: pictures on the way."""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.errors import Cancelled, InputError
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    from PIL import Image

MAX_WAITING = 32  # pictures; then a step waits for the disk
TOGETHER = 0.25  # seconds; previews of quicker steps are made in a row

Note = Mapping[str, Any] | None


class Previews:
    """What happens after a step.

    The network drives all else out of the processor's caches, so that a preview made between two
    steps takes twice as long as one made right after another. Those of less than TOGETHER seconds
    are therefore kept, and made and written in a row; the last step, or a Ctrl-C, leaves none.
    Large ones are written by a thread, one after the other; for small ones it would compete with
    the network for longer than writing them takes.

    A context: leaving it waits for the last file. What a write raises comes out at a later step,
    or there.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.every: int | None = arguments.preview_every
        self.overwrite: bool = arguments.overwrite
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()
        self._kept: list[Callable[[], None]] = []
        self._made = time.monotonic()  # when the last were made

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind in (None, Cancelled):
                self._make()
        finally:
            self._writer.shutdown()
        if kind is None:
            self._settle(0)

    def on_step(
        self,
        progress: console.Progress,
        paths: Sequence[Path],
        notes: Callable[[], Sequence[Note]],
    ) -> Callable[[int, int, Callable[[], list[Image.Image]]], None]:
        """A pipeline's `on_step`: shows the step, and saves its previews beside `paths`.

        `notes()`, asked once, gives what the finished pictures will say of themselves; their
        previews say it too, and of which step they are. Files that pictures carry are left out.
        """
        told: list[Note] = []

        def after(step: int, num_steps: int, preview: Callable[[], list[Image.Image]]) -> None:
            progress.step(step, num_steps)
            if self.every and step % self.every == 0 and step < num_steps:
                if not told:
                    told.extend(notes())
                of = {"step": step, "num_steps": num_steps}
                self._kept.append(partial(self._save, preview, paths, told, of))
            late = time.monotonic() - self._made >= TOGETHER
            if self._kept and (late or step == num_steps):
                self._make()

        return after

    def _make(self) -> None:
        """Make and save the previews that are kept."""
        kept, self._kept = self._kept, []
        for save in kept:
            save()
        self._made = time.monotonic()

    def _save(
        self,
        preview: Callable[[], list[Image.Image]],
        paths: Sequence[Path],
        notes: Sequence[Note],
        of: Mapping[str, int],
    ) -> None:
        from hidream.pictures import SMALL, write_picture

        for image, path, note in zip(preview(), paths, notes, strict=True):
            own = None
            if note is not None:
                own = {key: value for key, value in note.items() if key != "embedded"}
                own["preview"] = of
            place = _place(path, of["step"])
            write = partial(write_picture, image, place, own, overwrite=self.overwrite, quick=True)
            if image.width * image.height <= SMALL:
                write()
            else:
                self._settle(MAX_WAITING)
                self._waiting.append(self._writer.submit(write))

    def _settle(self, most: int) -> None:
        """Let go of what is written, until at most this many wait; raises what a write raised."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()


def check_previews(
    arguments: argparse.Namespace, paths: Sequence[Path], request: GenerateRequest
) -> None:
    """Raises InputError where a preview would be written over a file."""
    every = arguments.preview_every
    if not every or arguments.overwrite:
        return
    for path in paths:
        for step in range(every, request.num_inference_steps or 0, every):
            if os.path.lexists(place := _place(path, step)):
                raise InputError(
                    f"the preview {place} exists.",
                    "Overwrite it with --overwrite, or choose another -o.",
                )


def _place(path: Path, step: int) -> Path:
    return path.with_name(f"{path.stem}-step{step:04d}{path.suffix}")
