"""Pictures while it trains: the same prompts from the averaged weights, as one PNG a time."""

from __future__ import annotations

import torch
from PIL import Image

from hidream.models.o1.model import O1
from hidream.models.o1.patches import to_picture, unpatchify
from hidream.models.o1.tokens import UNCONDITIONAL_PROMPT, Tokenizer, Tokens, encode
from hidream.sampling import cfg_batched, euler, full_sigmas, picture_noise
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


@torch.no_grad()
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
    device = next(model.parameters()).device
    config, count = model.config, len(prompts)

    def tokens(prompt: str) -> Tokens:
        return encode(tokenizer, config, prompt, width=size, height=size)

    asked = [tokens(prompt) for prompt in prompts]
    both = model.prefill([*asked, *[tokens(UNCONDITIONAL_PROMPT)] * count])
    alone = model.prefill(asked)
    shape = (asked[0].num_target, config.patch_dim)
    noise = torch.stack([picture_noise(seed + i, 0, shape) for i in range(count)])

    def conditional(x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model.velocity(x_t, sigma, alone)

    def branches(x_t: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = model.velocity(torch.cat([x_t, x_t]), sigma, both).chunk(2)
        return first, second

    denoise = cfg_batched(conditional, branches, guidance_scale)
    patches = euler(denoise, noise_scale * noise.to(device), full_sigmas(num_steps, shift=3.0))
    pixels = unpatchify(patches, asked[0].grid, config.patch_size)
    return [to_picture(picture) for picture in pixels]


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
