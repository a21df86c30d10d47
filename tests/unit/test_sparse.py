"""Sparse attention: what it leaves out, and that all else is as it was."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention

from hidream import registry
from hidream.errors import ModelError
from hidream.limits import skipped_blocks
from hidream.models.i1.config import I1_TINY
from hidream.models.o1.tokens import Tokenizer, encode
from hidream.nn import sparse as sparse_attention
from hidream.nn.attention import attention
from hidream.nn.sparse import Blocks, Sparse, block_order, choose_blocks
from hidream.pipelines import load
from hidream.pipelines.base import batch_key
from hidream.request import GenerateRequest, resolve, warnings_of
from tests import tiny
from tests.tiny_i1 import features, latents, random_i1

SIGMA = torch.tensor(0.6)
PLACES = [Sparse(3, 5, 8, 3, 8), Sparse(0, 0, 9, 2, 8), Sparse(0, 5, 9, 1, 8)]


def heads(seed=0):
    """73 queries and 84 keys of two rows, with two heads of queries to each of keys."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 73, 4, 16), (2, 84, 2, 16), (2, 84, 2, 16))
    return [torch.randn(size, generator=generator) for size in sizes]


def blocks_of(q, k, sparse):
    num = min(sparse.num_blocks, (q.shape[1] - sparse.first_query) // sparse.size)
    part = q[:, sparse.first_query :][:, : num * sparse.size]
    return part, choose_blocks(part, k, sparse)


def masked(q, k, v, sparse, bias):
    """Every score, in float64, with those that are left out at −∞."""
    _, chosen = blocks_of(q, k, sparse)
    seen = torch.ones(2, 4, 73, 84, dtype=torch.bool)
    first, size = sparse.first_key, sparse.size
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:3])).tolist():
        row = seen[b, h, sparse.first_query + i * size :][:size]
        row[:, first : first + sparse.num_blocks * size] = False
        for j in chosen[b, h, i].tolist():
            row[:, first + j * size :][:, :size] = True
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / 4 + (0 if bias is None else bias)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sparse", PLACES, ids=str)
def test_it_is_dense_attention_without_the_blocks_that_are_left_out(sparse, biased):
    q, k, v = heads()
    bias = torch.randn(84, generator=torch.Generator().manual_seed(3)) if biased else None
    out = attention(q, k, v, bias=bias, sparse=sparse)
    assert (out - masked(q, k, v, sparse, bias)).abs().max() < 2e-6
    assert (out - attention(q, k, v, bias=bias)).abs().max() > 0.1


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sparse", PLACES[:2], ids=str)
def test_flex_attention_is_given_the_same_mask(sparse, biased, monkeypatch):
    """A GPU runs this compiled; here every score is computed, and the mask is what is tested."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    q, k, v = heads()
    bias = torch.randn(84, generator=torch.Generator().manual_seed(3)) if biased else None
    part, chosen = blocks_of(q, k, sparse)

    def read(q, k, v, bias):
        return attention(q, k, v, bias=bias)

    with torch.no_grad():
        ours = sparse_attention.gather(part, k, v, chosen, sparse, bias, read)
        theirs = sparse_attention.flex(part, k, v, chosen, sparse, bias, compiled=False)
    assert (ours - theirs).abs().max() < 2e-6
    table = sparse_attention.kept_table(chosen, sparse, 84)
    mask = sparse_attention.block_mask(table, sparse.size, 84)
    assert torch.equal(mask.to_dense().bool(), table)
    assert mask.shape == (2, 4, part.shape[1], 84)
    assert int(mask.kv_num_blocks.max()) == 1  # the last keys are no whole block


def test_only_what_is_kept_is_read():
    q, k, v = heads()
    lengths = []

    def read(q, k, v, bias):
        lengths.append((q.shape[1], k.shape[1]))
        return attention(q, k, v)

    sparse_attention.sparse_attention(q, k, v, PLACES[0], bias=None, read=read)
    # 8 blocks of 2 · 4 heads read 3 of 8 blocks and the other 20 keys; 9 queries read all.
    assert lengths == [(8, 24 + 20)] * 64 + [(9, 84)]


def test_the_blocks_that_agree_are_chosen():
    liked = torch.tensor([5, 1, 0, 7, 2, 6, 3, 4])
    k = 9 * torch.eye(8).repeat_interleave(8, dim=0)[None, :, None]
    q = torch.eye(8)[liked].repeat_interleave(8, dim=0)[None, :, None]
    noise = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))[:, None, :, None]
    chosen = choose_blocks(q + noise[0], k + noise[1], Sparse(0, 0, 8, 2, 8))[0, 0]
    for i, kept in enumerate(chosen.tolist()):
        assert int(liked[i]) in kept
        assert kept == sorted(set(kept))


@pytest.mark.parametrize("grid", [(16, 24), (8, 8), (13, 21), (1, 200), (200, 1), (5, 3), (45, 80)])
def test_blocks_are_compact(grid):
    order = block_order(*grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    rows, columns = order // grid[1], order % grid[1]
    for r, c in zip(rows.split(64), columns.split(64), strict=True):
        height, width = (int(t.max() - t.min()) + 1 for t in (r, c))
        if grid[0] % 8 == grid[1] % 8 == 0:
            assert (height, width) == (8, 8)
        elif min(grid) > 8:
            assert max(height, width) <= 20


def test_the_share_is_what_is_asked_for():
    assert [skipped_blocks(640, s) for s in (0, 0.05, 0.1, 0.5, 0.7, 0.999)] == [0, 0, 1, 5, 7, 9]
    assert skipped_blocks(127, 0.99) == 0
    assert Blocks.of((8, 8), 0.9) is None
    assert Blocks.of((64, 64), 0.0) is None
    blocks = Blocks.of((24, 25), 0.7, num_grids=2)
    assert (blocks.num_blocks, blocks.num_kept) == (18, 6)


@pytest.mark.usefixtures("unchecked")
def test_masks_do_not_go_with_it():
    q, k, v = heads()
    with pytest.raises(ValueError, match="neither mask nor causal"):
        attention(q, k, v, mask=torch.ones(1, 73, 84, dtype=torch.bool), sparse=PLACES[0])


# -- in the networks -------------------------------------------------------------------------------


def everything(prefix):
    """The same order of patches, and no block skipped."""
    return replace(prefix, blocks=replace(prefix.blocks, num_kept=prefix.blocks.num_blocks))


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_o1_in_block_order_is_o1(tiny_model, tiny_folder):
    """Rectangles that are no whole blocks, and references, which are always read."""
    tokens = [
        encode(
            Tokenizer(tiny_folder), tiny_model.config, prompt, width=208, height=272, references=r
        )
        for prompt, r in (("red", []), ("a blue cube", [tiny.picture(1)]))
    ]
    x_t = torch.randn(2, 221, 768, generator=torch.Generator().manual_seed(1))
    dense = tiny_model.velocity(x_t, SIGMA, tiny_model.prefill(tokens))
    assert torch.equal(
        tiny_model.velocity(x_t, SIGMA, tiny_model.prefill(tokens, None, 0.0)), dense
    )
    prefix = tiny_model.prefill(tokens, None, 0.7)
    assert (prefix.blocks.num_blocks, prefix.blocks.num_kept) == (3, 1)
    assert distance(tiny_model.velocity(x_t, SIGMA, everything(prefix)), dense) < 1e-5
    sparse = tiny_model.velocity(x_t, SIGMA, prefix)
    assert 1e-3 < distance(sparse, dense) < 0.5
    again = type(prefix).join([prefix.take([1]), prefix.take([0])])
    assert distance(tiny_model.velocity(x_t.flip(0), SIGMA, again), sparse.flip(0)) < 1e-5
    with pytest.raises(ValueError, match="sparsities cannot be joined"):
        type(prefix).join([prefix, tiny_model.prefill(tokens)])


@pytest.mark.parametrize(
    ("size", "with_source"), [((32, 32), False), ((22, 30), False), ((22, 30), True)], ids=str
)
def test_i1_in_block_order_is_i1(size, with_source):
    """A square, and a picture with padding, whose one token is always read; E1's source."""
    model = random_i1(replace(I1_TINY, max_resolution=(64, 64)))
    options = dict(zip(("height", "width"), size, strict=True))
    if with_source:
        options["source"] = latents(*size, seed=5)
    x_t = latents(*size)
    dense = model.velocity(x_t, SIGMA, model.prefill(features(), **options))
    none = model.prefill(features(), sparsity=0.0, **options)
    assert none.blocks is None
    assert torch.equal(model.velocity(x_t, SIGMA, none), dense)
    prefix = model.prefill(features(), sparsity=0.7, **options)
    assert bool(prefix.num_pads) == (size != (32, 32))
    assert distance(model.velocity(x_t, SIGMA, everything(prefix)), dense) < 1e-5
    sparse = model.velocity(x_t, SIGMA, prefix)
    assert 1e-3 < distance(sparse, dense) < 0.5
    taken = type(prefix).join([prefix.take([1]), prefix.take([0])])
    assert distance(model.velocity(x_t.flip(0), SIGMA, taken), sparse.flip(0)) < 1e-5
    with pytest.raises(ValueError, match="sparsities cannot be joined"):
        type(prefix).join([prefix, none])


# -- in requests -----------------------------------------------------------------------------------


def test_a_checkpoint_may_declare_its_own():
    spec = registry.of_folder({"sparsity": 0.7})
    asked = GenerateRequest(prompt="a")
    for fields, became in (({}, 0.7), ({"sparsity": 0.0}, 0.0), ({"sparsity": 0.5}, 0.5)):
        request = replace(asked, **fields)
        assert resolve(request, spec.defaults, 32).sparsity == became
    assert resolve(asked, registry.find("i1-full").defaults, 16).sparsity == 0
    for bad in (1, -0.5, "0.7", True):
        with pytest.raises(ModelError, match="sparsity="):
            registry.of_folder({"sparsity": bad})


def test_pictures_too_small_are_told():
    spec = registry.find("e1-1")
    for references, told in (((), True), (("a.png",), False)):
        asked = GenerateRequest(
            prompt="a", width=128, height=128, sparsity=0.5, references=references
        )
        request = resolve(asked, spec.defaults, spec.patch_size)
        found = [text for text in warnings_of(asked, request, spec) if "sparsity=0.5" in text]
        assert bool(found) == told


def test_pictures(tiny_folder):
    pipe = load(tiny_folder, device="cpu")
    asked = GenerateRequest(
        prompt="a red cube", seed=7, num_inference_steps=2, width=192, height=192
    )
    dense, sparse = pipe(asked), pipe(replace(asked, sparsity=0.6))
    assert (dense.num_prefills, sparse.num_prefills, sparse.num_reused) == (2, 0, 2)
    assert tiny.levels(dense.images[0], sparse.images[0]) > 0
    assert (dense.request.sparsity, sparse.request.sparsity) == (0.0, 0.6)
    assert batch_key(dense.request) != batch_key(sparse.request)
    assert not sparse.warnings
    small = pipe(replace(asked, sparsity=0.6, width=64, height=64))
    assert "sparsity=0.6 has no effect" in small.warnings[0]
