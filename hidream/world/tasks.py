"""The tasks of the world: which picture goes with which words, and what the words claim.

`sample(task, seed, index)` is a pure function. Seeds of training and of evaluation come from two
disjoint ranges; `check_seed` holds them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hidream.world import prompts
from hidream.world.prompts import Group
from hidream.world.render import render, render_subject
from hidream.world.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    MARGIN,
    PATTERNS,
    RELATIONS,
    SIGN_STYLES,
    SIZES,
    Dice,
    Object,
    Scene,
    Subject,
    boxes_apart,
    extent,
    holds,
    place,
    sign_shape,
    size_name,
)
from hidream.world.sprites import PALETTE

TASKS = ("text_to_image", "edit", "subject", "language", "understanding")
CATEGORIES = (
    "single",
    "colors",
    "two_objects",
    "position",
    "counting",
    "attribute_binding",
    "words",
    "edits",
    "subjects",
)
EDITS = ("recolour", "remove", "add", "replace", "move", "background", "word")
TRAIN_SEEDS = range(2**32)
EVAL_SEEDS = range(2**32, 2**33)

_KINDS = tuple(KINDS)
_MIX = (  # what text_to_image draws from when no category is asked for
    ("single", 0.06),
    ("colors", 0.1),
    ("two_objects", 0.07),
    ("position", 0.11),
    ("counting", 0.1),
    ("attribute_binding", 0.12),
    ("words", 0.08),
    ("related", 0.18),
    ("free", 0.18),
)
_EDIT_MIX = (
    ("recolour", 0.22),
    ("remove", 0.15),
    ("add", 0.16),
    ("replace", 0.15),
    ("move", 0.12),
    ("background", 0.14),
    ("word", 0.06),
)


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
    (i, relation, j) between them, and the background if the prompt names one."""

    objects: tuple[Claim, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One item of a task: the words, the scene behind the picture to make, what goes in with it.

    `answer` is the text to learn (language: a caption; understanding: a caption or an answer).
    An edit has `edit` (one of `EDITS`), the `source` scene, and `changed`: the indices, in
    `scene.objects`, of the objects the edit touches.
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

    def target(self, width: int, height: int) -> np.ndarray:
        """The picture of the scene: uint8 (height, width, 3)."""
        return render(self.scene, width, height)

    def reference_pictures(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """The pictures that go in: an edit's source, the subjects, the picture to describe."""
        if self.task == "understanding":
            return (self.target(width, height),)
        if self.source is not None:
            return (render(self.source, width, height),)
        return tuple(render_subject(subject, width, height) for subject in self.subjects)


def check_seed(seed: int, purpose: str) -> int:
    """The seed itself, if it may serve the purpose ("train" or "eval"); else a UsageError."""
    allowed = {"train": TRAIN_SEEDS, "eval": EVAL_SEEDS}[purpose]
    if seed not in allowed:
        from hidream.errors import UsageError

        raise UsageError(
            f"seed {seed} is not one of the world's {purpose} seeds.",
            f"They run from {allowed.start} to {allowed.stop - 1}; training and evaluation must "
            "never see the same scenes.",
        )
    return seed


def eval_seed(seed: int) -> int:
    """A user's evaluation seed (0 … 2³²−1) as a seed of the world, where no training seed is."""
    return check_seed(EVAL_SEEDS.start + seed, "eval")


def sample(task: str, seed: int, index: int, *, category: str | None = None) -> Sample:
    """Item `index` of a task: a pure function of its arguments.

    `category` (text_to_image: one of `CATEGORIES` or "related", "free"; edit: one of `EDITS`)
    restricts the kind of item; None mixes them as in training.
    """
    if task not in _MAKE:
        from hidream.errors import UsageError

        raise UsageError(f'unknown task "{task}".', f"The world's tasks are {', '.join(TASKS)}.")
    known = (*_TEXT, *EDITS, "edits", "subjects")
    if category is not None and category not in known:
        from hidream.errors import UsageError

        raise UsageError(f'unknown category "{category}".', f"Known are {', '.join(known)}.")
    if category in ("edits", "subjects"):
        task, category = {"edits": "edit", "subjects": "subject"}[category], None
    chosen = 0 if category is None else 1 + known.index(category)
    return _MAKE[task](Dice(TASKS.index(task), chosen, seed, index), category)


# Building scenes out of groups


@dataclass(frozen=True, kw_only=True)
class _Part:
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


_LARGE_FIRST = tuple(s for name in ("large", "medium", "small") for s in reversed(SIZES[name]))


def _any_size(dice: Dice, total: int, smallest: str = "small") -> float:
    """A size for one of `total` objects; fewer objects are larger."""
    weights = {1: (0.15, 0.4, 0.45), 2: (0.17, 0.5, 0.33), 3: (0.3, 0.7, 0.0)}
    small, medium, large = weights.get(total, (0.5, 0.5, 0.0))
    if smallest == "medium":
        small = 0.0
    name = dice.weighted((("small", small), ("medium", medium), ("large", large)))
    return dice.pick(SIZES[name])


def _smaller(size: float) -> float:
    """The next size down, of all that exist."""
    return next((s for s in _LARGE_FIRST if s < size - 1e-9), _LARGE_FIRST[-1])


def _build(
    dice: Dice,
    parts: tuple[_Part, ...],
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
        else part.size or _any_size(dice, total + (2 if signs else 0))
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
            s if part.kind == "sign" else _smaller(s) for s, part in zip(sizes, parts, strict=True)
        ]
    objects = tuple(
        Object(
            kind=parts[i].kind,
            color=parts[i].color,
            size=sizes[i],
            x=round(x, 4),
            y=round(y, 4),
            word=parts[i].word,
            pattern=subject.pattern if subject else "",
            color2=subject.color2 if subject else "",
        )
        for i, (x, y) in zip(members, centres, strict=True)
        for subject in [parts[i].subject]
    )
    return Scene(objects=objects, background=background), pairs, tuple(sizes)


def _claims(
    parts: tuple[_Part, ...],
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


def _things(dice: Dice, count: int, *, same_kind: float = 0.0, **fields: Any) -> tuple[_Part, ...]:
    """Single objects of different kinds and colours; with a chance, one kind in several colours."""
    colors = dice.some(COLORS, count)
    kinds = dice.some(_KINDS, count)
    if same_kind and dice.chance(same_kind):
        kinds = [kinds[0]] * count
    return tuple(_Part(kind=k, color=c, **fields) for k, c in zip(kinds, colors, strict=True))


# Text to image: the parts of each category

_Plan = tuple[tuple[_Part, ...], str]  # parts, relation between the first two ("" for none)


def _single(dice: Dice) -> _Plan:
    return _things(dice, 1, say_color=False), ""


def _colors(dice: Dice) -> _Plan:
    return _things(dice, 1), ""


def _two_objects(dice: Dice) -> _Plan:
    return _things(dice, 2, say_color=False), ""


def _position(dice: Dice) -> _Plan:
    return _things(dice, 2, say_color=False), dice.pick(RELATIONS)


def _counting(dice: Dice) -> _Plan:
    (part,) = _things(dice, 1, say_color=False)
    return (replace(part, count=2 + dice.below(3)),), ""


def _attribute_binding(dice: Dice) -> _Plan:
    return _things(dice, 2), ""


def _words(dice: Dice) -> _Plan:
    return (_a_sign(dice, prompts.random_word(dice)),), ""


def _a_sign(dice: Dice, word: str) -> _Part:
    return _Part(kind="sign", color=dice.pick(SIGN_STYLES), word=word, say_color=dice.chance(0.3))


def _related(dice: Dice) -> _Plan:
    """Two coloured things, or groups of them, and where they stand."""
    parts = _things(dice, 2, same_kind=0.1)
    if dice.chance(0.2):
        first = replace(parts[0], count=1 + dice.below(3))
        parts = (first, replace(parts[1], count=1 + dice.below(4 - first.count)))
    if dice.chance(0.2):
        parts = tuple(replace(part, say_size=True) for part in parts)
    return parts, dice.pick(RELATIONS)


def _free(dice: Dice) -> _Plan:
    """One to four objects with anything said of them, or a sign with something beside it."""
    if dice.chance(0.12):
        sign = _a_sign(dice, prompts.random_word(dice))
        (other,) = _things(dice, 1)
        relation = dice.pick(("above", "below")) if dice.chance(0.4) else ""
        return (sign, other), relation
    num_groups = dice.weighted(((1, 0.35), (2, 0.4), (3, 0.2), (4, 0.05)))
    parts = list(_things(dice, num_groups, same_kind=0.08))
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


_TEXT: dict[str, Callable[[Dice], _Plan]] = {
    "single": _single,
    "colors": _colors,
    "two_objects": _two_objects,
    "position": _position,
    "counting": _counting,
    "attribute_binding": _attribute_binding,
    "words": _words,
    "related": _related,
    "free": _free,
}
#: How often the prompt names the background; the categories of evaluation never do.
_SAY_BACKGROUND = {"related": 0.25, "free": 0.55}


def _text_to_image(dice: Dice, category: str | None) -> Sample:
    name = category if category is not None else dice.weighted(_MIX)
    parts, relation = _TEXT[name](dice)
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = _build(dice, parts, background, relations)
    said = background if dice.chance(_SAY_BACKGROUND.get(name, 0.0)) else ""
    groups = tuple(part.group(size) for part, size in zip(parts, sizes, strict=True))
    text = prompts.caption(dice, groups, relation, said, plain=name not in _SAY_BACKGROUND)
    claims = _claims(parts, sizes, pairs, said)
    return Sample(task="text_to_image", category=name, prompt=text, scene=scene, claims=claims)


# Editing


def _edit(dice: Dice, category: str | None) -> Sample:
    kind = category if category is not None else dice.weighted(_EDIT_MIX)
    while True:
        made = _try_edit(dice, kind)
        if made is not None:
            return made


def _try_edit(dice: Dice, kind: str) -> Sample | None:
    background = dice.pick(BACKGROUNDS)
    count = dice.weighted(((1, 0.35), (2, 0.45), (3, 0.2)))
    if kind == "remove" and count == 1:
        count = 2
    parts: tuple[_Part, ...] = _things(dice, count, same_kind=0.12)
    if kind == "word":
        parts = (_a_sign(dice, prompts.random_word(dice)), *parts[: count - 1][:1])
    scene, _, _ = _build(dice, parts, background)
    objects = scene.objects
    i = 0 if kind == "word" else dice.below(len(objects))
    thing = objects[i]
    the = _the(dice, objects, i)
    new: tuple[Object, ...] = objects
    changed: tuple[int, ...] = (i,)
    ground = background
    relations: tuple[tuple[int, str, int], ...] = ()
    if kind == "recolour":
        used = {o.color for o in objects}
        color = dice.pick([c for c in COLORS if c not in used])
        new = _swap(objects, i, replace(thing, color=color))
        text = _fill(dice, _RECOLOUR, the=the, color=color)
    elif kind == "remove":
        new = objects[:i] + objects[i + 1 :]
        changed = ()
        text = _fill(dice, _REMOVE, the=the)
    elif kind == "add":
        added = _added(dice, objects)
        if added is None:
            return None
        new_object, relation, j = added
        new, changed = (*objects, new_object), (len(objects),)
        a = prompts.article(f"{new_object.color} {new_object.kind}")
        where = ""
        if relation:
            the = _the(dice, objects, j)
            relations = ((len(objects), relation, j),)
            where = f" {dice.pick(prompts.RELATION_PHRASES[relation])} {the}"
        text = _fill(dice, _ADD, a=a, where=where)
    elif kind == "replace":
        other = dice.pick([k for k in _KINDS if k not in {o.kind for o in objects}])
        color = thing.color
        if dice.chance(0.35):
            color = dice.pick([c for c in COLORS if c not in {o.color for o in objects}])
            text = _fill(dice, _REPLACE, the=the, a=prompts.article(f"{color} {other}"))
        else:
            text = _fill(dice, _BECOME, the=the, a=prompts.article(other))
        new = _swap(objects, i, replace(thing, kind=other, color=color))
    elif kind == "move":
        moved = _moved(dice, objects, i)
        if moved is None:
            return None
        new_object, side = moved
        new = _swap(objects, i, new_object)
        text = _fill(dice, _MOVE, the=the, side=side)
    elif kind == "background":
        ground = dice.pick([b for b in BACKGROUNDS if b != background])
        changed = ()
        text = _fill(dice, _BACKGROUND, place=dice.pick(prompts.PLACES[ground]), scene=ground)
        text = text.replace("{bare}", dice.pick(_BARE[ground]))
    else:
        same_length = [w for w in prompts.WORDS if len(w) == len(thing.word) and w != thing.word]
        if dice.chance(0.25):
            same_length = ["".join(dice.pick(prompts.LETTERS) for _ in thing.word)]
        word = dice.pick(same_length)
        if word == thing.word:
            return None
        new = _swap(objects, i, replace(thing, word=word))
        text = _fill(dice, _WORD, word=prompts.quoted(word), old=prompts.quoted(thing.word))
    if not _fits(new, changed):
        return None
    target = Scene(objects=new, background=ground)
    told = tuple(_full_claim(o) for o in new)
    claims = Claims(objects=told, relations=relations, background=ground)
    return Sample(
        task="edit",
        category=kind,
        prompt=text,
        scene=target,
        claims=claims,
        source=scene,
        edit=kind,
        changed=changed,
    )


def _full_claim(o: Object) -> Claim:
    return Claim(kind=o.kind, color=o.color, word=o.word, pattern=o.pattern, color2=o.color2)


def _swap(objects: tuple[Object, ...], i: int, thing: Object) -> tuple[Object, ...]:
    return (*objects[:i], thing, *objects[i + 1 :])


def _fits(objects: tuple[Object, ...], changed: tuple[int, ...]) -> bool:
    """Whether what changed still stands apart from the rest and within the picture."""
    for i in changed:
        box = objects[i].box
        if min(box[0], box[1], 1 - box[2], 1 - box[3]) < MARGIN - 1e-3:
            return False
        others = (o for j, o in enumerate(objects) if j != i)
        if not all(boxes_apart(box, o.box, MARGIN - 1e-3) for o in others):
            return False
    return True


def _the(dice: Dice, objects: tuple[Object, ...], i: int) -> str:
    """A name that means object i and no other: its colour is said where its kind is shared."""
    thing = objects[i]
    if thing.kind == "sign":
        return "the sign"
    shared = any(o.kind == thing.kind for j, o in enumerate(objects) if j != i)
    say = shared or dice.chance(0.5)
    return prompts.definite(Group(kind=thing.kind, color=thing.color if say else ""))


def _added(dice: Dice, objects: tuple[Object, ...]) -> tuple[Object, str, int] | None:
    """A new object beside the others: (object, relation to object j or "", j)."""
    used_kinds = {o.kind for o in objects}
    kind = dice.pick([k for k in _KINDS if k not in used_kinds])
    color = dice.pick([c for c in COLORS if c not in {o.color for o in objects}])
    size = _any_size(dice, len(objects) + 1)
    relation = dice.pick(RELATIONS) if dice.chance(0.5) else ""
    j = dice.below(len(objects))
    boxes = [o.box for o in objects]
    for _ in range(12):
        centre = place(dice, [extent(kind, size)], taken=boxes, tries=3)
        if centre is None:
            size = _smaller(size)
            continue
        x, y = centre[0]
        thing = Object(kind=kind, color=color, size=size, x=round(x, 4), y=round(y, 4))
        if not relation or holds(relation, thing.box, boxes[j], 0.7):
            return thing, relation, j
    return None


def _moved(dice: Dice, objects: tuple[Object, ...], i: int) -> tuple[Object, str] | None:
    """Object i at one side of the picture, its other coordinate kept; or None for no room."""
    thing = objects[i]
    width, height = thing.extent
    side = dice.pick(("left", "right", "top", "bottom"))
    gap = MARGIN + 0.01
    x, y = thing.x, thing.y
    if side == "left":
        x = gap + width / 2
    elif side == "right":
        x = 1 - gap - width / 2
    elif side == "top":
        y = gap + height / 2
    else:
        y = 1 - gap - height / 2
    if abs(x - thing.x) + abs(y - thing.y) < 0.2:
        return None
    return replace(thing, x=round(x, 4), y=round(y, 4)), side


_RECOLOUR = (
    "make {the} {color}",
    "change the colour of {the} to {color}",
    "turn {the} {color}",
    "paint {the} {color}",
    "recolour {the} to {color}",
    "{the} should be {color}",
)
_REMOVE = (
    "remove {the}",
    "delete {the}",
    "take away {the}",
    "take {the} out of the picture",
    "erase {the}",
)
_ADD = ("add {a}{where}", "put {a}{where}", "place {a}{where}", "add {a} to the picture{where}")
_REPLACE = ("replace {the} with {a}", "swap {the} for {a}", "change {the} to {a}")
_BECOME = ("turn {the} into {a}", "replace {the} with {a} of the same colour", "make {the} {a}")
_MOVE = (
    "move {the} to the {side}",
    "move {the} to the {side} of the picture",
    "put {the} at the {side}",
    "shift {the} to the {side}",
)
_BACKGROUND = (
    "change the background to {bare}",
    "put everything {place}",
    "change the background: {place}",
    "make the background {bare}",
    "the scene should be {place}",
)
_BARE = {
    "studio": ("a grey studio", "a grey studio floor"),
    "wood": ("a wooden table", "a table"),
    "grass": ("grass", "a meadow"),
    "snow": ("snow", "a snowy field"),
    "night": ("night", "a dark night"),
    "beach": ("a beach", "sand"),
}
_WORD = (
    "change the word on the sign to {word}",
    "make the sign say {word}",
    "replace {old} with {word}",
    "the sign should say {word}",
    "change the text to {word}",
)


def _fill(dice: Dice, templates: tuple[str, ...], **values: str) -> str:
    values.setdefault("bare", "{bare}")
    return dice.pick(templates).format(**values)


# Subjects

_ORDINALS = ("first", "second", "third")


def _subject(dice: Dice, category: str | None) -> Sample:
    count = dice.weighted(((1, 0.55), (2, 0.33), (3, 0.12)))
    kinds = dice.some(_KINDS, count)
    subjects = []
    for kind in kinds:
        first, second = _two_colors(dice)
        pattern = dice.pick(PATTERNS)
        subjects.append(Subject(kind=kind, pattern=pattern, color=first, color2=second))
    low = {1: ("medium", "large"), 2: ("medium",), 3: ("medium",)}[count]
    parts = [
        _Part(kind=s.kind, color=s.color, subject=s, size=dice.pick(SIZES[dice.pick(low)]))
        for s in subjects
    ]
    nouns = [_subject_noun(dice, i, s, count) for i, s in enumerate(subjects)]
    if count == 1 and dice.chance(0.3):  # a plain object beside the subject
        kind = dice.pick([k for k in _KINDS if k not in kinds])
        parts.append(_Part(kind=kind, color=dice.pick(COLORS)))
        nouns.append("")
    relation = dice.pick(RELATIONS) if len(parts) == 2 and dice.chance(0.5) else ""
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = _build(dice, tuple(parts), background, relations)
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
        claims=_claims(tuple(parts), sizes, pairs, said),
        subjects=tuple(subjects),
    )


def _two_colors(dice: Dice) -> list[str]:
    """Two colours that can be told apart within one small texture."""
    while True:
        pair = dice.some(COLORS, 2)
        first, second = (PALETTE[color] for color in pair)
        if sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) > 150**2:
            return pair


def _subject_noun(dice: Dice, i: int, subject: Subject, count: int) -> str:
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


# Language and understanding


def _describe(dice: Dice) -> tuple[Scene, Claims, str, tuple[_Part, ...]]:
    """A scene and a caption that says all of it."""
    parts, relation = _related(dice) if dice.chance(0.4) else _free(dice)
    parts = tuple(replace(p, say_color=True) for p in parts)
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = _build(dice, parts, background, relations)
    groups = tuple(p.group(s) for p, s in zip(parts, sizes, strict=True))
    text = prompts.caption(dice, groups, relation, background)
    return scene, _claims(parts, sizes, pairs, background), text, parts


def _language(dice: Dice, category: str | None) -> Sample:
    scene, claims, text, _ = _describe(dice)
    return Sample(
        task="language", category="language", prompt="", answer=text, scene=scene, claims=claims
    )


def _understanding(dice: Dice, category: str | None) -> Sample:
    scene, claims, answer, parts = _describe(dice)
    question = dice.pick(("Describe the picture.", "What is in the picture?", "Write a caption."))
    style = dice.random()
    things = [p for p in parts if p.kind != "sign"]
    if style < 0.2 and things:
        part = dice.pick(things)
        number = sum(p.count for p in things if p.kind == part.kind)
        question = f"How many {prompts.plural(part.kind)} are there?"
        answer = prompts.NUMBERS[number]
    elif style < 0.4 and things:
        part = dice.pick(things)
        if sum(p.kind == part.kind for p in things) == 1:
            verb, noun = (
                ("is", part.kind) if part.count == 1 else ("are", prompts.plural(part.kind))
            )
            question, answer = f"What colour {verb} the {noun}?", part.color
    elif style < 0.55 and claims.relations and len(scene.objects) == 2:
        i, relation, j = claims.relations[0]
        a, b = scene.objects[i], scene.objects[j]
        if a.kind != b.kind and "sign" not in (a.kind, b.kind):
            where = prompts.RELATION_PHRASES[relation][0]
            question = f"What is {where} the {b.kind}?"
            answer = prompts.article(f"{a.color} {a.kind}")
    elif style < 0.6:
        question = "Where is this?"
        answer = prompts.PLACES[scene.background][0]
    return Sample(
        task="understanding",
        category="understanding",
        prompt=question,
        answer=answer,
        scene=scene,
        claims=claims,
    )


_MAKE: dict[str, Callable[[Dice, str | None], Sample]] = {
    "text_to_image": _text_to_image,
    "edit": _edit,
    "subject": _subject,
    "language": _language,
    "understanding": _understanding,
}
