"""The world's suite: fresh scenes → pictures → verdicts → accuracies with ceiling and floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from hidream import __version__
from hidream.eval.outside import outside_change
from hidream.eval.statistics import wilson
from hidream.judges.finding import Finding
from hidream.judges.measure import measure_judge
from hidream.judges.world import Verdict, judge
from hidream.request import GenerateRequest
from hidream.world import WORLD_VERSION
from hidream.world.asking import SHEET_SIDE, request_of
from hidream.world.tasks import CATEGORIES, Sample, eval_seed, sample

BATCH = 16  # requests handed to the pipeline at once
SHEET = 10  # pictures a row of a contact sheet
RIGHT, WRONG = (60, 160, 60), (200, 50, 50)


class Result(Protocol):
    """What the suite reads of a pipeline's output."""

    @property
    def images(self) -> list[Image.Image]: ...
    @property
    def request(self) -> GenerateRequest: ...


Pipe = Callable[[list[GenerateRequest]], Sequence[Result]]


def run(
    pipe: Pipe,
    *,
    num_scenes: int,
    seed: int,
    categories: Sequence[str] = CATEGORIES,
    out: Path | None = None,
    on_progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Accuracy of `pipe` on `num_scenes` fresh scenes of each category.

    - accuracy: the share of pictures that the judge finds right, with its 95 % interval;
    - ceiling: the judge on true renders of the same scenes;
    - floor: the same pictures under one another's prompts; for edits, what the model makes of the
      same sources under one another's instructions. None with a single scene;
    - outside_change, for edits: what changed outside the edited region, in percent of the range,
      in the model's pictures and in the true ones (`eval.outside`);
    - mean_iou, for layouts: the mean over all boxes of intersection over union of box and subject,
      0 where the subject is not there, in the model's pictures and in the true ones.

    With `out`, each category's pictures and `verdicts.jsonl` are kept as they come, and a contact
    sheet with green and red frames; `results.json` is what is returned.
    """
    say = on_progress or (lambda text: None)
    rows: dict[str, dict[str, Any]] = {}
    sides: dict[str, int] = {}
    settings: dict[str, Any] = {}
    for category in categories:
        items = [
            sample("text_to_image", eval_seed(seed), index, category=category)
            for index in range(num_scenes)
        ]
        record = _Record(out, category) if out is not None else None
        pictures: list[Image.Image] = []
        rights: list[bool] = []
        outside: list[tuple[float, float]] = []
        overlaps: list[tuple[float, float]] = []
        for item, result in zip(items, _generate(pipe, items), strict=True):
            picture, verdict = result.images[0], judge(result.images[0], item)
            sides[category] = picture.width
            settings = settings or _settings(result.request)
            if record is not None:
                record.add(picture, item, verdict)
            pictures.append(picture)
            rights.append(verdict.right)
            outside += _outside(picture, item, verdict)
            overlaps += _overlaps(picture, item, verdict)
            if len(rights) % BATCH == 0 or len(rights) == num_scenes:
                say(f"{category}: {sum(rights)} of {len(rights)} right")
        if record is not None:
            record.finish()
        low, high = wilson(sum(rights), num_scenes)
        rows[category] = {
            "n": num_scenes,
            "accuracy": sum(rights) / num_scenes,
            "floor": _floor(pipe, items, pictures),
            "ci95": [round(low, 4), round(high, 4)],
        }
        for field, pairs in (("outside_change", outside), ("mean_iou", overlaps)):
            if pairs:
                rows[category][field] = _means(pairs)
    say("judging the judge")
    judged = measure_judge(seed, num_scenes, side=sides, categories=tuple(categories))
    for category, row in rows.items():
        row["ceiling"] = judged["categories"][category]["right_on_true"]
    results = {
        "suite": "world",
        "world_version": WORLD_VERSION,
        "seed": seed,
        "categories": rows,
        "judge": {name: judged[name] for name in ("version", "right_on_true", "wrong_on_damaged")},
        "settings": settings,
        "hidream": __version__,
    }
    if out is not None:
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _generate(
    pipe: Pipe, items: Sequence[Sample], prompts: Sequence[str] | None = None
) -> Iterator[Result]:
    """One result an item, in order; `prompts` stand in for the items' own."""
    spec = getattr(pipe, "spec", None)  # stand-ins have none
    side = max(SHEET_SIDE, spec.defaults.width) if spec else SHEET_SIDE
    requests = iter(
        replace(
            request_of(item, index, sheet_side=side),
            prompt=prompts[index] if prompts else item.prompt,
        )
        for index, item in enumerate(items)
    )
    while batch := list(islice(requests, BATCH)):
        yield from pipe(batch)


def _floor(pipe: Pipe, items: Sequence[Sample], pictures: Sequence[Image.Image]) -> float | None:
    """Accuracy where each picture meets the next one's prompt; see `run`."""
    if len(items) < 2:
        return None
    others = [*items[1:], items[0]]
    if items[0].task == "edit":
        made = _generate(pipe, items, [other.prompt for other in others])
        rights = [judge(r.images[0], item).right for r, item in zip(made, items, strict=True)]
    else:
        rights = [judge(p, other).right for p, other in zip(pictures, others, strict=True)]
    return sum(rights) / len(rights)


def _outside(
    picture: Image.Image, item: Sample, verdict: Verdict
) -> tuple[tuple[float, float], ...]:
    """The change outside the edited region: the model's and the true picture's; () if none."""
    if item.task != "edit" or not isinstance(verdict.finding, Finding):
        return ()
    model = outside_change(picture, item, verdict.finding.objects)
    ceiling = outside_change(item.target(*picture.size), item)
    return () if model is None or ceiling is None else ((model, ceiling),)


def _overlaps(picture: Image.Image, item: Sample, verdict: Verdict) -> list[tuple[float, float]]:
    """For each box of a layout, its overlap with its subject: the model's, the true picture's."""
    if not item.layout:
        return []
    true = judge(item.target(*picture.size), item)
    return list(zip(verdict.overlaps, true.overlaps, strict=True))


def _means(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    model, ceiling = (sum(values) / len(values) for values in zip(*pairs, strict=True))
    return {"model": round(model, 4), "ceiling": round(ceiling, 4), "n": len(pairs)}


def _settings(request: GenerateRequest) -> dict[str, Any]:
    """How the pictures were made: the fields of the first request that a reader needs."""
    names = ("model", "width", "height", "num_inference_steps", "guidance_scale", "shift")
    return {name: getattr(request, name) for name in (*names, "sampler", "noise_scale")}


class _Record:
    """A category's folder: a picture and a line of verdicts.jsonl an item, then a contact sheet."""

    def __init__(self, out: Path, category: str):
        self.folder = out / category
        self.folder.mkdir(parents=True, exist_ok=True)
        self.verdicts = self.folder / "verdicts.jsonl"
        self.verdicts.write_text("")
        self.framed: list[Image.Image] = []

    def add(self, picture: Image.Image, item: Sample, verdict: Verdict) -> None:
        number = len(self.framed)
        picture.save(self.folder / f"{number:05d}.png")
        line = {
            "index": number,
            "prompt": item.prompt,
            "right": verdict.right,
            "reasons": list(verdict.reasons),
        }
        with self.verdicts.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = picture
        if item.task == "edit":  # source and result side by side
            source = Image.fromarray(item.reference_pictures(*picture.size)[0])
            shown = Image.fromarray(np.hstack([np.asarray(source), np.asarray(picture)]))
        self.framed.append(ImageOps.expand(shown, 3, RIGHT if verdict.right else WRONG))

    def finish(self) -> None:
        """The contact sheet of at most 100 pictures, beside the folder."""
        shown = self.framed[:100]
        width, height = shown[0].size
        rows = -(-len(shown) // SHEET)
        sheet = Image.new("RGB", (SHEET * width, rows * height), "white")
        for i, picture in enumerate(shown):
            sheet.paste(picture, (i % SHEET * width, i // SHEET * height))
        sheet.save(self.folder.with_suffix(".png"))
