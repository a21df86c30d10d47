"""The requests of a prompt file: all checked before the model loads, then drawn in batches."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hidream.cli import console
from hidream.cli.again import PICTURES
from hidream.cli.checking import (
    as_given,
    check_loras,
    check_pictures,
    check_prompts,
    check_reader,
    find_model,
    reads_texts,
    refiner_warning,
    variant_is_assumed,
    warn_not_here,
    with_embeddings,
)
from hidream.cli.drawing import COUNTS
from hidream.cli.loading import load_pipeline
from hidream.cli.previews import Previews, check_previews
from hidream.cli.prompt_file import Line, located, read_prompt_file
from hidream.cli.recording import Inputs, model_digest, note_of, read_inputs
from hidream.cli.stopping import stopped_by_ctrl_c
from hidream.errors import InputError, UsageError
from hidream.folder import Folder, open_model
from hidream.limits import MAX_IMAGES, batch_size
from hidream.locating import check_parts, find_refiner
from hidream.models.e1 import refining_warnings
from hidream.registry import DEFAULT_MODEL, Spec
from hidream.request import GenerateRequest, check_ability, resolve, warnings_of

MAX_PICTURES = 10 * MAX_IMAGES  # of one run


@dataclass(frozen=True, kw_only=True)
class Order:
    """One line's resolved request, its pictures' places, one a seed, and what they were made of."""

    where: str
    request: GenerateRequest
    paths: Sequence[Path]
    inputs: Inputs

    def part(self, places: Sequence[int]) -> Order:
        """The pictures at these places alone."""
        seeds = tuple(self.request.seeds[place] for place in places)
        request = replace(self.request, seed=seeds, num_images=len(seeds))
        return replace(self, request=request, paths=[self.paths[place] for place in places])


@dataclass
class Told:
    """Warnings, each once, with the first line that it is about and how many more there are."""

    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.places.setdefault(warning, []).append(where)

    def texts(self) -> list[str]:
        found = []
        for warning, places in self.places.items():
            more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
            found.append(f"{places[0]}{more}: {warning}" if places[0] else warning)
        return found


def draw_many(
    arguments: argparse.Namespace, given: Mapping[str, Any], *, needs_reference: str | None
) -> int:
    """Make the pictures of every line; returns the exit code. As `drawing.draw` in all else."""
    for name, there in (("PROMPT", "prompt" in given), ("--from", arguments.from_picture)):
        if there:
            raise UsageError(
                f"{name} and --prompt-file both say what to draw.", "Leave one of them out."
            )
    lines = read_prompt_file(arguments.prompt_file)
    model, where = _model(arguments.model, lines)
    with located(where):
        spec, path, missing = find_model(model, arguments.variant, arguments.components)
    check_parts(spec, llama=arguments.llama, refiner=arguments.refiner)
    told = Told()
    if path is not None and arguments.variant is None and variant_is_assumed(spec, path):
        told.add("", [f"{path} does not say its variant: full is assumed (--variant dev)."])
    asked = [_asked(line, given, spec, needs_reference) for line in lines]
    paths = _paths(arguments, [request.seeds for request in asked])

    folder = open_model(path, spec.file) if path is not None else None
    checks = _Checks(arguments, spec, folder, told)
    orders = [
        checks.order(line.where, request, places, as_given(request, {**given, **line.fields}))
        for line, request, places in zip(lines, asked, paths, strict=True)
    ]
    told.add("", refiner_warning(arguments, path, [order.request for order in orders]))
    _check_places(arguments, orders)
    if missing is not None and not arguments.dry_run:
        raise missing
    if path is not None and not arguments.dry_run:
        for order in orders:
            check_reader(arguments, order.request, spec, path)
    for warning in told.texts():
        console.warn(warning)
    if arguments.dry_run:
        return _dry_run(arguments, orders, spec, folder)
    assert folder is not None
    return _draw(arguments, model, orders, told, folder)


def _model(chosen: str | None, lines: Sequence[Line]) -> tuple[str, str]:
    """The one model of a run and where it stands: in the flag, or in lines that all name it."""
    found = (chosen, "")
    for line in lines:
        named = line.fields.get("model")
        if named is None:
            continue
        if found[0] is None:
            found = (str(named), line.where)
        elif str(named) != found[0]:
            raise UsageError(
                f"{line.where}: this asks for the model {named}, the run has {found[0]}.",
                "Draw with one model at a time.",
            )
    return found[0] or DEFAULT_MODEL, found[1]


def _asked(
    line: Line, given: Mapping[str, Any], spec: Spec, needs_reference: str | None
) -> GenerateRequest:
    """The flags' fields with the line's over them; its seeds are drawn."""
    with located(line.where):
        request = GenerateRequest.from_dict(with_embeddings({**given, **line.fields}))
        if needs_reference and not request.references:
            raise UsageError("there is no reference picture.", needs_reference)
        draft = resolve(request, spec.defaults_for(request.task), spec.patch_size)
        return replace(request, seed=draft.seed, num_images=draft.num_images)


def _paths(
    arguments: argparse.Namespace, seeds: Sequence[Sequence[int]]
) -> Iterator[Sequence[Path]]:
    """Every line's places. Lines often share their seed: the index tells pictures apart."""
    from hidream.pictures import plan_outputs

    total = sum(map(len, seeds))
    if total > MAX_PICTURES:
        raise InputError(
            f"{arguments.prompt_file} asks for {total} pictures; the limit is {MAX_PICTURES}.",
            "Split it.",
        )
    default = "out-{index}-{seed}.png"
    paths = iter(
        plan_outputs(
            arguments.output or default,
            [seed for some in seeds for seed in some],
            default=default,
            mark="{index}",
        )
    )
    return iter([[next(paths) for _ in some] for some in seeds])


class _Checks:
    """What one line's request is checked for; pictures and LoRAs that lines share are read once."""

    def __init__(
        self, arguments: argparse.Namespace, spec: Spec, folder: Folder | None, told: Told
    ) -> None:
        self.arguments, self.spec, self.folder, self.told = arguments, spec, folder, told
        self.path = folder.path if folder is not None else None
        self.pictures: dict[Any, tuple[tuple[int, int] | None, list[str], Inputs]] = {}
        self.loras: dict[Any, list[str]] = {}

    def order(
        self, where: str, asked: GenerateRequest, paths: Sequence[Path], given: GenerateRequest
    ) -> Order:
        """`given` is what warnings are about."""
        with located(where):
            size, warnings, inputs = self._read_pictures(asked)
            defaults = self.spec.defaults_for(asked.task)
            request = replace(
                resolve(asked, defaults, self.spec.patch_size, source_size=size),
                model=self.spec.name,
            )
            check_ability(self.spec, request)
            if request.refine_strength and not self.arguments.dry_run:
                find_refiner(self.arguments.refiner, self.path)
            check_prompts(request, self.folder)
            warnings = [
                *warnings,
                *warnings_of(given, request, self.spec),
                *refining_warnings(request),
                *self._read_loras(request),
            ]
            self.told.add(where, warnings)
            check_previews(self.arguments, paths, request)
            return Order(where=where, request=request, paths=paths, inputs=inputs)

    def _read_pictures(
        self, request: GenerateRequest
    ) -> tuple[tuple[int, int] | None, list[str], Inputs]:
        key = tuple(getattr(request, name) for name in PICTURES)
        if key not in self.pictures:
            warnings: list[str] = []
            inputs = Inputs()
            if not self.arguments.no_metadata:
                inputs = read_inputs(request, {}, embed=self.arguments.embed_inputs)
            self.pictures[key] = (check_pictures(request, warnings), warnings, inputs)
        return self.pictures[key]

    def _read_loras(self, request: GenerateRequest) -> list[str]:
        if request.loras not in self.loras:
            self.loras[request.loras] = []
            check_loras(request, self.folder, self.loras[request.loras])
        return self.loras[request.loras]


def _check_places(arguments: argparse.Namespace, orders: Sequence[Order]) -> None:
    from hidream.pictures import check_outputs

    largest = max((o.request.width or 0) * (o.request.height or 0) for o in orders)
    check_outputs(
        [path for order in orders for path in order.paths],
        overwrite=arguments.overwrite,
        num_bytes=largest * 3 + 65_536 + max(order.inputs.num_bytes for order in orders),
        make_folders=not arguments.dry_run,
    )


def batches(orders: Sequence[Order]) -> list[list[Order]]:
    """Parts of the orders that the pipeline draws together, as soon as possible after each other.

    A part is one order's pictures in the batch.
    """
    from hidream.pipelines.base import batch_key

    groups: dict[Any, list[tuple[int, int]]] = {}  # (order, which of its pictures)
    for number, order in enumerate(orders):
        for place in range(len(order.paths)):
            alone = (number, place) if order.request.deterministic else None
            groups.setdefault((batch_key(order.request), alone), []).append((number, place))
    found = []
    for group in groups.values():
        request = orders[group[0][0]].request
        most = batch_size(request.width or 1, request.height or 1)
        for start in range(0, len(group), most):
            parts: dict[int, list[int]] = {}
            for number, place in group[start : start + most]:
                parts.setdefault(number, []).append(place)
            found.append([orders[number].part(places) for number, places in parts.items()])
    return found


def _draw(
    arguments: argparse.Namespace,
    model: str,
    orders: Sequence[Order],
    told: Told,
    folder: Folder,
) -> int:
    from hidream.pictures import write_picture

    digest = None if arguments.no_metadata else model_digest(folder)
    needed = any(reads_texts(order.request) for order in orders)
    pipe = load_pipeline(arguments, model, orders[0].request.model, text_encoders=needed)

    def note(part: Order, ran: GenerateRequest, seed: int) -> dict[str, Any] | None:
        return None if arguments.no_metadata else note_of(ran, seed, pipe, digest, part.inputs)

    def notes(batch: Sequence[Order]) -> list[dict[str, Any] | None]:
        return [note(part, part.request, seed) for part in batch for seed in part.request.seeds]

    found = batches(orders)
    progress = console.Progress(len(found))
    saved: dict[Path, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    seconds = 0.0
    paths = {path: number for number, order in enumerate(orders) for path in order.paths}
    try:
        with stopped_by_ctrl_c() as token, Previews(arguments) as previews:
            for batch in found:
                places = [path for part in batch for path in part.paths]
                on_step = previews.on_step(progress, places, partial(notes, batch))
                outputs = pipe([part.request for part in batch], on_step=on_step, cancel=token)
                counts.update({name: getattr(outputs[0], name) for name in COUNTS})
                seconds += outputs[0].timings["total"]
                for part, output in zip(batch, outputs, strict=True):
                    for image, seed, path in zip(
                        output.images, output.seeds, part.paths, strict=True
                    ):
                        written = note(part, output.request, seed)
                        write_picture(image, path, written, overwrite=arguments.overwrite)
                        saved[path] = {"path": str(path), "seed": seed, "request": paths[path]}
                        if not arguments.json:
                            print(path, flush=True)
    finally:
        progress.close()
        if len(saved) < len(paths):
            console.say(f"{len(saved)} of {len(paths)} pictures are finished and kept.")
    if arguments.json:
        console.show(
            {
                "images": [saved[path] for path in paths],
                "requests": [order.request.to_dict() for order in orders],
                "model": orders[0].request.model,
                "device": str(pipe.device),
                "seconds": round(seconds, 3),
                "num_batches": len(found),
                **counts,
                "warnings": told.texts(),
            }
        )
    return 0


def _dry_run(
    arguments: argparse.Namespace, orders: Sequence[Order], spec: Spec, folder: Folder | None
) -> int:
    from hidream.cli.estimate import estimate, told

    flags: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("device", "dtype", "memory")
    }
    known: dict[Any, dict[str, Any]] = {}  # batches that are alike
    expected = []
    for batch in batches(orders):
        seeds = tuple(seed for part in batch for seed in part.request.seeds)
        together = replace(batch[0].request, seed=seeds, num_images=len(seeds))
        like = replace(together, prompt="-", negative_prompt=None, seed=tuple(range(len(seeds))))
        if like not in known:
            known[like] = estimate(together, folder, spec, **flags, batch_size=len(seeds))
        expected.append(known[like])
    memory = max(part["memory_bytes"] for part in expected)
    seconds = sum(part["seconds"] for part in expected)
    device, available = expected[0]["device"], expected[0]["available_bytes"]
    if folder is None:
        warn_not_here(spec)
    if memory > available:
        console.warn("this may not fit the memory.")
    outputs = [str(path) for order in orders for path in order.paths]
    if arguments.json:
        needs = {"memory_bytes": memory, "available_bytes": available, "seconds": round(seconds, 2)}
        needs |= {"flops": sum(part["flops"] for part in expected), "device": device}
        requests = [order.request.to_dict() for order in orders]
        console.show(
            {
                "requests": requests,
                "outputs": outputs,
                "num_batches": len(expected),
                "estimate": needs,
            }
        )
        return 0
    for order in orders:
        print(f"{', '.join(map(str, order.paths))}  {order.request.prompt}")
    print(
        f"{len(orders)} requests, {len(outputs)} pictures, {len(expected)} batches: "
        f"{told(memory, available, seconds, device)}"
    )
    return 0
