"""Layouts: one to three subjects, each in its own picture, and the box that each is to fill."""

from __future__ import annotations

from hidream.limits import Box
from hidream.world import prompts
from hidream.world.build import ALL_KINDS, Part, build_scene, claims_of
from hidream.world.sample import Sample
from hidream.world.scene import BACKGROUNDS, PATTERNS, SIZES, Dice, Object, Subject
from hidream.world.subjects import subject_noun, two_colors

IN_BOXES = ("", "", ", each in its box", ", placed as in the layout")
SLACK = 0.25  # by how much of its object a box is wider or higher, where it is


def layout(dice: Dice) -> Sample:
    """A sample of the category: the words say which subjects, their boxes where and how large."""
    count = dice.weighted(((1, 0.35), (2, 0.4), (3, 0.25)))
    subjects = []
    for kind in dice.some(ALL_KINDS, count):
        first, second = two_colors(dice)
        pattern = dice.pick(PATTERNS)
        subjects.append(Subject(kind=kind, pattern=pattern, color=first, color2=second))
    sizes = ("medium", "large") if count < 3 else ("medium",)
    parts = tuple(
        Part(kind=s.kind, color=s.color, subject=s, size=SIZES[dice.pick(sizes)]) for s in subjects
    )
    background = dice.pick(BACKGROUNDS)
    scene, _, found = build_scene(dice, parts, background)
    said = background if dice.chance(0.75) else ""
    nouns = [subject_noun(dice, i, s, count) for i, s in enumerate(subjects)]
    text = prompts.in_place(dice, prompts.listing(nouns), said)
    return Sample(
        task="subject",
        category="layout",
        prompt=text + (dice.pick(IN_BOXES) if count > 1 else ""),
        scene=scene,
        claims=claims_of(parts, found, (), said),
        subjects=tuple(subjects),
        layout=tuple(_box(dice, thing) for thing in scene.objects),
    )


def _box(dice: Dice, thing: Object) -> Box:
    """x1, x2, y1, y2 in hundredths: what the object fills, sometimes a little wider or higher."""
    left, top, right, bottom = thing.box
    slack = SLACK * dice.random() / 2 if dice.chance(0.3) else 0.0
    if dice.chance(0.5):
        slack_x, slack_y = slack * (right - left), 0.0
    else:
        slack_x, slack_y = 0.0, slack * (bottom - top)
    sides = (left - slack_x, right + slack_x, top - slack_y, bottom + slack_y)
    x1, x2, y1, y2 = (round(min(max(side, 0.0), 1.0), 2) for side in sides)
    return x1, x2, y1, y2
