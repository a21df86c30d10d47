"""`hidream models convert`: a PyTorch pickle (.pt, .pth, .ckpt) becomes safetensors.

The one place where a pickle is read, by PyTorch's restricted reader: tensors, plain containers and
argparse's Namespace, which REPA-E's checkpoints hold; whatever else one names is refused.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.errors import InputError, ModelError, UsageError
from hidream.folder import PICKLES

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("auto", "vae", "hidit", "stats", "weights")
EXAMPLES = """\
hidream models convert e2e-vavae-400k.pt vae/                     a VAE, with its config.json
hidream models convert e2e-vavae-400k-latents-stats.pt stats.safetensors
hidream models convert exps/run/checkpoints/0400000.pt model/ --ema
hidream models convert weights-inception-2015-12-05.pth inception.safetensors"""

Shapes = Mapping[str, list[int]]

# What a published VAE's training had beside the VAE.
BESIDE_VAE = ("loss.", "linear_proj.", "foundation_model.", "model_ema.")
STATS = ("latents_scale", "latents_bias")


@dataclass
class Found:
    """What a pickle held: the tensors that are kept, their kind, what is known of them."""

    tensors: dict[str, Tensor]
    kind: str
    part: str | None = None  # of the checkpoint: model, ema or state_dict; None: all of it
    others: tuple[str, ...] = ()  # the checkpoint's other parts
    told: Mapping[str, Any] = field(default_factory=dict)  # the arguments that it was trained with
    steps: int | None = None
    dropped: list[str] = field(default_factory=list)


def run(argv: list[str]) -> int:
    parser = Parser(
        "models convert",
        "Turn a PyTorch pickle into safetensors, once, so that nothing else has to read one.",
        usage="hidream models convert IN OUT [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="IN", help=", ".join(PICKLES))
    parser.add_argument(
        "target", metavar="OUT", help="a .safetensors file, or a folder, which gets a config.json"
    )
    parser.add_argument(
        "--kind", choices=KINDS, default="auto", help="what it is (default: told by its tensors)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="a checkpoint's averaged weights, not its last ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_json(parser)
    arguments = parser.parse(argv)
    source, target = (Path(p).expanduser() for p in (arguments.source, arguments.target))
    _check_paths(source, target, arguments.overwrite)

    found = read(source, kind=arguments.kind, ema=arguments.ema)
    is_file = target.suffix == ".safetensors"
    if not is_file and found.kind in ("stats", "weights"):
        raise UsageError(
            f"{found.kind} have no configuration, so they cannot become a folder.",
            f"Name a file: {target}.safetensors.",
        )
    config = _config(found, source)
    for name in found.dropped[:1]:
        console.say(f"left out, no part of a VAE: {len(found.dropped)} tensors, as {name}")
    if found.part == "model" and "ema" in found.others:
        console.say("these are the last weights; --ema takes the averaged ones, which draw better.")

    from hidream.models.hidit.files import write_folder, write_tensors

    if is_file:
        write_tensors(target, found.tensors)
    else:
        write_folder(target, config or {}, found.tensors)
    if arguments.json:
        console.show(
            {
                "path": str(target),
                "kind": found.kind,
                "part": found.part,
                "steps": found.steps,
                "num_tensors": len(found.tensors),
                "num_values": sum(tensor.numel() for tensor in found.tensors.values()),
                "dropped": found.dropped,
                "config": config,
            }
        )
    else:
        print(target)
    return 0


def read(source: Path, *, kind: str = "auto", ema: bool = False) -> Found:
    """The tensors of a pickle, by the names that they have without their training's wrappers.

    Raises ModelError where it holds anything else than tensors, settings and numbers, is damaged,
    is not of `kind`, or has values that are not finite; UsageError for `ema` of one without.
    """
    import torch

    content = _unpickled(source)
    found = _chosen(source, content, ema)
    named: dict[str, Tensor] = {}
    for name, value in found.tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{source} holds {type(value).__name__} under {str(name)[:60]!r}, not a tensor.",
                "It is no state dict; save its weights alone.",
            )
        named[_unwrapped(name)] = value
    if len(named) != len(found.tensors) or not named:
        raise ModelError(f"{source} holds {'a name twice' if named else 'no tensors'}.")
    found.tensors = named
    detected = _kind_of(named)
    if kind != "auto" and kind != detected and kind != "weights":
        raise ModelError(f"{source} is no {kind}: it looks like {detected}.", "Leave out --kind.")
    found.kind = detected if kind == "auto" else kind
    if found.kind == "vae":
        found.dropped = sorted(name for name in named if name.startswith(BESIDE_VAE))
        found.tensors = {n: t for n, t in named.items() if n not in found.dropped}
    for name, tensor in found.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(
                f"{name} in {source} holds values that are not finite.",
                "The file is damaged, or the training run that wrote it diverged.",
            )
    return found


def _unpickled(source: Path) -> Any:
    """By the reader that builds nothing but tensors, plain containers and a Namespace."""
    import torch

    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats, and of typed storages
        try:
            mapped = _is_archive(source)  # only such a file can be mapped instead of read
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # a hostile file makes the reader raise whatever it likes
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise
            raise _refused(source, error) from error


def _refused(source: Path, error: Exception) -> ModelError:
    """One line: which class or function a pickle asked for, or that it cannot be read."""
    text = " ".join(str(error).split())
    named = re.search(r"safe_globals\(\[([\w.]+)\]\)|GLOBAL ([\w.]+)", text)
    if named or "TorchScript" in text:
        what = f"names {named[1] or named[2]}" if named else "is TorchScript"
        return ModelError(
            f"{source} {what}: such a pickle can run any code, and is not read.",
            "Have its tensors alone saved again by whoever made it.",
        )
    reason = "its pickle is none of torch.save's" if "WeightsUnpickler" in text else text[:100]
    return ModelError(
        f"{source} is no readable PyTorch file ({reason or 'it ends too early'}).",
        "Download it again, and whole.",
    )


def _chosen(source: Path, content: Any, ema: bool) -> Found:
    """The part of a checkpoint that is wanted, and what stands beside it."""
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{source} holds a {type(content).__name__}, not named tensors.", "It is no checkpoint."
        )
    parts = [
        name for name in ("model", "ema", "state_dict") if isinstance(content.get(name), Mapping)
    ]
    if not parts:
        if ema:
            raise UsageError(f"{source} has no averaged weights.", "Leave out --ema.")
        tensors = dict(content)
        if set(STATS) <= tensors.keys():
            tensors = {name: tensors[name] for name in STATS}
        return Found(tensors, "weights")
    part = "ema" if ema else parts[0]
    if part not in parts:
        raise UsageError(f"{source} has no averaged weights.", "Leave out --ema.")
    told, steps = content.get("args"), content.get("steps")
    told = vars(told) if isinstance(told, argparse.Namespace) else told
    return Found(
        dict(content[part]),
        "weights",
        part=part,
        others=tuple(name for name in parts if name != part),
        told=told if isinstance(told, Mapping) else {},
        steps=steps if isinstance(steps, int) else None,
    )


def _kind_of(tensors: Mapping[str, Tensor]) -> str:
    if tensors.keys() == set(STATS):
        return "stats"
    if "x_embedder.proj.weight" in tensors and "pos_embed" in tensors:
        return "hidit"
    if "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        return "vae"
    return "weights"


def _config(found: Found, source: Path) -> dict[str, Any] | None:
    """What `config.json` will say, checked against every tensor; statistics are put in shape.

    Raises ModelError where names or shapes are not those of the configuration.
    """
    shapes = {name: list(tensor.shape) for name, tensor in found.tensors.items()}
    if found.kind == "stats":
        lengths = {math.prod(shape) for shape in shapes.values()}
        if len(lengths) != 1 or any(len(shape) not in (1, 4) for shape in shapes.values()):
            raise ModelError(f"{source}: {' and '.join(STATS)} are of {list(shapes.values())}.")
        found.tensors = {n: t.float().reshape(1, -1, 1, 1) for n, t in found.tensors.items()}
        return None
    if found.kind == "weights":
        return None
    if found.kind == "vae":
        from hidream.models.hidit import vae

        of_vae = vae.config_of(shapes)
        _check(source, shapes, vae.shapes_of(of_vae))
        return of_vae.to_dict()
    from hidream.models.hidit import weights
    from hidream.models.hidit.init import PIXEL_PREFIX

    config = weights.config_of(shapes, _settings(found.told))
    expected = weights.shapes_of(config)
    if not any(name.startswith(PIXEL_PREFIX) for name in shapes):
        expected = {n: s for n, s in expected.items() if not n.startswith(PIXEL_PREFIX)}
    _check(source, shapes, expected)
    return config.to_dict()


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """What REPA-E's and this project's arguments say that shapes do not."""
    from hidream.models.hidit.config import SIZES

    found: dict[str, Any] = {}
    if told.get("model") in SIZES:
        found["num_heads"] = SIZES[told["model"]].num_heads
    for name, ours, kind in (
        ("encoder_depth", "encoder_depth", int),
        ("resolution", "image_size", int),
        ("gate", "gate", float),
        ("attention", "attention", str),
        ("pixel_clock", "pixel_clock", str),
    ):
        if type(told.get(name)) is kind:
            found[ours] = told[name]
    return found


def _check(source: Path, shapes: Shapes, expected: Shapes) -> None:
    wrong = [
        *(f"{name} is missing" for name in expected if name not in shapes),
        *(f"{name} is left over" for name in shapes if name not in expected),
        *(
            f"{name} is {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{source} does not fit: {'; '.join(wrong[:3])}{more}.",
            "--kind weights converts any named tensors, to a file and as they are.",
        )


def _check_paths(source: Path, target: Path, overwrite: bool) -> None:
    if source.suffix == ".safetensors":
        raise InputError(f"{source} is safetensors already.", "There is nothing to convert.")
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "does not exist"
        raise InputError(f"{source} {what}.", f"Name a file: {', '.join(PICKLES)}.")
    if target.suffix in PICKLES:
        raise UsageError(f"{target} would be a pickle again.", "Name a .safetensors or a folder.")
    there = target if target.suffix == ".safetensors" else target / "model.safetensors"
    if target.suffix != ".safetensors" and target.is_file():
        raise InputError(f"{target} is a file.", "Name a folder, or end the name in .safetensors.")
    if there.exists() and not overwrite:
        raise InputError(f"{there} exists already.", "Choose another name, or say --overwrite.")
    if there == target and not target.absolute().parent.is_dir():
        raise InputError(f"{target.parent} is not a folder.", "Make it first.")


def _unwrapped(name: str) -> str:
    """Without what DistributedDataParallel puts in front and torch.compile puts anywhere."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def _is_archive(source: Path) -> bool:
    with source.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
