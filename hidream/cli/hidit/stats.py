"""`hidream hidit stats`: the statistics of a set of pictures, for evaluate."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.cli.hidit.network import (
    add_network,
    check_network,
    check_writable,
    choose,
    look_at,
    sha256,
)
from hidream.errors import InputError, UsageError

EPILOG = """\
hidream hidit stats --data-dir data/imagenet256 --output imagenet256.npz \\
    --inception inception-2015-12-05.safetensors"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "hidit stats",
        "Mean and covariance of Inception's features of pictures, as an .npz with mu and sigma.",
        usage="hidream hidit stats (--input-dir DIR | --data-dir DIR) --output STATS.npz [flags]",
        epilog=EPILOG,
    )
    parser.add_argument("--input-dir", metavar="DIR", help="PNG, JPEG or WebP files")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="the images.h5 of hidream hidit preprocess"
    )
    parser.add_argument("--output", required=True, metavar="NPZ")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_network(parser, beside="--output")
    add_json(parser)
    arguments = parser.parse(argv)
    check_network(arguments)
    if (arguments.input_dir is None) == (arguments.data_dir is None):
        raise UsageError("name the pictures by one of --input-dir and --data-dir.")
    output = Path(arguments.output).expanduser()
    if output.suffix != ".npz":
        raise InputError(f"{output} is no name of statistics.", "End it in .npz.")
    check_writable(output, overwrite=arguments.overwrite)

    from hidream.eval.fid import write_stats
    from hidream.eval.picture_set import check_number, open_h5, open_pictures

    start = time.perf_counter()
    chosen = choose(arguments.inception, beside=output)
    with ExitStack() as stack:
        pictures = (
            open_pictures(arguments.input_dir)
            if arguments.data_dir is None
            else stack.enter_context(open_h5(arguments.data_dir))
        )
        check_number(pictures, with_score=False)
        measured = look_at(pictures, chosen, arguments, with_score=False)
    write_stats(output, measured.stats, chosen.name)
    if arguments.json:
        console.show(
            {
                "path": str(output),
                "sha256": sha256(output),
                "num_images": len(pictures),
                "features": chosen.name,
                "pictures": str(pictures.place),
                "inception": chosen.identity(),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
    else:
        print(output)
    return 0
