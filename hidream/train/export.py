"""The averaged weights as a folder in the published layout: `python -m hidream.train.export`."""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from hidream.errors import HidreamError
from hidream.models.o1.config import SIZES, O1Config
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer
from hidream.models.o1.weights import load_o1, save_o1
from hidream.train import checkpoint
from hidream.train.config import Recipe, parse_recipe

PACKAGE = Path(__file__).parents[1]


def tokenizer_folder(recipe: Recipe) -> Path:
    """`tokenizer` of the recipe: a folder, `init` when empty; relative to here or the package."""
    path = Path(recipe.tokenizer or recipe.init)
    inside = PACKAGE.parent / path
    return inside if not path.exists() and inside.exists() else path


def export(run_dir: str | Path, out_dir: str | Path, step: int | None = None) -> Path:
    """Write the EMA weights of a run's latest checkpoint (or that of `step`) as a model folder.

    Works while the run goes on. Raises ModelError without a whole checkpoint.
    """
    run_dir = Path(run_dir)
    folder = checkpoint.latest(run_dir)
    if step is not None:
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
    recipe = parse_recipe(checkpoint.read_progress(folder).recipe)
    tokenizer = Tokenizer(tokenizer_folder(recipe))
    model = load_o1(recipe.init)[0] if recipe.init else O1(SIZES[recipe.model])
    checkpoint.load_ema(folder, model)
    return export_model(model, tokenizer, recipe, Path(out_dir))


def export_model(model: O1, tokenizer: Tokenizer, recipe: Recipe, out_dir: Path) -> Path:
    """Write `model` in bf16 with tokenizer and hidream.json, replacing `out_dir` when complete."""
    draft = out_dir.with_name(f".{out_dir.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    half = copy.deepcopy(model).to("cpu", torch.bfloat16)
    save_o1(half, draft, tokenizer=tokenizer, settings=settings(model.config, recipe))
    if out_dir.exists():
        out_dir.mkdir(exist_ok=True)
        for file in draft.iterdir():
            file.replace(out_dir / file.name)
        draft.rmdir()
    else:
        draft.rename(out_dir)
    return out_dir


def settings(config: O1Config, recipe: Recipe) -> dict[str, Any]:
    """hidream.json: what the published layout cannot say about this checkpoint."""
    size = recipe.stages[-1].size
    return {
        "name": recipe.name.replace("_", "-"),
        "family": "o1",
        "variant": "full",
        "patch_size": config.patch_size,
        "bottleneck_size": config.bottleneck_size,
        "noise_scale": recipe.objective.noise_scale,
        "sampler": "flash",
        "num_inference_steps": 50,
        "guidance_scale": 3.0,
        "shift": 3.0,
        "width": size,
        "height": size,
        "reference_budgets": {
            "sides": [list(row) for row in config.budgets.sides],
            "vision_sides": [list(row) for row in config.budgets.vision_sides],
        },
    }


def main() -> int:
    """`python -m hidream.train.export RUN OUT [--step N]`."""
    parser = argparse.ArgumentParser(description=export.__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--step", type=int, help="an older checkpoint than the latest")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(f"{export(arguments.run, arguments.out, arguments.step)}\n")
    except HidreamError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
