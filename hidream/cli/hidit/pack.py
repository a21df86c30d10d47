"""`hidream hidit pack`: the h5 files become plain arrays, fast to train from."""

from __future__ import annotations

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.cli.hidit.progress import Items

EXAMPLE = """\
hidream hidit pack --data-dir data/imagenet256 --vae-latents-name e2e-vavae-400k --num-workers 32

Training does it by itself where it is not done, in one process. The h5 files are not changed."""


def run(argv: list[str]) -> int:
    from hidream.data.workers import num_cores

    parser = Parser(
        "hidit pack",
        "Make packed-NAME beside the h5 files, unless it is there and of these files.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="has images.h5")
    parser.add_argument("--vae-latents-name", metavar="NAME", help="default: pictures alone")
    parser.add_argument(
        "--dtype", default="float16", choices=("float16", "float32"), help="of the latents"
    )
    parser.add_argument(
        "--num-workers", type=int, default=num_cores(), metavar="N", help="default: every core"
    )
    add_json(parser)
    arguments = parser.parse(argv)

    from hidream.data.packed import open_packed

    progress = Items("items")
    try:
        packed = open_packed(
            arguments.data_dir,
            arguments.vae_latents_name,
            dtype=arguments.dtype,
            num_workers=arguments.num_workers,
            on_progress=progress.step,
        )
    finally:
        progress.close()
    if arguments.json:
        console.show(
            {
                "path": str(packed.folder),
                "num_items": len(packed),
                "num_classes": packed.num_classes,
                "resolution": packed.resolution,
                "moments_shape": packed.moments_shape,
            }
        )
    else:
        print(packed.folder)
    return 0
