"""Text to image: what each category draws, and how it is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hidream.world import prompts
from hidream.world.build import Part, build_scene, claims_of, some_things
from hidream.world.sample import Sample
from hidream.world.scene import BACKGROUNDS, RELATIONS, SIGN_STYLES, Dice
from hidream.world.shots import shots
from hidream.world.storyboards import storyboards
from hidream.world.typed import typed

_MIX = (  # what text_to_image draws from when no category is asked for
    ("single", 0.1),
    ("colors", 0.15),
    ("two_objects", 0.08),
    ("position", 0.13),
    ("counting", 0.12),
    ("attribute_binding", 0.13),
    ("words", 0.03),
    ("related", 0.13),
    ("free", 0.13),
)

_Plan = tuple[tuple[Part, ...], str]  # parts, relation between the first two ("" for none)


def _single(dice: Dice) -> _Plan:
    return some_things(dice, 1, say_color=False), ""


def _colors(dice: Dice) -> _Plan:
    return some_things(dice, 1), ""


def _two_objects(dice: Dice) -> _Plan:
    return some_things(dice, 2, say_color=False), ""


def _position(dice: Dice) -> _Plan:
    return some_things(dice, 2, say_color=False), dice.pick(RELATIONS)


def _counting(dice: Dice) -> _Plan:
    (part,) = some_things(dice, 1, say_color=False)
    return (replace(part, count=2 + dice.below(3)),), ""


def _attribute_binding(dice: Dice) -> _Plan:
    return some_things(dice, 2), ""


def _words(dice: Dice) -> _Plan:
    return (a_sign(dice, prompts.random_word(dice)),), ""


def a_sign(dice: Dice, word: str) -> Part:
    return Part(kind="sign", color=dice.pick(SIGN_STYLES), word=word, say_color=dice.chance(0.3))


def related(dice: Dice) -> _Plan:
    """Two coloured things, or groups of them, and where they stand."""
    parts = some_things(dice, 2, same_kind=0.1)
    if dice.chance(0.2):
        first = replace(parts[0], count=1 + dice.below(3))
        parts = (first, replace(parts[1], count=1 + dice.below(4 - first.count)))
    if dice.chance(0.2):
        parts = tuple(replace(part, say_size=True) for part in parts)
    return parts, dice.pick(RELATIONS)


def free(dice: Dice) -> _Plan:
    """One to four objects with anything said of them, or a sign with something beside it."""
    if dice.chance(0.12):
        sign = a_sign(dice, prompts.random_word(dice))
        (other,) = some_things(dice, 1)
        relation = dice.pick(("above", "below")) if dice.chance(0.4) else ""
        return (sign, other), relation
    num_groups = dice.weighted(((1, 0.35), (2, 0.4), (3, 0.2), (4, 0.05)))
    parts = list(some_things(dice, num_groups, same_kind=0.08))
    room = 4 - num_groups
    for i, part in enumerate(parts):
        if room and dice.chance(0.35):
            extra = 1 + dice.below(room)
            part, room = replace(part, count=1 + extra), room - extra
        parts[i] = replace(part, say_size=dice.chance(0.35))
    if len({part.kind for part in parts}) == num_groups and dice.chance(0.15):
        parts = [replace(part, say_color=False) for part in parts]
    relation = dice.pick(RELATIONS) if num_groups > 1 and dice.chance(0.25) else ""
    return tuple(parts), relation


def _many_words(dice: Dice) -> _Plan:
    """Two signs, or one sign of two words."""
    if dice.chance(0.4):
        first = prompts.random_word(dice, 5)
        second = prompts.random_word(dice, 7 - len(first))
        return (a_sign(dice, f"{first} {second}"),), ""
    signs = [a_sign(dice, prompts.random_word(dice)) for _ in range(2)]
    while signs[1].word == signs[0].word:
        signs[1] = a_sign(dice, prompts.random_word(dice))
    return tuple(signs), dice.pick(("above", "below")) if dice.chance(0.6) else ""


def _casual(dice: Dice) -> _Plan:
    """What the categories of evaluation draw; its prompts are those of `typed`."""
    return _PLAIN[dice.weighted(_CASUAL_MIX)](dice)


_PLAIN: dict[str, Callable[[Dice], _Plan]] = {
    "single": _single,
    "colors": _colors,
    "two_objects": _two_objects,
    "position": _position,
    "counting": _counting,
    "attribute_binding": _attribute_binding,
    "words": _words,
}
_CASUAL_MIX = (
    ("single", 0.12),
    ("colors", 0.24),
    ("two_objects", 0.16),
    ("position", 0.14),
    ("counting", 0.14),
    ("attribute_binding", 0.14),
    ("words", 0.06),
)

PLANS: dict[str, Callable[[Dice], _Plan | Sample]] = {
    **_PLAIN,
    "related": related,
    "free": free,
    # since world 2.0; none of them is in `_MIX`
    "shots": shots,
    "many_words": _many_words,
    "casual": _casual,
    "storyboards": storyboards,
}
#: How often the prompt names the background; the categories of evaluation never do.
_SAY_BACKGROUND = {"related": 0.25, "free": 0.55}


def text_to_image(dice: Dice, category: str | None) -> Sample:
    name = category if category is not None else dice.weighted(_MIX)
    plan = PLANS[name](dice)
    if isinstance(plan, Sample):
        return plan
    parts, relation = plan
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = build_scene(dice, parts, background, relations)
    said = background if dice.chance(_SAY_BACKGROUND.get(name, 0.0)) else ""
    groups = tuple(part.group(size) for part, size in zip(parts, sizes, strict=True))
    if name == "casual":
        text = typed(dice, groups, relation)
    else:
        text = prompts.caption(dice, groups, relation, said, plain=name not in _SAY_BACKGROUND)
    claims = claims_of(parts, sizes, pairs, said)
    return Sample(task="text_to_image", category=name, prompt=text, scene=scene, claims=claims)
