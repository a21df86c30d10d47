"""Edits: a scene, an instruction, and the scene that it asks for."""

from __future__ import annotations

from dataclasses import replace

from hidream.world import prompts
from hidream.world.build import ALL_KINDS, Part, any_size, build_scene, smaller, some_things
from hidream.world.prompts import Group
from hidream.world.sample import Claim, Claims, Sample
from hidream.world.scene import (
    BACKGROUNDS,
    COLORS,
    MARGIN,
    RELATIONS,
    Dice,
    Object,
    Scene,
    boxes_apart,
    extent,
    holds,
    lattice,
    place,
)
from hidream.world.text_to_image import a_sign

EDITS = ("recolour", "remove", "add", "replace", "move", "background", "word")
_EDIT_MIX = (
    ("recolour", 0.22),
    ("remove", 0.15),
    ("add", 0.16),
    ("replace", 0.15),
    ("move", 0.12),
    ("background", 0.14),
    ("word", 0.06),
)


def edit(dice: Dice, category: str | None) -> Sample:
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
    parts: tuple[Part, ...] = some_things(dice, count, same_kind=0.12)
    if kind == "word":
        parts = (a_sign(dice, prompts.random_word(dice)), *parts[: count - 1][:1])
    scene, _, _ = build_scene(dice, parts, background)
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
        other = dice.pick([k for k in ALL_KINDS if k not in {o.kind for o in objects}])
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
    kind = dice.pick([k for k in ALL_KINDS if k not in used_kinds])
    color = dice.pick([c for c in COLORS if c not in {o.color for o in objects}])
    size = any_size(dice, len(objects) + 1)
    relation = dice.pick(RELATIONS) if dice.chance(0.5) else ""
    j = dice.below(len(objects))
    boxes = [o.box for o in objects]
    for _ in range(12):
        centre = place(dice, [extent(kind, size)], taken=boxes, tries=3)
        if centre is None:
            size = smaller(size)
            continue
        x, y = centre[0]
        thing = Object(kind=kind, color=color, size=size, x=x, y=y)
        if not relation or holds(relation, thing.box, boxes[j], 0.7):
            return thing, relation, j
    return None


def _moved(dice: Dice, objects: tuple[Object, ...], i: int) -> tuple[Object, str] | None:
    """Object i at one side of the picture, its other coordinate kept; None if it is there."""
    thing = objects[i]
    width, height = thing.extent
    side = dice.pick(("left", "right", "top", "bottom"))
    x, y = thing.x, thing.y
    columns = lattice(MARGIN + width / 2, 1 - MARGIN - width / 2)
    rows = lattice(MARGIN + height / 2, 1 - MARGIN - height / 2)
    if side == "left":
        x = columns[0]
    elif side == "right":
        x = columns[-1]
    elif side == "top":
        y = rows[0]
    else:
        y = rows[-1]
    if abs(x - thing.x) + abs(y - thing.y) < 0.2:
        return None
    return replace(thing, x=x, y=y), side


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
