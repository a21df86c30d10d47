"""Our decoder and vision tower against transformers' Qwen3-VL: equal weights, layer by layer."""

import pytest
import torch

from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import _place
from hidream.models.o1.tokens import encode
from hidream.nn.attention import attention
from tests import tiny

qwen = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")

RELATIVE = 1e-5  # of the largest value, fp32

SPECIAL = {f"<|{name}|>": i for i, name in enumerate(("image_pad", "video_pad"))}
SPECIAL |= {f"<|vision_{name}|>": i for i, name in enumerate(("start", "end"))}


@pytest.fixture(scope="module")
def theirs(tiny_model):
    """transformers' text model and vision tower with the tiny model's weights, built from the
    config.json that we would write."""
    config = qwen.Qwen3VLConfig(**O1_TINY.to_dict(SPECIAL))
    config._attn_implementation = "eager"
    models = {
        "language_model": qwen.Qwen3VLTextModel._from_config(config.text_config),
        "visual": qwen.Qwen3VLVisionModel._from_config(config.vision_config),
    }
    weights = tiny_model.model.state_dict()
    for part, model in models.items():
        own = {n.removeprefix(f"{part}."): t for n, t in weights.items() if n.startswith(part)}
        model.load_state_dict(own, strict=True)
        model.requires_grad_(False).eval()
    return models


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return encode(
        tokenizer,
        O1_TINY,
        "all of them, “red” 红",
        width=64,
        height=48,
        references=[tiny.picture(0), tiny.picture(1, 30, 70), tiny.picture(2, 50, 50)],
    )


def record(layers):
    """What each layer gives, kept in a list that fills as the model runs."""
    outputs = []

    def keep(module, inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(-1, 64))

    return outputs, [layer.register_forward_hook(keep) for layer in layers]


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max() / expected.abs().max()) <= RELATIVE


def test_vision_tower(tiny_model, theirs, tokens):
    """Pictures of three shapes at once: every block, the tokens, and the deepstack's."""
    assert len(set(tokens.image_grids)) == 3
    size = O1_TINY.vision.hidden_size
    runs = []
    for model, grids in (
        (tiny_model.model.visual, list(tokens.image_grids)),
        (theirs["visual"], torch.tensor([(1, *grid) for grid in tokens.image_grids])),
    ):
        blocks: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, i, out, kept=blocks: kept.append(out))
            for block in model.blocks
        ]
        runs.append((model(tokens.pixel_values, grids), blocks))
        for hook in hooks:
            hook.remove()
    (ours, our_blocks), (found, their_blocks) = runs
    assert len(our_blocks) == len(their_blocks) == O1_TINY.vision.num_layers
    for one, other in zip(our_blocks, their_blocks, strict=True):
        assert_close(one.reshape(-1, size), other.reshape(-1, size))
    assert_close(ours.tokens, found.pooler_output)
    assert len(ours.deepstack) == len(found.deepstack_features) == 2
    for one, other in zip(ours.deepstack, found.deepstack_features, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("with_pictures", [False, True])
def test_decoder(tiny_model, theirs, tokens, with_pictures):
    """Causal text at three-axis positions, with the deepstack added to the first layers."""
    decoder = tiny_model.model.language_model
    hidden = decoder.embed_tokens(tokens.input_ids)
    positions = tokens.position_ids[:, : len(hidden)]
    slots, deepstack, features = tokens.image_slots, (), None
    if with_pictures:
        vision = tiny_model.see([tokens])
        hidden, deepstack = _place(hidden, slots.nonzero()[:, 0], vision)
        features = [stack[slots] for stack in deepstack]
    our_layers, our_hooks = record(decoder.layers)
    their_layers, their_hooks = record(theirs["language_model"].layers)

    def read(q, k, v):
        return attention(q, k, v, causal=True)

    ours = decoder(
        hidden[None],
        decoder.rope(positions[:, None]),
        lambda layer: read,
        tuple(stack[None] for stack in deepstack),
    )
    expected = theirs["language_model"](
        inputs_embeds=hidden[None],
        position_ids=positions[:, None],
        use_cache=False,
        visual_pos_masks=slots[None] if with_pictures else None,
        deepstack_visual_embeds=features,
    ).last_hidden_state
    for hook in (*our_hooks, *their_hooks):
        hook.remove()
    assert len(our_layers) == len(their_layers) == O1_TINY.text.num_layers
    for one, other in zip(our_layers, their_layers, strict=True):
        assert_close(one, other)
    assert_close(ours, expected)


def test_logits(tiny_model, theirs, tokens):
    """The prefix's language: our whole way through `forward` against theirs with their head."""
    from hidream.models.o1.batch import collate

    ours = tiny_model(collate([tiny.text_alone(tokens)])).logits
    seen = theirs["visual"](
        tokens.pixel_values, torch.tensor([(1, *grid) for grid in tokens.image_grids])
    )
    hidden = tiny_model.model.language_model.embed_tokens(tokens.input_ids)
    hidden = hidden.masked_scatter(tokens.image_slots[:, None], seen.pooler_output)
    expected = theirs["language_model"](
        inputs_embeds=hidden[None],
        position_ids=tokens.position_ids[:, None, : len(hidden)],
        use_cache=False,
        visual_pos_masks=tokens.image_slots[None],
        deepstack_visual_embeds=seen.deepstack_features,
    ).last_hidden_state
    assert_close(ours[None], tiny_model.lm_head(expected))


def test_configs_are_read_as_we_write_them():
    config = qwen.Qwen3VLConfig(**O1_TINY.to_dict(SPECIAL))
    assert config.text_config.hidden_size == O1_TINY.text.hidden_size
    assert config.text_config.num_key_value_heads == O1_TINY.text.num_kv_heads
    assert config.vision_config.deepstack_visual_indexes == [0, 2]
    assert config.vision_config.out_hidden_size == O1_TINY.text.hidden_size
