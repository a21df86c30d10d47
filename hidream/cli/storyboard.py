"""`hidream storyboard`: a script's panels drawn in one picture, and cut out of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.camera import CAMERA
from hidream.cli.arguments import Parser, add_drawing, add_panels, request_fields
from hidream.cli.drawing import draw
from hidream.errors import HidreamError, InputError, UsageError
from hidream.request import GenerateRequest
from hidream.storyboard import Script, arrange, cut, read_script, sheet_prompt, with_default_camera

if TYPE_CHECKING:
    from PIL import Image

MAX_SCRIPT = 1_000_000  # characters
OF_SCRIPT = ("columns", "panel", "gutter", *CAMERA)  # flags that say how a script becomes a sheet
EXAMPLES = """\
hidream storyboard story.txt --seed 7 -o story.png
hidream storyboard story.json --columns 3 --panel 640x352 --ref heroine.png -o story/
printf 'a star at night\\na star by day\\n' | hidream storyboard - -o stars.png
hidream storyboard --from story.png -o again.png"""


@dataclass(frozen=True)
class Board:
    """What a sheet's pictures are cut into, and what they say of the script; None is unknown."""

    script: Script | None

    def places(self, path: Path, request: GenerateRequest) -> list[Path]:
        """Where the panels of the sheet at `path` go: `NAME-panel1.png`, …"""
        assert request.sheet is not None
        number = request.sheet.number
        digits = len(str(number))
        return [
            path.with_name(f"{path.stem}-panel{n:0{digits}}{path.suffix}")
            for n in range(1, number + 1)
        ]

    def sheet_note(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """The note of a sheet: also the script, where it is known."""
        return {**note, "storyboard": self.script.to_dict()} if self.script else dict(note)

    def save(
        self,
        image: Image.Image,
        path: Path,
        request: GenerateRequest,
        note: Mapping[str, Any] | None,
        overwrite: bool,
    ) -> list[str]:
        """Cut a sheet and write its panels; each says which it is. Returns their paths."""
        from hidream.pictures import write_picture

        assert request.sheet is not None
        places = self.places(path, request)
        panels = zip(cut(image, request.sheet), request.sheet.boxes, places, strict=True)
        for number, (panel, box, place) in enumerate(panels, 1):
            own = None if note is None else {**note, "panel": {"number": number, "box": list(box)}}
            write_picture(panel, place, own, overwrite=overwrite)
        return [str(place) for place in places]


def run(argv: list[str]) -> int:
    parser = Parser(
        "storyboard",
        "Draw all panels of a script in one picture, so that they belong together, and cut them\n"
        "out. SCRIPT is a file, or - for standard input: one panel a line or a paragraph, or JSON.",
        usage="hidream storyboard SCRIPT [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="what the panels show")
    add_panels(parser)
    add_drawing(parser, with_file=False)
    arguments = parser.parse(argv)
    given = request_fields(arguments)
    if arguments.script is not None:
        script = _script(arguments, given)
        given |= _composed(arguments, given, script)
        return draw(arguments, given, board=Board(script))
    if not arguments.from_picture:
        parser.error("the following arguments are required: SCRIPT")
    for name in OF_SCRIPT:
        if getattr(arguments, name, None) is not None:
            raise UsageError(f"--{name} needs the SCRIPT.", "Name it before --from.")
    return draw(arguments, given, board=Board(_recorded(arguments.from_picture)))


def _script(arguments: argparse.Namespace, given: Mapping[str, Any]) -> Script:
    camera = {name: given.get(name) for name in CAMERA}
    is_json = True if arguments.script.lower().endswith(".json") else None
    return with_default_camera(read_script(_text(arguments.script), is_json=is_json), **camera)


def _composed(
    arguments: argparse.Namespace, given: Mapping[str, Any], script: Script
) -> dict[str, Any]:
    """The fields of the request that a script decides."""
    if arguments.panel and "width" in given:
        raise UsageError("--panel and --size both say how large it is.", "Give one of them.")
    sheet = arrange(
        script,
        columns=arguments.columns,
        gutter=arguments.gutter,
        panel_size=arguments.panel,
        size=(given["width"], given["height"]) if "width" in given else None,
    )
    prompt = sheet_prompt(script, sheet, has_references=bool(given.get("references")))
    in_panels = dict.fromkeys(CAMERA)  # they stand in the prompt already
    return {"prompt": prompt, "sheet": sheet, "keep_aspect": False, **in_panels}


def _text(name: str) -> str:
    """A script's file, or standard input for `-`."""
    try:
        if name == "-":
            text = sys.stdin.read(MAX_SCRIPT + 1) if sys.stdin is not None else ""
        else:
            with open(Path(name).expanduser(), encoding="utf-8-sig") as file:
                text = file.read(MAX_SCRIPT + 1)
    except (OSError, ValueError, RuntimeError) as error:  # also no UTF-8, a NUL, an unknown ~
        reason = (error.strerror if isinstance(error, OSError) else "") or "it is no text in UTF-8"
        raise InputError(f"the script {name} cannot be read: {reason}.", "Check it.") from error
    if len(text) > MAX_SCRIPT:
        raise InputError(f"the script {name} has more than {MAX_SCRIPT} characters.", "Shorten it.")
    return text


def _recorded(picture: str) -> Script | None:
    """The script that a sheet or panel was made from, where it says so usably.

    Raises:
        InputError: the picture is no storyboard's.
    """
    from hidream.pictures import read_metadata

    note = read_metadata(picture, "the picture of --from") or {}
    request = note.get("request")
    if isinstance(request, Mapping) and not request.get("sheet"):
        raise InputError(f"{picture} is no storyboard.", "Give a SCRIPT too, or use generate.")
    try:
        return Script.from_dict(note["storyboard"])
    except (HidreamError, KeyError):
        return None
