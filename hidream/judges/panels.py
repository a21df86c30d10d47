"""What is done to true storyboards and layouts to see whether the judge is wrong on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hidream.world.panels import draw_panels
from hidream.world.render import render
from hidream.world.sample import Sample
from hidream.world.scene import COLORS, MARGIN, PLAIN, Dice, Object, Scene
from hidream.world.storyboards import PANEL_KINDS

Picture = np.ndarray
Damage = Callable[[Sample, Dice, int], Picture | None]


def other_subject(item: Sample, dice: Dice, side: int) -> Picture | None:
    """In one panel the subject is of another kind."""
    i = dice.below(len(item.panels))
    scene = item.panels[i].scene
    used = {thing.kind for thing in scene.objects}
    kind = dice.pick([k for k in PANEL_KINDS if k not in used])
    return _with_panel(item, i, _with_object(scene, 0, replace(scene.objects[0], kind=kind)), side)


def other_color(item: Sample, dice: Dice, side: int) -> Picture | None:
    """In one panel the subject has another colour."""
    i = dice.below(len(item.panels))
    scene = item.panels[i].scene
    color = dice.pick([c for c in COLORS if c != scene.objects[0].color])
    thing = replace(scene.objects[0], color=color)
    return _with_panel(item, i, _with_object(scene, 0, thing), side)


def missing_panel(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One panel is empty."""
    i = dice.below(len(item.panels))
    return _with_panel(item, i, Scene(objects=(), background=PLAIN), side)


def swapped_panels(item: Sample, dice: Dice, side: int) -> Picture | None:
    """Two panels are at one another's places."""
    i, j = dice.some(range(len(item.panels)), 2)
    scenes = [panel.scene for panel in item.panels]
    if _fits(item.panels[i], item.panels[j]) and _fits(item.panels[j], item.panels[i]):
        return None  # each says too little to be wrong there
    scenes[i], scenes[j] = scenes[j], scenes[i]
    return np.asarray(draw_panels(scenes, item.columns, side, side))


def box_off(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One subject is off its box by more than a third of it to the side and up or down."""
    i = dice.below(len(item.layout))
    thing = item.scene.objects[i]
    width, height = thing.extent
    ways = [
        (x, y)
        for x in (thing.x - 0.36 * width, thing.x + 0.36 * width)
        for y in (thing.y - 0.36 * height, thing.y + 0.36 * height)
        if min(x - width / 2, y - height / 2, 1 - x - width / 2, 1 - y - height / 2) > MARGIN
    ]
    if not ways:
        return None
    x, y = dice.pick(ways)
    return render(_with_object(item.scene, i, replace(thing, x=x, y=y)), side, side)


def too_small(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One subject is two thirds as large as its box."""
    large = [i for i, thing in enumerate(item.scene.objects) if thing.size > 0.28]
    if not large:
        return None
    thing = item.scene.objects[i := dice.pick(large)]
    return render(_with_object(item.scene, i, replace(thing, size=0.66 * thing.size)), side, side)


def swapped_references(item: Sample, dice: Dice, side: int) -> Picture | None:
    """Two subjects are in one another's boxes."""
    if len(item.layout) < 2:
        return None
    things = list(item.scene.objects)
    i, j = dice.some(range(len(things)), 2)
    a, b = things[i], things[j]
    things[i], things[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    return render(replace(item.scene, objects=tuple(things)), side, side)


#: Category -> its own damages.
OF_CATEGORY: dict[str, dict[str, Damage]] = {
    "storyboards": {
        "other_subject": other_subject,
        "other_color": other_color,
        "missing_panel": missing_panel,
        "swapped_panels": swapped_panels,
    },
    "layout": {
        "box_off": box_off,
        "too_small": too_small,
        "swapped_references": swapped_references,
    },
}


def _fits(panel: Sample, other: Sample) -> bool:
    """Whether the scene of a panel may be as the words of another have it."""
    says = other.claims
    return (
        len(panel.scene.objects) == len(says.objects) == 1
        and says.background in ("", panel.scene.background)
        and says.objects[0].size in ("", panel.scene.objects[0].size_name)
    )


def _with_object(scene: Scene, i: int, thing: Object) -> Scene:
    return replace(scene, objects=(*scene.objects[:i], thing, *scene.objects[i + 1 :]))


def _with_panel(item: Sample, i: int, scene: Scene, side: int) -> Picture:
    scenes = [panel.scene for panel in item.panels]
    scenes[i] = scene
    return np.asarray(draw_panels(scenes, item.columns, side, side))
