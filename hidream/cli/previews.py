"""`--preview-every`: pictures on the way, saved while the next steps already run."""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.errors import InputError
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    from PIL import Image

MAX_WAITING = 32  # pictures; then a step waits for the disk

Note = Mapping[str, Any] | None


class Previews:
    """What happens after a step. Files are written by a thread, one after the other.

    A context: leaving it waits for the last file. What a write raises comes out at a later step,
    or there.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.every: int | None = arguments.preview_every
        self.overwrite: bool = arguments.overwrite
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Previews:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
            if not self.every or step % self.every or step == num_steps:
                return
            if not told:
                told.extend(notes())
            for image, path, note in zip(preview(), paths, told, strict=True):
                self._save(image, path, note, step, num_steps)

        return after

    def _save(self, image: Image.Image, path: Path, note: Note, step: int, num_steps: int) -> None:
        from hidream.pictures import write_picture

        own = None
        if note is not None:
            own = {key: value for key, value in note.items() if key != "embedded"}
            own["preview"] = {"step": step, "num_steps": num_steps}
        self._settle(MAX_WAITING)
        saving = self._writer.submit(
            write_picture, image, _place(path, step), own, overwrite=self.overwrite, quick=True
        )
        self._waiting.append(saving)

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
