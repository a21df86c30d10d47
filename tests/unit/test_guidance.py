"""Guidance: the formula, where it is off, and which branches are asked."""

import pytest
import torch

from hidream.sampling import cfg, cfg_batched

X = torch.zeros(2, 3)


class Branch:
    """A velocity field of one value that counts how often it is asked."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        self.value, self.dtype, self.calls = value, dtype, 0

    def __call__(self, x_t, sigma):
        self.calls += 1
        return torch.full_like(x_t, self.value, dtype=self.dtype)


def test_moves_away_from_the_unconditional_branch():
    denoise = cfg(Branch(2.0), Branch(1.0), 5.0)
    assert torch.equal(denoise(X, torch.tensor(0.5)), torch.full_like(X, 1 + 5 * (2 - 1)))


@pytest.mark.parametrize("guidance_scale", [1.0, 0.5, 0.0, -1.0])
def test_at_or_below_one_it_is_off(guidance_scale):
    conditional, unconditional = Branch(2.0), Branch(1.0)
    denoise = cfg(conditional, unconditional, guidance_scale)
    assert torch.equal(denoise(X, torch.tensor(0.5)), torch.full_like(X, 2.0))
    assert (conditional.calls, unconditional.calls) == (1, 0)


@pytest.mark.parametrize(
    ("sigma", "on"), [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.9, False)]
)
def test_outside_its_interval_the_conditional_branch_is_asked_alone(sigma, on):
    conditional, unconditional = Branch(2.0), Branch(1.0)
    denoise = cfg(conditional, unconditional, 3.0, interval=(0.25, 0.75))
    assert torch.equal(denoise(X, torch.tensor(sigma)), torch.full_like(X, 4.0 if on else 2.0))
    assert (conditional.calls, unconditional.calls) == (1, int(on))


def test_by_default_it_is_on_everywhere():
    denoise = cfg(Branch(2.0), Branch(1.0), 3.0)
    for sigma in (0.0, 1.0):
        assert torch.equal(denoise(X, torch.tensor(sigma)), torch.full_like(X, 4.0))


@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_both_at_once_equals_one_after_the_other(guidance_scale, sigma):
    calls = []

    def both(x_t, sigma):
        calls.append(float(sigma))
        return torch.full_like(x_t, 2.0), torch.full_like(x_t, 1.0)

    interval = (0.25, 0.75)
    batched = cfg_batched(Branch(2.0), both, guidance_scale, interval)
    single = cfg(Branch(2.0), Branch(1.0), guidance_scale, interval)
    sigma = torch.tensor(sigma)
    assert torch.equal(batched(X, sigma), single(X, sigma))
    assert calls == ([0.5] if guidance_scale > 1 and sigma == 0.5 else [])


def test_half_precision_branches_are_combined_in_fp32():
    denoise = cfg(Branch(1.0, torch.bfloat16), Branch(0.99609375, torch.bfloat16), 1.001)
    expected = 0.99609375 + 1.001 * (1 - 0.99609375)  # bf16 would give exactly 1
    velocity = denoise(X, torch.tensor(0.5))
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, torch.full_like(X, expected), rtol=0, atol=1e-7)
