"""How good the judge is: right on true pictures, wrong on damaged ones, category by category."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from hidream.camera import CAMERA
from hidream.judges.panels import OF_CATEGORY
from hidream.judges.world import JUDGE_VERSION, judge
from hidream.world.figures import FIGURES
from hidream.world.render import paste_object, render
from hidream.world.scene import COLORS, KINDS, PATTERNS, Dice, Object, boxes_apart, extent
from hidream.world.shots import shot_scene, tellable
from hidream.world.tasks import CATEGORIES, Sample, eval_seed, sample

BLUR = 0.03  # standard deviation, of the picture's side
NOISE = 25  # standard deviation, of 255
Picture = np.ndarray
Damage = Callable[[Sample, Dice, int], Picture | None]


def missing(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One object is not there."""
    objects = item.scene.objects
    if not objects:
        return None
    i = dice.below(len(objects))
    return _draw(item, objects[:i] + objects[i + 1 :], side)


def extra(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One object more is there."""
    if item.scene.camera is not None:
        return _before_the_figure(item, dice, side)
    boxes = [o.box for o in item.scene.objects]
    for _ in range(200):
        kind, color = dice.pick(tuple(KINDS)), dice.pick(COLORS)
        size = dice.pick((0.2, 0.22, 0.24))
        width, height = extent(kind, size)
        x, y = dice.uniform(width / 2, 1 - width / 2), dice.uniform(height / 2, 1 - height / 2)
        thing = Object(kind=kind, color=color, size=size, x=x, y=y)
        if all(boxes_apart(thing.box, box, 0.0) for box in boxes):
            return _draw(item, (*item.scene.objects, thing), side)
    return None


def _before_the_figure(item: Sample, dice: Dice, side: int) -> Picture:
    """A flat object stands between a camera and its figure."""
    picture = Image.fromarray(item.target(side, side))
    color = dice.pick([c for c in COLORS if c != item.scene.objects[0].color])
    x, y = dice.uniform(0.15, 0.85), dice.uniform(0.15, 0.85)
    thing = Object(kind=dice.pick(tuple(KINDS)), color=color, size=0.24, x=x, y=y)
    paste_object(picture, thing)
    return np.asarray(picture)


def wrong_color(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One object whose colour the prompt says has another."""
    claimed = [
        i
        for i, claim in enumerate(item.claims.objects)
        if claim.color and claim.kind != "sign" and not claim.pattern
    ]
    if not claimed:
        return None
    i = dice.pick(claimed)
    used = {o.color for o in item.scene.objects}
    color = dice.pick([c for c in COLORS if c not in used])
    return _draw(item, _changed(item, i, color=color), side)


def wrong_class(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One object is of another kind."""
    i = _some_object(item, dice)
    if i is None:
        return None
    if item.scene.camera is not None:
        thing = item.scene.objects[0]
        kind = dice.pick([k for k in FIGURES if k != thing.kind])
        scene = shot_scene(kind, thing.color, item.scene.background, item.scene.camera)
        return render(scene, side, side)
    return _draw(item, _changed(item, i, kind=_other_kind(item, dice)), side)


def blended(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One object is halfway between its kind and another."""
    other = wrong_class(item, dice, side)
    if other is None:
        return None
    return _byte((item.target(side, side).astype(np.float32) + other) / 2)


def wrong_texture(item: Sample, dice: Dice, side: int) -> Picture | None:
    """A subject bears another pattern."""
    textured = [i for i, o in enumerate(item.scene.objects) if o.pattern]
    if not textured:
        return None
    i = dice.pick(textured)
    pattern = dice.pick([p for p in PATTERNS if p != item.scene.objects[i].pattern])
    return _draw(item, _changed(item, i, pattern=pattern), side)


def wrong_word(item: Sample, dice: Dice, side: int) -> Picture | None:
    """One letter of a sign is another."""
    for i, thing in enumerate(item.scene.objects):
        if thing.word:
            at = dice.below(len(thing.word))
            letter = dice.pick([x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if x != thing.word[at]])
            word = thing.word[:at] + letter + thing.word[at + 1 :]
            return _draw(item, _changed(item, i, word=word), side)
    return None


def _seen_otherwise(field: str) -> Damage:
    def damage(item: Sample, dice: Dice, side: int) -> Picture | None:
        camera, told = item.scene.camera, item.claims.camera
        if camera is None or field not in told:
            return None
        value = dice.pick([v for v in CAMERA[field] if v != told[field]])
        change: dict[str, Any] = {field: value}
        thing, other = item.scene.objects[0], replace(camera, **change)
        if not tellable(tuple(told), {name: getattr(other, name) for name in CAMERA}):
            return None
        return render(shot_scene(thing.kind, thing.color, item.scene.background, other), side, side)

    damage.__doc__ = f"The figure is seen in another {field} than the prompt says."
    return damage


def unedited(item: Sample, dice: Dice, side: int) -> Picture | None:
    """An edit's source, unchanged."""
    return None if item.source is None else item.reference_pictures(side, side)[0]


def blurred(item: Sample, dice: Dice, side: int) -> Picture | None:
    """The true picture out of focus."""
    image = Image.fromarray(item.target(side, side))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR * side)))


def noisy(item: Sample, dice: Dice, side: int) -> Picture | None:
    """The true picture under noise."""
    generator = np.random.Generator(np.random.Philox(key=dice.below(2**32)))
    noise = NOISE * generator.standard_normal((side, side, 3))
    return _byte(item.target(side, side) + noise)


DAMAGES: dict[str, Damage] = {
    "missing": missing,
    "extra": extra,
    "wrong_color": wrong_color,
    "wrong_class": wrong_class,
    "blended": blended,
    "wrong_texture": wrong_texture,
    "wrong_word": wrong_word,
    "wrong_shot": _seen_otherwise("shot"),
    "wrong_angle": _seen_otherwise("angle"),
    "wrong_view": _seen_otherwise("view"),
    "unedited": unedited,
    "blurred": blurred,
    "noisy": noisy,
}


def damages_of(category: str) -> dict[str, Damage]:
    """The damages that are done to a category's pictures, some of them to some only."""
    own = OF_CATEGORY.get(category, {})
    if category == "storyboards":  # the others know of one scene
        return {**own, "blurred": blurred, "noisy": noisy}
    return {**DAMAGES, **own}


def _byte(picture: np.ndarray) -> Picture:
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _draw(item: Sample, objects: tuple[Object, ...], side: int) -> Picture:
    return render(replace(item.scene, objects=objects), side, side)


def _changed(item: Sample, i: int, **fields: Any) -> tuple[Object, ...]:
    objects = item.scene.objects
    return (*objects[:i], replace(objects[i], **fields), *objects[i + 1 :])


def _some_object(item: Sample, dice: Dice) -> int | None:
    candidates = [i for i, o in enumerate(item.scene.objects) if o.kind != "sign"]
    return dice.pick(candidates) if candidates else None


def _other_kind(item: Sample, dice: Dice) -> str:
    return dice.pick([k for k in KINDS if k not in {o.kind for o in item.scene.objects}])


def measure_judge(
    seed: int,
    num_scenes: int,
    *,
    side: int | Mapping[str, int] = 128,
    categories: tuple[str, ...] = CATEGORIES,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """The judge's figures on `num_scenes` scenes of evaluation seed `seed` for each category.

    Every scene is judged as it is and once with one damage, each kind of damage in turn (the ones
    that do not apply to a scene are passed over). `side` is that of the square pictures in pixels,
    or that of each category. Returns `right_on_true` and `wrong_on_damaged`, over all and by
    category and damage, with the numbers of pictures.
    """
    truths: dict[str, list[bool]] = {}
    damaged: dict[str, list[bool]] = {}
    by_damage: dict[str, list[bool]] = defaultdict(list)
    done, total = 0, num_scenes * len(categories)
    for category in categories:
        truths[category], damaged[category] = [], []
        pixels = side if isinstance(side, int) else side[category]
        damages = damages_of(category)
        for index in range(num_scenes):
            item = sample("text_to_image", eval_seed(seed), index, category=category)
            truths[category].append(judge(item.target(pixels, pixels), item).right)
            dice = Dice(seed, index, CATEGORIES.index(category))
            names = list(damages)
            for step in range(len(names)):
                name = names[(index + step) % len(names)]
                picture = damages[name](item, dice, pixels)
                if picture is not None:
                    wrong = not judge(picture, item).right
                    damaged[category].append(wrong)
                    by_damage[name].append(wrong)
                    break
            done += 1
            if progress is not None:
                progress(done, total)
    return {
        "version": JUDGE_VERSION,
        "n": total,
        "right_on_true": _mean([right for values in truths.values() for right in values]),
        "wrong_on_damaged": _mean([wrong for values in damaged.values() for wrong in values]),
        "categories": {
            name: {
                "n": num_scenes,
                "right_on_true": _mean(truths[name]),
                "wrong_on_damaged": _mean(damaged[name]),
            }
            for name in categories
        },
        "damages": {
            name: {"n": len(values), "wrong": _mean(values)}
            for name, values in sorted(by_damage.items())
        },
    }


def _mean(values: list[bool]) -> float:
    return round(sum(values) / max(len(values), 1), 4)
