"""A training run's log as a small JSON record and a picture: `python benchmarks/curve.py RUN OUT`.

Writes OUT.json (means over windows of the log) and, where matplotlib is installed, OUT.png.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

WINDOW = 5  # log lines a point


def points(log: Path) -> list[dict[str, Any]]:
    """The log's records, averaged over windows of WINDOW lines of one stage."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [record for record in records if "lr" in record]
    windows: list[list[dict[str, Any]]] = []
    for record in records:
        full = windows and len(windows[-1]) == WINDOW
        if not windows or full or windows[-1][0]["stage"] != record["stage"]:
            windows.append([])
        windows[-1].append(record)
    return [_mean(window) for window in windows]


def _mean(window: list[dict[str, Any]]) -> dict[str, Any]:
    last = window[-1]
    mean = {name: last[name] for name in ("step", "stage", "samples")}
    for name in sorted({key for record in window for key in record if key.startswith("loss_")}):
        values = [record[name] for record in window if name in record]
        mean[name] = round(sum(values) / len(values), 5)
    mean["samples_per_second"] = round(
        sum(record["samples_per_second"] for record in window) / len(window), 1
    )
    return mean


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Picture losses over samples seen, a line a task, with the stages' borders."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for task in ("text_to_image", "edit", "subject"):
        shown = [(r["samples"] / 1000, r[f"loss_{task}"]) for r in rows if f"loss_{task}" in r]
        axes.plot(*zip(*shown, strict=True), label=task.replace("_", " "))
    for before, after in pairwise(rows):
        if before["stage"] != after["stage"]:
            axes.axvline(before["samples"] / 1000, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="thousand samples seen", ylabel="velocity loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    rows = points(run / "log.jsonl")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    out.with_suffix(".json").write_text(f"[\n  {lines}\n]\n")
    try:
        plot(rows, out.with_suffix(".png"))
    except ImportError:
        sys.stderr.write("matplotlib is not installed: no picture\n")


if __name__ == "__main__":
    main()
