"""A new object for o1-nano from eight pictures: `python benchmarks/lora.py FOLDER [key=value …]`.

Draws a rocket, which the world does not know, in eight pictures with captions; trains
recipes/lora.toml on them (the overrides are the recipe's); draws fresh prompts that use it, and two
of the world's categories, with and without the LoRA; and has the judge count, whose templates know
the rocket for that time. Writes results.json and contact sheets into FOLDER. Takes about a quarter
of an hour on one quiet core; parts that are in FOLDER already are not done again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

import hidream
from hidream.eval.statistics import wilson
from hidream.eval.world import run as run_suite
from hidream.judges.world import Verdict, judge
from hidream.request import GenerateRequest
from hidream.train import load_recipe, run
from hidream.world import prompts, render
from hidream.world.build import Part, build_scene, claims_of
from hidream.world.sample import Claim, Claims, Sample
from hidream.world.scene import BACKGROUNDS, COLORS, KINDS, Dice, Object, Scene
from hidream.world.sprites import Canvas, added_kind

RECIPE = Path(__file__).parents[1] / "recipes" / "lora.toml"
Draw = Callable[[Sequence[GenerateRequest]], Sequence[Any]]
ROCKET = "rocket"
EXTENT = (0.62, 1.0)
SIDE = 256  # of the eight pictures; they are trained at 128
NUM_WORLD = 60
ELSEWHERE = ("single", "colors")
SEED = 2**32 + 78  # of fresh scenes; training's seeds are below
EIGHT = (  # caption, colour, background, size, place
    ("a red rocket on grass", "red", "grass", 0.43, 0.5, 0.5),
    ("a large blue rocket in the snow", "blue", "snow", 0.43, 0.375, 0.625),
    ("a yellow rocket in a studio", "yellow", "studio", 0.31, 0.625, 0.375),
    ("a photo of a green rocket on the beach", "green", "beach", 0.31, 0.25, 0.5),
    ("a large pink rocket on a wooden table", "pink", "wood", 0.43, 0.625, 0.5),
    ("an orange rocket on the beach", "orange", "beach", 0.31, 0.75, 0.625),
    ("a photo of a white rocket at night", "white", "night", 0.43, 0.5, 0.5),
    ("a black rocket on grass", "black", "grass", 0.31, 0.375, 0.375),
)
UNSEEN = tuple(color for color in COLORS if color not in {row[1] for row in EIGHT})


def draw_rocket(c: Canvas) -> None:
    """A body with a pointed nose, two fins, a window and a nozzle."""
    c.put(c.polygon((0.2, 0.98), (0.2, 0.66), (0.4, 0.5), (0.4, 0.9)), 0.66)
    c.put(c.polygon((0.8, 0.98), (0.8, 0.66), (0.6, 0.5), (0.6, 0.9)), 0.6)
    c.put(c.box(0.41, 0.88, 0.59, 0.99), 0.3)
    body = c.ellipse(0.5, 0.47, 0.17, 0.46) & (c.y < 0.9)
    c.put(body, c.round_side(0.33, 0.67))
    c.put(body & (c.y < 0.24), 0.72)
    c.put(c.ellipse(0.5, 0.42, 0.085), 0.3)
    c.put(c.ellipse(0.5, 0.42, 0.055), 1.58)


def write_pictures(folder: Path) -> list[Image.Image]:
    """The eight as a hobbyist has them: NAME.png and NAME.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, (caption, color, background, size, x, y) in enumerate(EIGHT):
        thing = Object(kind=ROCKET, color=color, size=size, x=x, y=y)
        made.append(
            Image.fromarray(render(Scene(objects=(thing,), background=background), SIDE, SIDE))
        )
        made[-1].save(folder / f"rocket{number}.png")
        (folder / f"rocket{number}.txt").write_text(caption + "\n")
    return made


def fresh(index: int) -> Sample:
    """A prompt that uses the rocket, alone, and is none of the eight captions."""
    dice = Dice(SEED, index)
    while True:
        color = COLORS[index % len(COLORS)]
        part = Part(kind=ROCKET, color=color, say_color=dice.chance(0.9), say_size=dice.chance(0.3))
        background = dice.pick(BACKGROUNDS)
        said = background if dice.chance(0.7) else ""
        item = _sample(dice, (part,), background, said)
        if item.prompt not in {row[0] for row in EIGHT}:
            return item


def beside(index: int) -> Sample:
    """A rocket and one of the world's objects, each of a colour, and where they stand."""
    dice = Dice(SEED + 1, index)
    first, second = dice.some(COLORS, 2)
    parts = (Part(kind=ROCKET, color=first), Part(kind=dice.pick(tuple(KINDS)[:-1]), color=second))
    return _sample(dice, parts, dice.pick(BACKGROUNDS), "", dice.pick(("left", "right")))


def _sample(
    dice: Dice, parts: tuple[Part, ...], background: str, said: str, relation: str = ""
) -> Sample:
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = build_scene(dice, parts, background, relations)
    groups = tuple(part.group(size) for part, size in zip(parts, sizes, strict=True))
    text = prompts.related(dice, groups[0], relation, groups[1]) if relation else ""
    text = text or prompts.opening(dice, prompts.phrase(dice, groups[0]))
    return Sample(
        task="text_to_image",
        category=ROCKET,
        prompt=prompts.in_place(dice, text, said),
        scene=scene,
        claims=claims_of(parts, sizes, pairs, said),
    )


PROMPTS: dict[str, tuple[Callable[[int], Sample], int]] = {
    "rocket": (fresh, 48),
    "beside": (beside, 20),
}


def count(
    items: Sequence[Sample], pictures: Sequence[Image.Image]
) -> tuple[dict[str, Any], list[Verdict]]:
    """How many the judge finds right, and each verdict."""
    verdicts = [judge(p, item) for p, item in zip(pictures, items, strict=True)]
    rights = [v.right for v in verdicts]
    low, high = wilson(sum(rights), len(rights))
    row = {"n": len(rights), "accuracy": round(sum(rights) / len(rights), 4)}
    return row | {"ci95": [round(low, 4), round(high, 4)]}, verdicts


def sheet(pictures: Sequence[Image.Image], rights: Sequence[bool]) -> Image.Image:
    """The pictures in rows of ten, framed green where right, red where wrong."""
    side = pictures[0].width + 6
    made = Image.new("RGB", (10 * side, -(-len(pictures) // 10) * side), "white")
    for i, (picture, right) in enumerate(zip(pictures, rights, strict=True)):
        color = (60, 160, 60) if right else (200, 50, 50)
        made.paste(ImageOps.expand(picture, 3, color), (i % 10 * side, i // 10 * side))
    return made


def measure(draw: Draw, folder: Path, name: str, what: str) -> dict[str, Any]:
    """The rows of one part of the measurement with pictures of `draw`, kept as a file in `folder`.

    `what` is "rocket", "beside" or one of the world's categories.
    """
    kept = folder / f"{name}_{what}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if what in PROMPTS:
        with added_kind(ROCKET, EXTENT, draw_rocket):
            rows = _rockets(draw, folder, name, what)
    else:
        rows = run_suite(draw, num_scenes=NUM_WORLD, seed=14, categories=(what,))["categories"]
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _rockets(draw: Draw, folder: Path, name: str, what: str) -> dict[str, Any]:
    make, num = PROMPTS[what]
    items = [make(i) for i in range(num)]
    requests = [GenerateRequest(prompt=s.prompt, seed=i) for i, s in enumerate(items)]
    made = [out.images[0] for out in draw(requests)]
    row, verdicts = count(items, made)
    rows = {what: row | {"ceiling": count(items, [_true(item) for item in items])[0]["accuracy"]}}
    if what == "rocket":
        unseen = [i for i, s in enumerate(items) if s.scene.objects[0].color in UNSEEN]
        rows["unseen_colors"], _ = count([items[i] for i in unseen], [made[i] for i in unseen])
        any_look = replace(items[0], claims=Claims(objects=(Claim(kind=ROCKET),)))
        rows["of_any_look"], _ = count([any_look] * num, made)
    sheet(made, [v.right for v in verdicts]).save(folder / f"{name}_{what}.png")
    lines = [
        f"{i} {'right' if v.right else 'WRONG'} {s.prompt}: {'; '.join(v.reasons)}\n"
        for i, (s, v) in enumerate(zip(items, verdicts, strict=True))
    ]
    (folder / f"{name}_{what}.txt").write_text("".join(lines))
    return rows


def _true(item: Sample) -> Image.Image:
    return Image.fromarray(item.target(128, 128))


def main() -> int:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    with added_kind(ROCKET, EXTENT, draw_rocket):
        pictures = write_pictures(folder / "data")
    sheet(pictures, [True] * len(pictures)).save(folder / "data.png")
    given = [f"data={folder / 'data'}", f"out={folder / 'run'}", *overrides]
    recipe = load_recipe(RECIPE, given)
    lora = recipe.run_dir / "lora.safetensors"
    if not lora.exists():
        run(RECIPE, given)
    pipe = hidream.load("o1-nano")

    def drawing(loras: tuple[tuple[str, float], ...]) -> Draw:
        return lambda requests: pipe([replace(r, loras=loras) for r in requests])

    results: dict[str, Any] = {}
    for name, loras in (("with", ((str(lora), 1.0),)), ("without", ())):
        results[name] = {}
        for what in (*PROMPTS, *ELSEWHERE):
            results[name] |= measure(drawing(loras), folder, name, what)
            print(name, json.dumps(results[name]), flush=True)
    results["loss_elsewhere"] = {
        what: round(results["without"][what]["accuracy"] - results["with"][what]["accuracy"], 4)
        for what in ELSEWHERE
    }
    stage = recipe.stages[0]
    results["recipe"] = {
        "steps": recipe.num_steps,
        "batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "lora": {key: value for key, value in vars(recipe.lora).items() if value},
        "world": recipe.data.world,
        "seed": recipe.seed,
        "bytes": lora.stat().st_size,
        "overrides": overrides,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
