"""`--from`: the settings of a picture that hidream made, and the pictures that it was made from."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hidream.camera import CAMERA
from hidream.errors import HidreamError, InputError
from hidream.registry import VARIANTS
from hidream.request import GenerateRequest, warnings_of

# Fields that hold pictures -> what messages call them, and how one is given anew.
PICTURES = {
    "references": ("reference", "with --ref (of an edit: as IMAGE)"),
    "mask": ("the mask", "with --mask"),
    "init_image": ("the initial picture", "with --init"),
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
Slot = tuple[str, int]  # a field of PICTURES, and which of its pictures


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a picture says of how it was made; without --from all of it is empty.

    `fields` are the request's, without the model and without what is None. `carried` holds the
    files of pictures that lie inside the picture. `digest` is the model's. `weights` names the
    memory policy where it changes pixels. `preview`: it shows a step on the way. `warnings` were
    told when it was made.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[Slot, bytes] = field(default_factory=dict)
    model: str | None = None
    variant: str | None = None
    digest: str | None = None
    dtype: str | None = None
    weights: str | None = None
    device: str | None = None
    torch: str | None = None
    preview: bool = False
    warnings: tuple[str, ...] = ()


def read_again(picture: str, given: Mapping[str, Any]) -> Again:
    """Read the settings in `picture`. Of the pictures that `given` does not replace, each must be
    carried inside, or lie where it lay with its content unchanged.

    Raises:
        InputError: no settings of ours, unusable ones, or a picture is gone or another one.
    """
    from hidream.metadata import NOTE, VERSION
    from hidream.pictures import read_metadata

    note = read_metadata(picture, "the picture of --from")
    version = note.get(NOTE) if note else None
    if note is None or not isinstance(note.get("request"), dict) or not isinstance(version, int):
        raise InputError(
            f"{picture} holds no settings of hidream.",
            "--from needs a picture that hidream made without --no-metadata.",
        )
    if version > VERSION:
        raise InputError(f"{picture} was made by a newer hidream.", "Update hidream.")
    fields = {name: value for name, value in note["request"].items() if value is not None}
    try:
        own = GenerateRequest.from_dict(fields)
    except (HidreamError, TypeError, ValueError) as error:
        problem = error.problem if isinstance(error, HidreamError) else str(error)
        raise InputError(f"the settings in {picture} are not usable: {problem}") from error
    model, versions = _mapping(note, "model"), _mapping(note, "versions")
    name = fields.pop("model", None)
    variant = _text(model, "variant")
    return Again(
        fields=fields,
        carried=_carried(picture, note, fields, given),
        model=str(name) if name else None,
        variant=variant if variant in VARIANTS else None,
        digest=_text(model, "digest"),
        dtype=DTYPES.get(_text(note, "dtype") or ""),
        weights=_text(note, "weights"),
        device=_text(note, "device"),
        torch=_text(versions, "torch"),
        preview="preview" in note,
        warnings=warnings_of(own, own),
    )


def merged(again: Again, given: Mapping[str, Any]) -> dict[str, Any]:
    """The request's fields: what is `given` over what the picture says.

    What follows from something that is given anew is not taken from the picture: the number of
    pictures from the seeds, the sigmas from steps and shift, the size from the source's aspect or
    its expansion, the panels' size from the sheet's or the other way round, prompts from their
    embedding file or the other way round.
    """
    found = dict(again.fields)
    prompts = {"prompt", "negative_prompt", "encoder_prompts", *CAMERA}
    if "embeddings" in given:
        found = {name: value for name, value in found.items() if name not in prompts}
    elif prompts & set(given):
        found.pop("embeddings", None)
    if {"seed", "num_images"} & set(given):
        found.pop("num_images", None)
    if {"num_inference_steps", "shift", "sigmas"} & set(given):
        found.pop("sigmas", None)
    if "sigmas" in given:
        found.pop("num_inference_steps", None)
        found.pop("shift", None)
    sources = {"references", "init_image"} & set(given)
    if found.get("keep_aspect") and sources:
        found.pop("width", None)
        found.pop("height", None)
    if "expand" in given or "sheet" in given or (found.get("expand") and sources):
        for name in ("width", "height", "keep_aspect"):
            found.pop(name, None)
    if isinstance(found.get("sheet"), Mapping) and {"width", "height"} & set(given):
        found["sheet"] = {**found["sheet"], "width": None, "height": None}
    return {**found, **given}


def slots(values: Mapping[str, Any]) -> Iterator[tuple[Slot, str, Any]]:
    """The pictures among a request's fields: where, what messages call it, path or picture."""
    for name, (label, _) in PICTURES.items():
        value = values.get(name)
        if name == "references":
            for index, picture in enumerate(value or ()):
                yield (name, index), f"{label} {index + 1}", picture
        elif value is not None:
            yield (name, 0), label, value


def with_carried(request: GenerateRequest, carried: Mapping[Slot, bytes]) -> GenerateRequest:
    """The request with the pictures that are carried inside opened, instead of their paths."""
    from hidream.pictures import open_picture

    if not carried:
        return request
    opened: dict[str, list[Any]] = {}
    for slot, label, path in slots({name: getattr(request, name) for name in PICTURES}):
        picture = open_picture(carried[slot], label) if slot in carried else path
        opened.setdefault(slot[0], []).append(picture)
    single = {name: found[0] for name, found in opened.items() if name != "references"}
    return replace(request, **{**opened, **single})


def _carried(
    picture: str, note: Mapping[str, Any], fields: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[Slot, bytes]:
    from hidream import digest

    digests, embedded = _mapping(note, "inputs"), _mapping(note, "embedded")
    found = {}
    for (name, index), label, path in slots(fields):
        if name in given:
            continue
        try:
            told = str(digests[name][index])
            inside = embedded.get(told)
            data = None if inside is None else base64.b64decode(inside, validate=True)
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{picture} does not say well enough what {label} was.",
                f"Give it {PICTURES[name][1]}.",
            ) from error
        if data is None:
            _check_file(picture, label, path, told, PICTURES[name][1])
        elif digest.of_bytes(data) != told:
            raise InputError(
                f"{label}, carried inside {picture}, is damaged.", f"Give it {PICTURES[name][1]}."
            )
        else:
            found[name, index] = data
    return found


def _check_file(picture: str, label: str, path: str, told: str, how: str) -> None:
    """That the file is still the one that was used."""
    from hidream import digest
    from hidream.pictures import read_file

    try:
        data = read_file(path, label)
    except InputError as error:
        raise InputError(
            f"{picture} was made with a file that is gone: {error.problem}",
            f"Put it back, or give another {how}.",
        ) from error
    if digest.of_bytes(data) != told:
        raise InputError(
            f"{label} ({path}) is not the file that {picture} was made with: its SHA-256 differs.",
            f"Put the right one there, or give this one {how}.",
        )


def _mapping(note: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = note.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(note: Mapping[str, Any], key: str) -> str | None:
    value = note.get(key)
    return value if isinstance(value, str) else None
