"""I1's losses: experts that a skewed gate starves come back, and edits count where they are."""

import pytest
import torch

from hidream.models.i1.config import I1_TINY
from hidream.models.i1.model import I1
from hidream.train.config import Optimizer
from hidream.train.i1 import skew_gates
from hidream.train.losses import velocity_loss, weight_of_changes
from hidream.train.optim import build_optimizers, set_learning_rate
from tests import tiny_i1


def loads_after(num_steps, balance_weight):
    """The largest expert's load over the mean, before and after some steps on noise, block by
    block; every gate begins skewed."""
    model = I1(tiny_i1.TINIEST)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    skew_gates(model, 4.0)
    optimizers = build_optimizers(model, Optimizer())
    set_learning_rate(optimizers, 3e-3)
    features, sigma = tiny_i1.features(batch=4), torch.tensor([0.2, 0.4, 0.6, 0.8])
    first = None
    for _ in range(num_steps):
        x0, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
        x_t = x0 + sigma[:, None, None, None] * (noise - x0)
        prediction = model(x_t, sigma, features)
        loads = prediction.expert_loads.amax(dim=1) * I1_TINY.num_experts
        first = loads if first is None else first
        loss = velocity_loss(prediction.velocity, noise - x0, sigma)
        model.zero_grad()
        (loss + balance_weight * prediction.balance_loss).backward()
        for optimizer in optimizers:
            optimizer.step()
    return first, loads


@pytest.mark.parametrize("balance_weight", [0.0, 0.05])
def test_only_the_balance_loss_brings_starved_experts_back(balance_weight):
    first, last = loads_after(40, balance_weight)
    assert first.min() == 2  # of two assignments a token, one goes to the first expert
    assert last.max() <= 1.25 if balance_weight else last.min() > 1.6


def test_velocity_loss_is_the_weighted_mean_square():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    sigma, weight = torch.tensor([0.0, 0.5, 1.0]), torch.rand(3, 1, 4, 4, generator=generator)
    torch.testing.assert_close(velocity_loss(a, b, sigma), (a - b).square().mean())
    each = (weight * (a - b).square()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        velocity_loss(a, b, sigma, 2.0, weight), (each * torch.tensor([1, 0.25, 0])).mean()
    )
    assert velocity_loss(a.bfloat16(), b.bfloat16(), sigma).dtype == torch.float32


def test_changes_weigh_more_the_smaller_they_are():
    source = torch.zeros(3, 8, 16, 16)
    target = source.clone()
    target[0, :, 4:8, 4:8] = 1.0  # a sixteenth
    target[1] = 1.0  # all
    weight = weight_of_changes(target, source)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3)), torch.ones(3))
    assert weight[0, 0, 5, 5] / weight[0, 0, 12, 12] == pytest.approx(5.0)  # 1 + log2(16)
    assert 1 < weight[0, 0, 3, 5] / weight[0, 0, 12, 12] < 5  # blurred
    torch.testing.assert_close(weight[1:], torch.ones(2, 1, 16, 16))
