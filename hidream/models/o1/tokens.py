"""A request becomes tokens: the chat's ids, three-axis positions, reference patches."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from hidream.errors import ModelError
from hidream.models.o1.config import O1Config, VisionConfig
from hidream.models.o1.patches import patchify, to_tensor, vision_patches
from hidream.models.o1.references import Box, fit_to_bounds, prepare_references, vision_copy

FIRST_TARGET_POSITION = 4096  # on all three axes, however long the prompt is
UNCONDITIONAL_PROMPT = " "
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|boi_token|>",
    "<|bor_token|>",
    "<|eor_token|>",
    "<|bot_token|>",
    "<|tms_token|>",
)


@dataclass(frozen=True)
class Tokens:
    """One request: `[a causal tokens | timestep | n target patches | r reference patches]`.

    `input_ids` are the causal tokens, up to `<|boi_token|>` where a picture follows.
    `position_ids` hold (time, row, column) of all tokens. `references`: clean patches in [−1, 1],
    (0, p) without any.
    `image_slots` marks the causal tokens whose embeddings the vision tower gives, from
    `pixel_values` with `image_grids` (rows, columns) in its patches. `caption` is the stretch of
    `input_ids` that spells the prompt.
    """

    input_ids: Int[Tensor, " a"]
    position_ids: Int[Tensor, "3 l"]
    references: Float[Tensor, "r p"]
    image_slots: Bool[Tensor, " a"]
    pixel_values: Float[Tensor, "v c"]
    image_grids: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    caption: slice

    @property
    def num_target(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_generated(self) -> int:
        return self.position_ids.shape[1] - len(self.input_ids)

    def to(self, device: torch.device | str) -> Tokens:
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    What a user writes is text, also where it spells a special token: only the template places
    special tokens. Other text gets the ids that tokenising the whole rendered chat would give.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._text = FastTokenizer.from_file(str(folder / "tokenizer.json"))
            self._template = _read_template(folder)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ModelError(
                f"{folder} has no readable tokenizer.json with a chat template ({error}).",
                "Use a folder in the published layout.",
            ) from error
        ids = {token: self._text.token_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise ModelError(
                f"the tokenizer in {folder} lacks {', '.join(missing)}.",
                "O1 needs its own tokenizer, not that of the Qwen3-VL it was trained from.",
            )
        self.special = {token: number for token, number in ids.items() if number is not None}
        self._text.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
        self._text.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(list(ids), skip_special_tokens=True)

    def chat(self, caption: str, image_lengths: Sequence[int] = ()) -> tuple[list[int], slice]:
        """Ids of one user turn, pictures first, with the prompt for an answer; caption's stretch.

        `image_lengths`: the number of vision tokens of each picture.
        """
        ids: list[int] = []
        lengths = iter(image_lengths)
        span = slice(0, 0)
        for part in self._parts(len(image_lengths)):
            if part == "<|image_pad|>":
                ids += [self.special[part]] * next(lengths)
            elif part in self.special:
                ids.append(self.special[part])
            else:
                before, mark, after = part.partition(_CAPTION)
                first = len(ids)
                ids += self.encode(before + caption + after if mark else part)
                if mark:
                    num_before, num_after = (
                        len(self.encode(t)) if t else 0 for t in (before, after)
                    )
                    span = slice(first + num_before, len(ids) - num_after)
        return ids, span

    @cached_property
    def _render(self):
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self._template).render
        except TemplateError as error:
            raise ModelError(
                f"the chat template in {self.folder} is damaged ({error}).",
                "Download or copy the folder again.",
            ) from error

    def _parts(self, num_images: int) -> list[str]:
        """The chat around the caption, cut at special tokens."""
        if num_images not in self._cached_parts:
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": _CAPTION}]
            message = {"role": "user", "content": content if num_images else _CAPTION}
            chat = self._render(messages=[message], add_generation_prompt=True)
            cut = "|".join(re.escape(token) for token in SPECIAL_TOKENS)
            self._cached_parts[num_images] = [p for p in re.split(f"({cut})", chat) if p]
        return self._cached_parts[num_images]

    @cached_property
    def _cached_parts(self) -> dict[int, list[str]]:
        return {}


_CAPTION = "\ue000caption\ue000"  # stands for the prompt while the template is rendered


def _read_template(folder: Path) -> str:
    """The chat template: a file of its own or, in older folders, an entry of a JSON file."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(content.get("chat_template"), str):
                return content["chat_template"]
    raise FileNotFoundError("no chat_template.jinja")


def encode(
    tokenizer: Tokenizer,
    config: O1Config,
    prompt: str,
    *,
    width: int,
    height: int,
    references: Sequence[Image.Image] = (),
    layout: Sequence[Box] = (),
) -> Tokens:
    """Tokens of a request for a `width` × `height` picture, both multiples of the patch.

    `references` are RGB pictures of any size. `layout` has a box for each of them.
    """
    prepared = prepare_references(
        references,
        layout,
        width=width,
        height=height,
        patch_size=config.patch_size,
        budgets=config.budgets,
    )
    return encode_prepared(tokenizer, config, prompt, prepared, width=width, height=height)


def encode_prepared(
    tokenizer: Tokenizer,
    config: O1Config,
    prompt: str,
    prepared: Sequence[Image.Image],
    *,
    width: int,
    height: int,
) -> Tokens:
    """As `encode`, with references that are at their final size already."""
    patch = config.patch_size
    pixel_values, image_grids = _vision_input(_vision_copies(prepared, config), config.vision)
    grid = (height // patch, width // patch)
    generated = [grid, *((p.height // patch, p.width // patch) for p in prepared)]
    patches = [patchify(to_tensor(picture), patch) for picture in prepared]
    without_text = Tokens(
        input_ids=torch.zeros(0, dtype=torch.long),
        position_ids=torch.cat([torch.zeros(3, 1), patch_positions(generated)], dim=1).long(),
        references=torch.cat(patches) if patches else torch.zeros(0, config.patch_dim),
        image_slots=torch.zeros(0, dtype=torch.bool),
        pixel_values=pixel_values,
        image_grids=image_grids,
        grid=grid,
        caption=slice(0, 0),
    )
    return with_prompt(without_text, tokenizer, config, prompt)


def encode_text(
    tokenizer: Tokenizer,
    config: O1Config,
    prompt: str,
    pictures: Sequence[Image.Image] = (),
    answer: Sequence[int] = (),
) -> Tokens:
    """`user: [pictures] prompt; assistant: answer`, nothing drawn: how text is learnt and written.

    `pictures` are RGB and of any size. The vision tower sees them as Qwen3-VL does, each side at
    the nearest multiple of its stride within `config.vision_pixels`; a model without these (nano)
    as it was trained, at the area that `config.budgets` gives a reference's copy. `answer` is ids.
    The one position after the text is the next token's.
    """
    if config.vision_pixels is None:
        copies = _vision_copies(pictures, config)
    else:
        copies = [fit_to_bounds(p, *config.vision_pixels, config.vision.stride) for p in pictures]
    pixel_values, image_grids = _vision_input(copies, config.vision)
    merged = _merged(image_grids, config.vision)
    ids, caption = tokenizer.chat(prompt, [rows * columns for rows, columns in merged])
    asked = torch.tensor(ids)
    image_slots = torch.cat(
        [asked.eq(tokenizer.special["<|image_pad|>"]), torch.zeros(len(answer), dtype=torch.bool)]
    )
    return Tokens(
        input_ids=torch.cat([asked, torch.tensor(answer, dtype=torch.long)]),
        position_ids=text_positions(image_slots, merged, num_after=1),
        references=torch.zeros(0, config.patch_dim),
        image_slots=image_slots,
        pixel_values=pixel_values,
        image_grids=image_grids,
        grid=(0, 0),
        caption=caption,
    )


def _vision_copies(pictures: Sequence[Image.Image], config: O1Config) -> list[Image.Image]:
    side = config.budgets.vision_side(len(pictures))
    return [vision_copy(picture, side, config.vision.stride) for picture in pictures]


def _vision_input(
    copies: Sequence[Image.Image], vision: VisionConfig
) -> tuple[Float[Tensor, "v c"], tuple[tuple[int, int], ...]]:
    """The patches of all pictures, one after the other, and each one's rows and columns of them."""
    size = vision.patch_size
    pixels = [
        vision_patches(copy, size, vision.merge_size, vision.temporal_patch_size) for copy in copies
    ]
    grids = tuple((copy.height // size, copy.width // size) for copy in copies)
    return torch.cat(pixels) if pixels else torch.zeros(0, vision.patch_dim), grids


def _merged(grids: Sequence[tuple[int, int]], vision: VisionConfig) -> list[tuple[int, int]]:
    return [(rows // vision.merge_size, columns // vision.merge_size) for rows, columns in grids]


def with_prompt(tokens: Tokens, tokenizer: Tokenizer, config: O1Config, prompt: str) -> Tokens:
    """The same request under another prompt, as the unconditional branch is.

    Pictures are shared, not copied: the vision tower then sees them once for both.
    """
    merged = _merged(tokens.image_grids, config.vision)
    ids, caption = tokenizer.chat(prompt, [rows * columns for rows, columns in merged])
    ids.append(tokenizer.special["<|boi_token|>"])
    input_ids = torch.tensor(ids)
    image_slots = input_ids.eq(tokenizer.special["<|image_pad|>"])
    text = text_positions(image_slots, merged, num_after=1)  # and the timestep token
    patches = tokens.position_ids[:, len(tokens.input_ids) + 1 :]
    return replace(
        tokens,
        input_ids=input_ids,
        position_ids=torch.cat([text, patches], dim=1),
        image_slots=image_slots,
        caption=caption,
    )


def text_positions(
    image_slots: Bool[Tensor, " a"], grids: Sequence[tuple[int, int]], *, num_after: int = 0
) -> Int[Tensor, "3 l"]:
    """Text counts up on all three axes; a picture's tokens spread over rows and columns.

    A picture of (rows, columns) tokens starts where the text before it ended, and the text after
    it goes on one past its largest position. `num_after` more text tokens follow.
    """
    slots = image_slots.tolist() + [False] * num_after
    remaining = iter(grids)
    parts: list[Tensor] = []
    start = i = 0
    while i < len(slots):
        if slots[i]:
            rows, columns = next(remaining)
            parts.append(grid_positions((rows, columns), start))
            i += rows * columns
            start += max(rows, columns)
        else:
            length = next((n for n in range(i, len(slots)) if slots[n]), len(slots)) - i
            parts.append(torch.arange(start, start + length).expand(3, -1))
            i += length
            start += length
    return torch.cat(parts, dim=1)


def patch_positions(grids: Sequence[tuple[int, int]]) -> Int[Tensor, "3 g"]:
    """The target's grid at 4096, then each reference's one past the largest position so far."""
    parts, start = [], FIRST_TARGET_POSITION
    for grid in grids:
        parts.append(grid_positions(grid, start))
        start += max(grid)
    return torch.cat(parts, dim=1)


def grid_positions(grid: tuple[int, int], start: int) -> Int[Tensor, "3 n"]:
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1)
