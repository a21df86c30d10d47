"""Pictures while it trains: the same prompts from the averaged weights, as one PNG a time."""

from __future__ import annotations

import torch
from PIL import Image

from hidream.models.o1.model import O1
from hidream.models.o1.tokens import UNCONDITIONAL_PROMPT, Tokenizer, Tokens, encode
from hidream.pipelines.base import Counter
from hidream.pipelines.denoise import O1Job, denoise_batch
from hidream.request import GenerateRequest
from hidream.train.config import Recipe

PROMPTS = (
    "a red cube",
    "a blue sphere",
    "a yellow star",
    "a green tree",
    "a white house on grass",
    "an orange fish",
    "a red cube left of a blue sphere",
    "a purple heart above a yellow cylinder",
    "a green cone to the right of a pink star",
    "a black car below a white moon",
    "two red spheres",
    "three yellow cubes",
    "four blue stars",
    "a large green cube and a small red cone",
    "a brown mug at night",
    'a sign that says "HELLO"',
)
COLUMNS = 4
GAP = 4


def sample_pictures(
    model: O1,
    tokenizer: Tokenizer,
    prompts: tuple[str, ...],
    *,
    size: int,
    noise_scale: float = 1.0,
    num_steps: int = 15,
    guidance_scale: float = 2.0,
    seed: int = 0,
) -> list[Image.Image]:
    """One square picture a prompt, by Euler steps; picture i has seed `seed + i`."""

    def tokens(prompt: str) -> Tokens:
        return encode(tokenizer, model.config, prompt, width=size, height=size)

    unconditional = tokens(UNCONDITIONAL_PROMPT)
    jobs = []
    for i, prompt in enumerate(prompts):
        request = GenerateRequest(
            prompt=prompt,
            width=size,
            height=size,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            guidance_interval=(0.0, 1.0),
            noise_scale=noise_scale,
            sampler="euler",
            shift=3.0,
        )
        jobs.append(O1Job(request, seed + i, tokens(prompt), unconditional))
    with torch.no_grad():
        return denoise_batch(model, jobs, counter=Counter())


def write_grid(model: O1, tokenizer: Tokenizer, recipe: Recipe, step: int) -> None:
    """`run_dir/grids/STEP.png`: 16 fixed prompts and seeds at the size of the current stage."""
    number, _ = recipe.locate(step - 1)
    size = recipe.stages[number].size
    pictures = sample_pictures(
        model, tokenizer, PROMPTS, size=size, noise_scale=recipe.objective.noise_scale
    )
    folder = recipe.run_dir / "grids"
    folder.mkdir(parents=True, exist_ok=True)
    montage(pictures, size).save(folder / f"{step:07d}.png")


def montage(pictures: list[Image.Image], size: int) -> Image.Image:
    """Square pictures in rows of four, on grey."""
    rows = -(-len(pictures) // COLUMNS)
    width, height = (count * (size + GAP) + GAP for count in (COLUMNS, rows))
    sheet = Image.new("RGB", (width, height), (128, 128, 128))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, COLUMNS)
        sheet.paste(picture, (GAP + column * (size + GAP), GAP + row * (size + GAP)))
    return sheet
