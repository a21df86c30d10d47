"""`hidream hidit evaluate`: FID and Inception Score of a folder of pictures."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hidream import __version__
from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.cli.hidit.network import (
    Chosen,
    add_network,
    check_network,
    check_writable,
    choose,
    look_at,
    sha256,
    write_json,
)
from hidream.errors import InputError

if TYPE_CHECKING:
    from hidream.eval.fid import Moments

ENOUGH = 10_000  # pictures; an FID of fewer is known to be too high
EPILOG = """\
hidream hidit evaluate --input-dir samples/RUN --fid-stats imagenet_in256_stats.npz \\
    --inception inception-2015-12-05.safetensors --output-json results/RUN.json"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "hidit evaluate",
        "FID and Inception Score of a folder of pictures, against statistics (mu, sigma).",
        usage="hidream hidit evaluate --input-dir DIR --fid-stats STATS.npz [flags]",
        epilog=EPILOG,
    )
    parser.add_argument("--input-dir", required=True, metavar="DIR", help="PNG, JPEG or WebP files")
    parser.add_argument("--fid-stats", required=True, metavar="NPZ", help="mu and sigma")
    parser.add_argument("--output-json", metavar="FILE", help="keep the result, with digests")
    parser.add_argument("--no-isc", action="store_true", help="FID alone, no Inception Score")
    add_network(parser, beside="the statistics")
    add_json(parser)
    arguments = parser.parse(argv)
    check_network(arguments)
    output = Path(arguments.output_json).expanduser() if arguments.output_json else None
    if output is not None:
        check_writable(output, overwrite=True)
    stats = Path(arguments.fid_stats).expanduser()

    import torch

    from hidream.eval.fid import distance, read_stats
    from hidream.eval.picture_set import check_number, open_pictures

    start = time.perf_counter()
    reference = read_stats(stats)
    chosen = choose(arguments.inception, beside=stats)
    _check_same_network(reference, chosen, stats)
    pictures = open_pictures(arguments.input_dir)
    check_number(pictures, with_score=not arguments.no_isc)
    measured = look_at(pictures, chosen, arguments, with_score=not arguments.no_isc)
    if len(pictures) < ENOUGH:
        console.warn(
            f"of {len(pictures)} pictures the distance comes out too high: compare it only with "
            "that of as many."
        )
    value = distance(measured.stats.gaussian(), reference.gaussian())
    score = asdict(measured.score) if measured.score is not None else None
    result: dict[str, Any] = {
        "fid": None if chosen.is_stand_in else value,
        "inception_score": None if chosen.is_stand_in else score,
        "num_images": len(pictures),
        "features": chosen.name,
        "input_dir": str(pictures.place),
        "fid_stats": {"file": str(stats), "sha256": sha256(stats)},
        "inception": chosen.identity(),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": {"hidream": __version__, "torch": torch.__version__},
    }
    if chosen.is_stand_in:  # under no name that could be taken for a published measure
        result["stand_in"] = {"frechet_distance": value, "score": score}
    if output is not None:
        write_json(output, result)
    if arguments.json:
        console.show(result)
        return 0
    fid, isc = "FID", "Inception Score"
    if chosen.is_stand_in:
        fid, isc = "Fréchet distance of the stand-in (not FID)", "score of the stand-in (not IS)"
    print(f"{fid} {value:.4f}")
    if measured.score is not None:
        print(f"{isc} {measured.score.mean:.4f} ± {measured.score.std:.4f}")
    return 0


def _check_same_network(reference: Moments, chosen: Chosen, stats: Path) -> None:
    """InputError where the statistics say or show that another network made them."""
    theirs, num_features = reference.features, len(reference.mean)
    if theirs is not None and theirs != chosen.name:
        raise InputError(
            f'the features of {stats} are "{theirs}", those of --inception are "{chosen.name}".',
            "Use the same network for both.",
        )
    if num_features != chosen.num_features:
        raise InputError(
            f"{stats} is of {num_features} features; {chosen.name} has {chosen.num_features}.",
            "Both must come from the same network.",
        )
