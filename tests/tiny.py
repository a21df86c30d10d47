"""A tiny O1: random weights from this project's own noise, a byte-level tokenizer, test pictures.

Nothing here depends on a library's random numbers, so that golden pictures last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from hidream.models.o1.config import O1_TINY, O1Config
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import SPECIAL_TOKENS, Tokenizer, Tokens
from hidream.models.o1.weights import save_o1
from hidream.sampling import picture_noise

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (" red", " blue", " cube", " sphere", " the", " of", " make", "red", "user", "assistant")
WORDS += ("\n ",)  # not split before BPE, unlike in Qwen's: what stands before a prompt counts
SETTINGS = {
    "variant": "full",
    "width": 64,
    "height": 64,
    "noise_scale": 2.0,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "shift": 1.0,
}


def write_tokenizer(folder: Path, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
    """A byte-level BPE in Qwen's format that knows `WORDS`, and <think>, which is not special."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        letters = word.replace(" ", "Ġ").replace("\n", "Ċ")
        for end in range(1, len(letters)):
            pair = (letters[:end], letters[end])
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special_tokens])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 4096}')


def random_o1(config: O1Config = O1_TINY, seed: int = 0, **options: Any) -> O1:
    """Every tensor random, none of them neutral, so that each one shows in the output."""
    model = O1(config, **options)
    with torch.no_grad():
        for stream, (name, weight) in enumerate(model.named_parameters()):
            noise = picture_noise(seed, stream, weight.shape)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            else:
                fan_in = 4 if "embed_tokens" in name else weight[0].numel()
                small = 0.25 if "final_layer2" in name else 1  # few pixels are clipped
                weight.copy_(small * noise / fan_in**0.5)
    return model.requires_grad_(False).eval()


def write_folder(
    folder: Path,
    config: O1Config = O1_TINY,
    *,
    settings: Mapping[str, Any] = SETTINGS,
    seed: int = 0,
) -> O1:
    """A whole model folder; returns the model in it."""
    write_tokenizer(folder)
    model = random_o1(config, seed)
    save_o1(model, folder, tokenizer=Tokenizer(folder), settings=settings)
    return model


def variant(**text: Any) -> O1Config:
    """O1_TINY with other fields of its decoder."""
    return replace(O1_TINY, text=replace(O1_TINY.text, **text))


def text_alone(tokens: Tokens) -> Tokens:
    """A request's text, with nothing to draw."""
    return replace(tokens, references=tokens.references[:0], grid=(0, 0))


def picture(seed: int, width: int = 60, height: int = 44) -> Image.Image:
    """Two shapes and a gradient, different for each seed, so that no two regions are alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [
            rows * 255 // height,
            columns * 255 // width,
            (rows * (3 + seed) + columns * 5 + seed * 40) % 256,
        ],
        axis=-1,
    )
    made = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(made)
    hue = [(200, 30, 30), (30, 180, 60), (40, 60, 220)][seed % 3]
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill=hue)
    return made


def pictures(count: int) -> list[Image.Image]:
    """Pictures of different sizes and shapes."""
    return [picture(i, 40 + 13 * (i % 4), 70 - 9 * (i % 5)) for i in range(count)]


def levels(one: Image.Image, other: Image.Image) -> int:
    """The largest difference between two pictures, in 8-bit levels."""
    assert one.size == other.size
    assert one.mode == other.mode == "RGB"
    return int(np.abs(np.array(one).astype(int) - np.array(other).astype(int)).max())


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
