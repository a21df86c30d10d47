"""Random batches from the packed arrays and from the h5 files: `python -m benchmarks.hidit_data`.

The h5 way is the published loader's: both files are opened once, each item is looked up by its
name, its PNG decoded, its latents read. Both ways read the same items of the same made-up pictures
(smooth, with noise on top) in the same order, from the system's cache, in one process and on one
thread; both end in one uint8 and one float32 array a batch. They take turns in every round; ratios
are medians of the rounds' own.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hidream.bench.timing import machine
from hidream.data import h5
from hidream.data.latents import cache_latents
from hidream.data.packed import Packed, pack
from hidream.data.preprocess import preprocess

BATCH = 64
CHANNELS, CELL = 32, 16  # of f16d32's latents; pixels of a side that one stands for
CASES = {"256x256": (256, 512), "64x64": (64, 2048)}  # pixels of a side, pictures
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_data(folder: Path, size: int, num: int) -> None:
    """images.h5 and latents.h5 of made-up pictures."""
    source = folder / "source" / "class"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(source / f"{index:06}.png", compress_level=0)
    preprocess(folder / "source", folder, size)

    def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
        cells = pictures.unflatten(3, (-1, CELL)).unflatten(2, (-1, CELL)).mean((3, 5))
        mean = cells.repeat(1, CHANNELS, 1, 1)[:, :CHANNELS]
        return mean, mean.abs() + 0.1

    cache_latents(folder, folder, "latents", encode, batch_size=BATCH)


def h5_reader(folder: Path) -> Read:
    """The published way."""
    images, latents = h5py.File(folder / "images.h5"), h5py.File(folder / "latents.h5")
    names = h5.read_listing(folder, h5.IMAGES).names
    keys = [h5.latents_name(name) for name in names]

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pictures = [
            np.array(Image.open(io.BytesIO(np.array(images[names[index]])))).transpose(2, 0, 1)
            for index in indices
        ]
        return np.stack(pictures), np.stack([np.array(latents[keys[index]]) for index in indices])

    return read


def packed_reader(packed: Packed) -> Read:
    return lambda indices: (packed.images(indices), packed.moments(indices))


def time_case(size: int, num: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hidit-data-") as name:
        folder = Path(name)
        make_data(folder, size, num)
        start = time.perf_counter()
        packed = pack(folder, "latents")
        packing = time.perf_counter() - start
        ways = {"packed": packed_reader(packed), "h5": h5_reader(folder)}
        batches = np.random.default_rng(1).permutation(num)[: num // BATCH * BATCH]
        batches = batches.reshape(-1, BATCH)
        check(ways, batches)  # also the warm-up
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in sorted(ways, reverse=bool(number % 2)):
                start = time.process_time()
                for indices in batches:
                    ways[way](indices)
                taken[way].append((time.process_time() - start) / batches.size)
        ratios = [b / a for a, b in zip(taken["packed"], taken["h5"], strict=True)]
        return {
            "pictures": num,
            "batch_size": BATCH,
            "moments": list(packed.moments_shape or ())[1:],
            "items_per_cpu_second": {way: round(1 / median(t)) for way, t in taken.items()},
            "packed_faster": round(median(ratios), 1),
            "rounds": [round(ratio, 1) for ratio in ratios],
            "packing_items_per_second": round(num / packing),
        }


def check(ways: dict[str, Read], batches: np.ndarray) -> None:
    """Both ways find the same pictures, and the same latents as far as fp16 goes."""
    for indices in batches:
        (images, moments), (expected, exact) = (read(indices) for read in ways.values())
        assert np.array_equal(images, expected)
        assert np.array_equal(moments, exact.astype(np.float16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", default="benchmarks/results/hidit_data_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for name, (size, num) in CASES.items():
        print(name, flush=True)
        cases[name] = time_case(size, num, arguments.rounds)
    result = {"machine": machine() | {"h5py": h5py.__version__}, "cases": cases}
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
