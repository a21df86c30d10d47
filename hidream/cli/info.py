"""`hidream info`: what a picture is and what it says about how it was made."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.errors import UsageError
from hidream.limits import MAX_SIDE

if TYPE_CHECKING:
    from hidream.metadata import Texts

MAX_SHOWN = 4000  # characters of a value of another program
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # kinds of characters that may move others about
_JOINER = "\u200d"  # of emoji


def run(argv: list[str]) -> int:
    parser = Parser("info", "Show what a picture says about itself.")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--analyse", action="store_true", help="also look for the grid of patches in its pixels"
    )
    parser.add_argument(
        "--patch",
        type=int,
        metavar="N",
        help="of --analyse: pixels of a patch (default: its model's)",
    )
    add_json(parser)
    arguments = parser.parse(argv)
    if arguments.patch is not None and not arguments.analyse:
        raise UsageError("--patch is for --analyse.", "Add --analyse.")
    if arguments.patch is not None and not 2 <= arguments.patch <= MAX_SIDE:
        raise UsageError(f"--patch {arguments.patch} is outside 2 … {MAX_SIDE}.")

    from hidream.pictures import read_metadata, read_size, read_texts

    width, height = read_size(arguments.image)
    note, texts = read_metadata(arguments.image), read_texts(arguments.image)
    num_bytes = Path(arguments.image).expanduser().stat().st_size
    if note is not None:
        note = _without_files(note)
    other = _of_others(texts) if note is None else None
    patch = arguments.patch or _patch_size(arguments.image, note) if arguments.analyse else None
    seams = _seams(arguments.image, patch) if patch else None
    if arguments.json:
        picture = {"path": arguments.image, "width": width, "height": height, "bytes": num_bytes}
        found = {"metadata": note, "other": other, "digital_source_type": texts.source_type}
        console.show({**picture, **found, **({"seams": seams} if seams else {})})
        return 0
    print(f"{arguments.image}: {width}x{height}, {console.size(num_bytes)}")
    if texts.source_type:
        print(f"marked as {texts.source_type}")
    if note is not None:
        _show_ours(arguments.image, note)
    elif other is not None:
        _show_other(other)
    else:
        print("no settings of hidream in it")
    if seams:
        _show_seams(seams)
    return 0


def _patch_size(image: str, note: Mapping[str, Any] | None) -> int:
    """The patch of the model that made a picture, as its note says."""
    from hidream.registry import SPECS

    model = (note or {}).get("model")
    model = model if isinstance(model, dict) else {}
    size = model.get("patch_size")
    if isinstance(size, int) and 2 <= size <= MAX_SIDE:
        return size
    for spec in SPECS.values():
        if model.get("name") == spec.name:
            return spec.patch_size
    raise UsageError(
        f"{image} does not say which model made it.",
        "Give its patch: --patch 32 for O1, 16 for o1-nano.",
    )


def _seams(image: str, patch: int) -> dict[str, Any]:
    """What `judges.seams` finds, as JSON values rounded to three places."""
    from hidream.judges.seams import seams_of
    from hidream.pictures import read_picture

    found: dict[str, Any] = {"patch": patch}
    for axis, seams in seams_of(read_picture(image), patch).items():
        found[axis] = seams and {
            "border": round(seams.border, 3),
            "inside": round(seams.inside, 3),
            "ratio": round(seams.ratio, 3),
            "other_offsets": [round(value, 3) for value in seams.range],
            "shows": seams.shows,
        }
    return found


def _show_seams(seams: Mapping[str, Any]) -> None:
    print(f"seams of patches of {seams['patch']} pixels (step across borders / inside patches):")
    for axis, name in (("x", "between columns"), ("y", "between rows")):
        found = seams[axis]
        if found is None:
            print(f"  {name:<20} the picture has no border there")
            continue
        low, high = found["other_offsets"]
        print(
            f"  {name:<20} {found['ratio']:.2f} = {found['border']:.2f} / {found['inside']:.2f} "
            f"levels; other offsets {low:.2f} to {high:.2f}: "
            f"{'more than any of them' if found['shows'] else 'normal'}"
        )


def _show_ours(image: str, note: Mapping[str, Any]) -> None:
    request = note.get("request")
    request = request if isinstance(request, dict) else {}
    for name, value in request.items():
        if value not in (None, [], "off", False):
            print(f"  {_plain(name):<20} {_plain(value)}")
    preview = note.get("preview")
    if isinstance(preview, dict):
        told = f"of step {preview.get('step')} of {preview.get('num_steps')}"
        print(f"  {'preview':<20} {_plain(told)}")
    model, embedded = note.get("model"), note.get("embedded")
    if isinstance(model, dict) and model.get("digest"):
        print(f"  {'model digest':<20} {_plain(model['digest'])}")
    if isinstance(embedded, dict):
        print(f"  {'carried inside':<20} {len(embedded)} pictures")
    versions = note.get("versions")
    if isinstance(versions, dict):
        told = ", ".join(f"{name} {value}" for name, value in versions.items())
        print(f"made with {_plain(told)}")
    references = request.get("references")
    num_references = len(references) if isinstance(references, list) else 0
    command = ("generate", "edit", "subject")[min(num_references, 2)]
    if isinstance(sheet := request.get("sheet"), dict):
        command = "storyboard"
        if isinstance(panel := note.get("panel"), dict):
            print(f"panel {_plain(panel.get('number'))} of {_plain(sheet.get('number'))} panels")
    print(f"make it again: hidream {command} --from {image} -o again.png")


def _show_other(other: Mapping[str, Any]) -> None:
    print(f"no settings of hidream in it, but those of {other['program']}")
    for name, value in other.items():
        rows = value if isinstance(value, dict) else {name: value}
        for key, inner in rows.items():
            if name != "program" and inner not in ("", [], None):
                print(f"  {_plain(key):<20} {_plain(inner)[:MAX_SHOWN]}")


def _of_others(texts: Texts) -> dict[str, Any] | None:
    from hidream.foreign import read_comfy, read_parameters

    if texts.prompt is not None or texts.workflow is not None:
        return {"program": "ComfyUI", **read_comfy(texts.prompt, texts.workflow)}
    if texts.parameters is not None:
        return {"program": "A1111 or one of its kind", **read_parameters(texts.parameters)}
    return None


def _without_files(note: dict[str, Any]) -> dict[str, Any]:
    """The note with the sizes, in characters of base64, of the files that it carries."""
    embedded = note.get("embedded")
    if not isinstance(embedded, dict):
        return note
    return {**note, "embedded": {key: len(str(data)) for key, data in embedded.items()}}


def _plain(value: object) -> str:
    """One line that changes nothing of a terminal, whatever stands in the picture."""
    text = str(value)
    return "".join(" " if unicodedata.category(c) in _UNSEEN and c != _JOINER else c for c in text)
