"""`hidream composite`: a subject cut out by its mask, set on another picture, its edge blended."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_drawing, request_fields
from hidream.cli.checking import check, check_flags, check_reader, find_model
from hidream.cli.drawing import draw
from hidream.cli.loading import load_pipeline
from hidream.cli.recording import Inputs, model_digest, note_of
from hidream.cli.stopping import stopped_by_ctrl_c
from hidream.errors import HidreamError, UsageError
from hidream.outpainting import GREY
from hidream.registry import DEFAULT_MODEL
from hidream.request import GenerateRequest, check_ability, resolve

if TYPE_CHECKING:
    from PIL import Image

    from hidream.cli.checking import Checked
    from hidream.pipelines import Pipeline

STRENGTH = 0.4  # of the pass that blends the edge
# Fields that a background does not share with the picture: it is one, of another prompt.
NOT_THE_SCENES = ("strength", "embeddings", "encoder_prompts", "num_images")
EXAMPLES = """\
hidream composite cup.png "a mug on a beach" --subject-mask mug.png --background beach.png
hidream composite dog.png "a dog in snow" --subject-mask dog-mask.png --background snow.png \\
    --place 0.3,0.7 --scale 0.5 --band 24 --strength 0.3
hidream composite cup.png "a mug on a beach" --subject-mask mug.png \\
    --background-prompt "a beach" -o beach.png"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "composite",
        "Cut a subject out by its mask, set it on a background, and let the model blend the edge.\n"
        "What it starts from is kept beside the result: NAME-composite.png and NAME-edge.png, and\n"
        "NAME-background.png where the background is drawn.",
        usage="hidream composite IMAGE PROMPT --subject-mask MASK\n"
        "                         (--background IMAGE | --background-prompt TEXT) [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture with the subject")
    parser.add_argument("prompt", metavar="PROMPT", help="what the result shows")
    group = parser.add_argument_group("compositing")
    group.add_argument("--subject-mask", required=True, metavar="MASK", help="white: the subject")
    backgrounds = group.add_mutually_exclusive_group(required=True)
    backgrounds.add_argument("--background", metavar="IMAGE")
    backgrounds.add_argument(
        "--background-prompt", metavar="TEXT", help="draw it, by the same model, seed and settings"
    )
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
    check_flags(arguments)

    from hidream.pictures import read_picture

    with TemporaryDirectory() as nowhere:
        scratch = Path(nowhere)
        if arguments.background_prompt is None:
            background = read_picture(arguments.background, "the background")
            return _blended(arguments, given, background, scratch if arguments.dry_run else None)
        scene = _scene(arguments, given)
        given["seed"] = _seeds(given, scene)
        blank = _blank(scene)
        if arguments.dry_run:
            console.say(
                f"the background comes first: {scene.width}x{scene.height}, "
                f"{scene.num_inference_steps} steps; the estimate is for what follows."
            )
            return _blended(arguments, given, blank, scratch)
        ready = check(arguments, _fields(_composed(arguments, blank, scratch), given))
        pipe, background = _drawn(arguments, scene, ready)
        return _blended(arguments, given, background, None, pipe)


def _blended(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    background: Image.Image,
    folder: Path | None,
    pipe: Pipeline | None = None,
) -> int:
    """Compose, beside the result or in another folder, and draw; what was not drawn leaves
    nothing."""
    places = _composed(arguments, background, folder)
    try:
        return draw(arguments, _fields(places, given), pipe=pipe)
    except HidreamError:
        for place in places:
            place.unlink(missing_ok=True)
        raise


def _fields(places: tuple[Path, Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the request whose pass blends the edge."""
    picture, edge = map(str, places)
    return {"init_image": picture, "mask": edge, "strength": STRENGTH, **given}


def _scene(arguments: argparse.Namespace, given: Mapping[str, Any]) -> GenerateRequest:
    """The resolved request for the background; errors where the model cannot draw it."""
    fields = {name: value for name, value in given.items() if name not in NOT_THE_SCENES}
    seed = given.get("seed")
    fields["seed"] = seed[0] if isinstance(seed, list) else seed
    fields["prompt"] = arguments.background_prompt
    asked = GenerateRequest.from_dict(fields)
    spec, folder, missing = find_model(
        arguments.model or DEFAULT_MODEL, arguments.variant, arguments.components
    )
    scene = replace(resolve(asked, spec.defaults, spec.patch_size), model=spec.name)
    check_ability(spec, scene)
    if arguments.dry_run:
        return scene
    if missing is not None:
        raise missing
    if folder is not None:
        check_reader(arguments, scene, spec, folder)
    return scene


def _seeds(given: Mapping[str, Any], scene: GenerateRequest) -> Any:
    """The request's own, the first of them the scene's, which may have been drawn."""
    seeds = given.get("seed")
    return [scene.seed, *seeds[1:]] if isinstance(seeds, list) else scene.seed


def _blank(scene: GenerateRequest) -> Image.Image:
    """What stands for the background until it is drawn."""
    from PIL import Image

    return Image.new("RGB", (scene.width or 1, scene.height or 1), GREY)


def _drawn(
    arguments: argparse.Namespace, scene: GenerateRequest, ready: Checked
) -> tuple[Pipeline, Image.Image]:
    """The model of the ready, loaded, and the background that it draws, which is kept beside the
    result."""
    from hidream.pictures import check_outputs, write_picture

    (place,) = _places(arguments, "background")
    check_outputs([place], overwrite=arguments.overwrite, num_bytes=2**20)
    pipe = load_pipeline(arguments, ready.model, scene.model)
    progress = console.Progress(1)
    try:
        with stopped_by_ctrl_c() as token:
            made = pipe(scene, on_step=lambda step, num, _: progress.step(step, num), cancel=token)
    finally:
        progress.close()
    note = None
    if not arguments.no_metadata and ready.opened is not None:
        note = note_of(made.request, made.seeds[0], pipe, model_digest(ready.opened), Inputs())
    write_picture(made.images[0], place, note, overwrite=arguments.overwrite)
    return pipe, made.images[0]


def _places(arguments: argparse.Namespace, *parts: str) -> tuple[Path, ...]:
    """Beside the result: NAME-PART.png."""
    output = Path(arguments.output or "out.png").expanduser()
    stem = output.stem.replace("{seed}", "").replace("{index}", "").strip("-_") or "out"
    return tuple(output.with_name(f"{stem}-{part}.png") for part in parts)


def _composed(
    arguments: argparse.Namespace, background: Image.Image, folder: Path | None
) -> tuple[Path, Path]:
    """The files that the pass starts from: the raw composite and its edge, beside the result or
    in another folder."""
    from hidream.compositing import composite
    from hidream.pictures import check_outputs, read_mask, read_picture, write_picture

    source = read_picture(arguments.image, "the subject's picture")
    mask = read_mask(arguments.subject_mask, source.size, "the subject's mask")
    made = composite(
        source, mask, background, center=arguments.place, scale=arguments.scale, band=arguments.band
    )
    places = _places(arguments, "composite", "edge")
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
