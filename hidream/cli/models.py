"""`hidream models`: list, describe, check and download models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_components, add_json
from hidream.errors import ModelError, UsageError
from hidream.folder import holds_transformer, open_file, read_config
from hidream.locating import fetch, locate, published
from hidream.registry import SPECS, VARIANTS, Spec, find, known, nearest

if TYPE_CHECKING:
    from hidream.models.i1.config import I1Config
    from hidream.models.o1.config import O1Config

HELP = """\
usage: hidream models [list | info | verify | pull | convert] ...

  list                            the models by name, and which are on this machine
  info NAME_OR_FOLDER [--tensors] sizes, defaults, licence; every tensor's name and shape; of a
                                  single file what its header tells
  verify NAME_OR_FOLDER           check headers, names, shapes and values
  pull NAME_OR_HUB_ID [--to DIR]  download a model (safetensors, configuration, tokenizer)
  convert IN.pt OUT               a PyTorch pickle of Hi-DiT's kind becomes safetensors

Each takes --json."""


def run(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "info": _info,
        "verify": _verify,
        "pull": _pull,
        "convert": _convert,
    }
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if not argv or argv[0].startswith("-"):
        return _list(argv)
    if argv[0] not in commands:
        raise UsageError(f'unknown command "models {argv[0]}"; {nearest(argv[0], commands)}')
    return commands[argv[0]](argv[1:])


def _list(argv: list[str]) -> int:
    parser = Parser("models list", "The models by name.")
    add_json(parser)
    arguments = parser.parse(argv)
    rows = []
    for spec in SPECS.values():
        folder = _here(spec.name)
        rows.append(
            {
                "name": spec.name,
                "repo": spec.repo,
                "folder": str(folder) if folder else None,
                "licence": spec.licence,
                "description": spec.description,
            }
        )
    if arguments.json:
        console.show({"models": rows})
        return 0
    for row in rows:
        place = "here" if row["folder"] else "not here"
        print(f"{row['name']:<13} {place:<9} {row['licence']:<5} {row['description']}")
        if row["repo"]:
            print(f"{'':<13} {row['repo']}")
    return 0


def _info(argv: list[str]) -> int:
    parser = Parser("models info", "A model's sizes, defaults and licence.")
    parser.add_argument("model", metavar="NAME_OR_FOLDER")
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--tensors", action="store_true", help="every tensor's name and shape")
    add_json(parser)
    arguments = parser.parse(argv)
    if Path(arguments.model).expanduser().is_file():
        return _info_of_file(arguments.model, tensors=arguments.tensors, as_json=arguments.json)
    spec, folder, config = _described(arguments.model, arguments.variant)

    shapes = _shapes(config)
    if arguments.tensors:
        return _show_tensors(shapes, as_json=arguments.json)
    found: dict[str, Any] = {
        "name": spec.name,
        "repo": spec.repo,
        "folder": str(folder) if folder else None,
        "family": spec.family,
        "variant": spec.variant,
        "licence": spec.licence,
        "description": spec.description,
        "num_params": sum(_product(shape) for shape in shapes.values()),
        "num_tensors": len(shapes),
        "config": asdict(config),
        "defaults": asdict(spec.defaults),
        "defaults_by_task": {task: asdict(d) for task, d in spec.defaults_by_task.items()},
    }
    return _show(found, as_json=arguments.json)


def _info_of_file(file: str, *, tensors: bool, as_json: bool) -> int:
    """What the header of a single file tells: it holds no configuration."""
    opened = open_file(file)
    if tensors:
        shapes = {name: list(info.shape) for name, info in opened.tensors.items()}
        return _show_tensors(shapes, as_json=as_json)
    is_ours = holds_transformer(opened)
    found = {
        "file": file,
        "holds": "an I1's or E1's transformer" if is_ours else "tensors",
        "prefix": opened.prefix,
        "num_params": opened.num_params,
        "num_tensors": len(opened.tensors),
        "dtypes": dict(Counter(info.dtype for info in opened.tensors.values())),
    }
    return _show(found, as_json=as_json)


def _show_tensors(shapes: Mapping[str, list[int]], *, as_json: bool) -> int:
    if as_json:
        console.show_compact({"tensors": shapes})
        return 0
    for name, shape in shapes.items():
        print(f"{name}  {list(shape)}")
    return 0


def _show(found: Mapping[str, Any], *, as_json: bool) -> int:
    if as_json:
        console.show(found)
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key:<20} {inner}")
        elif value not in (None, ""):
            print(f"{name:<22} {value}")
    return 0


def _verify(argv: list[str]) -> int:
    parser = Parser("models verify", "Check a model's headers, names, shapes and values.")
    parser.add_argument("model", metavar="NAME_OR_FOLDER")
    add_components(parser)
    add_json(parser)
    arguments = parser.parse(argv)
    spec, path = locate(arguments.model, components=arguments.components)

    from safetensors import safe_open

    if spec.family == "o1":
        from hidream.models.o1.tokens import Tokenizer
        from hidream.models.o1.weights import verify_folder

        parts = {"model": verify_folder(path)}
        Tokenizer(path)
    else:
        from hidream.models.i1.repository import verify_repository

        parts = verify_repository(path, spec.file, edits=spec.family == "e1")
        if "vae" in parts and "text_encoder_4" not in parts:
            console.say("Llama is published elsewhere, and was not looked at.")
    files = sorted({info.file for folder in parts.values() for info in folder.tensors.values()})
    num_bytes = 0
    for number, file in enumerate(files, 1):
        console.say(f"reading {file.name} ({number}/{len(files)})")
        num_bytes += file.stat().st_size
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                if not shard.get_tensor(name).isfinite().all():
                    raise ModelError(
                        f"{name} in {file} holds values that are not finite.",
                        "The file is damaged, or the training run that wrote it diverged.",
                    )
    found = {
        "folder": str(spec.file or path),
        "ok": True,
        "num_files": len(files),
        "num_tensors": sum(len(folder.tensors) for folder in parts.values()),
        "num_params": sum(folder.num_params for folder in parts.values()),
        "bytes": num_bytes,
        "parts": list(parts),
    }
    if arguments.json:
        console.show(found)
    else:
        read = f" ({', '.join(parts)})" if len(parts) > 1 else ""
        print(
            f"{found['folder']} is whole: {found['num_tensors']} tensors, {found['num_params']} "
            f"values, {console.size(num_bytes)}{read}."
        )
    return 0


def _pull(argv: list[str]) -> int:
    parser = Parser("models pull", "Download a model; what is here already is not fetched again.")
    parser.add_argument("model", metavar="NAME_OR_HUB_ID")
    parser.add_argument("--to", metavar="DIR", help="a folder of its own, not the hub's cache")
    add_json(parser)
    arguments = parser.parse(argv)
    if "/" in arguments.model:
        repo: str | None = arguments.model
    else:
        repo = find(arguments.model).repo
    if repo is None:
        path = locate(arguments.model)[1]
        console.say(f"{arguments.model} ships with hidream; there is nothing to download.")
    else:
        console.say(f"downloading {repo}")
        path = fetch(repo, folder=Path(arguments.to).expanduser() if arguments.to else None)
    if arguments.json:
        console.show({"model": arguments.model, "folder": str(path)})
    else:
        print(path)
    return 0


def _convert(argv: list[str]) -> int:
    from hidream.cli import convert

    return convert.run(argv)


def _described(model: str, variant: str | None) -> tuple[Spec, Path | None, O1Config | I1Config]:
    """Spec, folder and configuration; for a published model that is not here, its named size."""
    from hidream.models.i1 import config as i1
    from hidream.models.o1 import config as o1

    if model not in SPECS and model in o1.SIZES:
        return find("o1"), None, o1.SIZES[model]
    if model not in SPECS and model in i1.SIZES:
        return find("i1-full"), None, i1.SIZES[model]
    try:
        spec, path = locate(model, variant=variant)
    except ModelError:
        named = known(model)
        if named is None:
            raise
        return (
            published(named, variant),
            None,
            i1.SIZES.get(named.name) or o1.SIZES.get(named.name, o1.O1_8B),
        )
    if spec.family != "o1":
        from hidream.folder import transformer_folder

        config, _ = read_config(transformer_folder(path) or path)
        return spec, path, i1.I1Config.from_dict(config)
    return spec, path, o1.O1Config.from_dict(*read_config(path))


def _shapes(config: O1Config | I1Config) -> dict[str, list[int]]:
    from hidream.models.i1 import weights as i1
    from hidream.models.o1 import weights as o1
    from hidream.models.o1.config import O1Config

    return o1.shapes_of(config) if isinstance(config, O1Config) else i1.shapes_of(config)


def _here(name: str) -> Path | None:
    try:
        return locate(name)[1]
    except ModelError:
        return None


def _product(shape: list[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result
