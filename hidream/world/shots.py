"""Shots: one figure before a camera, and how a prompt speaks of shot scale, angle and view."""

from __future__ import annotations

from collections.abc import Sequence

from hidream.camera import CAMERA, with_camera
from hidream.world import prompts
from hidream.world.figures import FIGURES
from hidream.world.lens import SHOTS, frame_of
from hidream.world.prompts import Group
from hidream.world.sample import Claim, Claims, Sample
from hidream.world.scene import BACKGROUNDS, COLORS, Camera, Dice, Object, Scene
from hidream.world.typed import request_of, typed_camera

#: How often a camera has a value that the prompt leaves unsaid.
_USUAL: dict[str, tuple[tuple[str, float], ...]] = {
    "shot": (("full", 0.5), ("medium-full", 0.3), ("medium", 0.2)),
    "angle": (("eye-level", 0.7), ("high", 0.3)),
    "view": (("three-quarter", 0.5), ("side", 0.25), ("front", 0.25)),
}
_SAID: tuple[tuple[tuple[str, ...], float], ...] = (
    (("shot",), 0.2),
    (("angle",), 0.12),
    (("view",), 0.16),
    (("shot", "angle"), 0.12),
    (("shot", "view"), 0.16),
    (("angle", "view"), 0.12),
    (("shot", "angle", "view"), 0.12),
)
#: Other words for a field's value; every list begins with those of `hidream.camera`.
SHOT_PHRASES: dict[str, tuple[str, ...]] = {
    "extreme-full": ("an extreme full shot of", "a very wide shot of", "an extreme long shot of"),
    "full": ("a full shot of", "a full-length shot of", "a long shot of"),
    "medium-full": ("a medium full shot of", "a medium long shot of"),
    "medium": ("a medium shot of", "a mid shot of"),
    "medium-close-up": ("a medium close-up of",),
    "close-up": ("a close-up of", "a close-up shot of", "a close shot of"),
    "extreme-close-up": ("an extreme close-up of", "a macro shot of", "a detail of"),
}
ANGLE_PHRASES: dict[str, tuple[str, ...]] = {
    "high": ("from a high angle", "high angle", "looking down at it"),
    "low": ("from a low angle", "low angle", "from below"),
    "eye-level": ("at eye level", "eye-level"),
    "birds-eye": ("from above", "seen from above", "from a bird's-eye view", "from overhead"),
}
VIEW_PHRASES: dict[str, tuple[str, ...]] = {
    "front": ("from the front", "seen from the front", "front view"),
    "side": ("from the side", "seen from the side", "in profile", "side view"),
    "back": ("from behind", "seen from behind", "from the back", "back view"),
    "three-quarter": ("three-quarter view", "in three-quarter view", "from a three-quarter view"),
}


def place(kind: str, camera: Camera, column: float = 0.5) -> tuple[float, float]:
    """Where the point that the camera looks at lies in the picture. Seen from below, a figure that
    is whole stands on the horizon; else it is in the middle, a small one at its own `column`."""
    share, _ = SHOTS[camera.shot]
    if camera.shot != "extreme-full":
        column = 0.5
    if camera.angle == "low" and share < 1:
        frame = frame_of(kind, camera)
        return column, 0.9 - (frame.y - frame.low) * frame.scale
    return column, 0.55 if camera.angle == "high" and share < 0.6 else 0.5


def shot_scene(
    kind: str, color: str, background: str, camera: Camera, column: float = 0.5
) -> Scene:
    """A figure as a camera sees it."""
    x, y = place(kind, camera, column)
    thing = Object(kind=kind, color=color, size=SHOTS[camera.shot][0], x=x, y=y)
    return Scene(objects=(thing,), background=background, camera=camera)


def tellable(said: Sequence[str], values: dict[str, str]) -> bool:
    """Whether a picture can show all that is said. From straight above there is no front; in a
    detail that fills the picture neither angle nor view is sure."""
    if values["angle"] == "birds-eye" and "view" in said:
        return False
    return values["shot"] != "extreme-close-up" or said == ("shot",)


def shots(dice: Dice) -> Sample:
    """A sample of the category: a camera, and a prompt that says one to three things of it."""
    while True:
        said = dice.weighted(_SAID)
        values = {
            field: dice.pick(tuple(CAMERA[field])) if field in said else dice.weighted(usual)
            for field, usual in _USUAL.items()
        }
        if tellable(said, values):
            break
    kind, color = dice.pick(FIGURES), dice.pick(COLORS)
    background = dice.pick(BACKGROUNDS)
    turn = 1 if dice.chance(0.5) else -1
    column = dice.pick((0.375, 0.5, 0.625))
    scene = shot_scene(kind, color, background, Camera(**values, turn=turn), column)
    told = {field: values[field] for field in said}
    say_color = dice.chance(0.75)
    wide = SHOTS[values["shot"]][0] < 1
    ground = background if wide and dice.chance(0.15) else ""
    group = Group(kind=kind, color=color if say_color else "")
    return Sample(
        task="text_to_image",
        category="shots",
        prompt=shot_prompt(dice, group, told, ground),
        scene=scene,
        claims=Claims(
            objects=(Claim(kind=kind, color=group.color),), background=ground, camera=told
        ),
    )


def shot_prompt(dice: Dice, group: Group, told: dict[str, str], background: str = "") -> str:
    """A figure and what is said of its camera (field -> value of `CAMERA`) as a prompt."""
    style = dice.random()
    what = prompts.phrase(dice, group)
    if style < 0.4:  # as `hidream generate --shot --angle --view` writes it
        text = prompts.in_place(dice, prompts.opening(dice, what), background)
        return with_camera(text, **{field: told.get(field) for field in CAMERA})
    if style < 0.6:
        words = [CAMERA[field][value] for field, value in told.items()]
        text = prompts.in_place(dice, what, background)
        return ", ".join([text, *words] if dice.chance(0.6) else [*words, text])
    if style < 0.85:
        return _spoken(dice, what, told, background)
    where = dice.pick(prompts.PLACES[background]) if background else ""
    return request_of(dice, typed_camera(dice, prompts.name(group), told, where))


def _spoken(dice: Dice, what: str, told: dict[str, str], background: str) -> str:
    """ "a close-up of a red car from the side"."""
    text = what
    if "view" in told:
        text += _after(dice.pick(VIEW_PHRASES[told["view"]]))
    if "angle" in told:
        text += _after(dice.pick(ANGLE_PHRASES[told["angle"]]))
    if "shot" in told:
        text = f"{dice.pick(SHOT_PHRASES[told['shot']])} {text}"
    return prompts.in_place(dice, text, background)


def _after(words: str) -> str:
    """A phrase behind a noun, with a comma where it is no adverb."""
    return f", {words}" if words.split()[0] not in ("from", "seen", "in", "at") else f" {words}"
