"""The SDE of Hi-DiT's sampling: exact variances, its noise, and the ODE's orders from 1 to 0.

On data N(0, s**2) the exact velocity is linear in x_t, so that every state is normal and its
variance follows a recursion, written down here and known to no code under test.
"""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from hidream.sampling.noise import picture_noise
from hidream.sampling.samplers import euler, heun
from hidream.sampling.sde import euler_maruyama, sde_last_step, sde_sigmas, sde_step


def normal_velocity(std):
    """E[noise - x0 | x_t] for x0 ~ N(0, std**2)."""

    def velocity(x_t, sigma):
        sigma = float(sigma)
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        return (sigma - (1 - sigma) * std**2) / variance * x_t

    return velocity


def exact_std(std, num_steps, last):
    """The deviation that the SDE ends with, by recursion.

    x_t = (1 - t) x0 + t n has variance V = (1 - t)**2 s**2 + t**2. Given x_t, the means of n and of
    x0 are t / V x_t and (1 - t) s**2 / V x_t. The step from t to t - h multiplies x_t by
    1 - h (v + n) with v = n - x0, and adds noise of variance g**2 h = 2 t h.
    """
    levels = [1 - i * (1 - 0.04) / (num_steps - 1) for i in range(num_steps)] + [0.0]
    variance = 1.0
    for t, t_next in pairwise(levels):
        marginal = (1 - t) ** 2 * std**2 + t**2
        noise, x0 = t / marginal, (1 - t) * std**2 / marginal
        h = t - t_next
        if t_next > 0:
            variance = (1 - h * (2 * noise - x0)) ** 2 * variance + 2 * t * h
        else:
            variance *= {"mean": 1 - h * (2 * noise - x0), "x0": x0}[last] ** 2
    return math.sqrt(variance)


@pytest.mark.parametrize(
    ("std", "num_steps", "ratio"),
    [
        *((1, 50, 0.986), (1, 100, 0.992), (1, 250, 0.995)),
        *((0.1, 50, 0.80), (0.1, 100, 0.78), (0.1, 250, 0.77)),
    ],
)
def test_the_recursion_gives_the_known_deviations(std, num_steps, ratio):
    digits = 3 if std == 1 else 2
    assert round(exact_std(std, num_steps, "mean") / std, digits) == ratio


@pytest.mark.parametrize("last", ["mean", "x0"])
@pytest.mark.parametrize(("std", "num_steps"), [(1.0, 50), (1.0, 250), (0.1, 50), (0.1, 250)])
def test_drift_and_noise_are_those_of_the_recursion_exactly(std, num_steps, last):
    """All is linear: the final variance is the sum of the squares of what each noise adds."""
    sources = torch.eye(num_steps, dtype=torch.float64)  # the first noise, and one a step
    final = euler_maruyama(
        normal_velocity(std),
        sources[0],
        sde_sigmas(num_steps),
        noise=lambda step: sources[step + 1],
        last=last,
    )
    assert float(final.norm()) == pytest.approx(exact_std(std, num_steps, last), rel=1e-12)


@pytest.mark.parametrize("std", [1.0, 0.1])
def test_monte_carlo_agrees(std):
    size = 40_000
    final = euler_maruyama(
        normal_velocity(std),
        picture_noise(1, 0, [size]).double(),
        sde_sigmas(50),
        noise=lambda step: picture_noise(1, step + 1, [size]),
    )
    # The deviation of n normal numbers is itself known to 1 / sqrt(2 n): 0.35 %.
    assert float(final.std()) == pytest.approx(
        exact_std(std, 50, "mean"), rel=4 / math.sqrt(2 * size)
    )
    assert abs(float(final.mean())) < 4 * std / math.sqrt(size)


def test_the_mean_step_stays_wrong_for_fine_detail():
    """The numbers of the module's first lines: more steps do not help, "x0" has another bias."""
    assert exact_std(0.1, 4000, "mean") / 0.1 == pytest.approx(0.77, abs=0.01)
    assert exact_std(0.02, 4000, "mean") / 0.02 == pytest.approx(1.4, abs=0.06)
    assert exact_std(0.02, 50, "mean") / 0.02 == pytest.approx(1.8, abs=0.06)
    assert exact_std(0.02, 50, "x0") < 0.02


def test_the_noise_has_variance_two_sigma_per_unit_of_sigma():
    x_t = torch.zeros(3, dtype=torch.float64)
    noise = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for sigma, sigma_next in ((1.0, 0.9), (0.5, 0.25), (0.06, 0.04)):
        added = sde_step(x_t, torch.zeros_like(x_t), sigma, sigma_next, noise)
        torch.testing.assert_close(added**2 / (sigma - sigma_next), 2 * sigma * noise**2)


def test_the_drift_is_that_of_the_general_formula():
    """v - g**2 / 2 * score, with the score of the normal distribution that x_t has."""
    x_t, std = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.7
    for sigma, sigma_next in ((0.9, 0.8), (0.3, 0.28)):
        velocity = normal_velocity(std)(x_t, sigma)
        score = -x_t / ((1 - sigma) ** 2 * std**2 + sigma**2)
        drift = velocity - 0.5 * (2 * sigma) * score
        moved = sde_step(x_t, velocity, sigma, sigma_next, torch.zeros_like(x_t))
        torch.testing.assert_close(moved, x_t + (sigma_next - sigma) * drift)


def test_it_asks_as_often_as_it_has_steps():
    asked, noises, seen = [], [], []

    def denoise(x_t, sigma):
        asked.append(float(sigma))
        return torch.zeros_like(x_t)

    def noise(step):
        noises.append(step)
        return torch.zeros(2)

    sigmas = sde_sigmas(7)
    euler_maruyama(
        denoise, torch.ones(2), sigmas, noise=noise, on_step=lambda step, *_: seen.append(step)
    )
    assert asked == sigmas[:-1].tolist() == pytest.approx(np.linspace(1, 0.04, 7))
    assert noises == list(range(6))
    assert seen == list(range(7))
    assert sigmas.dtype == torch.float64


def test_the_last_step_lands_where_it_says():
    x_t, velocity = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25])
    x0, noise = x_t - 0.04 * velocity, x_t + 0.96 * velocity
    torch.testing.assert_close(sde_last_step(x_t, velocity, 0.04, "x0"), x0)
    torch.testing.assert_close(sde_last_step(x_t, velocity, 0.04, "mean"), x0 - 0.04 * noise)


def test_needs_noise_and_two_steps():
    with pytest.raises(ValueError, match="noise"):
        euler_maruyama(normal_velocity(1), torch.zeros(2), sde_sigmas(3))
    with pytest.raises(ValueError, match="2 or more"):
        sde_sigmas(1)


def test_fp64_stays_and_half_precision_becomes_fp32():
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        final = euler_maruyama(
            lambda x_t, sigma: x_t.bfloat16(),
            torch.ones(2, dtype=dtype),
            sde_sigmas(3),
            noise=lambda step: torch.ones(2),
        )
        assert final.dtype == expected


# The ODE, all the way from pure noise to data

MIXTURE = ((0.3, -1.0, 0.3), (0.7, 0.8, 0.4))  # weight, mean, deviation


def mixture_velocity(x_t, sigma):
    alpha, sigma = 1 - float(sigma), float(sigma)
    weights, x0 = [], []
    for weight, mean, std in MIXTURE:
        variance = alpha**2 * std**2 + sigma**2
        offset = x_t - alpha * mean
        weights.append(weight * torch.exp(-offset.square() / (2 * variance)) / variance**0.5)
        x0.append(mean + alpha * std**2 / variance * offset)
    x0 = sum(w * x for w, x in zip(weights, x0, strict=True)) / sum(weights)
    return (x_t - x0) / sigma


def mixture_quantile(uniform):
    """Where the mixture's distribution function has this value, by bisection."""
    low, high = -6.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(w * NormalDist(mean, std).cdf(middle) for w, mean, std in MIXTURE)
        low, high = (middle, high) if below < uniform else (low, middle)
    return low


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1.0), (heun, 2.0)])
def test_order_of_the_ode_from_noise_to_data(sampler, order):
    """In one dimension the flow keeps quantiles: the exact end is known without any solver."""
    quantiles = [(i + 0.5) / 64 for i in range(64)]
    start = torch.tensor([NormalDist().inv_cdf(q) for q in quantiles], dtype=torch.float64)
    exact = torch.tensor([mixture_quantile(q) for q in quantiles], dtype=torch.float64)

    def error(num_steps):
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return float((sampler(mixture_velocity, start, sigmas) - exact).square().mean().sqrt())

    errors = [error(num_steps) for num_steps in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.03)
