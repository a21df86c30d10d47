"""`hidream hidit preprocess`: a folder of labelled pictures becomes images.h5."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json
from hidream.cli.hidit.progress import Items

EXAMPLE = """\
hidream hidit preprocess --imagenet-path imagenet/train --output-path data/imagenet256 \\
    --resolution 256 --num-workers 32

Stopped and started again, it goes on where it was. Files that cannot be read are left out, named
here and in images_report.json."""
NUM_NAMED = 10  # files that are left out, on stderr; the report has them all


def run(argv: list[str]) -> int:
    from hidream.data.workers import num_cores

    parser = Parser(
        "hidit preprocess",
        "Crop every picture of a folder, and write images.h5 and images_h5.json.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--imagenet-path",
        required=True,
        metavar="DIR",
        help="pictures in a folder a class, or anyhow with a dataset.json",
    )
    parser.add_argument("--output-path", default="data", metavar="DIR", help="default data")
    parser.add_argument("--resolution", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument(
        "--num-workers", type=int, default=num_cores(), metavar="N", help="default: every core"
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="only the first N files")
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="ignore EXIF rotation and transparency, as the published script does",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another images.h5")
    add_json(parser)
    arguments = parser.parse(argv)

    from hidream.data.h5 import IMAGES, h5_file
    from hidream.data.preprocess import preprocess

    path = h5_file(Path(arguments.output_path).expanduser(), IMAGES)
    if path.exists() and not arguments.overwrite:
        console.say(f"{path} is there already.")
    progress = Items("pictures")
    try:
        report = preprocess(
            arguments.imagenet_path,
            arguments.output_path,
            arguments.resolution,
            num_workers=arguments.num_workers,
            max_images=arguments.max_images,
            as_published=arguments.as_published,
            overwrite=arguments.overwrite,
            on_progress=progress.step,
        )
    finally:
        progress.close()
    if report.skipped:
        console.warn(f"{len(report.skipped)} of {report.num_files} files are left out:")
        for one in report.skipped[:NUM_NAMED]:
            console.say(f"  {one.file} {one.reason}")
        if len(report.skipped) > NUM_NAMED:
            console.say("  and more: images_report.json names all of them.")
    if report.absent:
        console.warn(f"dataset.json names {report.absent} files that are not there.")
    if arguments.json:
        console.show({"path": str(path), **asdict(report)})
    else:
        print(path)
    return 0
