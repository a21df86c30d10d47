"""Samplers: orders of convergence on a field known exactly, the published solver's numbers, rules.

The test double is a mixture of Gaussians: its velocity has a closed form, so what remains of an
error is the solver's own.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_flow_match_lcm

from hidream import registry
from hidream.sampling import (
    SAMPLERS,
    add_noise,
    clip_noise,
    custom_sigmas,
    euler,
    flash,
    full_sigmas,
    heun,
    i1_distilled_sigmas,
    i1_sigmas,
    initial_noise,
    linear_sigmas,
    step_noise,
    to_velocity,
    to_x0,
    truncate,
    unipc,
)

ODE_SAMPLERS = {name: SAMPLERS[name] for name in ("euler", "heun", "unipc")}
SEEDS = [3, 5, 8, 13]
SHAPE = (6, 4)


class Mixture:
    """The exact velocity of the flow from noise to a mixture of Gaussians, for x_t (b, ..., 2).

    x0 ~ sum of weights[k] * N(means[k], stds[k]**2); then x_t of component k is normal about
    (1 - sigma) * means[k] with variance (1 - sigma)**2 * stds[k]**2 + sigma**2.
    """

    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.2]], dtype=torch.float64)
    stds = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)

    def __init__(self) -> None:
        self.sigmas: list[float] = []

    def __call__(self, x_t, sigma):
        self.sigmas.append(float(sigma))
        alpha, sigma = 1 - float(sigma), float(sigma)
        x = x_t.double().unflatten(-1, (-1, 1, 2))  # (b, ..., n, 1, 2) against (k, 2)
        variance = alpha**2 * self.stds**2 + sigma**2
        offset = x - alpha * self.means
        log_weight = self.weights.log() - variance.log() - offset.square().sum(-1) / (2 * variance)
        gain = (alpha * self.stds**2 / variance)[:, None]
        x0 = (log_weight.softmax(-1)[..., None] * (self.means + gain * offset)).sum(-2)
        return to_velocity(x_t.double(), x0.flatten(-2), sigma).to(x_t.dtype)


def towards(x0):
    """The velocity field of a single picture `x0`: every line leads to it."""
    return lambda x_t, sigma: to_velocity(x_t, x0, sigma)


def flash_with_noise(seeds, shape, **settings):
    return partial(flash, noise=lambda step: step_noise(seeds, step, shape), **settings)


def all_samplers(seeds=SEEDS, shape=SHAPE):
    return {**ODE_SAMPLERS, "flash": flash_with_noise(seeds, shape, noise_clip_std=2.5)}


# Convergence


def runge_kutta(denoise, x_t, sigmas):
    """The classical method of order 4: the reference."""
    for a, b in pairwise(sigmas.tolist()):
        h, mid = b - a, (a + b) / 2
        k1 = denoise(x_t, a)
        k2 = denoise(x_t + h / 2 * k1, mid)
        k3 = denoise(x_t + h / 2 * k2, mid)
        k4 = denoise(x_t + h * k3, b)
        x_t = x_t + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x_t


def test_the_double_is_exact():
    # Pushing noise through the flow gives the mixture's own mean and variance.
    x_t = initial_noise([1], (10_000, 2)).double()
    samples = runge_kutta(Mixture(), x_t, torch.linspace(1, 1e-3, 101, dtype=torch.float64))
    weights, means, stds = Mixture.weights[:, None], Mixture.means, Mixture.stds[:, None]
    mean = (weights * means).sum(0)
    variance = (weights * (means**2 + stds**2)).sum(0) - mean**2
    torch.testing.assert_close(samples[0].mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(samples[0].var(0), variance, atol=0.03, rtol=0)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(name, order, shift):
    """Twice the steps divide the error by 2**order."""

    def grid(num_steps):
        # In [0.05, 0.95]: at the ends of [0, 1] a velocity's derivatives grow without bound.
        evenly = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64)
        return shift * evenly / (1 + (shift - 1) * evenly)

    x_t = initial_noise([2], (200, 2)).double()
    exact = runge_kutta(Mixture(), x_t, grid(400))
    errors = [
        (SAMPLERS[name](Mixture(), x_t, grid(num_steps)) - exact).square().mean().sqrt()
        for num_steps in (40, 80, 160)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_unipc_beats_heun_at_equal_cost():
    x_t = initial_noise([2], (200, 2)).double()
    exact = runge_kutta(Mixture(), x_t, torch.linspace(0.95, 0.05, 401, dtype=torch.float64))

    def error(sampler, num_steps):
        grid = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64)
        return (sampler(Mixture(), x_t, grid) - exact).square().mean().sqrt()

    assert error(unipc, 20) < error(heun, 10) < error(euler, 20)


# The published solver


UNIPC_REFERENCE = {
    1: (-0.3504707436609025, 0.9094362305893426, -0.27973585958722025),
    2: (0.6106491687270187, 0.9272993525460438, -0.9256093095269493),
    3: (0.980186508873027, 0.934322217650754, -0.5723456701509022),
    4: (0.7037871782576106, 0.937345179034973, -0.6505995219493287),
    6: (0.31953010993739717, 0.941197673974187, -0.2254191911172181),
    10: (0.4166255878518344, 0.9442629522706599, 0.7866222286986428),
    50: (0.9992877408768778, 0.947392165800182, 0.8909076095635824),
}


@pytest.mark.parametrize("num_steps", UNIPC_REFERENCE)
def test_unipc_equals_the_published_scheduler(num_steps):
    """Numbers of UniPCMultistepScheduler (flow sigmas, order 2, bh2), diffusers 0.42.1, float64."""

    def denoise(x_t, sigma):
        return to_velocity(x_t, torch.sin(2 * x_t.flip(-1) + 3 * sigma), sigma)

    x_t = torch.tensor([[1.5, -0.5, 0.25]], dtype=torch.float64)
    final = unipc(denoise, x_t, full_sigmas(num_steps, 3.0).double())
    expected = torch.tensor([UNIPC_REFERENCE[num_steps]], dtype=torch.float64)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-10)


def test_unipc_may_start_from_pure_noise():
    # log(alpha / sigma) is minus infinity there, so it counts as a hair less.
    x_t = initial_noise([1], (50, 2)).double()
    sigmas = linear_sigmas(8).double()
    nearly = sigmas.clamp(max=1 - 1e-6)
    final = unipc(Mixture(), x_t, sigmas)
    torch.testing.assert_close(final, unipc(Mixture(), x_t, nearly), atol=1e-5, rtol=0)


# Flash


def test_flash_states_have_their_closed_form():
    x0 = torch.full((2, *SHAPE), 0.25)
    x_t = 7.5 * initial_noise([1, 2], SHAPE)
    sigmas = custom_sigmas([0.9, 0.6, 0.3])
    noise = [step_noise([1, 2], step, SHAPE) for step in range(3)]
    states = []
    final = flash(
        towards(x0),
        x_t,
        sigmas,
        noise=noise.__getitem__,
        on_step=lambda step, state, x0: states.append(state),
        noise_scale=(7.5, 6.0),
    )
    # Over three steps the scale is 7.5, 6.75 and 6.0; the last one meets sigma = 0.
    for state, sigma, scale, fresh in zip(states, (0.6, 0.3), (7.5, 6.75), noise, strict=False):
        expected = (1 - sigma) * x0 + sigma * scale * fresh
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(final, x0, rtol=0, atol=2e-6)


def test_flash_clips_noise_at_its_own_deviation():
    noise = 3 * initial_noise([1, 2], (1000,))
    clipped = clip_noise(noise, 1.5)
    for row, original in zip(clipped, noise, strict=True):
        limit = float(1.5 * original.std())
        assert row.abs().max() == pytest.approx(limit)
        inside = original.abs() < limit
        assert torch.equal(row[inside], original[inside])
    assert torch.equal(clip_noise(noise, 0.0), noise)


def test_flash_asks_for_no_noise_at_the_last_step():
    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(1, 2)

    flash(Mixture(), torch.zeros(1, 2), linear_sigmas(4), noise=noise)
    assert asked == [0, 1, 2]


def test_flash_needs_noise():
    with pytest.raises(ValueError, match="noise"):
        flash(Mixture(), torch.zeros(1, 2), linear_sigmas(4))


# I1, beside diffusers


def curved(x_t, sigma):
    """A velocity that no straight step follows."""
    return to_velocity(x_t, torch.sin(2 * x_t.flip(-1) + 3 * sigma), sigma)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 28, 50])
def test_i1_full_takes_diffusers_way(num_steps):
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    theirs.set_timesteps(num_steps)
    start = initial_noise([4], (2, 3, 5)).double()
    x_t, states = start, []
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        x_t = theirs.step(curved(x_t, sigma), t, x_t, return_dict=False)[0]
        states.append(x_t)
    seen = []
    final = unipc(
        curved, start, i1_sigmas(num_steps), on_step=lambda step, x_t, x0: seen.append(x_t)
    )
    # Their lambdas are fp32.
    torch.testing.assert_close(torch.stack(seen), torch.stack(states), rtol=0, atol=2e-5)
    assert torch.equal(final, seen[-1])


@pytest.mark.parametrize(("num_steps", "shift"), [(28, 6.0), (16, 3.0)])
def test_i1_distilled_takes_diffusers_way(monkeypatch, num_steps, shift):
    noise = [step_noise([4], step, (2, 3, 5)) for step in range(num_steps)]
    fresh = iter(noise)
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *a, **k: next(fresh))
    theirs = FlowMatchLCMScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    start = initial_noise([4], (2, 3, 5))
    x_t = start
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        x_t = theirs.step(curved(x_t, sigma), t, x_t, return_dict=False)[0]
    sigmas = i1_distilled_sigmas(num_steps, shift)
    ours = flash(curved, start, sigmas, noise=noise.__getitem__)
    torch.testing.assert_close(ours, x_t, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_steps", "shift", "left"), [(28, 6.0, 0.0348), (16, 3.0, 0.0089)])
def test_the_official_flash_leaves_noise_in_the_picture(num_steps, shift, left):
    """Its scheduler's `step` does nothing once the last of its n timesteps is reached."""
    x0, sigmas = torch.zeros(1, 50, 50), i1_distilled_sigmas(num_steps, shift)
    noise = [step_noise([4], step, (50, 50)) for step in range(num_steps)]
    x_t = start = initial_noise([4], (50, 50))
    for i in range(num_steps):
        answer = to_velocity(x_t, x0, sigmas[i])
        if i < num_steps - 1:
            x_t = sigmas[i + 1] * noise[i] + (1 - sigmas[i + 1]) * (x_t - answer * sigmas[i])
    seen = []
    final = SAMPLERS["flash-official"](
        towards(x0),
        start,
        sigmas,
        noise=noise.__getitem__,
        on_step=lambda step, x_t, x0: seen.append((step, x0)),
    )
    torch.testing.assert_close(final, x_t, rtol=0, atol=1e-6)
    assert float(final.std()) == pytest.approx(left, rel=0.03)
    assert [step for step, _ in seen] == list(range(num_steps))
    assert torch.equal(seen[-1][1], final)
    assert float(flash(towards(x0), start, sigmas, noise=noise.__getitem__).std()) < 1e-6


# What holds for all of them


def test_names_are_those_of_the_registry():
    assert set(SAMPLERS) == set(registry.SAMPLERS)


@pytest.mark.parametrize("name", all_samplers())
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_land_on_the_only_picture_there_is(name, num_steps):
    x0 = torch.linspace(-1, 1, 4 * 24).reshape(4, *SHAPE)
    x_t = 8 * initial_noise(SEEDS, SHAPE)
    final = all_samplers()[name](towards(x0), x_t, full_sigmas(num_steps))
    torch.testing.assert_close(final, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", all_samplers())
@pytest.mark.parametrize("seeds", [[5], [5, 8], [8, 5], [13, 8, 5, 3]])
def test_a_picture_is_the_same_to_the_bit_in_every_batch(name, seeds):
    def generate(seeds):
        x_t = initial_noise(seeds, SHAPE)
        return all_samplers(seeds)[name](Mixture(), x_t, full_sigmas(6))

    together = generate(SEEDS)
    for seed, picture in zip(seeds, generate(seeds), strict=True):
        assert torch.equal(picture, together[SEEDS.index(seed)])


@pytest.mark.parametrize(
    ("name", "calls"), [("euler", 7), ("heun", 13), ("unipc", 7), ("flash", 7)]
)
def test_number_of_calls_and_where(name, calls):
    mixture, sigmas = Mixture(), full_sigmas(7)
    all_samplers()[name](mixture, initial_noise(SEEDS, SHAPE), sigmas)
    assert len(mixture.sigmas) == calls
    assert sorted(set(mixture.sigmas), reverse=True) == sigmas[:-1].tolist()


@pytest.mark.parametrize("name", all_samplers())
def test_denoise_is_given_sigma_as_an_fp32_scalar(name):
    def denoise(x_t, sigma):
        assert (sigma.shape, sigma.dtype) == ((), torch.float32)
        return torch.zeros_like(x_t)

    all_samplers()[name](denoise, initial_noise(SEEDS, SHAPE), full_sigmas(3))


@pytest.mark.parametrize("name", all_samplers())
def test_on_step_sees_every_step_in_order(name):
    seen = []

    def on_step(step, x_t, x0):
        seen.append((step, x_t.clone(), x0))

    x_t = initial_noise(SEEDS, SHAPE)
    first_x0 = to_x0(x_t, Mixture()(x_t, 0.9), 0.9)
    sigmas = custom_sigmas([0.9, 0.5, 0.2])
    final = all_samplers()[name](Mixture(), x_t, sigmas, on_step=on_step)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[0][2], first_x0)
    _, last_state, x0_of_last = seen[-1]
    assert torch.equal(last_state, final)
    torch.testing.assert_close(x0_of_last, final, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", all_samplers())
def test_raising_in_on_step_cancels(name):
    class Cancelled(Exception):
        pass

    def on_step(step, x_t, x0):
        if step == 1:
            raise Cancelled

    mixture = Mixture()
    with pytest.raises(Cancelled):
        all_samplers()[name](mixture, initial_noise(SEEDS, SHAPE), full_sigmas(9), on_step=on_step)
    assert len(mixture.sigmas) <= 4


@pytest.mark.parametrize("name", all_samplers())
def test_works_in_fp32_whatever_the_network_answers_in(name):
    x_t = initial_noise(SEEDS, SHAPE)
    before = x_t.clone()

    def half(x_t, sigma):
        assert x_t.dtype == torch.float32
        return Mixture()(x_t, sigma).bfloat16()

    def widened(x_t, sigma):
        return half(x_t, sigma).float()

    sampler = all_samplers()[name]
    final = sampler(half, x_t, full_sigmas(5))
    assert final.dtype == torch.float32
    assert torch.equal(final, sampler(widened, x_t, full_sigmas(5)))
    assert torch.equal(x_t, before), "the caller's tensor was changed"
    assert sampler(half, x_t.bfloat16(), full_sigmas(5)).dtype == torch.float32


@pytest.mark.parametrize("name", all_samplers())
def test_a_schedule_without_steps_returns_the_state(name):
    x_t = initial_noise(SEEDS, SHAPE)
    final = all_samplers()[name](Mixture(), x_t, truncate(full_sigmas(5), 0.0))
    assert torch.equal(final, x_t)


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.9])])
def test_flow_conversions_agree(sigma):
    x0, noise = initial_noise([1, 2], (3, 4)), initial_noise([3, 4], (3, 4))
    x_t = add_noise(x0, noise, sigma, noise_scale=8.0)
    velocity = to_velocity(x_t, x0, sigma)
    torch.testing.assert_close(velocity, 8 * noise - x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(to_x0(x_t, velocity, sigma), x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, torch.tensor(0.0), torch.tensor([0.0, 0.0])])
def test_velocity_is_bounded_near_data(sigma):
    velocity = to_velocity(torch.ones(2, 3), torch.zeros(2, 3), sigma, min_sigma=0.001)
    torch.testing.assert_close(velocity, torch.full((2, 3), 1000.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_stored_between_steps_is_what_the_next_step_starts_from(name):
    """As published code keeps latents in bf16: every state but the last is one that bf16 holds."""
    states, asked = [], []

    def denoise(x_t, sigma):
        asked.append(x_t)
        return Mixture()(x_t, sigma)

    out = SAMPLERS[name](
        denoise,
        initial_noise(SEEDS, SHAPE),
        linear_sigmas(5),
        noise=lambda step: step_noise(SEEDS, step, SHAPE),
        on_step=lambda step, x_t, x0: states.append(x_t),
        store=lambda x_t: x_t.bfloat16(),
    )
    assert out.dtype == torch.float32
    for state in states[:-1]:
        assert torch.equal(state, state.bfloat16().float())
    assert [any(torch.equal(state, x_t) for x_t in asked) for state in states[:-2]] == [True] * 3
    if name != "flash-official":  # whose last step is none
        assert not torch.equal(out, out.bfloat16().float())
