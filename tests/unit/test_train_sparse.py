"""Training with sparse attention: what steps compute, and gradients of what is kept."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hidream import registry
from hidream.errors import UsageError
from hidream.models.o1.batch import collate
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.tokens import Tokenizer, encode
from hidream.nn.attention import attention
from hidream.train.config import load_recipe, parse_recipe
from hidream.train.distributed import World
from hidream.train.o1 import O1Learner
from tests import tiny
from tests.unit.test_sparse import PLACES, heads, masked

NANO = Path(__file__).parents[2] / "hidream" / "models" / "o1_nano"
SIZE = 192  # 12 by 12 patches: two blocks, and 16 that fill none


def recipe_of(**stage):
    stage = {"size": SIZE, "steps": 2, "batch_size": 2, "learning_rate": 1e-3} | stage
    stage = {"tasks": {"edit": 1}} | stage
    plain = {"name": "tiny", "model": "o1-tiny", "seed": 3, "stages": [stage]}
    return parse_recipe(plain | {"tokenizer": str(NANO), "precision": "float32"})


def gradients_of(recipe, num_kept=None):
    """Loss and gradients of the first step of a random network; `num_kept` blocks are read."""
    learner = O1Learner(recipe)
    model = learner.build()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # the head begins at zero
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    batch = learner.make_batch(0)
    if num_kept is not None:
        rows = [
            replace(r, blocks=r.blocks and replace(r.blocks, num_kept=num_kept))
            for r in batch.batch.packing.rows
        ]
        assert any(r.blocks for r in rows)
        packing = replace(batch.batch.packing, rows=tuple(rows))
        batch = replace(batch, batch=replace(batch.batch, packing=packing))
    losses = learner.losses(model, batch, World().start_sums(*batch.counts))
    losses.total.backward()
    return losses.total.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sparse", PLACES, ids=str)
def test_gradients_are_those_of_what_is_kept(sparse, biased):
    q, k, v = (t.requires_grad_() for t in heads())
    bias = torch.randn(84, generator=torch.Generator().manual_seed(3)) if biased else None
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    ours = attention(q, k, v, bias=bias, sparse=sparse)
    theirs = masked(q, k, v, sparse, bias)
    assert (ours - theirs).abs().max() < 2e-6
    found = torch.autograd.grad(ours, (q, k, v), upstream)
    wanted = torch.autograd.grad(theirs, (q, k, v), upstream.double())
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    with torch.no_grad():
        assert torch.allclose(attention(q, k, v, bias=bias, sparse=sparse), ours, atol=2e-6)


def test_training_computes_what_steps_compute(tmp_path):
    tiny.write_tokenizer(tmp_path)
    tokenizer, model = Tokenizer(tmp_path), tiny.random_o1()
    requests = [
        encode(tokenizer, O1_TINY, prompt, width=SIZE, height=SIZE, references=references)
        for prompt, references in (("red cube", []), ("make the cube blue", [tiny.picture(1)]))
    ]
    batch = collate(requests, 0.5)
    x_t = torch.randn(2, 144, 3 * O1_TINY.patch_size**2, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor(0.6)
    with torch.no_grad():
        steps = model.predict_x0(x_t, sigma, model.prefill(requests, sparsity=0.5))
        dense = model.predict_x0(x_t, sigma, model.prefill(requests))
    trained = model(batch, x_t.flatten(0, 1), sigma.expand(2)).x0.view_as(steps)
    assert (trained - steps).abs().max() < 1e-5 * steps.abs().max()
    assert (trained - dense).abs().max() > 1e-3 * dense.abs().max()


def test_without_sparsity_and_with_all_blocks_kept_it_is_dense():
    dense_loss, dense = gradients_of(recipe_of())
    loss, same = gradients_of(recipe_of(sparsity=0.0))
    assert torch.equal(loss, dense_loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in dense.items())
    loss, same = gradients_of(recipe_of(sparsity=0.5), num_kept=2)
    assert abs(loss - dense_loss) < 1e-5 * dense_loss
    for name, gradient in dense.items():
        assert (same[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_gradients_reach_every_weight():
    dense_loss, dense = gradients_of(recipe_of())
    loss, gradients = gradients_of(recipe_of(sparsity=0.5))
    assert loss != dense_loss
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == dense[name].any(), name
    reached = [name for name, gradient in gradients.items() if gradient.any()]
    assert len(reached) > 0.95 * len(gradients)


def test_the_exported_folder_declares_the_last_stages_sparsity(tmp_path):
    for sparsity in (0.5, 0.0):
        learner = O1Learner(recipe_of(sparsity=sparsity))
        folder = learner.export(learner.build(), tmp_path / str(sparsity))
        settings = tiny.read_json(folder / "hidream.json")
        assert registry.of_folder(settings).defaults.sparsity == sparsity
        assert ("sparsity" in settings) == (sparsity > 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.1.sparsity=1.0"], "stages.1.sparsity = 1.0 must lie in 0 … below 1"),
        (["stages.1.sparsity=0.5"], "goes with an O1 and compile = false"),
        (["stages.1.sparsity=0.5", "compile=false", "parallel={sp = 2}"], "parallel.sp = 1"),
    ],
)
def test_wrong_values_are_named(changes, message):
    recipe = NANO.parents[2] / "recipes" / "o1_nano.toml"
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, changes)
    assert message in str(caught.value)


def test_a_picture_with_nothing_to_leave_out_is_refused():
    with pytest.raises(UsageError, match="leaves nothing out of 64 patches, which are 1 blocks"):
        O1Learner(recipe_of(size=128, sparsity=0.9)).build()


def test_the_pages_stage_is_a_recipes():
    page = (NANO.parents[2] / "docs" / "sparsity.md").read_text()
    shown = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    plain = load_recipe(NANO.parents[2] / "recipes" / "o1_nano.toml", ["compile=false"]).to_dict()
    shown["stages"] = [plain["stages"][0] | shown["stages"][0]]
    recipe = parse_recipe(plain | shown)
    assert O1Learner(recipe).build().config.patch_size == 16
    assert recipe.stages[0].sparsity == 0.5
