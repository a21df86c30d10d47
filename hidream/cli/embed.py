"""`hidream embed`: what I1's text encoders say of a prompt, in a file, for drawing without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json, add_model
from hidream.errors import InputError, UsageError
from hidream.folder import transformer_folder
from hidream.limits import clean_prompt
from hidream.locating import check_parts, components_folder, locate
from hidream.memory import Policy, find_policy
from hidream.request import ENCODERS

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
hidream embed "a cat in the snow" -m i1-full -n "blurry" -o cat.safetensors
hidream generate --embeddings cat.safetensors -m i1-full -o cat.png"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "embed",
        "Have I1's text encoders read a prompt once. Drawing from the file needs none of them.",
        usage="hidream embed PROMPT -o FILE [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what will be drawn")
    parser.add_argument("-n", "--negative", default="", metavar="TEXT", help="the negative prompt")
    parser.add_argument(
        "--encoder-prompt",
        action="append",
        nargs=2,
        default=[],
        metavar=("ENCODER", "TEXT"),
        help=f"what one of them reads instead: {', '.join(ENCODERS)} (repeatable)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_model(parser)
    add_json(parser)
    arguments = parser.parse(argv)
    policy = find_policy(arguments.memory)
    prompt = clean_prompt(arguments.prompt)
    negative = clean_prompt(arguments.negative, "negative_prompt", may_be_empty=True).strip()
    output = Path(arguments.output).expanduser()
    if output.suffix != ".safetensors":
        raise InputError(f"{output} is no name of an embedding file.", "End it in .safetensors.")
    if output.exists() and not arguments.overwrite:
        raise InputError(f"{output} exists already.", "Choose another name, or say --overwrite.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} is not a folder.", "Make it first.")
    spec, folder = locate(
        arguments.model or "i1-full", variant=arguments.variant, components=arguments.components
    )
    check_parts(spec, llama=arguments.llama, refiner=arguments.refiner)
    if spec.family == "o1" or transformer_folder(folder) is None:
        raise UsageError(f"{spec.name} has no text encoders.", "Name an I1 or E1: -m i1-full.")

    from hidream.models.i1.embeddings import Embeddings, save_embeddings
    from hidream.models.i1.text import TextEncoders, Texts
    from hidream.pipelines.devices import find_device, find_dtype, told_when_full

    device = find_device(arguments.device)
    dtype = find_dtype(None if arguments.dtype == "auto" else arguments.dtype, device)
    texts, negative_texts = Texts.of(prompt, dict(arguments.encoder_prompt)), Texts.of(negative)
    parts = components_folder(spec, folder, arguments.refiner)
    encoders = TextEncoders.open(
        parts,
        llama=arguments.llama,
        device=device,
        dtype=dtype,
        keep=False,
        piecewise=policy.piecewise,
    )
    for warning in (*encoders.cut(texts), *encoders.cut(negative_texts)):
        console.warn(warning)
    console.say(f"reading with the text encoders of {spec.name}")
    with told_when_full(device, policy, "the text encoders", _less_memory(device, dtype, policy)):
        both = encoders.encode([texts, negative_texts])
    found = Embeddings(
        features=both.take([0]),
        texts=texts,
        negative=both.take([1]),
        negative_texts=negative_texts,
    )
    save_embeddings(output, found, overwrite=arguments.overwrite)
    if arguments.json:
        console.show({"path": str(output), "model": spec.name, "bytes": output.stat().st_size})
    else:
        print(output)
    return 0


def _less_memory(device: torch.device, dtype: torch.dtype, policy: Policy) -> str:
    """What takes less of the device than these choices: one encoder is there at a time anyway."""
    if device.type != "cpu":
        by_layers = "Use --memory low, under which they come layer by layer"
        return "Use --device cpu." if policy.piecewise else f"{by_layers}, or --device cpu."
    if dtype.itemsize > 2:
        return "Use --dtype bf16."
    return "Llama alone takes 15 GB: read the prompt on a larger machine, and draw from the file."
