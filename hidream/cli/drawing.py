"""What generate, edit and subject share: check everything, load the model, draw, save."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.again import PICTURES, Again, merged, read_again, with_carried
from hidream.cli.loading import check_memory, load_pipeline
from hidream.cli.previews import Previews, check_previews
from hidream.cli.recording import Inputs, differences, model_digest, note_of, read_inputs
from hidream.cli.stopping import stopped_by_ctrl_c
from hidream.errors import ModelError, UsageError
from hidream.folder import Folder, is_alone, open_model
from hidream.limits import batch_size
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
    from hidream.pipelines import Pipeline

COUNTS = ("num_forwards", "num_prefills", "num_reused")  # of an Output, summed over batches


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


def draw(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    *,
    needs_reference: str | None = None,
    board: Board | None = None,
    pipe: Pipeline | None = None,
) -> int:
    """Make the pictures that the flags ask for; returns the exit code.

    torch is imported, and weights are read, only after the checks of `check`. `needs_reference`
    tells how to give the picture that the command cannot do without. `board` cuts each picture into
    panels. `pipe` is the model, where it is loaded already.
    """
    refuse_for_now(arguments)
    if getattr(arguments, "prompt_file", None) is not None:
        from hidream.cli.many import draw_many

        return draw_many(arguments, given, needs_reference=needs_reference)
    ready = check(arguments, given, needs_reference=needs_reference, board=board)
    for warning in ready.warnings:
        console.warn(warning)
    if arguments.dry_run:
        return _dry_run(arguments, ready)
    return _draw(arguments, ready, board, pipe)


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


def _draw(
    arguments: argparse.Namespace, ready: Checked, board: Board | None, loaded: Pipeline | None
) -> int:
    from hidream.pictures import write_picture

    model, request, again, warnings = ready.model, ready.request, ready.again, ready.warnings
    assert ready.opened is not None
    digest = model_digest(ready.opened) if again.digest or not arguments.no_metadata else None
    if again.digest and model == again.model and digest != again.digest:
        _warn(f"{model} has changed since the picture was made: its digest differs.", warnings)

    def note(ran: GenerateRequest, seed: int) -> dict[str, Any] | None:
        if arguments.no_metadata:
            return None
        named = {name: getattr(request, name) for name in PICTURES}  # not those carried inside
        return note_of(replace(ran, **named), seed, pipe, digest, ready.inputs)

    pipe = loaded or load_pipeline(
        arguments, model, request.model, text_encoders=reads_texts(request)
    )
    if difference := differences(again, pipe):
        _warn(difference, warnings)
    batches = list(_batches(with_carried(request, again.carried), ready.paths))
    progress = console.Progress(len(batches))
    saved: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    seconds = 0.0
    try:
        with stopped_by_ctrl_c() as token, Previews(arguments) as previews:
            for part, places in batches:
                notes = partial(_notes, note, request, part.seeds)
                on_step = previews.on_step(progress, places, notes)
                output = pipe(part, on_step=on_step, cancel=token)
                counts.update({name: getattr(output, name) for name in COUNTS})
                seconds += output.timings["total"]
                for image, seed, path in zip(output.images, output.seeds, places, strict=True):
                    written = note(output.request, seed)
                    if board and written:
                        written = board.sheet_note(written)
                    write_picture(image, path, written, overwrite=arguments.overwrite)
                    saved.append({"path": str(path), "seed": seed})
                    if board:
                        cut = board.save(image, path, output.request, written, arguments.overwrite)
                        saved[-1]["panels"] = cut
                    if not arguments.json:
                        print(path, *saved[-1].get("panels", ()), sep="\n", flush=True)
    finally:
        progress.close()
    if arguments.json:
        console.show(
            {
                "images": saved,
                "request": request.to_dict(),
                "model": request.model,
                "device": str(pipe.device),
                "seconds": round(seconds, 3),
                **counts,
                "warnings": list(warnings),
            }
        )
    return 0


def refuse_for_now(arguments: argparse.Namespace) -> None:
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


def _warn(text: str, warnings: list[str]) -> None:
    console.warn(text)
    warnings.append(text)


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


def _batches(
    request: GenerateRequest, paths: Sequence[Path]
) -> Iterator[tuple[GenerateRequest, Sequence[Path]]]:
    """The request in parts that are drawn together, so that finished pictures are saved."""
    most, seeds = batch_size(request.width or 1, request.height or 1), request.seeds
    most = 1 if request.deterministic else most
    for start in range(0, len(seeds), most):
        part = seeds[start : start + most]
        yield replace(request, seed=part, num_images=len(part)), paths[start : start + most]


def _notes(
    note: Callable[[GenerateRequest, int], dict[str, Any] | None],
    request: GenerateRequest,
    seeds: Sequence[int],
) -> list[dict[str, Any] | None]:
    return [note(request, seed) for seed in seeds]


def _dry_run(arguments: argparse.Namespace, ready: Checked) -> int:
    from hidream.cli.estimate import estimate, told

    request, spec, folder = ready.request, ready.spec, ready.opened
    paths, panels = ready.paths, ready.panels
    batch = len(next(_batches(request, paths))[1])
    expected = estimate(
        request,
        folder,
        spec,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=batch,
        memory=arguments.memory,
    )
    if folder is None:
        warn_not_here(spec)
    policies = {row["name"]: row for row in expected["policies"]}
    if not policies[arguments.memory]["fits"]:
        console.warn(_may_not_fit(arguments.memory, policies))
    settings = request.to_dict()
    if arguments.json:
        outputs = [str(path) for path in (*paths, *panels)]
        console.show({"request": settings, "outputs": outputs, "estimate": expected})
        return 0
    for name, value in settings.items():
        if value not in (None, [], "off", False):
            print(f"{name:<20} {value}")
    print(f"{'output':<20} {', '.join(map(str, [*paths, *panels]))}")
    names = ("memory_bytes", "available_bytes", "seconds", "device")
    print(f"{'estimate':<20} {told(**{name: expected[name] for name in names})}")
    for name, row in policies.items():
        beside = f" and {console.size(row['cpu_bytes'])} of CPU memory" if row["cpu_bytes"] else ""
        fits = "" if row["fits"] else ", which may not fit"
        lacks = "" if row["available"] else "; needs torchao"
        print(f"{'--memory ' + name:<20} {console.size(row['memory_bytes'])}{beside}{fits}{lacks}")
    return 0


def _may_not_fit(memory: str, policies: Mapping[str, Mapping[str, Any]]) -> str:
    """What to tell of a policy, and the next smaller one that fits, if any."""
    smaller = POLICIES[memory].smaller
    while smaller is not None and not policies[smaller]["fits"]:
        smaller = POLICIES[smaller].smaller
    remedy = f"--memory {smaller} should" if smaller else "ask for a smaller size"
    return f"this may not fit the memory; {remedy}."
