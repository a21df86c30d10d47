"""Does Hi-DiT's pixel branch find the detail that a VAE loses? A small experiment, whole.

`python -m benchmarks.hidit_toy DIR OUT.json [--seeds 0 1 2]` makes, in DIR, pictures of 16×16 with
real high frequencies (three shapes, textured with stripes or speckles of single pixels), a lossy
VAE (latents of 4×4×4), a stage 1 and from it, with as many steps and samples, a stage 2 for each of
the two pixel clocks, and a *refiner*: the same network with the same parameters, which reads the
latents and their decoding and is taught, by the mean squared error, the true picture: no noise,
nothing generated. Measured against pictures that no training saw: energy in the highest
frequencies, and Fréchet distance of the stand-in's features, which is no FID. What is in DIR
already is not made again; a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from hidream.data.latents import cache_latents
from hidream.data.packed import Packed, open_packed
from hidream.data.preprocess import preprocess
from hidream.eval.fid import Stats, distance
from hidream.eval.stand_in import StandIn
from hidream.models.hidit.config import PIXEL_CLOCKS
from hidream.models.hidit.model import HiDiT
from hidream.models.hidit.vae import LdmVae, VaeConfig, load_vae, new_vae, save_vae
from hidream.pipelines.hidit import SamplingOptions, draw, labels_for
from hidream.train.checkpoint import folder_of, latest, load_ema
from hidream.train.config import HiDiTOptions, Optimizer, Recipe, Stage
from hidream.train.hidit import HiDiTLearner
from hidream.train.loop import train

SIDE, SUPER = 16, 4
SHAPES, TEXTURES = ("disc", "square", "triangle"), ("stripes", "speckles")
NUM_CLASSES = len(SHAPES) * len(TEXTURES)
NUM_TRAIN, NUM_HELD_OUT, NUM_DRAWN = 6000, 2000, 500
COLORS = (
    (220, 70, 60),
    (70, 170, 80),
    (70, 90, 210),
    (230, 200, 80),
    (160, 80, 170),
    (200, 200, 200),
)
VAE = VaeConfig(channels=4, width=16, multipliers=(1, 2, 4), num_blocks=1, num_groups=8)
VAE_STEPS, STAGE_1, STAGE_2, BATCH, RATE = 1500, 1500, 1500, 32, 1e-3
GATE = 0.5  # half of a step's samples show their pixels
SAMPLING = SamplingOptions(mode="ode", num_steps=25, cfg_scale=1.5)
HIGH = 0.5  # of the Nyquist frequency: what is above counts as high


def picture(label: int, dice: np.random.Generator) -> Image.Image:
    """A shape before a plain ground, its texture one pixel fine, of a colour and its shadow."""
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    ground, light = (np.array(COLORS[i]) for i in dice.choice(len(COLORS), 2, replace=False))
    if texture == "stripes":
        lines = np.indices((SIDE, SIDE))[dice.integers(2)] + dice.integers(2)
        lit = lines % 2 == 0
    else:
        lit = dice.random((SIDE, SIDE)) < 0.5
    inside = Image.new("L", (SIDE * SUPER, SIDE * SUPER))
    pen = ImageDraw.Draw(inside)
    half, cx, cy = (dice.uniform(4.5, 6) * SUPER, *(dice.uniform(7, 9, 2) * SUPER))
    box = (cx - half, cy - half, cx + half, cy + half)
    if shape == "disc":
        pen.ellipse(box, fill=255)
    elif shape == "square":
        pen.rectangle(box, fill=255)
    else:
        pen.polygon([(cx, box[1]), (box[2], box[3]), (box[0], box[3])], fill=255)
    share = np.asarray(inside.resize((SIDE, SIDE), Image.Resampling.BOX))[..., None] / 255
    pixels = share * np.where(lit[..., None], light, light * 0.2) + (1 - share) * ground
    return Image.fromarray(pixels.round().astype(np.uint8))


def write_pictures(folder: Path, first: int, count: int) -> None:
    for i in range(first, first + count):
        place = folder / f"c{i % NUM_CLASSES}" / f"{i:05d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(i % NUM_CLASSES, np.random.default_rng(i)).save(place)


def train_vae(data: Packed, folder: Path) -> None:
    """Mean squared error and a small divergence: what is lost comes out as its mean."""
    vae = new_vae(VAE, torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, VAE_STEPS)
    dice, generator = np.random.default_rng(0), torch.Generator().manual_seed(1)
    for step in range(VAE_STEPS):
        images = data.images(dice.integers(0, len(data), 32))
        x = torch.from_numpy(images).float() / 127.5 - 1
        mean, std = vae.moments(x)
        made = vae.decode(mean + std * torch.randn(mean.shape, generator=generator))
        divergence = 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).mean()
        loss = F.mse_loss(made, x) + 3e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            print(f"vae step {step}: {loss.item():.4f}", flush=True)
    save_vae(vae.eval(), folder)


def recipe_of(root: Path, name: str, seed: int, steps: int, **options: object) -> Recipe:
    stage = Stage(
        size=1, steps=steps, batch_size=BATCH, learning_rate=RATE, warmup=50, decay=steps // 2
    )
    return Recipe(
        name=name,
        model="hidit-SiT-N/1",
        stages=(stage,),
        out=str(root / f"{name}-{seed}"),
        seed=seed,
        precision="float32",
        log_every=50,
        checkpoint_every=250,
        grid_every=0,
        optimizer=Optimizer(betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.995),
        hidit=HiDiTOptions(
            data_dir=str(root / "data"),
            vae_latents_name="toy",
            vae_ckpt=str(root / "vae"),
            enc_type="stand-in",
            encoder_depth=3,
            gate=GATE,
            pixel_weight=0.25,
            pixel_delta=0.2,
            **options,  # type: ignore[arg-type]
        ),
    )


def run(recipe: Recipe) -> None:
    """Train to the end, or go on, or find it done."""
    folder = Path(recipe.run_dir)
    if not (folder / "model").exists():
        resume = (folder / "checkpoints" / "latest").exists()
        train(recipe, resume=resume, on_log=lambda record: print(json.dumps(record), flush=True))


def trained(recipe: Recipe) -> HiDiT:
    """The averaged weights at a run's end."""
    model = HiDiTLearner(recipe).build()
    load_ema(latest(recipe.run_dir), model)
    return model.requires_grad_(False).eval()


def second(first: Recipe, name: str, **options: object) -> Recipe:
    """A run that goes on from the end of another, with a schedule of its own."""
    steps = first.num_steps
    more = replace(first.stages[0], steps=STAGE_2, warmup=50, decay=STAGE_2 // 2)
    return replace(
        first,
        name=name,
        out=str(first.run_dir.with_name(f"{name}-{first.seed}")),
        stages=(replace(first.stages[0], decay=0), more),
        start=str(folder_of(first.run_dir, steps)),
        hidit=replace(first.hidit, ldm_only=False, **options),  # type: ignore[arg-type]
    )


def refined(model: HiDiT, x0: Tensor, decoded: Tensor, labels: Tensor) -> Tensor:
    """The refiner's answer: latents and their decoding in, at noise level 0, the picture out."""
    none = torch.zeros(len(x0))
    found = model(x0, none, labels, decoded, pixel_sigma=none)
    assert found.pixels is not None
    return found.pixels


def train_refiner(first: Recipe, data: Packed, vae: LdmVae, place: Path) -> HiDiT:
    """As many steps of as many samples as stage 2, from the same weights, by the squared error."""
    recipe = second(first, "refiner")
    model = HiDiTLearner(recipe).build()
    if place.exists():
        model.load_state_dict(load_file(place))
        return model.requires_grad_(False).eval()
    load_ema(folder_of(first.run_dir, first.num_steps), model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STAGE_2)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=False
    )
    dice = np.random.default_rng(first.seed)
    for step in range(STAGE_2):
        items = dice.integers(0, len(data), BATCH)
        images = torch.from_numpy(data.images(items)).float() / 127.5 - 1
        mean, std = torch.from_numpy(data.moments(items)).chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape)
        with torch.no_grad():
            decoded = vae.decode(latents)
        labels = torch.from_numpy(data.labels[items])
        made = refined(model, model.normalise(latents), decoded, labels)
        loss = F.mse_loss(made, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
        if step % 50 == 0:
            print(f"refiner {first.seed} step {step}: {loss.item():.4f}", flush=True)
    done: HiDiT = average.module
    save_file({k: v.contiguous() for k, v in done.state_dict().items()}, place)
    return done.requires_grad_(False).eval()


def high_energy(pictures: Tensor) -> float:
    """Mean power of a pixel value above `HIGH` of the Nyquist frequency, levels in [−1, 1]."""
    x = pictures.float() / 127.5 - 1
    spectrum = torch.fft.fft2(x, norm="ortho").abs().square()
    f = torch.fft.fftfreq(SIDE).abs()
    above = (torch.maximum(f[:, None], f[None]) > HIGH / 2).float()
    return float((spectrum * above).sum(dim=(-2, -1)).mean() / SIDE**2)


def stats_of(pictures: Tensor) -> Stats:
    network = StandIn()
    stats: Stats | None = None
    for part in pictures.split(100):
        features = network(part).features
        stats = stats or Stats(features.shape[1])
        stats.add(features)
    assert stats is not None
    return stats


def in_batches(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        parts = zip(*(t.split(100) for t in tensors), strict=True)
        return torch.cat([function(*part) for part in parts])


def levels(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def experiment(root: Path, seed: int, held_out: Tensor) -> dict[str, dict[str, float]]:
    """All figures of one seed, by what is shown."""
    place = root / f"figures-{seed}.json"
    if place.exists():
        return json.loads(place.read_text())  # type: ignore[no-any-return]
    vae = load_vae(root / "vae")
    data = open_packed(root / "data", "toy")
    first = recipe_of(root, "stage1", seed, STAGE_1, ldm_only=True)
    run(first)
    hybrids = {clock: second(first, f"stage2-{clock}", pixel_clock=clock) for clock in PIXEL_CLOCKS}
    for hybrid in hybrids.values():
        run(hybrid)
    refiner = train_refiner(first, data, vae, root / f"refiner-{seed}.safetensors")
    items = np.arange(NUM_DRAWN) * (NUM_TRAIN // NUM_DRAWN)  # of all classes: they lie in order
    shown = {"true pictures, another half": torch.from_numpy(data.images(items))}
    shown["VAE of true pictures"] = in_batches(
        lambda m: levels(vae.decode(m.chunk(2, dim=1)[0])), torch.from_numpy(data.moments(items))
    )
    labels = torch.from_numpy(labels_for(NUM_DRAWN, NUM_CLASSES, seed=seed))
    indices = torch.arange(NUM_DRAWN)
    stage_1, decoded = trained(first), replace(SAMPLING, output="vae")
    shown["stage 1, VAE"] = drawn(stage_1, vae, labels, indices, seed, decoded)
    for clock, hybrid in hybrids.items():
        stage_2 = trained(hybrid)
        for name, options in (("VAE", decoded), ("pixels", SAMPLING)):
            pictures = drawn(stage_2, vae, labels, indices, seed, options)
            shown[f"stage 2 ({clock}), {name}"] = pictures
    # The refiner sees the very latents that stage 1 draws.
    latents = sampled_latents(stage_1, vae, labels, indices, seed)
    shown["stage 1, refiner"] = in_batches(
        lambda z, y: levels(refined(refiner, z, vae.decode(stage_1.denormalise(z)), y)),
        latents,
        labels,
    )
    sheet(shown, root / f"sheet-{seed}.png")
    true, reference = high_energy(held_out), stats_of(held_out).gaussian()
    figures = {
        name: {
            "high_frequency_energy": high_energy(pictures) / true,
            "frechet_stand_in": distance(stats_of(pictures).gaussian(), reference),
        }
        for name, pictures in shown.items()
    }
    place.write_text(json.dumps(figures))
    return figures


def drawn(
    model: HiDiT, vae: LdmVae, labels: Tensor, indices: Tensor, seed: int, options: SamplingOptions
) -> Tensor:
    def part(y: Tensor, i: Tensor) -> Tensor:
        return draw(model, vae.decode, y, i, seed, options).permute(0, 3, 1, 2)

    return in_batches(part, labels, indices)


def sampled_latents(
    model: HiDiT, vae: LdmVae, labels: Tensor, indices: Tensor, seed: int
) -> Tensor:
    """The clean latents, normalised, that `draw` decodes."""
    kept: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        kept.append(model.normalise(latents.float()))
        return vae.decode(latents)

    options = replace(SAMPLING, output="vae")
    for y, i in zip(labels.split(100), indices.split(100), strict=True):
        draw(model, decode, y, i, seed, options)
    return torch.cat(kept)


def sheet(shown: dict[str, Tensor], place: Path) -> None:
    """Rows of the first pictures, one row for each way to show them, four times as large."""
    rows = [
        torch.cat(list(pictures[:: NUM_DRAWN // 16][:16]), dim=2) for pictures in shown.values()
    ]
    pixels = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * 5, image.height * 5), Image.Resampling.NEAREST).save(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    root = arguments.dir
    torch.set_flush_denormal(True)
    if not (root / "data" / "images_h5.json").exists():
        write_pictures(root / "pictures", 0, NUM_TRAIN)
        preprocess(root / "pictures", root / "data", SIDE)
    if not (root / "vae").exists():
        train_vae(open_packed(root / "data", None), root / "vae")
    if not (root / "data" / "toy_h5.json").exists():
        vae = load_vae(root / "vae")
        with torch.no_grad():
            cache_latents(root / "data", root / "data", "toy", vae.moments, batch_size=100)
    dice = range(NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT)
    held_out = torch.from_numpy(
        np.stack([np.asarray(picture(i % NUM_CLASSES, np.random.default_rng(i))) for i in dice])
    ).permute(0, 3, 1, 2)
    found = [experiment(root, seed, held_out) for seed in arguments.seeds]
    rows = {
        name: {
            key: {
                "mean": round(statistics.mean(f[name][key] for f in found), 4),
                "each": [round(f[name][key], 4) for f in found],
            }
            for key in found[0][name]
        }
        for name in found[0]
    }
    about = {
        "seeds": arguments.seeds,
        "pictures": [NUM_TRAIN, NUM_HELD_OUT, NUM_DRAWN],
        "steps": {"vae": VAE_STEPS, "stage 1": STAGE_1, "stage 2 and refiner": STAGE_2},
        "batch": BATCH,
        "sampling": SAMPLING.to_dict(),
        "high_frequency_energy": f"above {HIGH} of the Nyquist frequency, over that of true ones",
        "frechet_stand_in": "stand-in features: not FID",
    }
    arguments.out.write_text(json.dumps({**about, "shown": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
