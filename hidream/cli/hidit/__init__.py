"""`hidream hidit STAGE`: from a folder of labelled pictures to a trained Hi-DiT and its FID."""

from __future__ import annotations

from importlib import import_module

from hidream.errors import UsageError
from hidream.registry import nearest

# stage -> (module with `run(argv) -> int`, what it does)
STAGES = {
    "preprocess": ("preprocess", "a folder of labelled pictures becomes images.h5"),
    "cache-latents": ("cache_latents", "a VAE reads every picture once"),
    "pack": ("pack", "the h5 files become one that trains fast (train does it by itself)"),
    "train": ("train", "stage 1 with --ldm-only, then the pixel branch without it"),
    "sample": ("sample", "draw pictures of every class"),
    "stats": ("stats", "the statistics of a set of pictures, for evaluate"),
    "evaluate": ("evaluate", "FID and Inception Score of a folder of pictures"),
}
HELP = "\n".join(
    [
        "usage: hidream hidit STAGE [flags]",
        "",
        *(f"  {name:<15}{what}" for name, (_, what) in STAGES.items()),
        "",
        "hidream hidit STAGE --help lists a stage's flags. cache-latents, train and sample",
        "also run as several processes: torchrun --nproc_per_node 8 -m hidream hidit STAGE ...",
    ]
)


def run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if not argv or argv[0] not in STAGES:
        what = f'unknown stage "{argv[0]}"; {nearest(argv[0], STAGES)}' if argv else "no stage."
        raise UsageError(what, "See hidream hidit --help.")
    return import_module(f"hidream.cli.hidit.{STAGES[argv[0]][0]}").run(argv[1:])
