"""A sheet of panels: where they lie on the one picture that holds them all, and cutting them out.

Panels are equal, stand row by row from the top left, and have white gutters between them. Every
measure is a multiple of the model's patch, so that no patch belongs to two panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from hidream.errors import UsageError
from hidream.limits import MAX_SIDE, Range, check_in_range, check_side, size_error, snap_size
from hidream.registry import nearest

if TYPE_CHECKING:
    from PIL import Image

MAX_PANELS = 64
PANEL_ASPECT = 16 / 9  # width over height of a panel, unless a size says otherwise
_EMPTY_CELL = 4.0  # how a row that is not full weighs against a sheet that is far from square
_RANGES: dict[str, Range] = {
    "number": (True, 2, MAX_PANELS, True),
    "columns": (True, 1, MAX_PANELS, True),
    "gutter": (True, 0, MAX_SIDE, True),
    "width": (True, 1, MAX_SIDE, True),
    "height": (True, 1, MAX_SIDE, True),
}
PixelBox = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """`number` panels, `columns` in a row; what lies between them, and cells left over, is white.

    `gutter`, and `width` and `height` of one panel, are pixels. None means the default: a gutter
    of one patch, and panels of 16:9 that are as large as the model's native area lets them be.

    Raises:
        UsageError: a number is out of range or its type is wrong.
    """

    number: int
    columns: int
    gutter: int | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for name, limits in _RANGES.items():
            shown = f"sheet.{name}"
            value = check_in_range(shown, getattr(self, name), {shown: limits})
            if value is None and name in ("number", "columns"):
                raise UsageError(f"{shown} is not given.")
            object.__setattr__(self, name, value)
        if self.columns > self.number:
            raise UsageError(
                f"sheet.columns={self.columns} is more than its {self.number} panels.",
                f"Choose 1 … {self.number}.",
            )
        if (self.width is None) != (self.height is None):
            raise UsageError("a panel has its width or its height alone.", "Give both.")

    @property
    def rows(self) -> int:
        return -(-self.number // self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole sheet in pixels; only of a sheet without None."""
        assert self.gutter is not None
        assert self.width is not None
        assert self.height is not None
        return (
            self.columns * (self.width + self.gutter) - self.gutter,
            self.rows * (self.height + self.gutter) - self.gutter,
        )

    @property
    def boxes(self) -> tuple[PixelBox, ...]:
        """Where each panel lies, in their order; only of a sheet without None."""
        assert self.gutter is not None
        assert self.width is not None
        assert self.height is not None
        found = []
        for place in range(self.number):
            row, column = divmod(place, self.columns)
            left, top = column * (self.width + self.gutter), row * (self.height + self.gutter)
            found.append((left, top, left + self.width, top + self.height))
        return tuple(found)

    @property
    def is_covered(self) -> bool:
        """Whether panels fill the sheet, so that nothing of it has to stay white."""
        return self.gutter == 0 and self.number == self.rows * self.columns


def read_sheet(value: Any) -> Sheet | None:
    """A Sheet, also from its fields by name; UsageError for anything else."""
    if value is None or isinstance(value, Sheet):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(f"sheet={value!r} is no sheet.", 'Write {"number": 6, "columns": 2}.')
    known = [item.name for item in fields(Sheet)]
    for name in value:
        if name not in known:
            raise UsageError(f'sheet has no "{name}"; {nearest(str(name), known)}')
    return Sheet(**{"number": None, "columns": None, **value})  # type: ignore[arg-type]


def default_columns(
    number: int, *, panel_aspect: float = PANEL_ASPECT, sheet_aspect: float = 1.0
) -> int:
    """How many panels to a row: the sheet near its aspect, with few cells left over."""

    def cost(columns: int) -> float:
        rows = -(-number // columns)
        stretch = abs(math.log(panel_aspect * columns / rows / sheet_aspect))
        return stretch + _EMPTY_CELL * (rows * columns - number) / number

    return min(range(1, number + 1), key=cost)


def resolve_sheet(
    sheet: Sheet,
    patch_size: int,
    *,
    native_area: int,
    size: tuple[int, int] | None = None,
    snap: bool = False,
) -> Sheet:
    """The sheet with every None replaced; resolving twice changes nothing.

    `size` is the wanted (width, height) of the whole sheet in pixels, `native_area` the pixels of
    a picture that the model draws best. With `snap`, what does not fit goes to the nearest.

    Raises:
        UsageError: gutter, panel or sheet do not part into whole patches, or the sheet's size
            differs from what its panels need.
    """
    gutter = patch_size if sheet.gutter is None else sheet.gutter
    if gutter % patch_size and snap:
        gutter = (gutter + patch_size // 2) // patch_size * patch_size
    elif gutter % patch_size:
        low = gutter // patch_size * patch_size
        raise UsageError(
            f"gutter={gutter} is not a multiple of {patch_size}; "
            f"the nearest are {low} and {low + patch_size}.",
            "Or snap to the nearest with --snap nearest.",
        )
    if sheet.width is not None and sheet.height is not None:
        found = _whole_patches(sheet.width, sheet.height, patch_size, snap)
    elif size is not None:
        found = (
            _part("width", size[0], sheet.columns, gutter, patch_size, snap),
            _part("height", size[1], sheet.rows, gutter, patch_size, snap),
        )
    else:
        found = _native_panel(sheet, gutter, patch_size, native_area)
    resolved = replace(sheet, gutter=gutter, width=found[0], height=found[1])
    whole = resolved.size
    for name, side in zip(("width", "height"), whole, strict=True):
        check_side(name, side)
    if sheet.width is not None and size not in (None, whole):
        assert size is not None
        raise UsageError(
            f"the size is {size[0]}x{size[1]}, but {sheet.number} panels of {found[0]}x{found[1]} "
            f"need {whole[0]}x{whole[1]}.",
            "Give the panels' size or the sheet's, not both.",
        )
    return resolved


def blank(sheet: Sheet) -> tuple[Image.Image, Image.Image]:
    """The white sheet (RGB), and where it may be drawn on (L, white on the panels)."""
    from PIL import Image

    mask = Image.new("L", sheet.size, 0)
    for box in sheet.boxes:
        mask.paste(255, box)
    return Image.new("RGB", sheet.size, (255, 255, 255)), mask


def cut(image: Image.Image, sheet: Sheet) -> list[Image.Image]:
    """The panels of a drawn sheet, in their order.

    Raises:
        UsageError: the picture is not of the sheet's size.
    """
    if image.size != sheet.size:
        raise UsageError(
            f"the picture is {image.width}x{image.height}, "
            f"its sheet {sheet.size[0]}x{sheet.size[1]}."
        )
    return [image.crop(box) for box in sheet.boxes]


def _whole_patches(width: int, height: int, patch_size: int, snap: bool) -> tuple[int, int]:
    problem = size_error(width, height, patch_size)
    if problem and not snap:
        raise UsageError(f"of a panel, {problem}", "Or snap to the nearest with --snap nearest.")
    return snap_size(width, height, patch_size)


def _part(name: str, side: int, count: int, gutter: int, patch_size: int, snap: bool) -> int:
    """The side of each of `count` panels on a sheet's side."""
    between = (count - 1) * gutter
    unit = count * patch_size  # what a panel's growth by one patch adds to the sheet
    parts, rest = divmod(side - between, unit)
    if parts > 0 and rest == 0:
        return parts * patch_size
    if snap:
        return max(1, parts + (2 * rest >= unit)) * patch_size
    near = [between + n * unit for n in (parts, parts + 1) if n > 0] or [between + unit]
    raise UsageError(
        f"{name}={side} does not part into {count} panels of whole patches of {patch_size} with "
        f"gutters of {gutter}; the nearest {'are' if len(near) > 1 else 'is'} "
        f"{' and '.join(map(str, near))}.",
        "Or snap to the nearest with --snap nearest.",
    )


def _native_panel(sheet: Sheet, gutter: int, patch_size: int, native_area: int) -> tuple[int, int]:
    """The largest panel of about 16:9 with which the sheet stays within the native area."""
    found = (patch_size, patch_size)
    for columns in range(1, MAX_SIDE // patch_size + 1):
        height = max(1, round(columns / PANEL_ASPECT)) * patch_size
        tried = replace(sheet, gutter=gutter, width=columns * patch_size, height=height)
        if math.prod(tried.size) > native_area:
            break
        found = (columns * patch_size, height)
    return found
