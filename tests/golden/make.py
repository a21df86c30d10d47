"""Golden pictures: `python -m tests.golden.make` draws them anew, to be looked at before commit.

Random weights (tests/tiny.py) answer with coloured noise; what the pictures hold fast is every
number on the way from a request to its pixels.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from hidream.pipelines import Pipeline, load
from tests import tiny

FOLDER = Path(__file__).parent / "pictures"


def requests() -> dict[str, dict[str, Any]]:
    """Name -> fields: each task, sampler and way of starting once."""
    source = tiny.picture(2, 64, 64)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 20, 40, 56))
    return {
        "text_to_image": {"prompt": "a red cube", "seed": 7},
        "dev": {
            "prompt": "the blue sphere, “tall”, 红色",
            "seed": 2**63 - 1,
            "width": 96,
            "height": 32,
            "guidance_scale": 0,
            "sampler": "flash",
            "noise_clip_std": 2.5,
        },
        "edit": {"prompt": "make it red", "seed": 1, "references": (source,), "mask": mask},
        "layout": {
            "prompt": "a red cube and a blue sphere",
            "seed": 3,
            "references": (tiny.picture(0), tiny.picture(1)),
            "layout": [[0.1, 0.4, 0.2, 0.6], [50, 90, 30, 80]],
            "negative_prompt": "blue",
            "sampler": "heun",
        },
        "image_to_image": {
            "prompt": "a red cube",
            "seed": 4,
            "init_image": source,
            "strength": 0.5,
            "sampler": "euler",
            "shift": 3.0,
        },
    }


def draw(pipe: Pipeline, fields: dict[str, Any]) -> Image.Image:
    return pipe(**fields).images[0]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_folder(Path(folder))
        pipe = load(folder, device="cpu")
        for name, fields in requests().items():
            path = FOLDER / f"{name}.png"
            draw(pipe, fields).save(path, optimize=True)
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
