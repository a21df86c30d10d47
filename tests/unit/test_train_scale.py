"""The plan of a large O1: the model's tensors, shards that make them whole, sums that add up."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch

from hidream.models.loading import tensor_shapes
from hidream.models.o1.config import O1_TINY, SIZES
from hidream.models.o1.decoder import Block
from hidream.models.o1.model import O1
from hidream.nn.attention import attention
from hidream.train.layout import Layout
from hidream.train.scale import (
    NAMED,
    Work,
    main,
    part_shape,
    plan,
    shard_shape,
    values_kept,
)
from hidream.train.scale_shapes import shapes


@pytest.mark.parametrize("name", ["o1-pro", "o1-nano"])
def test_tensors_are_those_of_the_model_on_the_meta_device(name):
    with torch.device("meta"):
        model = O1(SIZES[name])
    found = shapes(SIZES[name])
    assert found == {n: tuple(shape) for n, shape in tensor_shapes(model).items()}
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(map(prod, found.values())) == parameters
    if name == "o1-pro":
        assert plan(name, Layout(shard=64, tp=8), Work()).parameters == parameters > 200e9


@pytest.mark.parametrize("name", ["200b-edits", "8b"])
def test_shards_of_every_tensor_make_it_whole(name):
    model, layout, _ = NAMED[name]
    for tensor, shape in shapes(SIZES[model]).items():
        parts = [shard_shape(tensor, shape, layout, i) for i in range(layout.num_shards)]
        part = part_shape(tensor, shape, layout)
        assert sum(map(prod, parts)) == prod(part), tensor
        dealt = torch.empty(part, device="meta").chunk(layout.num_shards)
        assert [tuple(piece.shape) for piece in dealt] == parts[: len(dealt)], tensor
        assert prod(part) * (layout.tp if part != shape else 1) == prod(shape)


def test_what_a_block_keeps_is_what_the_formula_says():
    """Bytes that autograd holds for a real block, its weights and angles left out. A CPU's norms
    keep normalised values too, which a GPU's kernel makes again."""
    config, tokens = replace(O1_TINY.text, hidden_size=128, num_heads=8), 64
    block, angles = Block(config), (torch.rand(tokens, config.head_dim),) * 2
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that none is given away
        return tensor

    x = torch.randn(1, tokens, config.hidden_size, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        block(x, angles, lambda q, k, v: attention(q, k, v, causal=True))
    known = {t.data_ptr() for t in (*block.parameters(), *angles)}
    kept = sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in known)
    formula = 4 * tokens * values_kept(replace(O1_TINY, text=config))["none"]
    scalars = 4 * tokens * (2 + 2 * config.num_heads + config.num_kv_heads)  # norms, softmax
    normed = 2 * config.hidden_size + config.head_dim * (config.num_heads + config.num_kv_heads)
    assert kept == formula + scalars + 4 * tokens * normed


def test_memory_and_transfers_follow_the_mesh():
    whole, sharded = (plan("o1-8b", Layout(shard=n), Work(samples=2)) for n in (1, 8))
    assert whole.sent == dict.fromkeys(whole.sent, 0)
    assert whole.memory["weights"] == 4 * whole.parameters
    assert sharded.memory["weights"] == pytest.approx(whole.memory["weights"] / 8, rel=1e-3)
    assert sharded.sent["reduce_scatter_gradients"] == pytest.approx(3.5 * whole.parameters)
    with_copies = plan("o1-8b", Layout(shard=8, replicate=2), Work(samples=2))
    assert with_copies.memory == sharded.memory
    assert with_copies.sent["all_reduce_gradients"] == pytest.approx(whole.parameters / 8 * 4)
    halves = plan("o1-8b", Layout(shard=4, sp=2), Work(samples=2, text=511, target=4096))
    assert halves.memory["weights"] == sharded.memory["weights"]
    assert halves.sent["all_to_all_tokens"] > 0
    fewer = plan("o1-8b", Layout(shard=8), Work(samples=2, checkpointing="none"))
    assert fewer.memory["activations"] > 8 * sharded.memory["activations"]
    today = plan("o1-8b", Layout(shard=8), Work(samples=2, gather=4))
    assert today.memory["casts"] == 2 * today.parameters
    assert all(plan(*told).total_memory < 80e9 for told in NAMED.values())


def test_the_command_prints_a_table_or_json(capsys):
    assert main([]) == 0
    table = capsys.readouterr().out
    assert "| parameters, 10⁹ | 8.8 | 56.1 | 207.0 |" in table
    assert main(["--model", "o1-8b", "--shard", "16", "--samples", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["o1-8b"]
    assert told["num_gpus"] == 16
    assert told["total_memory"] == sum(told["memory"].values())
    assert main(["--model", "o1-pro", "--tp", "16"]) == 2
    assert "tp = 16 does not divide the model's 8 key heads" in capsys.readouterr().err


def test_the_page_shows_this_table(capsys):
    from tests.unit.test_train_config import RECIPES

    main([])
    page = (RECIPES.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page
