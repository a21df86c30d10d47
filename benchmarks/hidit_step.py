"""A training step of Hi-DiT against a plain one: `python -m benchmarks.hidit_step OUT.json`.

Both take the same step of the same network, XL/1 scaled down to a quarter of its width and depth
with 8×8 latents for pictures of 64×64, from the same files, with the same encoder for REPA and the
same batch. *Plain* is written as published trainers are: a picture and its latents out of the h5
files one by one, fp32, nothing compiled, noise levels drawn one by one, pixel tokens for every
sample where some need them, REPA's loss sample by sample, AdamW and the moving average tensor by
tensor. *Ours* is the loop's: packed data read ahead, blocks compiled, pixels for the samples below
the gate alone, fused AdamW. They run in turn in one process; the ratio is the rounds' median.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hidream.data import h5
from hidream.data.latents import cache_latents
from hidream.data.packed import open_packed
from hidream.data.preprocess import preprocess
from hidream.models.hidit import config as sizes
from hidream.train.config import HiDiTOptions, Optimizer, Recipe, Stage
from hidream.train.distributed import World
from hidream.train.hidit import HiDiTLearner
from hidream.train.optim import build_optimizers, clip_gradients, set_learning_rate, update_ema
from hidream.train.prefetch import Prefetcher

SIZE = replace(
    sizes.SIZES["SiT-XL/1"],
    hidden_size=288,
    num_layers=7,
    num_heads=4,
    encoder_depth=2,
    projector_width=512,
)
BATCH, STEPS, ROUNDS, RATE = 32, 3, 5, 1e-4
NUM_PICTURES = 512


def write_data(root: Path) -> None:
    """Pictures of smooth colours in ten classes, and latents that stand in for a VAE's."""
    dice = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        folder = root / "pictures" / f"n{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        colors = dice.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(colors).resize((80, 80), Image.Resampling.BICUBIC).save(
            folder / f"{i:04d}.jpg"
        )
    preprocess(root / "pictures", root / "data", 64)

    def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.adaptive_avg_pool2d(pictures, 8).repeat(1, 11, 1, 1)[:, :32]
        return mean, torch.full_like(mean, 0.1)

    cache_latents(root / "data", root / "data", "stand-in", encode, batch_size=64)
    open_packed(root / "data", "stand-in")


def ours(recipe: Recipe) -> Callable[[], None]:
    """A function that takes the next step."""
    learner = HiDiTLearner(recipe)
    model, ema = learner.build(), learner.build().requires_grad_(False)
    for block in learner.blocks(model):
        block.compile(dynamic=False)
    optimizers = build_optimizers(model, recipe.optimizer)
    set_learning_rate(optimizers, RATE)
    parameters = list(model.parameters())
    averages, weights = [p.data for p in ema.parameters()], [p.data for p in parameters]
    batches = iter(Prefetcher(learner.make_batch, range(recipe.num_steps), ahead=2))

    def step() -> None:
        batch = next(batches)
        model.zero_grad(set_to_none=True)
        learner.losses(model, batch, World().start_sums()).total.backward()
        clip_gradients(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_ema(averages, weights, 0.9999)

    return step


def plain(recipe: Recipe) -> Callable[[], None]:
    """The same step, written as one would at first."""
    options = recipe.hidit
    learner = HiDiTLearner(recipe)
    model = learner.build()
    ema = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, foreach=False)
    folder = Path(options.data_dir)
    names = h5.read_listing(folder, "images").names
    labels = h5.read_listing(folder, "images").labels
    order: Iterator[int] = iter(np.random.default_rng(0).integers(0, len(names), 10**6).tolist())
    images_file = h5.import_h5py().File(h5.h5_file(folder, "images"))
    latents_file = h5.import_h5py().File(h5.h5_file(folder, options.vae_latents_name))

    def step() -> None:
        items = [next(order) for _ in range(BATCH)]
        images = torch.stack(
            [torch.from_numpy(h5.read_image(images_file, names[i])) for i in items]
        )
        moments = torch.stack(
            [
                torch.from_numpy(h5.read_latents(latents_file, h5.latents_name(names[i])))
                for i in items
            ]
        )
        mean, deviation = moments.float().chunk(2, dim=1)
        x0 = model.normalise(mean + deviation * torch.randn_like(mean))
        noise, sigma = torch.randn_like(x0), torch.rand(BATCH)
        level = sigma[:, None, None, None]
        classes = torch.tensor([int(labels[i]) for i in items])
        classes[torch.rand(BATCH) < 0.1] = learner.config.num_classes
        pixels = noisy = None
        if not options.ldm_only:
            pixels = images.float() / 127.5 - 1
            noisy = (1 - level) * pixels + level * torch.randn_like(pixels)
        found = model((1 - level) * x0 + level * noise, sigma, classes, noisy, with_features=True)
        total = (found.velocity - (noise - x0)).square().mean()
        with torch.no_grad():
            wanted = learner.encoder(images)
        alignment = torch.zeros(())
        for features in found.features:
            for one, other in zip(features, wanted, strict=True):
                one, other = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
                alignment = alignment - (one * other).sum(-1).mean()
        total = total + 0.5 * alignment / (len(found.features) * BATCH)
        if pixels is not None:
            error = (found.pixels - pixels).square().mean(dim=(1, 2, 3))
            error = error / sigma.clamp(min=0.05).square()
            total = total + (error * (sigma <= learner.config.gate)).mean()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return step


def measure(root: Path, ldm_only: bool) -> dict[str, float | int | str]:
    stage = Stage(size=1, steps=10**6, batch_size=BATCH, learning_rate=RATE)
    recipe = Recipe(
        name="bench",
        model="hidit-bench",
        stages=(stage,),
        out=str(root / "run"),
        precision="float32",  # bfloat16 pays on a CPU with AMX alone
        optimizer=Optimizer(betas=(0.9, 0.999), weight_decay=0.0),
        hidit=HiDiTOptions(
            data_dir=str(root / "data"),
            vae_latents_name="stand-in",
            ldm_only=ldm_only,
            enc_type="stand-in",
            encoder_depth=2,
        ),
    )
    steps = {"ours": ours(recipe), "plain": plain(recipe)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):  # the first is to compile and to warm up
        for name in sorted(steps, reverse=bool(number % 2)):
            start = time.perf_counter()
            for _ in range(STEPS):
                steps[name]()
            if number:
                times[name].append((time.perf_counter() - start) / STEPS)
    ratios = [b / a for a, b in zip(times["ours"], times["plain"], strict=True)]
    return {
        "stage": "1, latents" if ldm_only else "2, latents and pixels",
        "batch": BATCH,
        "ours_pictures_per_second": round(BATCH / statistics.median(times["ours"]), 2),
        "plain_pictures_per_second": round(BATCH / statistics.median(times["plain"]), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    sizes.SIZES["bench"] = SIZE
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        rows = [measure(Path(folder), ldm_only) for ldm_only in (True, False)]
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "network": f"SiT-XL/1 scaled down: width {SIZE.hidden_size}, {SIZE.num_layers} blocks, "
        f"{SIZE.num_heads} heads, 8×8 latents, 64×64 pixels",
        "rounds": ROUNDS,
        "steps_a_round": STEPS,
    }
    Path(sys.argv[1]).write_text(json.dumps({**about, "stages": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
