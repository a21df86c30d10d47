"""What our text encoders give is, to the bit, what diffusers' pipeline computes."""

import pytest
import torch
from diffusers import HiDreamImagePipeline

from hidream.models.i1.text import TextEncoders, Texts

PROMPTS = {
    "empty": "",
    "short": "a red cube left of the blue sphere",
    "long": "the red cube, " * 60,
    "chinese": "一个红色的立方体 in the rain",
    "quotes": 'make it say “it\'s a "cube"”, <b>é</b>',
}


@pytest.fixture(scope="module")
def theirs(tiny_i1_folder):
    return HiDreamImagePipeline.from_pretrained(tiny_i1_folder, transformer=None, vae=None)


@pytest.fixture(scope="module")
def ours(tiny_i1_folder):
    return TextEncoders.open(tiny_i1_folder)


@pytest.mark.parametrize("name", list(PROMPTS))
def test_to_the_bit(ours, theirs, name):
    with torch.no_grad():
        t5, _, llama, _, pooled, _ = theirs.encode_prompt(
            PROMPTS[name], do_classifier_free_guidance=False
        )
    features = ours.encode([Texts.of(PROMPTS[name])])
    assert torch.equal(features.t5, t5)
    assert torch.equal(features.llama, llama)
    assert torch.equal(features.pooled, pooled)


def test_prompts_for_each_encoder(ours, theirs):
    apart = {"clip_g": "a sphere", "t5": "the cube", "llama": "a blue cube"}
    with torch.no_grad():
        t5, _, llama, _, pooled, _ = theirs.encode_prompt(
            "red", *apart.values(), do_classifier_free_guidance=False
        )
    features = ours.encode([Texts.of("red", apart)])
    assert torch.equal(features.t5, t5)
    assert torch.equal(features.llama, llama)
    assert torch.equal(features.pooled, pooled)
