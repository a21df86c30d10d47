"""`hidream bench`: how fast this machine draws, and how much of that is our doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json, add_model
from hidream.cli.loading import check_memory, load_pipeline
from hidream.errors import InputError, UsageError
from hidream.registry import DEFAULT_MODEL


def run(argv: list[str]) -> int:
    parser = Parser(
        "bench",
        "Time a step and a picture, against a plain implementation and the published scheme.",
        usage="hidream bench [-m MODEL] [--steps N] [--rounds N] [--quick] [-o FILE.json]",
    )
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of a picture")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="each case, each way")
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument("-o", "--output", metavar="FILE", help="keep the figures as JSON")
    add_json(parser)
    add_model(parser)
    arguments = parser.parse(argv)
    for name, most in (("steps", 1000), ("rounds", 1000)):
        value = getattr(arguments, name)
        if not 1 <= value <= most:
            raise UsageError(f"--{name} {value} is out of range: 1 … {most}.")
    check_memory(arguments)
    if arguments.memory != "auto":
        raise UsageError(
            f"bench compares ways to compute with everything on the device, not under --memory "
            f"{arguments.memory}.",
            "Leave --memory out.",
        )
    output = Path(arguments.output).expanduser() if arguments.output else None
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} is not a folder.", "Make it first.")

    from hidream.bench import cases, timing
    from hidream.pipelines.o1 import O1Pipeline

    model = arguments.model or DEFAULT_MODEL
    pipe = load_pipeline(arguments, model)
    if not isinstance(pipe, O1Pipeline):
        raise UsageError(
            f"bench times O1 models; {pipe.spec.name} is none.",
            "For I1: python -m benchmarks.i1_step.",
        )
    chosen = (*cases.TEXT_TO_IMAGE, *cases.WITH_REFERENCES)
    result: dict[str, Any] = {"model": pipe.spec.name, "machine": timing.machine()}
    result["device"] = str(pipe.device)
    result["cold_start_s"] = timing.cold_start(model, str(pipe.device))
    result |= timing.run(
        pipe.model,
        pipe.tokenizer,
        num_steps=arguments.steps,
        rounds=arguments.rounds,
        cases=chosen[:2] if arguments.quick else chosen,
        on_progress=console.say,
    )
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        console.show(result)
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    cold = result["cold_start_s"]
    print("cold start  " + ", ".join(f"{name} {value:.2f} s" for name, value in cold.items()))
    print(f"{'milliseconds a step':<42} {'ours':>9} {'plain':>9} {'two-pass':>9}  ours faster by")
    for row in result["cases"]:
        step, faster = row["step_ms"], row["ours_faster"]
        print(
            f"{row['case']:<42} {step['ours']:>9.1f} {step['plain']:>9.1f} "
            f"{step['two_pass']:>9.1f}  {faster['plain']:.2f} and {faster['two_pass']:.2f}"
        )
    for task, means in result["ours_faster"].items():
        bound = result["arithmetic"][task]
        print(
            f"{task:<42} geometric means: {means['plain']:.2f} and {means['two_pass']:.2f}; "
            f"by arithmetic alone {bound['plain']:.2f} and {bound['two_pass']:.2f}"
        )
