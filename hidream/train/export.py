"""The averaged weights as a folder in the published layout: `python -m hidream.train.export`."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from hidream.errors import HidreamError
from hidream.train import checkpoint
from hidream.train.config import past_recipe


def export(run_dir: str | Path, out_dir: str | Path, step: int | None = None) -> Path:
    """Write the EMA weights of a run's latest checkpoint (or that of `step`) as a model folder.

    Works while the run goes on. Raises ModelError without a whole checkpoint.
    """
    from hidream.train.learner import learner_of

    run_dir = Path(run_dir)
    folder = checkpoint.latest(run_dir)
    if step is not None:
        folder = checkpoint.folder_of(run_dir, step)
    recipe = replace(past_recipe(checkpoint.read_progress(folder).recipe), out=str(run_dir))
    learner = learner_of(recipe)
    model = learner.build()
    checkpoint.load_ema(folder, model)
    return learner.export(model, Path(out_dir))


def put_in_place(draft: Path, out_dir: Path) -> Path:
    """Rename `draft` to `out_dir`, file by file where that is there already."""
    if out_dir.exists():
        for file in sorted(p for p in draft.rglob("*") if p.is_file()):
            place = out_dir / file.relative_to(draft)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        shutil.rmtree(draft)
    else:
        draft.rename(out_dir)
    return out_dir


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
