"""Scenes out of parts: sizes and places are found, and the claims that follow are written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hidream.world.prompts import Group
from hidream.world.sample import Claim, Claims
from hidream.world.scene import (
    COLORS,
    KINDS,
    SIZES,
    Dice,
    Object,
    Scene,
    Subject,
    extent,
    place,
    sign_shape,
    size_name,
)

ALL_KINDS = tuple(KINDS)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A group before it is placed: what it is, and what of that the prompt will say."""

    kind: str
    color: str
    count: int = 1
    size: float = 0.0  # 0 = any
    word: str = ""
    say_color: bool = True
    say_size: bool = False
    subject: Subject | None = None

    def group(self, size: float, noun: str = "") -> Group:
        return Group(
            kind=self.kind,
            count=self.count,
            color=self.color if self.say_color else "",
            size=size_name(size) if self.say_size else "",
            word=self.word,
            noun=noun,
        )


_LARGE_FIRST = tuple(SIZES[name] for name in ("large", "medium", "small"))


def any_size(dice: Dice, total: int) -> float:
    """A size for one of `total` objects; fewer objects are larger."""
    weights = {1: (0.15, 0.4, 0.45), 2: (0.17, 0.5, 0.33), 3: (0.3, 0.7, 0.0)}
    small, medium, large = weights.get(total, (0.5, 0.5, 0.0))
    name = dice.weighted((("small", small), ("medium", medium), ("large", large)))
    return SIZES[name]


def smaller(size: float) -> float:
    """The next size down, of all that exist."""
    return next((s for s in _LARGE_FIRST if s < size - 1e-9), _LARGE_FIRST[-1])


def build_scene(
    dice: Dice,
    parts: tuple[Part, ...],
    background: str,
    relations: tuple[tuple[int, str, int], ...] = (),
) -> tuple[Scene, tuple[tuple[int, str, int], ...], tuple[float, ...]]:
    """A scene of the parts: (scene, relations between objects, sizes of the parts).

    `relations` are between parts; they hold for every pair of their objects. Sizes shrink until
    everything finds room.
    """
    total = sum(part.count for part in parts)
    signs = any(part.kind == "sign" for part in parts)
    sizes = [
        sign_shape(part.word)[0]
        if part.kind == "sign"
        else part.size or any_size(dice, total + (2 if signs else 0))
        for part in parts
    ]
    members = [i for i, part in enumerate(parts) for _ in range(part.count)]
    pairs = tuple(
        (a, relation, b)
        for i, relation, j in relations
        for a, of_a in enumerate(members)
        for b, of_b in enumerate(members)
        if of_a == i and of_b == j
    )
    while True:
        extents = [extent(parts[i].kind, sizes[i], parts[i].word) for i in members]
        centres = place(dice, extents, pairs)
        if centres is not None:
            break
        sizes = [
            s if part.kind == "sign" else smaller(s) for s, part in zip(sizes, parts, strict=True)
        ]
    objects = tuple(
        Object(
            kind=parts[i].kind,
            color=parts[i].color,
            size=sizes[i],
            x=x,
            y=y,
            word=parts[i].word,
            pattern=subject.pattern if subject else "",
            color2=subject.color2 if subject else "",
        )
        for i, (x, y) in zip(members, centres, strict=True)
        for subject in [parts[i].subject]
    )
    return Scene(objects=objects, background=background), pairs, tuple(sizes)


def claims_of(
    parts: tuple[Part, ...],
    sizes: tuple[float, ...],
    pairs: tuple[tuple[int, str, int], ...] = (),
    background: str = "",
) -> Claims:
    objects = tuple(
        Claim(
            kind=part.kind,
            color=part.color if part.say_color else "",
            size=size_name(size) if part.say_size else "",
            word=part.word,
            pattern=part.subject.pattern if part.subject else "",
            color2=part.subject.color2 if part.subject else "",
        )
        for part, size in zip(parts, sizes, strict=True)
        for _ in range(part.count)
    )
    return Claims(objects=objects, relations=pairs, background=background)


def some_things(
    dice: Dice, count: int, *, same_kind: float = 0.0, **fields: Any
) -> tuple[Part, ...]:
    """Single objects of different kinds and colours; with a chance, one kind in several colours."""
    colors = dice.some(COLORS, count)
    kinds = dice.some(ALL_KINDS, count)
    if same_kind and dice.chance(same_kind):
        kinds = [kinds[0]] * count
    return tuple(Part(kind=k, color=c, **fields) for k, c in zip(kinds, colors, strict=True))
