"""What a scene of the procedural world is, and how one is laid out.

A scene is the exact truth behind a picture: which objects, of which kind, colour and size, where,
before which background. Coordinates and sizes are fractions of the picture (x to the right, y
down); on a picture that is not square, sizes are fractions of its shorter side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WORLD_VERSION = "2.0"

#: Kind of object -> (width, height) of its tight box in units of the object's size.
KINDS: dict[str, tuple[float, float]] = {
    "cube": (0.9, 1.0),
    "sphere": (1.0, 1.0),
    "cone": (0.84, 1.0),
    "cylinder": (0.68, 1.0),
    "star": (1.0, 0.96),
    "heart": (1.0, 0.92),
    "ring": (1.0, 1.0),
    "moon": (0.74, 1.0),
    "house": (0.94, 1.0),
    "tree": (0.86, 1.0),
    "fish": (1.0, 0.62),
    "car": (1.0, 0.6),
    "mug": (1.0, 0.86),
    "umbrella": (1.0, 1.0),
}
#: The ten colours of GenEval.
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
BACKGROUNDS = ("studio", "wood", "grass", "snow", "night", "beach")
#: The plain backdrop of reference pictures; never the background of a scene.
PLAIN = "plain"
PATTERNS = ("stripes", "bands", "dots", "checks", "halves")
SIGN_STYLES = ("white", "wooden")
RELATIONS = ("left", "right", "above", "below")

#: Size name -> the size (a fraction of the picture's side).
SIZES: dict[str, float] = {"small": 0.22, "medium": 0.31, "large": 0.43}
#: Centres stand on a lattice of eighths. Together with three sizes it leaves every kind three ways
#: to lie across the patches instead of thousands: what two cores can learn in two hours.
LATTICE = 8
MARGIN = 0.028  # between two objects, and between an object and the picture's edge
HORIZON = 0.2  # the ground begins here: every object stands on it


class Dice:
    """The random numbers of one sample, keyed by integers: the same key, the same numbers.

    Only `random()` of the Mersenne twister is used: Python promises its sequence for an integer
    key in every version, which it does not for `choice` or `shuffle`.
    """

    def __init__(self, *key: int) -> None:
        packed = 1
        for part in key:
            packed = (packed << 64) | part
        self.random = random.Random(packed).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def below(self, bound: int) -> int:
        return int(self.random() * bound)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """One of `options` with the weights beside them."""
        point = self.random() * sum(weight for _, weight in options)
        for option, weight in options:
            point -= weight
            if point < 0:
                return option
        return options[-1][0]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options, in random order."""
        pool = list(options)
        return [pool.pop(int(self.random() * len(pool))) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Object:
    """One thing in a scene: its centre (x, y) and size are fractions of the picture.

    A textured object has a `pattern` of `color` and `color2`. A sign has kind "sign", a style of
    `SIGN_STYLES` as its colour, and a `word`; its size is the width of its board.
    """

    kind: str
    color: str
    size: float
    x: float
    y: float
    pattern: str = ""
    color2: str = ""
    word: str = ""

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height of the tight box."""
        return extent(self.kind, self.size, self.word)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        width, height = self.extent
        return (
            self.x - width / 2,
            self.y - height / 2,
            self.x + width / 2,
            self.y + height / 2,
        )

    @property
    def size_name(self) -> str:
        return size_name(self.size)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """How a figure is seen: names of `hidream.camera`. `turn` is 1 or -1: the flank that side and
    three-quarter views show, the figure facing left or right."""

    shot: str
    angle: str
    view: str
    turn: int = 1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects before a background. With a `camera` there is one object, a figure with depth
    (`hidream.world.figures`); its size is the share of the picture that its longer side takes, its
    (x, y) the place of the point that the camera looks at."""

    objects: tuple[Object, ...]
    background: str
    camera: Camera | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An object with a texture of its own, as reference pictures show it."""

    kind: str
    pattern: str
    color: str
    color2: str


def size_name(size: float) -> str:
    """ "small", "medium" or "large": the name of the nearest size."""
    return "small" if size < 0.265 else "medium" if size < 0.37 else "large"


def extent(kind: str, size: float, word: str = "") -> tuple[float, float]:
    """Width and height of an object's tight box, as fractions of the picture's side."""
    if kind == "sign":
        _, board_height, post = sign_shape(word)
        return size, board_height + post
    width, height = KINDS[kind]
    return width * size, height * size


def sign_cell(word: str) -> float:
    """Width of the cell of one letter on a sign with that word."""
    return min(0.17, 0.8 / len(word))


def sign_shape(word: str) -> tuple[float, float, float]:
    """Width of a sign's board, height of the board, and length of the post under it."""
    cell = sign_cell(word)
    return cell * len(word) + 0.06, cell * 1.25 + 0.055, 0.06


Box = tuple[float, float, float, float]
EVERYWHERE: Box = (0.0, 0.0, 1.0, 1.0)


def boxes_apart(a: Box, b: Box, margin: float = MARGIN) -> bool:
    """Whether two boxes keep `margin` between them."""
    return (
        a[2] + margin <= b[0]
        or b[2] + margin <= a[0]
        or a[3] + margin <= b[1]
        or b[3] + margin <= a[1]
    )


def lattice(low: float, high: float) -> list[float]:
    """The places of the lattice from `low` to `high`, rising."""
    first, last = math.ceil(LATTICE * low - 1e-6), math.floor(LATTICE * high + 1e-6)
    return [i / LATTICE for i in range(first, last + 1)]


def holds(relation: str, a: Box, b: Box, threshold: float = 0.5) -> bool:
    """Whether box `a` is left of / right of / above / below box `b`.

    GenEval's rule: the offset between the centres, less a tenth of both sizes, points more than
    `threshold` (cosine) into the direction. So a diagonal neighbour is both left of and above.
    """
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    slack_x = 0.1 * (a[2] - a[0] + b[2] - b[0])
    slack_y = 0.1 * (a[3] - a[1] + b[3] - b[1])
    dx = max(abs(dx) - slack_x, 0.0) * (1 if dx > 0 else -1)
    dy = max(abs(dy) - slack_y, 0.0) * (1 if dy > 0 else -1)
    length = (dx * dx + dy * dy) ** 0.5
    if length == 0:
        return False
    along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
    return along / length > threshold


def place(
    dice: Dice,
    extents: Sequence[tuple[float, float]],
    relations: Sequence[tuple[int, str, int]] = (),
    taken: Sequence[Box] = (),
    tries: int = 24,
) -> list[tuple[float, float]] | None:
    """Centres for boxes of the given (width, height) that keep apart and fulfil the relations.

    `relations` holds (i, relation, j): box i is left of / right of / above / below box j. `taken`
    are boxes that already stand. None if no place was found in `tries` attempts.
    """
    low, high = MARGIN, 1.0 - MARGIN
    regions = [EVERYWHERE] * len(extents)
    for _ in range(tries):
        if relations:
            regions = _halves(dice, extents, relations)
        boxes: list[Box] = []
        for (width, height), region in zip(extents, regions, strict=True):
            columns = lattice(max(low, region[0]) + width / 2, min(high, region[2]) - width / 2)
            rows = lattice(max(low, region[1]) + height / 2, min(high, region[3]) - height / 2)
            if not columns or not rows:
                break
            for _ in range(10):
                x, y = dice.pick(columns), dice.pick(rows)
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                if all(boxes_apart(box, other) for other in taken) and all(
                    boxes_apart(box, other) for other in boxes
                ):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(extents) and all(
            holds(relation, boxes[i], boxes[j], 0.75) for i, relation, j in relations
        ):
            return [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
    return None


def _halves(
    dice: Dice,
    extents: Sequence[tuple[float, float]],
    relations: Sequence[tuple[int, str, int]],
) -> list[Box]:
    """Regions on two sides of a line, so that relations hold without many attempts."""
    axis = 0 if relations[0][1] in ("left", "right") else 1
    first = {i if r in ("left", "above") else j for i, r, j in relations}
    second = {j if r in ("left", "above") else i for i, r, j in relations}
    need_first = max(extents[i][axis] for i in first) + MARGIN
    need_second = max(extents[i][axis] for i in second) + 2 * MARGIN
    line = dice.uniform(need_first, max(need_first, 1 - need_second))
    regions = []
    for i in range(len(extents)):
        region = [0.0, 0.0, 1.0, 1.0]
        if i in first:
            region[2 + axis] = line + 1e-9
        elif i in second:
            region[axis] = line
        regions.append((region[0], region[1], region[2], region[3]))
    return regions
