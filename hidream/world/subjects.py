"""Subjects: objects with textures of their own, each in a picture, placed into a new scene."""

from __future__ import annotations

from hidream.world import prompts
from hidream.world.build import ALL_KINDS, Part, build_scene, claims_of
from hidream.world.sample import Sample
from hidream.world.scene import BACKGROUNDS, COLORS, PATTERNS, RELATIONS, SIZES, Dice, Subject
from hidream.world.sprites import PALETTE

_ORDINALS = ("first", "second", "third")


def subject(dice: Dice, category: str | None) -> Sample:
    count = dice.weighted(((1, 0.55), (2, 0.33), (3, 0.12)))
    kinds = dice.some(ALL_KINDS, count)
    subjects = []
    for kind in kinds:
        first, second = two_colors(dice)
        pattern = dice.pick(PATTERNS)
        subjects.append(Subject(kind=kind, pattern=pattern, color=first, color2=second))
    low = {1: ("medium", "large"), 2: ("medium",), 3: ("medium",)}[count]
    parts = [
        Part(kind=s.kind, color=s.color, subject=s, size=SIZES[dice.pick(low)]) for s in subjects
    ]
    nouns = [subject_noun(dice, i, s, count) for i, s in enumerate(subjects)]
    if count == 1 and dice.chance(0.3):  # a plain object beside the subject
        kind = dice.pick([k for k in ALL_KINDS if k not in kinds])
        parts.append(Part(kind=kind, color=dice.pick(COLORS)))
        nouns.append("")
    relation = dice.pick(RELATIONS) if len(parts) == 2 and dice.chance(0.5) else ""
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = build_scene(dice, tuple(parts), background, relations)
    said = background if dice.chance(0.75) or len(parts) == 1 else ""
    groups = tuple(p.group(s, noun) for p, s, noun in zip(parts, sizes, nouns, strict=True))
    if len(parts) == count == 2 and dice.chance(0.2):
        text = "both objects"
        if relation:
            where = dice.pick(prompts.RELATION_PHRASES[relation])
            text += f", the first {where} the second"
        text = f"{text} {dice.pick(prompts.PLACES[said])}" if said else text
    elif relation:
        where = dice.pick(prompts.RELATION_PHRASES[relation])
        a, b = (prompts.phrase(dice, g) for g in groups)
        text = prompts.in_place(dice, f"{a} {where} {b}", said)
    else:
        text = prompts.listing([prompts.phrase(dice, g) for g in groups])
        text = prompts.in_place(dice, text, said)
    if dice.chance(0.2):
        text = "a photo of " + text
    return Sample(
        task="subject",
        category="subjects",
        prompt=text,
        scene=scene,
        claims=claims_of(tuple(parts), sizes, pairs, said),
        subjects=tuple(subjects),
    )


def two_colors(dice: Dice) -> list[str]:
    """Two colours that can be told apart within one small texture."""
    while True:
        pair = dice.some(COLORS, 2)
        first, second = (PALETTE[color] for color in pair)
        if sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) > 150**2:
            return pair


def subject_noun(dice: Dice, i: int, subject: Subject, count: int) -> str:
    """How the prompt points at reference picture i: "the mug in the first picture"."""
    what = subject.kind if dice.chance(0.8) else "object"
    if count == 1:
        ways = ("the {} in the picture", "the {} from the picture", "this {}", "the {}")
        return dice.pick(ways).format(what)
    places = (
        f"the {what} in the {_ORDINALS[i]} picture",
        f"the {what} from picture {i + 1}",
        f"the {_ORDINALS[i]} object",
    )
    return dice.pick(places)
