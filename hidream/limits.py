"""What a value of a request may be: prompts, sizes, numbers, seeds, boxes; each checked alone."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from hidream.errors import InputError, UsageError

MAX_PROMPT = 32_000  # characters
MAX_SIDE = 8192  # pixels
MAX_AREA = 4096 * 4096
MAX_SEED = 2**63 - 1
MAX_REFERENCES = 11  # one person and ten objects, as in the paper's subject benchmark
MAX_BOXES = 10  # the colours a layout picture has
TRAINED_BOXES = 5  # more than the published checkpoints have seen
MAX_IMAGES = 1000
MAX_BATCH = 16  # pictures drawn together, fewer when they are large
MAX_LORAS = 16
MAX_LORA_SCALE = 100
BATCH_AREA = 4 * 1024 * 1024  # pixels of a batch, unless one picture alone has more
SPARSE_BLOCK = 64  # patches that sparse attention keeps or skips together

Box = tuple[float, float, float, float]
Lora = tuple[str, float]  # a path or hub name, and how strongly it acts

Range = tuple[bool, float, float, bool]

# field -> (whole numbers only, lowest, highest, is the lowest itself allowed)
RANGES: dict[str, Range] = {
    "num_inference_steps": (True, 1, 1000, True),
    "num_images": (True, 1, MAX_IMAGES, True),
    "guidance_scale": (False, 0, 100, True),
    "shift": (False, 0, 100, False),
    "noise_scale": (False, 0, 1000, False),
    "noise_clip_std": (False, 0, 1000, False),
    "strength": (False, 0, 1, False),
    "image_guidance_scale": (False, 0, 100, True),
    "refine_strength": (False, 0, 1, True),
    "sparsity": (False, 0, 1, True),
}
TEXT_RANGES: dict[str, Range] = {
    "max_new_tokens": (True, 1, 32_768, True),
    "temperature": (False, 0, 100, True),
    "top_p": (False, 0, 1, False),
    "top_k": (True, 1, 1_000_000, True),
}


def batch_size(width: int, height: int) -> int:
    """How many pictures of one size are drawn together: 1 … 16."""
    return max(1, min(MAX_BATCH, BATCH_AREA // (width * height)))


def skipped_blocks(num_patches: int, sparsity: float, size: int = SPARSE_BLOCK) -> int:
    """How many of a picture's blocks of patches each block does not read; never all."""
    return int(sparsity * (num_patches // size) + 1e-9)


def clean_prompt(text: object, name: str = "prompt", *, may_be_empty: bool = False) -> str:
    """The prompt with newlines and tabs as spaces.

    Raises:
        InputError: empty, too long, or it holds control characters or half a character.
    """
    if not isinstance(text, str):
        raise UsageError(f"{name} is {type(text).__name__}; it must be text.")
    if len(text) > MAX_PROMPT:
        raise InputError(
            f"{name} has {len(text)} characters; the limit is {MAX_PROMPT}.", "Shorten it."
        )
    text = text.replace("\r\n", " ").translate({9: " ", 10: " ", 13: " "})
    for place, character in enumerate(text, 1):
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cs"):
            what = "a control character" if kind == "Cc" else "half of a character (a surrogate)"
            raise InputError(
                f"{name} holds {what}, U+{ord(character):04X}, at place {place}.",
                "Remove it; newlines and tabs may stay.",
            )
    if not may_be_empty and all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cf") for c in text):
        raise InputError(f"{name} is empty.", "Say what to draw.")
    return text


def is_picture(value: Any) -> bool:
    """A path, or something that behaves as a PIL image."""
    return isinstance(value, str | Path) or (hasattr(value, "size") and hasattr(value, "convert"))


def check_pictures(value: Any, name: str) -> tuple[Any, ...]:
    """One picture or several, each called a `name` in messages; UsageError for anything else."""
    if is_picture(value):
        return (value,)
    if not isinstance(value, Iterable):
        raise UsageError(f"{name}s={value!r} is not a list of pictures.")
    pictures = tuple(value)
    for number, picture in enumerate(pictures, 1):
        if not is_picture(picture):
            raise UsageError(f"{name} {number} is neither a path nor a picture.")
    if len(pictures) > MAX_REFERENCES:
        raise UsageError(
            f"{len(pictures)} {name}s are given; the limit is {MAX_REFERENCES}.",
            "Leave some out.",
        )
    return pictures


def size_error(width: int, height: int, patch_size: int) -> str | None:
    """What is wrong with a size for a model of this patch, with the nearest good ones, or None."""
    found = []
    for name, side in (("width", width), ("height", height)):
        if side % patch_size:
            low = side // patch_size * patch_size
            high = low + patch_size
            near = f"nearest are {low} and {high}" if low else f"nearest is {high}"
            found.append(f"{name}={side} is not a multiple of {patch_size}; the {near}.")
    return " ".join(found) or None


def snap_size(width: int, height: int, patch_size: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of the patch, at least one patch each."""

    def snapped(side: int) -> int:
        largest = MAX_SIDE // patch_size
        return min(max(1, (side + patch_size // 2) // patch_size), largest) * patch_size

    return snapped(width), snapped(height)


def aspect_size(source: tuple[int, int], area: int, patch_size: int) -> tuple[int, int]:
    """The size of the source's aspect whose area is at most `area`, in whole patches.

    The published rule: scale to the area, round or floor each side, cut to whole patches, and of
    the four combinations take the largest that fits.
    """
    scale = math.sqrt(area / (source[0] * source[1]))
    widths, heights = (
        {max(1, side // patch_size) * patch_size for side in (round(s * scale), int(s * scale))}
        for s in source
    )
    sizes = [(w, h) for w in sorted(widths) for h in sorted(heights)]
    fitting = [size for size in sizes if size[0] * size[1] <= area]
    return max(fitting, key=math.prod) if fitting else min(sizes, key=math.prod)


def halved(source: tuple[int, int], side: int) -> tuple[int, int]:
    """A size halved as often as neither side falls below `side`, as E1.1's script does first."""
    while min(source) >= 2 * side:
        source = source[0] // 2, source[1] // 2
    return source


def check_area(width: int, height: int) -> None:
    """Raise UsageError where the picture is absurdly large."""
    if width * height > MAX_AREA:
        raise UsageError(
            f"width={width} and height={height} make {width * height / 1e6:.1f} million pixels; "
            f"the limit is {MAX_AREA / 1e6:.1f} million (4096x4096).",
            "Choose a smaller size.",
        )


def check_side(name: str, value: Any) -> int | None:
    """A side in pixels, of any multiple; UsageError outside 1 … MAX_SIDE."""
    if value is None:
        return None
    side = _whole(name, value)
    if not 1 <= side <= MAX_SIDE:
        raise UsageError(
            f"{name}={side} is outside 1 … {MAX_SIDE} pixels.", "Choose a size within the limits."
        )
    return side


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name}={value!r} is not a whole number.")
    return int(value.__index__())


def check_in_range(name: str, value: Any, ranges: Mapping[str, Range] = RANGES) -> Any:
    """A number within its row of `ranges`; UsageError otherwise."""
    if value is None:
        return None
    whole, low, high, low_allowed = ranges[name]
    if whole:
        number: float = _whole(name, value)
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name}={value!r} is not a number.")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise UsageError(f"{name}={number} is not a finite number.", f"Choose one up to {high:g}.")
    if not low <= number <= high or (number == low and not low_allowed):
        bounds = f"{low:g} … {high:g}" if low_allowed else f"more than {low:g}, up to {high:g}"
        raise UsageError(
            f"{name}={number:g} is out of range: {bounds}.", "Choose a value in this range."
        )
    return number


def check_sparsity(value: Any) -> float | None:
    """A share that leaves something; UsageError otherwise."""
    value = check_in_range("sparsity", value)
    if value == 1:
        raise UsageError(
            "sparsity=1 would leave nothing to read: it must be below 1.",
            "Choose a smaller share, as 0.5; 0 skips nothing.",
        )
    return value


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{name}={value!r} is not a list of numbers.")
    numbers = tuple(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise UsageError(f"{name} holds {number!r}, which is not a finite number.")
    return tuple(float(number) for number in numbers)


def check_sigmas(value: Any, steps: int | None) -> tuple[float, ...] | None:
    """A falling schedule in (0, 1], its final 0 cut off; UsageError otherwise."""
    if value is None:
        return None
    sigmas = _numbers("sigmas", value)
    if len(sigmas) > 1 and sigmas[-1] == 0:
        sigmas = sigmas[:-1]  # the samplers end at 0 in any case
    if not 1 <= len(sigmas) <= 1000:
        raise UsageError(f"sigmas has {len(sigmas)} values; the limits are 1 … 1000.")
    falling = all(a > b for a, b in pairwise(sigmas))
    if not falling or not 0 < sigmas[-1] <= sigmas[0] <= 1:
        raise UsageError(
            "sigmas must fall from at most 1 and stay above 0.", "The final 0 is added by itself."
        )
    if steps not in (None, len(sigmas)):
        raise UsageError(
            f"num_inference_steps={steps} but sigmas has {len(sigmas)} values.", "Leave one out."
        )
    return sigmas


def check_interval(value: Any) -> tuple[float, float] | None:
    """Two values of sigma, low < high; UsageError otherwise."""
    if value is None:
        return None
    numbers = _numbers("guidance_interval", value)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise UsageError("guidance_interval must be two values of sigma, 0 ≤ low < high ≤ 1.")
    return numbers[0], numbers[1]


def check_seed(value: Any, num_images: int | None) -> int | tuple[int, ...] | None:
    """One seed or several, −1 for a drawn one; UsageError otherwise."""
    if value is None:
        return None
    several = isinstance(value, list | tuple)
    seeds = tuple(_whole("seed", seed) for seed in (value if several else (value,)))
    for seed in seeds:
        if not -1 <= seed <= MAX_SEED:
            raise UsageError(
                f"seed={seed} is outside 0 … 2⁶³−1.", "Choose one in this range; -1 draws one."
            )
    if not several or len(seeds) == 1:
        if seeds[0] + (num_images or 1) - 1 > MAX_SEED:
            raise UsageError(f"seed={seeds[0]} and {num_images} pictures pass 2⁶³−1.")
        return seeds[0]
    if not 1 <= len(seeds) <= MAX_IMAGES:
        raise UsageError(f"{len(seeds)} seeds are given; the limits are 1 … {MAX_IMAGES}.")
    if num_images not in (None, len(seeds)):
        raise UsageError(
            f"{len(seeds)} seeds make {len(seeds)} pictures, but num_images={num_images}.",
            "Leave one out.",
        )
    return seeds


def check_loras(value: Any) -> tuple[Lora, ...]:
    """LoRAs as (path, scale) pairs; a path alone has scale 1. UsageError otherwise."""
    if isinstance(value, str | Path):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise UsageError(f"loras={value!r} is not a list of LoRAs.", "Write [(path, scale), …].")
    found = []
    for number, entry in enumerate(value, 1):
        pair = (entry, 1.0) if isinstance(entry, str | Path) else entry
        good = isinstance(pair, list | tuple) and len(pair) == 2
        good = good and isinstance(pair[0], str | Path) and isinstance(pair[1], Real)
        if not good or isinstance(pair[1], bool):
            raise UsageError(
                f"entry {number} of loras, {entry!r}, is no path with a scale.",
                "Write [(path, scale), …].",
            )
        path, scale = str(pair[0]), float(pair[1])
        if not path or any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
            raise UsageError(f"entry {number} of loras, {path!r}, is no path.")
        if not math.isfinite(scale) or abs(scale) > MAX_LORA_SCALE:
            raise UsageError(
                f"the scale {scale:g} of entry {number} of loras is out of range: "
                f"−{MAX_LORA_SCALE} … {MAX_LORA_SCALE}.",
                "1 is the LoRA as it was trained.",
            )
        found.append((path, scale))
    if len(found) > MAX_LORAS:
        raise UsageError(f"{len(found)} loras are given; the limit is {MAX_LORAS}.")
    return tuple(found)


def read_layout(layout: Any) -> tuple[Box, ...]:
    """Boxes as `(x1, x2, y1, y2)` fractions, from any of the published forms.

    A list of boxes, a list of objects with `bbox` or `box`, or an object that holds such a list as
    `layout_bboxes`, `bboxes`, `boxes` or `bbox_list`. A box whose numbers are all at most 1 is in
    fractions, any other in percent.

    Raises:
        InputError: a box is not four finite numbers, inverted, empty or outside, or there are more
            than ten.
    """
    if isinstance(layout, Mapping):
        keys = ("layout_bboxes", "bboxes", "boxes", "bbox_list")
        found = [layout[key] for key in keys if key in layout]
        if len(found) != 1:
            raise InputError(f"the layout needs one list under one of {', '.join(keys)}.")
        layout = found[0]
    if isinstance(layout, str | bytes) or not isinstance(layout, Sequence):
        raise InputError("the layout is not a list of boxes.", "Write [[x1, x2, y1, y2], …].")
    if len(layout) > MAX_BOXES:
        raise InputError(f"the layout has {len(layout)} boxes; the limit is {MAX_BOXES}.")
    return tuple(read_box(box, f"box {number}") for number, box in enumerate(layout, 1))


def read_box(box: Any, name: str = "box") -> Box:
    """One box of a layout as fractions; see `read_layout`."""
    if isinstance(box, Mapping):
        box = box.get("bbox", box.get("box"))
    four = isinstance(box, Sequence) and not isinstance(box, str) and len(box) == 4
    if not four or not all(isinstance(v, Real) and not isinstance(v, bool) for v in box):
        raise InputError(f"{name} is not four numbers.", "A box is x1,x2,y1,y2.")
    values = [float(value) for value in box]
    shown = ",".join(f"{value:g}" for value in values)
    if not all(map(math.isfinite, values)):
        raise InputError(f"{name} ({shown}) holds a number that is not finite.")
    scale = 1.0 if max(values) <= 1 else 100.0
    if min(values) < 0 or max(values) > scale:
        raise InputError(
            f"{name} ({shown}) lies outside the picture.",
            "Its numbers are fractions from 0 to 1, or percent from 0 to 100.",
        )
    x1, x2, y1, y2 = (value / scale for value in values)
    for low, high, axis in ((x1, x2, "x"), (y1, y2, "y")):
        if low >= high:
            word = "inverted" if low > high else "empty"
            raise InputError(
                f"{name} ({shown}) is {word}: {axis}1 must be less than {axis}2.",
                "The order is x1,x2,y1,y2.",
            )
    return x1, x2, y1, y2
