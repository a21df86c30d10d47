"""`hidream describe`: what a picture shows, in words."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from typing import TYPE_CHECKING

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json, add_model, add_text
from hidream.cli.loading import check_memory, load_pipeline
from hidream.errors import ModelError, UsageError
from hidream.folder import open_folder
from hidream.locating import locate
from hidream.registry import DEFAULT_MODEL
from hidream.text_request import TextRequest

if TYPE_CHECKING:
    from hidream.pipelines import TextOutput

EXAMPLES = """\
hidream describe cube.png
hidream describe cube.png "What colour is the sphere?"
hidream describe photo.jpg "Tell its story." -m o1 --temperature 0.7 --top-p 0.8 --seed 1"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "describe",
        "Say what a picture shows, or answer a question about it.",
        usage="hidream describe IMAGE [QUESTION] [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture to look at")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="default: describe it")
    add_text(parser)
    add_model(parser)
    add_json(parser)
    arguments = parser.parse(argv)
    check_memory(arguments)
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    fields = {name: value for name, value in vars(arguments).items() if name in names}
    request = TextRequest.about(arguments.image, arguments.question, **fields)
    model = arguments.model or DEFAULT_MODEL
    spec, folder = locate(model, variant=arguments.variant, components=arguments.components)
    if spec.family != "o1":
        raise UsageError(f"{spec.name} draws, but cannot write.", "Use an O1 model.")

    from hidream.pictures import read_picture

    read_picture(arguments.image, "the picture")
    if not open_folder(folder).has_lm_head:
        raise ModelError(
            f"{folder} has no lm_head: its model can draw, but not write.",
            "Use a folder that holds lm_head.weight.",
        )
    for warning in request.warnings:
        console.warn(warning)
    return _answer(arguments, model, request)


def _answer(arguments: argparse.Namespace, model: str, request: TextRequest) -> int:
    """Load the model and write: on a terminal word by word, as plain text or JSON when done."""
    pipe = load_pipeline(arguments, model)
    live = not arguments.json and sys.stdout.isatty()
    try:
        output = pipe.generate_text(request, on_token=_show_piece if live else None)
    finally:
        if live:
            print(flush=True)
    if arguments.json:
        console.show(_report(output, arguments, pipe.spec.name, str(pipe.device)))
        return 0
    if not live:
        print(output.text)
    if output.finish_reason == "length":
        console.say(f"cut at {output.num_tokens} tokens; --max-tokens N allows more.")
    return 0


def _show_piece(place: int, number: int, text: str) -> None:
    """A piece of text to the terminal, without what would steer it."""
    print("".join(map(_harmless, text)), end="", flush=True)


def _harmless(character: str) -> str:
    steers = unicodedata.category(character) == "Cc" and character not in "\n\t"
    return "\ufffd" if steers else character


def _report(
    output: TextOutput, arguments: argparse.Namespace, model: str, device: str
) -> dict[str, object]:
    request = output.request
    return {
        "text": output.text,
        "num_tokens": output.num_tokens,
        "finish_reason": output.finish_reason,
        "image": arguments.image,
        "question": request.prompt,
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "model": model,
        "device": device,
        "seconds": round(output.timings["total"], 3),
        "warnings": list(output.warnings),
    }
