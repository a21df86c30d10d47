"""From a scene to its picture: a background, then sprites from far to near."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from hidream.world.lens import HORIZONS, figure_sprite
from hidream.world.scene import HORIZON, PLAIN, Camera, Object, Scene, Subject, sign_cell
from hidream.world.sprites import (
    SIGN_TONES,
    board_sprite,
    letter_mask,
    plain_sprite,
    textured_sprite,
)

#: Background -> (top of the sky, sky at the horizon, ground at the horizon, ground at the bottom).
_GROUNDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "studio": ((150, 154, 160), (172, 176, 181), (186, 189, 193), (158, 161, 166)),
    "wood": ((246, 236, 216), (240, 226, 200), (222, 180, 124), (206, 160, 102)),
    "grass": ((150, 204, 244), (204, 232, 250), (176, 214, 108), (140, 192, 80)),
    "snow": ((160, 190, 220), (190, 214, 236), (228, 237, 247), (208, 223, 240)),
    "night": ((40, 44, 96), (64, 66, 128), (82, 84, 140), (62, 64, 118)),
    "beach": ((110, 190, 226), (136, 212, 228), (246, 222, 170), (236, 206, 146)),
    PLAIN: ((236, 236, 236), (236, 236, 236), (236, 236, 236), (224, 224, 224)),
}


@lru_cache(maxsize=64)
def background(name: str, width: int, height: int, horizon: float = HORIZON) -> Image.Image:
    """The empty picture of a background; below 0 or above 1, the horizon is out of sight."""
    sky_top, sky_low, ground_top, ground_low = (
        np.array(colour, np.float32) for colour in _GROUNDS[name]
    )
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    sky = sky_top + (sky_low - sky_top) * np.clip(y / horizon, 0, 1)
    ground = ground_top + (ground_low - ground_top) * np.clip((y - horizon) / (1 - horizon), 0, 1)
    mix = np.clip((y - horizon) / 0.025 + 0.5, 0, 1)
    rows = sky * (1 - mix) + ground * mix  # (h, 3)
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    glow = 1 + 0.03 * (0.5 - np.abs(x - 0.5)) * 2 - 0.015  # a little light in the middle
    picture = np.clip(rows[:, None, :] * glow[None, :, None], 0, 255)
    return Image.fromarray((picture + 0.5).astype(np.uint8))


def paste_object(picture: Image.Image, thing: Object) -> None:
    """Draws one object onto the picture."""
    width, height = picture.size
    side = min(width, height)
    if thing.kind == "sign":
        _paste_sign(picture, thing, side)
        return
    pixels = max(4, round(thing.size * side))
    if thing.pattern:
        sprite, mask, _ = textured_sprite(
            thing.kind, thing.pattern, thing.color, thing.color2, pixels
        )
    else:
        sprite, mask, _ = plain_sprite(thing.kind, thing.color, pixels)
    left = round(thing.x * width - sprite.width / 2)
    top = round(thing.y * height - sprite.height / 2)
    picture.paste(sprite, (left, top), mask)


def _paste_sign(picture: Image.Image, thing: Object, side: int) -> None:
    letters = len(thing.word)
    sprite, mask, pad = board_sprite(thing.color, letters, side)
    left = round(thing.x * picture.width - sprite.width / 2)
    top = round(thing.y * picture.height - sprite.height / 2)
    picture.paste(sprite, (left, top), mask)
    cell = sign_cell(thing.word) * side
    x0 = left + pad + (sprite.width - 2 * pad - cell * letters) / 2
    y0 = top + pad + 0.0275 * side
    ink = SIGN_TONES[thing.color][2]
    for i, letter in enumerate(thing.word):
        picture.paste(ink, (round(x0 + i * cell), round(y0)), letter_mask(letter, letters, side))


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The picture of a scene as a PIL image (RGB)."""
    if scene.camera is not None:
        return _shoot(scene, scene.camera, width, height)
    picture = background(scene.background, width, height).copy()
    for thing in sorted(scene.objects, key=lambda o: o.y + o.extent[1] / 2):
        paste_object(picture, thing)
    return picture


def _shoot(scene: Scene, camera: Camera, width: int, height: int) -> Image.Image:
    """The picture that a camera takes of the scene's figure."""
    picture = background(scene.background, width, height, HORIZONS[camera.angle]).copy()
    for thing in scene.objects:
        sprite, mask, shadow = figure_sprite(thing, camera, width, height)
        picture.paste((16, 16, 16), (0, 0), shadow)
        picture.paste(sprite, (0, 0), mask)
    return picture


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """The picture of a scene: uint8 (height, width, 3). A pure function of its arguments."""
    return np.asarray(draw(scene, width, height))


def subject_scene(subject: Subject) -> Scene:
    """The scene of a reference picture: the subject alone, large, before a plain backdrop."""
    thing = Object(
        kind=subject.kind,
        color=subject.color,
        color2=subject.color2,
        pattern=subject.pattern,
        size=0.66,
        x=0.5,
        y=0.5,
    )
    return Scene(objects=(thing,), background=PLAIN)


def render_subject(subject: Subject, width: int, height: int) -> np.ndarray:
    """The reference picture of a subject: uint8 (height, width, 3)."""
    return render(subject_scene(subject), width, height)
