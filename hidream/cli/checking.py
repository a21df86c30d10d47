"""All that can be found wrong with what was asked for before weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.again import Again, merged, read_again, with_carried
from hidream.cli.loading import check_memory
from hidream.cli.previews import check_previews
from hidream.cli.recording import Inputs, read_inputs
from hidream.errors import ModelError, UsageError
from hidream.folder import Folder, is_alone, open_model
from hidream.locating import (
    check_parts,
    components_folder,
    find_refiner,
    locate,
    published,
    told_variant,
)
from hidream.memory import POLICIES
from hidream.models.e1 import refining_warnings, target_description
from hidream.registry import DEFAULT_MODEL, SPECS, Spec, known
from hidream.request import GenerateRequest, check_ability, resolve, warnings_of

if TYPE_CHECKING:
    from hidream.cli.storyboard import Board


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request that can be drawn: what is known of it before torch is imported.

    `panels` are the places of a storyboard's; `opened` is None where the model is not here.
    """

    model: str
    request: GenerateRequest
    spec: Spec
    opened: Folder | None
    paths: Sequence[Path]
    panels: Sequence[Path]
    inputs: Inputs
    again: Again
    warnings: list[str]


def check(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    *,
    needs_reference: str | None = None,
    board: Board | None = None,
) -> Checked:
    """All that can be found wrong before weights are read, the cheap checks first: flags, prompt
    and ranges, output, pictures, the model's headers."""
    warnings: list[str] = []
    picture = arguments.from_picture
    again = read_again(picture, given) if picture else Again()
    model, asked = _request(arguments, given, again, warnings)
    if again.preview:
        warnings.append(f"{picture} is a preview: the whole picture is made.")
    if needs_reference and not asked.references:
        raise UsageError("there is no reference picture.", needs_reference)
    _settle(arguments, again, same_model=model == again.model)
    spec, folder, missing = find_model(model, arguments.variant, arguments.components)
    check_parts(spec, llama=arguments.llama, refiner=arguments.refiner)
    if folder is not None and arguments.variant is None and variant_is_assumed(spec, folder):
        warnings.append(f"{folder} does not say its variant: full is assumed (--variant dev).")
    defaults = spec.defaults_for(asked.task)
    draft = resolve(asked, defaults, spec.patch_size)
    asked = replace(asked, seed=draft.seed)  # drawn once

    from hidream import pictures  # numpy and Pillow: not needed for what the flags decide

    paths = pictures.plan_outputs(arguments.output or "out-{seed}.png", draft.seeds)
    inputs = Inputs()
    if not arguments.no_metadata:
        inputs = read_inputs(asked, again.carried, embed=arguments.embed_inputs)
    panels = [place for path in paths for place in board.places(path, draft)] if board else []
    pictures.check_outputs(
        [*paths, *panels],
        overwrite=arguments.overwrite,
        num_bytes=(draft.width or 0) * (draft.height or 0) * 3 + 65_536 + inputs.num_bytes,
        make_folders=not arguments.dry_run,
    )
    check_previews(arguments, paths, draft)
    source_size = check_pictures(with_carried(asked, again.carried), warnings)
    request = replace(
        resolve(asked, defaults, spec.patch_size, source_size=source_size), model=spec.name
    )
    check_ability(spec, request)
    if request.refine_strength and not arguments.dry_run:
        find_refiner(arguments.refiner, folder)
    found = warnings_of(as_given(asked, merged(again, given)), request, spec)
    warnings += [told for told in found if told not in again.warnings]
    warnings += refining_warnings(request)
    warnings += refiner_warning(arguments, folder, [request])
    opened = open_model(folder, spec.file) if folder is not None else None
    check_prompts(request, opened)
    check_loras(request, opened, warnings)
    if missing is not None and not arguments.dry_run:
        raise missing
    if folder is not None and not arguments.dry_run:
        check_reader(arguments, request, spec, folder)
    return Checked(
        model=model,
        request=request,
        spec=spec,
        opened=opened,
        paths=paths,
        panels=panels,
        inputs=inputs,
        again=again,
        warnings=warnings,
    )


def check_flags(arguments: argparse.Namespace) -> None:
    """UsageError for flags that exclude each other, or whose values cannot be."""
    if arguments.embed_inputs and arguments.no_metadata:
        raise UsageError("--embed-inputs and --no-metadata exclude each other.", "Leave one out.")
    check_memory(arguments)
    if arguments.preview_every is not None and arguments.preview_every < 1:
        raise UsageError(f"--preview-every {arguments.preview_every} is less than 1.")


def _request(
    arguments: argparse.Namespace, given: dict[str, Any], again: Again, warnings: list[str]
) -> tuple[str, GenerateRequest]:
    """The model and the request: the flags over the settings of --from's picture."""
    model = arguments.model or again.model or DEFAULT_MODEL
    if again.model and model != again.model:
        warnings.append(f"the settings come from a picture of {again.model}, not of {model}.")
    values = with_embeddings(merged(again, given))
    if "prompt" not in values:
        raise UsageError("there is no prompt.", 'Write it first: hidream generate "a red cube".')
    return model, GenerateRequest.from_dict(values)


def with_embeddings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields with the prompts of its embedding file, if any, where they give none."""
    if values.get("embeddings") is None:
        return dict(values)
    from hidream.models.i1.embeddings import read_texts

    texts, negative = read_texts(values["embeddings"])
    found = {"prompt": texts.t5, "encoder_prompts": texts.apart(texts.t5)}
    if negative is not None:
        found["negative_prompt"] = negative.t5
    return {**found, **values}


def as_given(asked: GenerateRequest, values: Mapping[str, Any]) -> GenerateRequest:
    """The request without the negative prompt of its embedding file, which is not in its `values`:
    nobody need be told that it has no effect."""
    if asked.embeddings is None or "negative_prompt" in values:
        return asked
    return replace(asked, negative_prompt=None)


def check_prompts(request: GenerateRequest, folder: Folder | None) -> None:
    """InputError where an embedding file holds other prompts than the request, or another model's
    reading of them, as far as the model is here."""
    if request.embeddings is None:
        return
    from hidream.models.i1.config import I1Config
    from hidream.models.i1.embeddings import check_embeddings

    check_embeddings(request, I1Config.from_dict(folder.config) if folder is not None else None)


def check_reader(
    arguments: argparse.Namespace, request: GenerateRequest, spec: Spec, folder: Path
) -> None:
    """ModelError where an I1's Llama is not here, which would else be found after the hashing."""
    if spec.family == "o1" or not reads_texts(request):
        return
    from hidream.models.i1.llama import find_llama

    find_llama(components_folder(spec, folder, arguments.refiner), arguments.llama)


def refiner_warning(
    arguments: argparse.Namespace, folder: Path | None, requests: Sequence[GenerateRequest]
) -> list[str]:
    """What to tell where an E1's refiner is named that none of the requests needs."""
    if arguments.refiner is None or any(request.refine_strength for request in requests):
        return []
    if folder is None or is_alone(folder):  # then it has the text encoders, and the VAE
        return []
    return ["--refiner has no effect: no edit is refined (--refine-strength)."]


def reads_texts(request: GenerateRequest) -> bool:
    """Whether text encoders are needed: an embedding file holds no description of a target."""
    if request.embeddings is None:
        return True
    return bool(request.refine_strength) and target_description(request.full_prompt) is not None


def _settle(arguments: argparse.Namespace, again: Again, *, same_model: bool) -> None:
    """Compute as the picture of --from was computed, unless the flags say how."""
    if arguments.dtype == "auto" and again.dtype:
        arguments.dtype = again.dtype
    if arguments.memory == "auto" and again.weights in POLICIES:
        arguments.memory = again.weights
        check_memory(arguments)
    if arguments.variant is None and same_model:
        arguments.variant = again.variant


def find_model(
    model: str, variant: str | None, components: str | None = None
) -> tuple[Spec, Path | None, ModelError | None]:
    """Spec and folder; for a published model that is not here, its Spec and what to say later."""
    try:
        return *locate(model, variant=variant, components=components), None
    except ModelError as error:
        spec = known(model)
        if spec is None:
            raise
        return published(spec, variant), None, error


def warn_not_here(spec: Spec) -> None:
    console.warn(f"{spec.name} is not on this machine: hidream models pull {spec.name}")


def variant_is_assumed(spec: Spec, folder: Path) -> bool:
    if spec.family == "e1":
        return False  # there is one alone
    if (folder / "hidream.json").exists():
        return False
    return spec.name not in SPECS and told_variant(folder) is None


def check_pictures(request: GenerateRequest, warnings: list[str]) -> tuple[int, int] | None:
    """Read every picture once to find what is wrong; returns the size whose aspect may be kept."""
    from hidream.pictures import mask_warning, read_mask, read_picture

    sizes = [
        read_picture(picture, f"reference {number}").size
        for number, picture in enumerate(request.references, 1)
    ]
    initial = None
    if request.init_image is not None:
        initial = read_picture(request.init_image, "the initial picture").size
    if request.mask is not None:
        warning = mask_warning(read_mask(request.mask, initial or sizes[0]))
        warnings += [warning] if warning else []
    return sizes[0] if len(sizes) == 1 else initial


def check_loras(request: GenerateRequest, folder: Folder | None, warnings: list[str]) -> None:
    """Find every LoRA, and match its layers with the model's where the model is here."""
    from hidream.lora_file import find_lora, linear_layers, read_lora

    for path, _ in request.loras:
        if folder is None:
            find_lora(path)
            continue
        shapes = {name: info.shape for name, info in folder.tensors.items()}
        layers = linear_layers(shapes)
        warnings += read_lora(path, layers, request.model or "", shapes=shapes).warnings
