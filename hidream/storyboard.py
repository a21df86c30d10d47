"""Storyboards: a script becomes one request whose picture holds all panels; the panels cut out.

    script = read_script("a girl wakes up\\na girl opens the door")
    out = pipe(compose(script, seed=7))
    first, second = cut(out.images[0], out.request.sheet)

The prompt describes the arrangement of the whole sheet and then each panel, as the captions of
multi-panel pictures that O1 was trained on do (O1-Image paper, section 2.4). The white gutters are
held during all steps as the black parts of a mask are, so panels end where they are cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hidream.camera import CAMERA, camera_value, with_camera
from hidream.errors import InputError, UsageError
from hidream.limits import clean_prompt
from hidream.registry import nearest
from hidream.request import GenerateRequest
from hidream.sheet import MAX_PANELS, PANEL_ASPECT, Sheet, cut, default_columns

__all__ = ["Panel", "Script", "arrange", "compose", "cut", "read_script"]

_JSON = re.compile(r"\s*(\{|\[\s*[\"{])")
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}
_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What one panel shows; `shot`, `angle` and `view` are names of `hidream.camera`."""

    prompt: str
    shot: str | None = None
    angle: str | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", clean_prompt(self.prompt, "a panel's prompt").strip())
        for name in CAMERA:
            object.__setattr__(self, name, camera_value(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Script:
    """The panels in their order, and what holds for all of them: the story's title, the style, and
    the subject that recurs.

    Raises:
        UsageError: a type is wrong, or shot, angle or view is unknown.
        InputError: there are fewer than 2 panels or more than 64, or a text is not usable.
    """

    panels: tuple[Panel, ...]
    title: str | None = None
    style: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "panels", tuple(self.panels))
        if not 2 <= len(self.panels) <= MAX_PANELS:
            raise InputError(
                f"a storyboard has 2 … {MAX_PANELS} panels; the script has {len(self.panels)}.",
                "Write one panel a line, or one a paragraph.",
            )
        for name in ("title", "style", "subject"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, clean_prompt(value, f"the script's {name}").strip())

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `read_script` and `from_dict` read, without what is None."""
        panels = [_without_none(asdict(panel)) for panel in self.panels]
        return _without_none({**asdict(self), "panels": panels})

    @classmethod
    def from_dict(cls, values: Any) -> Script:
        """From an object with `panels` and perhaps title, style, subject; or from the panels alone.

        A panel is a text, or an object with `prompt` and perhaps shot, angle, view. Raises as the
        class, and InputError for unknown keys (the nearest is named).
        """
        if isinstance(values, list):
            values = {"panels": values}
        found = _known(values, cls, "the script")
        panels = found.pop("panels", None)
        if not isinstance(panels, list):
            raise InputError(
                "the script has no list of panels.", 'Write {"panels": ["…", "…"]}, or plain text.'
            )
        try:
            return cls(panels=tuple(_panel(item, n) for n, item in enumerate(panels, 1)), **found)
        except UsageError as error:
            raise InputError(error.problem, error.remedy) from error


def read_script(text: str, *, is_json: bool | None = None) -> Script:
    """A script from its text.

    JSON is read by `Script.from_dict`; None decides by how the text begins. Plain text has one
    panel a line, or one a paragraph where blank lines part it.

    Raises:
        InputError: it is not usable.
    """
    if is_json is None:
        is_json = _JSON.match(text) is not None
    if is_json:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the script is not JSON: {_reason(error)}.") from error
        return Script.from_dict(values)
    parts = re.split(r"\n\s*\n", text.strip().replace("\r\n", "\n"))
    if len(parts) == 1:
        parts = parts[0].splitlines()
    return Script.from_dict([part.strip() for part in parts if part.strip()])


def compose(
    script: Script | str | Iterable[str],
    *,
    columns: int | None = None,
    gutter: int | None = None,
    panel_size: tuple[int, int] | None = None,
    **request: Any,
) -> GenerateRequest:
    """The request that draws all panels of a script in one picture.

    `columns` None lets the sheet be about square (or of the aspect that `width` and `height` give
    it); `gutter` and `panel_size` (width, height) are pixels, see `hidream.sheet`. `request` are
    fields of a GenerateRequest; shot, angle and view are for panels that name none of their own.

    Raises UsageError and InputError as the script and the request do.
    """
    if isinstance(script, str):
        script = read_script(script)
    elif not isinstance(script, Script):
        script = Script.from_dict(list(script))
    camera = {name: request.pop(name, None) for name in CAMERA}
    script = with_default_camera(script, **camera)
    width, height = request.get("width"), request.get("height")
    size = (width, height) if width and height else None
    sheet = arrange(script, columns=columns, gutter=gutter, panel_size=panel_size, size=size)
    prompt = sheet_prompt(script, sheet, has_references=bool(request.get("references")))
    return GenerateRequest(prompt=prompt, sheet=sheet, **{"keep_aspect": False, **request})


def arrange(
    script: Script,
    *,
    columns: int | None = None,
    gutter: int | None = None,
    panel_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Sheet:
    """The sheet for a script's panels; `size` is the whole sheet's (width, height) in pixels."""
    number = len(script.panels)
    if columns is None:
        columns = default_columns(
            number,
            panel_aspect=_aspect(panel_size) or PANEL_ASPECT,
            sheet_aspect=_aspect(size) or 1.0,
        )
    wide, high = panel_size or (None, None)
    return Sheet(number=number, columns=columns, gutter=gutter, width=wide, height=high)


def with_default_camera(
    script: Script, *, shot: str | None = None, angle: str | None = None, view: str | None = None
) -> Script:
    """The script with shot, angle and view for the panels that have none of their own."""
    panels = tuple(
        replace(panel, shot=panel.shot or shot, angle=panel.angle or angle, view=panel.view or view)
        for panel in script.panels
    )
    return replace(script, panels=panels)


def sheet_prompt(script: Script, sheet: Sheet, *, has_references: bool = False) -> str:
    """What the model reads: the arrangement and what panels share, then panel by panel."""
    number = len(script.panels)
    apart = "" if sheet.gutter == 0 else ", with plain white gutters between the panels"
    parts = [
        f"A storyboard of {number} panels in a grid of {_count(sheet.rows, 'row')} and "
        f"{_count(sheet.columns, 'column')}, read row by row from the top left{apart}."
    ]
    if script.title:
        parts.append(f"The story: {_sentence(script.title)}")
    if script.style:
        parts.append(f"Style of all panels: {_sentence(script.style)}")
    if script.subject:
        parts.append(f"In all panels: {_sentence(script.subject)}")
    kept = "Characters, objects and style stay the same from panel to panel."
    if has_references:
        kept = (
            "What the reference pictures show recurs in the panels and keeps its appearance; "
            "characters, objects and style stay the same from panel to panel."
        )
    parts.append(kept)
    for index, panel in enumerate(script.panels):
        words = with_camera(panel.prompt, shot=panel.shot, angle=panel.angle, view=panel.view)
        parts.append(f"Panel {index + 1}, {_place(index, sheet)}: {_sentence(words)}")
    return " ".join(parts)


def _aspect(size: tuple[int, int] | None) -> float | None:
    return size[0] / size[1] if size and min(size) > 0 else None


def _place(index: int, sheet: Sheet) -> str:
    """Where a panel lies, in words: "top left", or "row 4, column 2" on large sheets."""
    row, column = divmod(index, sheet.columns)
    if sheet.rows > 3 or sheet.columns > 3:
        return f"row {row + 1}, column {column + 1}"
    words = f"{_ROWS[sheet.rows][row]} {_COLUMNS[sheet.columns][column]}".strip()
    return "centre" if words == "middle centre" else words


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…", "。", '"', "”")) else f"{text}."


def _panel(item: Any, number: int) -> Panel:
    name = f"panel {number}"
    values = {"prompt": item} if isinstance(item, str) else _known(item, Panel, name)
    if "prompt" not in values:
        raise InputError(f"{name} has no prompt.", "Say what it shows.")
    try:
        return Panel(**values)
    except InputError as error:
        problem = error.problem.replace("a panel's prompt", f"{name}'s prompt", 1)
        raise InputError(problem, error.remedy) from error
    except UsageError as error:
        problem = error.problem.replace("a panel's prompt", "its prompt", 1)
        raise InputError(f"{name}: {problem}", error.remedy) from error


def _known(values: Any, kind: type, name: str) -> dict[str, Any]:
    """The object's values, whose keys must be fields of `kind`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is neither a text nor an object.", "See docs/storyboard.md.")
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            raise InputError(f'{name} has an unknown key "{key}"; {nearest(str(key), known)}')
    return dict(values)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or ["it is nested too deeply"])[0]
