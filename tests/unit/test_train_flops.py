"""Operations of a step: what the configuration says is what PyTorch counts."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hidream.models.hidit.config import HIDIT_TINY
from hidream.models.hidit.model import HiDiT
from hidream.models.i1.config import E1_TINY, I1_TINY
from hidream.models.i1.model import I1
from hidream.models.o1.batch import collate
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import encode, encode_text
from hidream.train.config import Recipe, Stage
from hidream.train.data import TrainBatch
from hidream.train.flops import hidit_step, i1_step
from hidream.train.o1 import O1Learner
from hidream.train.objective import Objective
from tests import tiny, tiny_i1

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not counted by itself
CLOSE = 0.02


def counted(step):
    """Operations of `step()` and of its backward pass; scores computed again are not counted."""

    def forward(q, k, *_, **__):
        return 4 * prod(q) * k[-2]

    def backward(_, q, k, *__, **___):
        return 8 * prod(q) * k[-2]

    mapping = {
        SDPA: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counting:
        step().backward()
    return counting.get_total_flops()


@pytest.fixture
def learner(tiny_folder):
    stage = Stage(size=64, steps=1, batch_size=2, learning_rate=1e-3, tasks={"edit": 1.0})
    recipe = Recipe(
        name="a", model="o1-tiny", stages=(stage,), tokenizer=str(tiny_folder), precision="float32"
    )
    return O1Learner(recipe)


def step_of(batch, x0, sigma):
    return TrainBatch(
        tasks=("edit",) * len(batch.lengths),
        objective=Objective(),
        batch=batch,
        x0=x0,
        noise=x0,
        sigma=sigma,
        grids=((2, 2),) * len(sigma),
        crops=torch.zeros(len(sigma), 2),
        levels=sigma,
        shares={"edit": 1.0},
        said={"caption": torch.arange(len(batch.input_ids))},
        redrawn=0,
        corrupt=0,
    )


@pytest.mark.parametrize(("num_references", "drawn"), [(0, True), (2, True), (1, False)])
def test_o1(learner, tokenizer, num_references, drawn):
    references = tiny.pictures(num_references)
    if drawn:
        requests = [
            encode(tokenizer, O1_TINY, text, width=64, height=64, references=references)
            for text in ("a red cube", "a red cube?")  # unlike, and so read with a mask
        ]
    else:
        requests = [encode_text(tokenizer, O1_TINY, "what?", references, [5, 6])] * 2
    batch = collate(requests)
    x0, sigma = torch.zeros(sum(batch.targets), O1_TINY.patch_dim), torch.tensor([0.3, 0.6])
    step = step_of(batch, x0, sigma)
    model = O1(O1_TINY)

    def run():
        made = model(batch, x0, sigma) if drawn else model(batch)
        return made.logits.sum() + (made.x0.sum() if drawn else 0)

    assert learner.flops(step) == pytest.approx(counted(run), rel=CLOSE)


@pytest.mark.parametrize(("size", "num_experts"), [(I1_TINY, 0), (E1_TINY, 4)])
def test_i1_and_e1(size, num_experts):
    """E1's at the size that leaves no padding, which is a token more."""
    config, side = replace(size, num_experts=num_experts), size.max_resolution[0]
    model, features = I1(config), tiny_i1.features(config)
    x_t, patches = tiny_i1.latents(side, side), (side // 2) ** 2
    source = x_t if size is E1_TINY else None
    sizes = {"t5": features.t5.shape[1], "llama": features.llama.shape[2]}
    sizes["source"] = 0 if source is None else patches
    sigma = torch.tensor([0.2, 0.7])
    wanted = counted(lambda: model(x_t, sigma, features, source=source).velocity.sum())
    found = i1_step(config, samples=2, patches=patches, **sizes)
    assert found == pytest.approx(wanted, rel=CLOSE)


@pytest.mark.parametrize(
    ("attention", "gated"), [("readonly", 0), ("readonly", 3), ("full", 3), ("add", 3)]
)
def test_hidit(attention, gated):
    config = replace(HIDIT_TINY, attention=attention)
    model = HiDiT(config)
    x_t = torch.zeros(3, config.in_channels, config.latent_size, config.latent_size)
    pixels = torch.zeros(gated, 3, config.image_size, config.image_size) if gated else None

    def run():
        made = model(x_t, torch.full((3,), 0.2), torch.arange(3), pixels, with_features=True)
        parts = [made.velocity, *made.features] + ([made.pixels] if gated else [])
        return torch.stack([part.sum() for part in parts]).sum()

    found = hidit_step(config, samples=3, gated=gated, with_features=True)
    assert found == pytest.approx(counted(run), rel=CLOSE)
