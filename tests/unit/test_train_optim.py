"""AdamW's groups, the schedule of the rate, clipping and the moving average."""

import pytest
import torch

from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import O1
from hidream.train.config import Optimizer, Stage
from hidream.train.optim import (
    build_optimizers,
    clip_gradients,
    ema_decay,
    learning_rate,
    update_ema,
)

STAGES = (
    Stage(size=32, steps=10, batch_size=4, learning_rate=1.0, warmup=4, tasks={}),
    Stage(
        size=64,
        steps=10,
        batch_size=4,
        learning_rate=0.5,
        warmup=2,
        decay=4,
        final_rate=0.1,
        tasks={},
    ),
)


def test_the_rate_climbs_holds_and_falls():
    rates = [learning_rate(STAGES, step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:10] == [1.0] * 6
    assert rates[10:12] == [0.75, 0.5]  # from where the stage before ended
    assert rates[12:16] == [0.5] * 4
    assert rates[16:] == pytest.approx([0.5, 0.4, 0.3, 0.2])


def test_decay_is_for_matrices_alone():
    model = O1(O1_TINY)
    (adamw,) = build_optimizers(model, Optimizer(weight_decay=0.3))
    decayed, kept = adamw.param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    kept_names = {names[id(p)] for p in kept["params"]}
    assert "model.language_model.embed_tokens.weight" in kept_names
    assert "model.language_model.norm.weight" in kept_names
    assert "lm_head.weight" not in kept_names
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_clipping_scales_all_gradients_alike_and_tells_the_norm():
    a, b, unused = (torch.zeros(2, requires_grad=True) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients([a, b, unused], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.grad, torch.tensor([0.0, 0.8]), atol=1e-5, rtol=0)
    assert clip_gradients([a, b], 10.0).item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.0]), atol=1e-5, rtol=0)


def test_the_average_follows_its_equation():
    ema, weights = [torch.tensor([1.0])], [torch.tensor([3.0])]
    update_ema(ema, weights, 0.75)
    assert ema[0].item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert weights[0].item() == 3


def test_the_average_starts_with_a_short_memory():
    assert ema_decay(0.999, 0) == pytest.approx(0.1)
    assert ema_decay(0.999, 90) == pytest.approx(0.91)
    assert ema_decay(0.999, 100_000) == 0.999
