"""`hidream composite`: a subject cut out by its mask, set on another picture, its edge blended."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

from hidream.cli.arguments import Parser, add_drawing, request_fields
from hidream.cli.drawing import draw
from hidream.errors import HidreamError, UsageError

STRENGTH = 0.4  # of the pass that blends the edge
EXAMPLES = """\
hidream composite cup.png "a mug on a beach" --subject-mask mug.png --background beach.png
hidream composite dog.png "a dog in snow" --subject-mask dog-mask.png --background snow.png \\
    --place 0.3,0.7 --scale 0.5 --band 24 --strength 0.3"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "composite",
        "Cut a subject out by its mask, set it on a background, and let the model blend the edge.\n"
        "What it starts from is kept beside the result: NAME-composite.png and NAME-edge.png.",
        usage="hidream composite IMAGE PROMPT --subject-mask MASK --background IMAGE [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture with the subject")
    parser.add_argument("prompt", metavar="PROMPT", help="what the result shows")
    group = parser.add_argument_group("compositing")
    group.add_argument("--subject-mask", required=True, metavar="MASK", help="white: the subject")
    group.add_argument("--background", required=True, metavar="IMAGE")
    group.add_argument(
        "--place", type=_place, default=(0.5, 0.5), metavar="X,Y", help="of its middle, 0 to 1"
    )
    group.add_argument("--scale", type=float, default=1.0, metavar="F", help="of its size")
    group.add_argument(
        "--band", type=int, default=16, metavar="N", help="pixels of its edge that may change"
    )
    add_drawing(parser, with_references=False)
    arguments = parser.parse(argv)
    given = request_fields(arguments)
    for name in ("mask", "init_image", "expand"):
        if name in given:
            raise UsageError(f"composite makes its own {name}.", "Leave it out.")
    if arguments.from_picture or arguments.prompt_file:
        raise UsageError(
            "composite takes neither --from nor --prompt-file.", "Use hidream generate."
        )
    if not 1 <= arguments.band <= 512:
        raise UsageError(f"--band {arguments.band} is not between 1 and 512.")
    if not 0 < arguments.scale < math.inf:
        raise UsageError(f"--scale {arguments.scale} is not a number above 0.")
    with TemporaryDirectory() as nowhere:
        places = _composed(arguments, Path(nowhere) if arguments.dry_run else None)
        picture, edge = map(str, places)
        fields = {"init_image": picture, "mask": edge, "strength": STRENGTH}
        try:
            return draw(arguments, {**fields, **given})
        except HidreamError:
            for place in places:
                place.unlink(missing_ok=True)
            raise


def _composed(arguments: argparse.Namespace, folder: Path | None) -> tuple[Path, Path]:
    """The files that the pass starts from: the raw composite and its edge, beside the result or
    in another folder."""
    from hidream.compositing import composite
    from hidream.pictures import check_outputs, read_mask, read_picture, write_picture

    source = read_picture(arguments.image, "the subject's picture")
    mask = read_mask(arguments.subject_mask, source.size, "the subject's mask")
    background = read_picture(arguments.background, "the background")
    made = composite(
        source, mask, background, center=arguments.place, scale=arguments.scale, band=arguments.band
    )
    output = Path(arguments.output or "out.png").expanduser()
    stem = output.stem.replace("{seed}", "").replace("{index}", "").strip("-_") or "out"
    places = tuple(output.with_name(f"{stem}-{part}.png") for part in ("composite", "edge"))
    check_outputs(
        places, overwrite=arguments.overwrite, num_bytes=2**20, make_folders=folder is None
    )
    if folder is not None:
        places = tuple(folder / place.name for place in places)
    for picture, place in zip((made.picture, made.edge.convert("RGB")), places, strict=True):
        write_picture(picture, place, None, overwrite=arguments.overwrite)
    return places[0], places[1]


def _place(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError("no place")
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'"{text}" is no place; write X,Y, as in 0.5,0.8'
        ) from error
    return x, y
