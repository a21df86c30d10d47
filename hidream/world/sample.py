"""One item of a task: its words, its scene, and what a picture of it must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hidream.limits import Box
from hidream.world.panels import draw_panels
from hidream.world.render import render, render_subject
from hidream.world.scene import Scene, Subject


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the prompt says of one object; empty fields go unsaid."""

    kind: str
    color: str = ""
    size: str = ""
    word: str = ""
    pattern: str = ""
    color2: str = ""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a picture must show, and nothing besides: objects in the scene's order, relations
    (i, relation, j) between them, the background if the prompt names one, and of the camera what
    it says (field -> value of `hidream.camera.CAMERA`)."""

    objects: tuple[Claim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str = ""
    camera: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One item of a task: the words, the scene behind the picture to make, what goes in with it.

    `answer` is the text to learn (language: a caption; understanding: a caption or an answer).
    An edit has `edit` (one of `EDITS`), the `source` scene, and `changed`: the indices, in
    `scene.objects`, of the objects the edit touches. A `layout` has the box (x1, x2, y1, y2) of
    each subject. A storyboard has `panels`, each a sample of its own, so many `columns` of them to
    a row; its `scene` and `claims` are the first panel's.
    """

    task: str
    category: str
    prompt: str
    scene: Scene
    claims: Claims
    answer: str = ""
    source: Scene | None = None
    subjects: tuple[Subject, ...] = ()
    edit: str = ""
    changed: tuple[int, ...] = ()
    layout: tuple[Box, ...] = ()
    panels: tuple[Sample, ...] = ()
    columns: int = 0

    def target(self, width: int, height: int) -> np.ndarray:
        """The picture of the scene, or of all panels: uint8 (height, width, 3)."""
        if self.panels:
            scenes = [panel.scene for panel in self.panels]
            return np.asarray(draw_panels(scenes, self.columns, width, height))
        return render(self.scene, width, height)

    def reference_pictures(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """The pictures that go in: an edit's source, the subjects, the picture to describe."""
        if self.task == "understanding":
            return (self.target(width, height),)
        if self.source is not None:
            return (render(self.source, width, height),)
        return tuple(render_subject(subject, width, height) for subject in self.subjects)
