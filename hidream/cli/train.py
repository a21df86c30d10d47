"""`hidream train`: a recipe becomes a model."""

from __future__ import annotations

import logging
import sys

from hidream.cli import console
from hidream.cli.arguments import Parser

EXAMPLES = """\
hidream train recipes/o1_nano.toml
hidream train recipes/o1_nano.toml --resume
hidream train recipes/o1_8b_pretrain.toml --dry-run
hidream train recipes/o1_nano.toml out=runs/try seed=3
torchrun --nproc-per-node 2 -m hidream train recipes/o1_nano.toml"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "train",
        "Train a model by a recipe. Ctrl-C ends the step and saves a checkpoint.",
        usage="hidream train RECIPE.toml [--resume | --dry-run] [key=value ...]",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "words", nargs="+", metavar="RECIPE.toml", help="then key=value ..., over the recipe's own"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print stages, tokens and memory; train nothing"
    )
    arguments = parser.parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")

    if arguments.dry_run:
        from hidream.train.config import load_recipe
        from hidream.train.launch import check_files
        from hidream.train.plan import plan

        recipe = load_recipe(arguments.words[0], arguments.words[1:])
        check_files(recipe)
        sys.stdout.write(plan(recipe).told + "\n")
        return 0
    if console.in_group():
        from hidream.train.worker import run_launched as train
    else:
        from hidream.train import run as train
    return train(arguments.words[0], arguments.words[1:], arguments.resume)
