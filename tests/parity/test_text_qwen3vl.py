"""Text, token by token, against transformers' Qwen3VLForConditionalGeneration on equal weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hidream.models.o1.config import O1_TINY
from hidream.models.o1.patches import vision_patches
from hidream.models.o1.references import fit_to_bounds
from hidream.models.o1.text import write
from hidream.models.o1.tokens import encode_text
from tests import tiny

qwen = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")

RELATIVE = 1e-5  # of a position's largest logit, fp32
NEW_TOKENS = 32
OURS_ALONE = ("model.t_embedder1.", "model.x_embedder.", "model.final_layer2.")


def theirs_of(model, config, tokenizer):
    """Their whole model with our weights, from the config.json that we would write."""
    their_config = qwen.Qwen3VLConfig(**config.to_dict(tokenizer.special))
    their_config._attn_implementation = "eager"
    theirs = qwen.Qwen3VLForConditionalGeneration._from_config(their_config)
    weights = model.state_dict()
    shared = {name: t for name, t in weights.items() if not name.startswith(OURS_ALONE)}
    assert len(shared) < len(weights)
    theirs.load_state_dict(shared, strict=True)
    return theirs.requires_grad_(False).eval()


def compare(ours, theirs, tokens):
    """Greedy text of both, with the logits of each step."""
    seen = []

    def choose(row, number, logits):
        seen.append(logits)
        return int(logits.argmax())

    (written,) = write(ours, [tokens], choose, limits=[NEW_TOKENS], stop=())
    pictures = {}
    if tokens.image_grids:
        pictures = {
            "pixel_values": tokens.pixel_values,
            "image_grid_thw": torch.tensor([(1, *grid) for grid in tokens.image_grids]),
            "mm_token_type_ids": tokens.image_slots[None].int(),
        }
    found = theirs.generate(
        input_ids=tokens.input_ids[None],
        attention_mask=torch.ones_like(tokens.input_ids)[None],
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **pictures,
    )
    expected = found.sequences[0, len(tokens.input_ids) :].tolist()
    assert len(expected) == len(found.logits) == len(seen) == NEW_TOKENS
    assert written == expected
    for one, other in zip(seen, found.logits, strict=True):
        assert float((one - other[0]).abs().max() / other.abs().max()) <= RELATIVE
    return written


@pytest.fixture(scope="module")
def theirs(tiny_model, tokenizer):
    return theirs_of(tiny_model, O1_TINY, tokenizer)


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
@pytest.mark.parametrize("bounds", [None, (64 * 64, 96 * 96)])
def test_logits_and_greedy_tokens(tiny_model, theirs, tokenizer, num_pictures, bounds):
    """As nano sees pictures, and as the published models do."""
    config = replace(O1_TINY, vision_pixels=bounds)
    pictures = [tiny.picture(0, 90, 61), tiny.picture(1, 30, 70)][:num_pictures]
    tokens = encode_text(tokenizer, config, "all of the red cubes?", pictures)
    assert len(set(tokens.image_grids)) == num_pictures
    assert len(set(compare(tiny_model, theirs, tokens))) > 3


def test_tied_embeddings(tokenizer):
    config = replace(O1_TINY, tie_word_embeddings=True)
    model = tiny.random_o1(config)
    tokens = encode_text(tokenizer, config, "the sphere", [tiny.picture(2)])
    compare(model, theirs_of(model, config, tokenizer), tokens)


@pytest.mark.parametrize(
    "size", [(64, 64), (70, 100), (9, 9), (500, 333), (1000, 16), (16, 1000), (48, 80), (33, 700)]
)
def test_pictures_are_resized_as_by_their_processor(size):
    """Their processor that works with PIL: sizes, pixels and their order are equal."""
    found = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    least, most = 64 * 64, 320 * 320
    processor = found.Qwen2VLImageProcessorPil(
        size={"shortest_edge": least, "longest_edge": most},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    picture = tiny.picture(1, *size)
    expected = processor(images=[picture], return_tensors="np")
    fitted = fit_to_bounds(picture, least, most, 32)
    assert [1, fitted.height // 16, fitted.width // 16] == expected["image_grid_thw"][0].tolist()
    pixels = vision_patches(fitted, 16, 2, 2).numpy()
    assert np.abs(pixels - expected["pixel_values"]).max() <= 1e-6
