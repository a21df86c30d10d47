"""Flags: a parser that suggests near names, and a request's fields as flags."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from hidream.camera import CAMERA
from hidream.errors import InputError, UsageError
from hidream.locating import REFINER
from hidream.memory import POLICIES
from hidream.registry import DEFAULT_MODEL, SAMPLERS, VARIANTS, nearest
from hidream.request import GenerateRequest

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16", "fp16")


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, our errors, and values that begin with a minus."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"hidream {prog}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; flags and positionals may come in any order. Raises UsageError."""
        arguments, unknown = self.parse_known_intermixed_args(self._joined(argv))
        for text in unknown:
            if text.startswith("-") and len(text) > 1:
                name = text.split("=")[0]
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                raise UsageError(f'unknown flag "{name}"; {nearest(name, known)}', self._see())
        if unknown:
            raise UsageError(f'"{unknown[0]}" is one argument too many.', self._see())
        return arguments

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-\w/)?(-\S+?)(/--\S+)?: ", r"\2: ", message)
        end = "" if message.endswith(("?", ".")) else "."
        raise UsageError(message + end, self._see())

    def _see(self) -> str:
        return f'See "{self.prog} --help".'

    def _joined(self, argv: Sequence[str]) -> list[str]:
        """`--size -4x4` as `--size=-4x4`, since argparse would take `-4x4` for a flag."""
        joined: list[str] = []
        for text in argv:
            action = self._option_string_actions.get(joined[-1]) if joined else None
            takes_one = action is not None and action.nargs is None
            if takes_one and joined[-1].startswith("--") and re.match(r"-([\d.]|inf|nan)", text):
                joined[-1] = f"{joined[-1]}={text}"
            else:
                joined.append(text)
        return joined


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def add_drawing(
    parser: argparse.ArgumentParser, *, with_references: bool = True, with_file: bool = True
) -> None:
    """All flags of a command that draws: request, --prompt-file unless without, model, output."""
    add_request(parser, with_references=with_references)
    if with_file:
        add_prompt_file(parser)
    add_model(parser)
    add_output(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """-m, --variant, --device, --dtype, --memory."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=None,
        help=f"name, hub id, folder, or a file with --components (default {DEFAULT_MODEL})",
    )
    add_components(group)
    group.add_argument(
        "--variant",
        choices=VARIANTS,
        help="of a published folder that does not say it (default full)",
    )
    group.add_argument(
        "--llama", metavar="PATH", help="I1: folder or hub id of Llama-3.1-8B-Instruct"
    )
    group.add_argument(
        "--refiner", metavar="MODEL", help=f"E1: the I1 of --refine-strength (default {REFINER})"
    )
    group.add_argument("--device", default="auto", type=_device, help=", ".join(DEVICES))
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: fp32 on a CPU")
    group.add_argument(
        "--memory", default="auto", metavar="POLICY", help=", ".join(POLICIES) + " (docs/memory.md)"
    )


def add_components(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--components",
        metavar="MODEL",
        help="of a single file: the I1 or E1 whose text encoders and VAE go with it",
    )


def add_request(parser: argparse.ArgumentParser, *, with_references: bool = True) -> None:
    """Every field of a request that is not a positional argument of its command.

    What is not given is absent from the namespace, so that it can come from elsewhere.
    """
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    group = parser.add_argument_group("picture")
    group.add_argument("-n", "--negative", dest="negative_prompt", metavar="TEXT", **unset)
    group.add_argument("--size", type=_size, metavar="WxH", help="pixels, as in 256x256", **unset)
    group.add_argument("--snap", choices=("nearest",), help="take the nearest size", **unset)
    group.add_argument(
        "--keep-aspect",
        action=argparse.BooleanOptionalAction,
        help="the source's aspect at the model's native area",
        **unset,
    )
    group.add_argument(
        "--tile", action="store_true", help="a texture that goes on beside itself", **unset
    )
    group.add_argument("--seed", type=_whole, nargs="+", metavar="N", help="-1 draws one", **unset)
    group.add_argument("--num-images", type=_whole, metavar="N", help="seeds S, S+1, …", **unset)
    if with_references:
        group.add_argument(
            "--ref",
            dest="references",
            action="append",
            metavar="IMAGE",
            help="reference picture, up to 11 (repeatable)",
            **unset,
        )
    group.add_argument(
        "--box",
        action="append",
        metavar="x1,x2,y1,y2",
        help="where a reference goes, in their order; fractions or percent (repeatable)",
        **unset,
    )
    group.add_argument("--layout", metavar="FILE", help="all boxes from a JSON file", **unset)
    group.add_argument("--init", dest="init_image", metavar="IMAGE", help="start from it", **unset)
    group.add_argument("--strength", type=float, metavar="F", help="how far from --init", **unset)
    group.add_argument("--mask", metavar="IMAGE", help="white where it may change", **unset)
    group.add_argument(
        "--expand",
        type=_margins,
        metavar="L,T,R,B",
        help="pixels that the source grows by at its left, top, right, bottom; it is kept itself",
        **unset,
    )

    group.add_argument(
        "--lora",
        dest="loras",
        action="append",
        nargs=2,
        metavar=("PATH", "SCALE"),
        help="a LoRA's safetensors file and how strongly it acts, as in 0.8 (repeatable)",
        **unset,
    )
    for name, values in CAMERA.items():
        group.add_argument(f"--{name}", metavar="NAME", help=", ".join(values), **unset)

    group.add_argument(
        "--encoder-prompt",
        dest="encoder_prompts",
        action="append",
        nargs=2,
        metavar=("ENCODER", "TEXT"),
        help="what one text encoder of I1 reads instead: clip_l, clip_g, t5 or llama (repeatable)",
        **unset,
    )
    group.add_argument(
        "--embeddings", metavar="FILE", help="I1: a prompt as hidream embed read it", **unset
    )

    group = parser.add_argument_group("sampling (default: the model's own)")
    group.add_argument("--steps", dest="num_inference_steps", type=_whole, metavar="N", **unset)
    group.add_argument("--guidance", dest="guidance_scale", type=float, metavar="G", **unset)
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range of sigma where guidance acts",
        **unset,
    )
    group.add_argument("--shift", type=float, metavar="S", **unset)
    group.add_argument("--sampler", metavar="NAME", help=", ".join(SAMPLERS), **unset)
    group.add_argument("--sigmas", type=float, nargs="+", metavar="S", help="falling", **unset)
    group.add_argument("--noise-scale", type=float, metavar="F", **unset)
    group.add_argument("--noise-clip-std", type=float, metavar="F", **unset)
    group.add_argument(
        "--image-guidance-scale",
        type=float,
        metavar="G",
        help="E1: how much of the source stays",
        **unset,
    )
    group.add_argument(
        "--clip-cfg-norm",
        action=argparse.BooleanOptionalAction,
        help="E1: guidance makes the velocity no longer (its default)",
        **unset,
    )
    group.add_argument(
        "--refine-strength",
        type=float,
        metavar="F",
        help="E1: share of the steps left to I1",
        **unset,
    )
    group.add_argument(
        "--as-published", action="store_true", help="I1, E1: as their own pipelines do", **unset
    )
    group.add_argument(
        "--sparsity",
        type=float,
        metavar="F",
        help="share of the attention between a picture's parts to skip, 0 … below 1",
        **unset,
    )
    group.add_argument(
        "--deterministic", action="store_true", help="same bits in any batch", **unset
    )

    later = parser.add_argument_group("refused in this version, with a message")
    later.add_argument("--refine-prompt", metavar="NAME", **unset)


def add_prompt_file(parser: argparse.ArgumentParser) -> None:
    """--prompt-file, None where it is not given."""
    parser.add_argument_group("many requests").add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a line is a prompt, or JSON with a request's fields, which win over the flags",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """How a text is written: fields of a TextRequest, absent where they are not given."""
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    group = parser.add_argument_group("text")
    group.add_argument(
        "--max-tokens",
        dest="max_new_tokens",
        type=_whole,
        metavar="N",
        help="longest answer (default 256)",
        **unset,
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0, the default, takes the likeliest word each time; 1 draws by probability",
        **unset,
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest only", **unset
    )
    group.add_argument("--seed", type=_whole, metavar="N", help="-1 draws one", **unset)


def add_panels(parser: argparse.ArgumentParser) -> None:
    """How a storyboard's panels lie on their sheet; None where it is not given."""
    group = parser.add_argument_group("panels")
    group.add_argument(
        "--columns", type=_whole, metavar="N", help="panels in a row (default: by their shape)"
    )
    group.add_argument(
        "--panel", type=_size, metavar="WxH", help="pixels of one panel (--size is the sheet's)"
    )
    group.add_argument(
        "--gutter", type=_whole, metavar="N", help="white pixels between panels; 0 is none"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        default=None,
        metavar="FILE",
        help="may hold {seed} and {index}; .png, .jpg or .webp (default out-{seed}.png, or "
        "out-{index}-{seed}.png of a prompt file)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing files")
    group.add_argument(
        "--preview-every", type=_whole, metavar="N", help="also save every Nth step's preview"
    )
    group.add_argument(
        "--from", dest="from_picture", metavar="IMAGE", help="make it again; other flags win"
    )
    group.add_argument("--no-metadata", action="store_true", help="keep the settings out of it")
    group.add_argument(
        "--embed-inputs", action="store_true", help="carry references and masks inside it"
    )
    group.add_argument("--dry-run", action="store_true", help="show settings and an estimate")
    add_json(group)


def request_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request's fields that the flags give, by name.

    Raises:
        UsageError: two flags exclude each other.
        InputError: a box or the layout file is not usable.
    """
    given = vars(arguments)
    known = {item.name for item in fields(GenerateRequest)} - {"layout", "model"}
    found = {name: value for name, value in given.items() if name in known and value is not None}
    if "size" in given:
        found["width"], found["height"] = given["size"]
    if "seed" in found and len(found["seed"]) == 1:
        found["seed"] = found["seed"][0]
    if "loras" in found:
        found["loras"] = [(path, _scale(scale)) for path, scale in found["loras"]]
    if "box" in given and "layout" in given:
        raise UsageError("--box and --layout both say where references go.", "Give one of them.")
    if "box" in given:
        found["layout"] = [_box(text) for text in given["box"]]
    if "layout" in given:
        found["layout"] = _layout(Path(given["layout"]))
    return found


def _scale(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(
            f'the scale "{text}" of --lora is not a number.', "Write --lora PATH SCALE."
        ) from error


def _box(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f'the box "{text}" is not four numbers.', "Write --box x1,x2,y1,y2."
        ) from error


def _layout(file: Path) -> Any:
    try:
        return json.loads(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise InputError(f"the layout {file} cannot be read: {reason}.") from error


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-?\d{1,9})[xX×](-?\d{1,9})", text)
    if not match:
        raise argparse.ArgumentTypeError(f'"{text}" is no size; write WIDTHxHEIGHT, as in 256x256')
    return int(match[1]), int(match[2])


def _margins(text: str) -> list[int]:
    if not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9}){3}|-?\d{1,9}", text):
        raise argparse.ArgumentTypeError(
            f'"{text[:40]}" is not four numbers; write LEFT,TOP,RIGHT,BOTTOM in pixels, as in '
            "0,0,64,0"
        )
    return [int(part) for part in text.split(",")]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,30}", text):
        raise argparse.ArgumentTypeError(f'"{text[:40]}" is not a whole number')
    return int(text)


def _device(text: str) -> str:
    if text.split(":")[0] not in DEVICES:
        raise argparse.ArgumentTypeError(f'unknown device "{text}"; {nearest(text, DEVICES)}')
    return text
