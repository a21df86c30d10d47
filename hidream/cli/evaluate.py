"""`hidream eval world`: how often a model's pictures of the procedural world are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json, add_model
from hidream.cli.loading import check_memory, load_pipeline
from hidream.errors import UsageError
from hidream.registry import DEFAULT_MODEL, nearest

SUITES = ("world",)
HELP = """\
usage: hidream eval world [-m MODEL] [--scenes N] [--seed S] [flags]

  world   scenes of the procedural world, drawn by the model and judged by the world's judge

hidream eval world --help lists the flags."""


def run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if not argv or argv[0] not in SUITES:
        what = f'unknown suite "{argv[0]}"; {nearest(argv[0], SUITES)}' if argv else "no suite."
        raise UsageError(what, "Write hidream eval world.")
    return _world(argv[1:])


def _world(argv: list[str]) -> int:
    parser = Parser(
        "eval world",
        "Draw scenes of the procedural world with a model and judge the pictures.",
        usage="hidream eval world [-m MODEL] [--scenes N] [--seed S] [--categories NAME ...]",
    )
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="a category")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--out", metavar="DIR", help="keep the pictures with their verdicts")
    add_json(parser)
    add_model(parser)
    arguments = parser.parse(argv)
    if not 1 <= arguments.scenes <= 100_000:
        raise UsageError(f"--scenes {arguments.scenes} is out of range: 1 … 100000.")
    if not 0 <= arguments.seed < 2**31:
        raise UsageError(f"--seed {arguments.seed} is out of range: 0 … 2147483647.")
    check_memory(arguments)

    from hidream.eval import world

    categories = tuple(arguments.categories or world.CATEGORIES)
    for name in categories:
        if name not in world.CATEGORIES:
            raise UsageError(f'unknown category "{name}"; {nearest(name, world.CATEGORIES)}')
    model = arguments.model or DEFAULT_MODEL
    pipe = load_pipeline(arguments, model)
    result = world.run(
        pipe,
        num_scenes=arguments.scenes,
        seed=arguments.seed,
        categories=categories,
        out=Path(arguments.out).expanduser() if arguments.out else None,
        on_progress=console.say,
    )
    if arguments.json:
        console.show(result)
        return 0
    heads = f"{'category':<20} {'n':>5} {'accuracy':>9} {'95 % interval':>15}"
    print(f"{heads} {'ceiling':>8} {'floor':>6} {'outside':>15} {'IoU':>11}")
    for name, row in result["categories"].items():
        low, high = row["ci95"]
        floor = "–" if row["floor"] is None else f"{row['floor']:.3f}"
        print(
            f"{name:<20} {row['n']:>5} {row['accuracy']:>9.3f} {f'{low:.3f} … {high:.3f}':>15} "
            f"{row['ceiling']:>8.3f} {floor:>6} {_outside(row):>15} {_iou(row):>11}"
        )
    if any("outside_change" in row for row in result["categories"].values()):
        print("outside: change outside the edited region, the model's and the true pictures'")
    if any("mean_iou" in row for row in result["categories"].values()):
        print("IoU: mean overlap of boxes and their subjects, the model's and the true pictures'")
    print("the judge: " + ", ".join(f"{name} {value}" for name, value in result["judge"].items()))
    return 0


def _outside(row: dict[str, Any]) -> str:
    """The change outside the edited region, the model's and the ceiling's."""
    change = row.get("outside_change")
    return f"{change['model']:.2f} / {change['ceiling']:.2f} %" if change else "–"


def _iou(row: dict[str, Any]) -> str:
    """The mean overlap of a layout's boxes with their subjects, the model's and the ceiling's."""
    mean = row.get("mean_iou")
    return f"{mean['model']:.2f} / {mean['ceiling']:.2f}" if mean else "–"
