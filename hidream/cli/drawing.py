"""What generate, edit and subject share: check everything, load the model, draw, save."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream.cli import console
from hidream.cli.again import PICTURES, with_carried
from hidream.cli.checking import Checked, check, check_flags, reads_texts, warn_not_here
from hidream.cli.loading import load_pipeline
from hidream.cli.previews import Previews
from hidream.cli.recording import differences, model_digest, note_of
from hidream.cli.stopping import stopped_by_ctrl_c
from hidream.limits import batch_size
from hidream.memory import POLICIES
from hidream.request import GenerateRequest

if TYPE_CHECKING:
    from hidream.cli.storyboard import Board
    from hidream.pipelines import Pipeline

COUNTS = ("num_forwards", "num_prefills", "num_reused")  # of an Output, summed over batches


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
    check_flags(arguments)
    if getattr(arguments, "prompt_file", None) is not None:
        from hidream.cli.many import draw_many

        return draw_many(arguments, given, needs_reference=needs_reference)
    ready = check(arguments, given, needs_reference=needs_reference, board=board)
    for warning in ready.warnings:
        console.warn(warning)
    if arguments.dry_run:
        return _dry_run(arguments, ready)
    return _draw(arguments, ready, board, pipe)


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


def _warn(text: str, warnings: list[str]) -> None:
    console.warn(text)
    warnings.append(text)


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
