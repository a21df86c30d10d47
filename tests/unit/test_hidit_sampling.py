"""Hi-DiT's drawing: who is asked what and when, and what comes out where the answer is known.

The networks here are formulas. Where one is exact (a correlated Gaussian), so is what is expected.
"""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hidream.errors import ModelError, UsageError
from hidream.pipelines.hidit import (
    SamplingOptions,
    draw,
    first_pixel_step,
    labels_for,
    needs_decoder,
    picture_seed,
    pixel_level,
    walk,
)
from hidream.sampling.device_noise import batch_noise, philox_noise
from hidream.sampling.noise import picture_noise
from hidream.sampling.samplers import euler, heun
from hidream.sampling.sde import euler_maruyama, sde_sigmas

NUM_CLASSES = 5


class Stub:
    """A network of `velocity(x_t, sigma, labels)` and `x0(pixels, level, latents, labels)`.

    It notes every call: noise level, rows, rows with pixels, their level, the labels.
    """

    def __init__(self, velocity=None, x0=None, *, side=4, gate=0.3, clock="shared"):
        self.config = SimpleNamespace(
            in_channels=3,
            latent_size=side,
            image_size=side,
            num_classes=NUM_CLASSES,
            gate=gate,
            pixel_clock=clock,
        )
        self.velocity = velocity or (lambda x_t, sigma, labels: 0.5 * x_t)
        self.x0 = x0 or (lambda pixels, level, latents, labels: 0.25 * pixels + 0.125 * latents)
        self.calls = []

    def denormalise(self, latents):
        return 2 * latents

    def __call__(self, x_t, sigma, labels, pixels=None, *, rows=None, pixel_sigma=None):
        assert len(sigma) == len(labels) == len(x_t)
        assert sigma.unique().numel() == 1
        assert pixels is None or len(pixels) == len(x_t)
        level = sigma if pixel_sigma is None else pixel_sigma
        self.calls.append(
            SimpleNamespace(
                sigma=float(sigma[0]),
                rows=len(x_t),
                pixel_rows=None if pixels is None else len(pixels),
                level=None if pixel_sigma is None else float(pixel_sigma[0]),
                labels=labels.tolist(),
            )
        )
        at = SimpleNamespace(velocity=self.velocity(x_t, sigma[:, None, None, None], labels))
        at.pixels = None
        if pixels is not None:
            at.pixels = self.x0(pixels, level[:, None, None, None], x_t, labels)
        return at


def half(latents):
    """The inverse of the stub's `denormalise`: as if the VAE were the identity."""
    return latents / 2


def noise_of(seeds, side=4):
    """Cheap fp64 noise, another for each seed, stream and number."""

    def one(seed, stream, number):
        generator = torch.Generator().manual_seed(10**6 * seed + 2 * number + (stream == "pixels"))
        return torch.randn(3, side, side, dtype=torch.float64, generator=generator)

    return lambda stream, number: torch.stack([one(seed, stream, number) for seed in seeds])


def run(stub, seeds=(1, 2), decode=half, labels=None, **options):
    labels = torch.tensor([0, 3][: len(seeds)] if labels is None else labels)
    return walk(
        stub, decode, labels, noise_of(seeds), SamplingOptions(**options), dtype=torch.float64
    )


# Which calls are made


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize(("clock", "more"), [("shared", 1), ("rescaled", 0)])
def test_no_pixels_above_the_gate_and_one_call_a_step(mode, clock, more):
    stub = Stub(clock=clock)
    run(stub, mode=mode, num_steps=50, decode=half if clock == "shared" else None)
    below = [call for call in stub.calls if call.pixel_rows is not None]
    sigmas = SamplingOptions(mode=mode).sigmas()[:-1].tolist()
    assert len(stub.calls) == 50 + more, "the hand-over asks once more, where it decodes"
    assert [c.sigma for c in below] == [s for s in sigmas if np.float32(s) <= np.float32(0.3)]
    assert all(call.sigma > 0.3 for call in stub.calls[: 50 - len(below)])
    if more:
        hand_over = stub.calls[50 - len(below)]
        assert (hand_over.sigma, hand_over.pixel_rows) == (below[0].sigma, None)


def test_the_gate_is_inclusive_whatever_a_schedule_makes_of_it():
    options = SamplingOptions(mode="ode", num_steps=10)
    assert options.sigmas()[7] != 0.3, "this is what makes the test one"
    assert first_pixel_step(options, 0.3) == 7
    assert first_pixel_step(options, 0.29) == 8
    assert first_pixel_step(SamplingOptions(output="vae"), 0.3) is None


def test_a_gate_that_no_step_meets_is_refused():
    with pytest.raises(UsageError, match=r"ends at noise level 0.5 .* gate of the pixels, 0.3"):
        first_pixel_step(SamplingOptions(mode="ode", num_steps=2), 0.3)
    assert first_pixel_step(SamplingOptions(mode="sde", num_steps=2), 0.3) == 1


def test_output_vae_never_asks_for_pixels_and_draws_the_same_latents():
    """Where latents do not read pixels, as in the stub and in attention `readonly`."""
    stub = Stub()
    with_pixels = run(stub, mode="sde", num_steps=20)
    stub.calls.clear()
    without = run(stub, mode="sde", num_steps=20, output="vae")
    assert without.pixels is None
    assert all(call.pixel_rows is None for call in stub.calls)
    assert torch.equal(with_pixels.latents, without.latents)


def test_a_decoder_is_needed_for_what_it_decodes():
    assert needs_decoder(SamplingOptions(), "shared")
    assert not needs_decoder(SamplingOptions(), "rescaled")
    assert needs_decoder(SamplingOptions(output="vae"), "rescaled")


# Guidance


@pytest.mark.parametrize(
    ("low", "high", "doubled"), [(0.0, 1.0, 10), (0.3, 0.7, 5), (0.0, 0.7, 7), (0.35, 0.65, 3)]
)
def test_guidance_doubles_the_batch_inside_its_interval_ends_included(low, high, doubled):
    stub = Stub()
    interval = {"guidance_low": low, "guidance_high": high}
    run(stub, mode="ode", num_steps=10, cfg_scale=2.0, output="vae", **interval)
    inside = [round(call.sigma, 6) for call in stub.calls if call.rows == 4]
    assert len(stub.calls) == 10
    assert len(inside) == doubled
    assert all(low <= sigma <= high for sigma in inside)
    for call in stub.calls:
        null = [NUM_CLASSES, NUM_CLASSES]
        assert call.labels == [0, 3] + (null if call.rows == 4 else [])


def test_the_published_sde_interval_counts_as_published():
    """REPA-E's ImageNet setting: 250 steps, [0, 0.73]."""
    stub = Stub()
    run(stub, mode="sde", num_steps=250, cfg_scale=2.4, guidance_high=0.73, output="vae")
    sigmas = sde_sigmas(250)[:-1]
    assert len(stub.calls) == 250
    assert sum(call.rows == 4 for call in stub.calls) == int((sigmas <= 0.73).sum()) == 179


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_scale_of_one_never_doubles(mode, scale):
    stub = Stub()
    run(stub, mode=mode, num_steps=20, cfg_scale=scale)
    assert {call.rows for call in stub.calls} == {2}


def test_heuns_second_call_is_guided_as_its_first():
    """REPA-E tests the interval with the level that a step starts from, for both its calls."""
    stub = Stub()
    interval = {"guidance_low": 0.5, "guidance_high": 0.8}
    run(stub, mode="ode", heun=True, num_steps=4, cfg_scale=2.0, output="vae", **interval)
    seen = [(call.sigma, call.rows) for call in stub.calls]
    first, *others, last = [
        (1.0, 2),
        (0.75, 2),
        (0.75, 4),
        (0.5, 4),
        (0.5, 4),
        (0.25, 4),
        (0.25, 2),
    ]
    assert seen == [first, *others, last]


def by_label(cond, null):
    """A field that is `cond` times x_t for classes and `null` times x_t for the null label."""

    def field(x, level, *rest):
        labels = rest[-1]
        factors = torch.tensor([cond, null], dtype=torch.float64)[(labels == NUM_CLASSES).long()]
        return factors.to(x)[:, None, None, None] * x

    return field


@pytest.mark.parametrize(
    "options", [{"mode": "sde"}, {"mode": "ode"}, {"mode": "ode", "heun": True}]
)
def test_guidance_of_a_linear_field_is_the_formula(options):
    """v_null + scale (v - v_null) for latents, and the same for the pixels' x0, at their scale."""
    options = {**options, "num_steps": 20}
    guided = Stub(by_label(0.5, 0.2), by_label(0.75, 0.5))
    formula = Stub(
        by_label(0.2 + 3 * (0.5 - 0.2), math.nan), by_label(0.5 + 1.5 * (0.75 - 0.5), math.nan)
    )
    found = run(guided, cfg_scale=3.0, pixel_cfg_scale=1.5, **options)
    expected = run(formula, **options)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.pixels, expected.pixels, rtol=1e-10, atol=1e-10)


def test_pixels_take_the_latents_scale_unless_they_have_their_own():
    fields = by_label(0.5, 0.2), by_label(0.75, 0.5)
    same = run(Stub(*fields), cfg_scale=3.0)
    assert torch.equal(same.pixels, run(Stub(*fields), cfg_scale=3.0, pixel_cfg_scale=3.0).pixels)
    assert not torch.equal(
        same.pixels, run(Stub(*fields), cfg_scale=3.0, pixel_cfg_scale=2.0).pixels
    )


def test_pixels_alone_may_be_guided_or_not():
    fields = by_label(0.5, 0.2), by_label(0.75, 0.5)
    stub = Stub(*fields)
    alone = run(stub, pixel_cfg_scale=2.0)
    assert {call.rows for call in stub.calls if call.pixel_rows is None} == {2}
    assert {call.rows for call in stub.calls if call.pixel_rows is not None} == {4}
    torch.testing.assert_close(alone.latents, run(Stub(*fields)).latents)
    unguided = run(Stub(fields[0], by_label(0.75, math.nan)), cfg_scale=3.0, pixel_cfg_scale=1.0)
    assert bool(unguided.pixels.isfinite().all())


# The samplers in it


def test_the_ode_is_that_of_the_samplers_and_the_sde_too():
    def velocity(x_t, sigma, labels=None):
        return (x_t - 0.3 * x_t.square() + 0.25 * x_t) / sigma

    noise = noise_of([1, 2])
    for solver, options in (
        (euler, {"mode": "ode"}),
        (heun, {"mode": "ode", "heun": True}),
        (euler_maruyama, {"mode": "sde"}),
    ):
        found = run(Stub(velocity), num_steps=12, output="vae", **options).latents
        expected = solver(
            velocity,
            noise("latents", 0),
            SamplingOptions(num_steps=12, **options).sigmas(),
            noise=lambda step: noise("latents", step + 1),
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clock", ["shared", "rescaled"])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_pixels_end_at_the_last_predicted_x0(mode, clock):
    """Not at SiT's "mean", which leaves noise in what the eye sees."""
    answers = []

    def x0(pixels, level, latents, labels):
        answers.append(0.25 * pixels + 0.125)
        return answers[-1]

    drawn = run(Stub(x0=x0, clock=clock), mode=mode, num_steps=20)
    torch.testing.assert_close(drawn.pixels, answers[-1], rtol=1e-12, atol=1e-12)


def test_the_rescaled_clock_is_one_at_the_gate_and_ends_with_the_latents():
    stub = Stub(clock="rescaled")
    run(stub, mode="ode", num_steps=50)
    levels = [call.level for call in stub.calls if call.pixel_rows]
    sigmas = [call.sigma for call in stub.calls if call.pixel_rows]
    assert levels[0] == 1
    assert levels[1:] == pytest.approx([sigma / 0.3 for sigma in sigmas[1:]])
    assert pixel_level(0.0, 0.3, "rescaled") == 0
    assert pixel_level(0.8, 0.3, "rescaled") == 1
    assert pixel_level(0.8, 0.3, "shared") == 0.8


# A correlated Gaussian: z0 ~ N(0, 1), x0 = a z0 + r with r ~ N(0, std**2), decode(z) = a z


class Gaussian(Stub):
    """The exact network of that law, with `readonly` latents or with ones that read pixels too."""

    def __init__(self, a, std, *, readonly, **config):
        super().__init__(side=1, **config)
        self.a, self.readonly = a, readonly
        self.std = torch.as_tensor(std, dtype=torch.float64)

    def __call__(self, x_t, sigma, labels, pixels=None, *, rows=None, pixel_sigma=None):
        t = float(sigma[0])
        z0 = (1 - t) / ((1 - t) ** 2 + t**2) * x_t
        x0 = None
        if pixels is not None:
            s = t if pixel_sigma is None else float(pixel_sigma[0])
            # E[(z0, x0) | z_t, x_s] = C A (A C A + N)^-1 (z_t, x_s), by hand for two numbers
            c = 1.0, self.a, self.a**2 + self.std**2
            alpha, beta = 1 - t, 1 - s
            zz, zx, xx = alpha**2 * c[0] + t**2, alpha * beta * c[1], beta**2 * c[2] + s**2
            determinant = zz * xx - zx**2
            to_z, to_x = (
                (xx * x_t - zx * pixels) / determinant,
                (zz * pixels - zx * x_t) / determinant,
            )
            x0 = alpha * c[1] * to_z + beta * c[2] * to_x
            if not self.readonly:
                z0 = alpha * c[0] * to_z + beta * c[1] * to_x
        return SimpleNamespace(velocity=(x_t - z0) / t, pixels=x0)

    def decode(self, latents):
        return self.a * latents / 2


def covariance(network, **options):
    """Of the final (z, x), exactly: everything is linear, so each source of noise goes alone."""
    options = SamplingOptions(**options)
    fresh = len(options.sigmas()) - 2 if options.mode == "sde" else 0
    count = 2 * (1 + fresh)
    ends = []

    def noise(stream, number):
        source = torch.zeros(count, 3, 1, 1, dtype=torch.float64)
        source[2 * number + (stream == "pixels")] = 1
        return source

    drawn = walk(
        network,
        network.decode,
        torch.zeros(count, dtype=torch.int64),
        noise,
        options,
        dtype=torch.float64,
    )
    ends = torch.stack([drawn.latents[:, 0, 0, 0], drawn.pixels[:, 0, 0, 0]])
    return (ends @ ends.T).numpy()


def expected_covariance(a, std, gate, clock, readonly, mode, num_steps, tail=()):
    """The same by matrices: P -> M P M' + Q, a step each; written without a look at the code."""
    law = np.array([[1, a], [a, a * a + std * std]])
    if mode == "sde":
        levels = [*np.linspace(1, 0.04, num_steps), *tail, 0.0]
    else:
        levels = [*np.linspace(1, 0, num_steps + 1)[:-1], *tail, 0.0]
    state, pixels_are_there = np.diag([1.0, 0.0]), False
    for t, t_next in pairwise(levels):
        shrink = (1 - t) / ((1 - t) ** 2 + t * t)
        s, s_next = (t, t_next) if clock == "shared" else (t / gate, min(1, t_next / gate))
        if not pixels_are_there and t <= gate + 1e-9:
            pixels_are_there, s = True, t if clock == "shared" else 1.0
            first = np.array([[1, 0], [(1 - t) * a * shrink if clock == "shared" else 0, 0]])
            state = first @ state @ first.T + np.diag([0, s * s])
        clean = np.array([[shrink, 0], [0, 0]])
        if pixels_are_there:
            keep, noise = np.diag([1 - t, 1 - s]), np.diag([t * t, s * s])
            clean = law @ keep @ np.linalg.inv(keep @ law @ keep + noise)
            if readonly:
                clean[0] = shrink, 0
        velocity = np.diag([1 / t, 1 / s]) @ (np.eye(2) - clean)
        drift, move = velocity, np.diag([t_next - t, s_next - s])
        added = np.zeros((2, 2))
        if mode == "sde":
            drift = velocity + np.eye(2) + np.diag([1 - t, 1 - s]) @ velocity
            added = np.diag([2 * t * (t - t_next), 2 * s * (s - s_next)]) * (t_next > 0)
        if not pixels_are_there:
            move[1, 1] = added[1, 1] = 0
        step = np.eye(2) + move @ drift
        if t_next == 0 and mode == "sde":
            step[1] = clean[1]
        state = step @ state @ step.T + added
    return state


@pytest.mark.parametrize("mode", ["ode", "sde"])
@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("clock", ["shared", "rescaled"])
def test_the_joint_covariance_is_that_of_the_recursion(clock, readonly, mode):
    for a, std in ((0.8, 0.25), (0.8, 0.08), (0.0, 0.25)):
        network = Gaussian(a, std, readonly=readonly, clock=clock)
        found = covariance(network, mode=mode, num_steps=50)
        expected = expected_covariance(a, std, 0.3, clock, readonly, mode, 50)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mode", "last"), [("sde", 0.04), ("ode", 0.02)])
def test_the_tail_halves_the_last_level_for_pixels_alone(mode, last):
    options = SamplingOptions(mode=mode, pixel_tail=2)
    assert options.sigmas()[-4:].tolist() == pytest.approx([last, last / 2, last / 4, 0])
    without = SamplingOptions(mode=mode, pixel_tail=2, output="vae")
    assert torch.equal(without.sigmas(), SamplingOptions(mode=mode).sigmas())
    network = Gaussian(0.8, 0.08, readonly=True, clock="rescaled")
    found = covariance(network, mode=mode, pixel_tail=2)
    tail = [last / 2, last / 4]
    expected = expected_covariance(0.8, 0.08, 0.3, "rescaled", True, mode, 50, tail)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("clock", "tail", "left"),
    [("shared", 0, 0.87), ("shared", 1, 1.02), ("rescaled", 0, 0.41), ("rescaled", 1, 0.95)],
)
def test_the_tail_keeps_fine_detail(clock, tail, left):
    """What 50 steps of the SDE keep of a deviation of 0.05: numbers of docs/hidit.md."""
    network = Gaussian(0.0, 0.05, readonly=True, clock=clock)
    (_, _), (_, variance) = covariance(network, mode="sde", pixel_tail=tail)
    assert math.sqrt(variance) / 0.05 == pytest.approx(left, abs=0.005)


def test_the_rescaled_clock_recovers_the_joint_law():
    a, std = 0.8, 0.25
    network = Gaussian(a, std, readonly=False, clock="rescaled")
    found = covariance(network, mode="ode", heun=True, num_steps=800)
    np.testing.assert_allclose(found, [[1, a], [a, a * a + std * std]], rtol=0.003)


def test_latents_that_do_not_read_pixels_bend_the_joint_law_a_little():
    """`readonly` keeps the law of the latents, and gives the pixels' away for 2 %."""
    a, std = 0.8, 0.25
    network = Gaussian(a, std, readonly=True, clock="rescaled")
    (zz, zx), (_, xx) = covariance(network, mode="ode", heun=True, num_steps=800)
    assert zz == pytest.approx(1, rel=0.003)
    assert zx / a == pytest.approx(0.988, abs=0.004)
    assert xx / (a * a + std * std) == pytest.approx(0.986, abs=0.004)


TABLE = {  # gate -> what is left of detail of deviation .05, .08, .15, .25
    0.1: (0.91, 0.81, 0.60, 0.41),
    0.2: (0.98, 0.95, 0.86, 0.71),
    0.3: (0.99, 0.98, 0.94, 0.86),
    0.5: (1.00, 1.00, 0.99, 0.97),
}


@pytest.mark.parametrize("gate", TABLE)
def test_the_shared_clock_shrinks_detail_that_the_decoder_lacks(gate):
    """To gate / sqrt(gate**2 + (1 - gate)**2 std**2) of its deviation: the table of the docs."""
    stds = torch.tensor([0.05, 0.08, 0.15, 0.25], dtype=torch.float64)
    network = Gaussian(0.0, stds[:, None, None, None], readonly=True, gate=gate)

    def noise(stream, number):
        return torch.full((4, 3, 1, 1), float(stream == "pixels"), dtype=torch.float64)

    options = SamplingOptions(mode="ode", heun=True, num_steps=600)
    labels = torch.zeros(4, dtype=torch.int64)
    drawn = walk(network, network.decode, labels, noise, options, dtype=torch.float64)
    left = drawn.pixels[:, 0, 0, 0] / stds
    predicted = gate / (gate**2 + (1 - gate) ** 2 * stds**2).sqrt()
    torch.testing.assert_close(left, predicted, rtol=0.002, atol=0)
    assert [round(float(p), 2) for p in predicted] == list(TABLE[gate])


# Reproducible drawing


def drawn_in_batches(stub, indices, size, seed=7, **options):
    options = SamplingOptions(**{"num_steps": 5, "cfg_scale": 2.0, **options})
    labels = labels_for(40, NUM_CLASSES, "equal", seed)
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    return torch.cat([draw(stub, half, labels[p], p, seed, options) for p in parts])


@pytest.mark.parametrize("clock", ["shared", "rescaled"])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_a_picture_is_the_same_in_any_batch_and_order(mode, clock):
    stub = Stub(by_label(0.5, 0.25), by_label(0.75, 0.5), clock=clock)
    indices = np.arange(8)
    together = drawn_in_batches(stub, indices, 8, mode=mode)
    for size in (1, 3):
        assert torch.equal(drawn_in_batches(stub, indices, size, mode=mode), together)
    shuffled = np.array([7, 3, 6, 0])
    assert torch.equal(drawn_in_batches(stub, shuffled, 3, mode=mode), together[shuffled])
    assert len({picture.numpy().tobytes() for picture in together}) == 8
    assert not torch.equal(drawn_in_batches(stub, indices, 8, seed=8, mode=mode), together)


def test_every_picture_has_a_seed_of_its_own():
    assert picture_seed(0, 5) == 5
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**31 - 1, 2**32 - 1)]
    assert len({picture_seed(*pair) for pair in pairs}) == len(pairs)
    assert max(picture_seed(*pair) for pair in pairs) == 2**63 - 1


def test_no_two_steps_or_streams_share_noise():
    asked = []
    stub = Stub()

    def noise(stream, number):
        asked.append((stream, number))
        return torch.zeros(1, 3, 4, 4)

    walk(stub, half, torch.tensor([1]), noise, SamplingOptions(num_steps=10))
    assert len(set(asked)) == len(asked)
    assert {("latents", step) for step in range(10)} <= set(asked)
    assert ("pixels", 0) in asked


def test_streams_start_from_noise_of_their_own():
    seen = {}

    def velocity(x_t, sigma, labels):
        return seen.setdefault("latents", x_t)

    def x0(pixels, level, latents, labels):
        return seen.setdefault("pixels", pixels)

    stub = Stub(velocity, x0, clock="rescaled")
    draw(stub, None, [0, 1], [6, 2], 9, SamplingOptions(num_steps=4))
    for name, number in (("latents", 0), ("pixels", 2**32)):
        own = [picture_noise(picture_seed(9, index), number, (3, 4, 4)) for index in (6, 2)]
        assert torch.equal(seen[name], torch.stack(own))


def test_tensor_noise_has_the_bits_of_the_generator():
    seeds = [0, 1, picture_seed(7, 123456), 2**63 - 1]
    for stream in (0, 1, 2**32 + 5, 2**40):
        for shape in ((1,), (3,), (3, 16, 16)):
            expected = torch.stack([picture_noise(seed, stream, shape) for seed in seeds])
            assert torch.equal(philox_noise(seeds, stream, shape, "cpu"), expected)
            assert torch.equal(batch_noise(seeds, stream, shape), expected)
    with pytest.raises(ValueError, match="seed"):
        philox_noise([-1], 0, (1,), "cpu")


# Labels


@pytest.mark.parametrize("world", [1, 2, 8])
def test_equal_labels_are_fifty_of_each_class_for_any_number_of_processes(world):
    labels = labels_for(50_000, 1000, "equal", seed=3)
    shares = [labels[rank::world] for rank in range(world)]
    assert np.bincount(np.concatenate(shares), minlength=1000).tolist() == [50] * 1000


def test_equal_labels_of_any_number_differ_by_one_and_begin_alike():
    many = labels_for(1003, 10, "equal", seed=1)
    counts = np.bincount(many, minlength=10)
    assert (counts.min(), counts.max()) == (100, 101)
    assert np.array_equal(labels_for(37, 10, "equal", seed=1), many[:37])
    assert not np.array_equal(labels_for(37, 10, "equal", seed=2), many[:37])
    assert len({tuple(many[i : i + 10]) for i in range(0, 1000, 10)}) > 90, "orders differ"


def test_random_labels_are_even_and_begin_alike():
    labels = labels_for(20_000, 10, "random", seed=5)
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 2000 - 5 * 45
    assert counts.max() < 2000 + 5 * 45
    assert counts.min() != counts.max()
    assert np.array_equal(labels_for(100, 10, "random", seed=5), labels[:100])
    with pytest.raises(UsageError, match='"even"'):
        labels_for(1, 10, "even")


# Bytes


def test_bytes_are_cut_off_as_published():
    """trunc(clamp(255 (x + 1) / 2)), with no rounding to the nearest."""
    values = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, 2 * 99.9 / 255 - 1])
    x0 = values.repeat(8)[:48].reshape(1, 3, 4, 4)
    stub = Stub(x0=lambda pixels, level, latents, labels: x0.to(pixels))
    picture = draw(stub, half, [0], [0], 0, SamplingOptions(num_steps=4))
    assert picture.shape == (1, 4, 4, 3)
    expected = torch.tensor([0, 0, 127, 255, 255, 99], dtype=torch.uint8)
    assert torch.equal(picture[0].permute(2, 0, 1).flatten(), expected.repeat(8)[:48])


def test_what_is_not_finite_is_refused():
    stub = Stub(x0=lambda pixels, level, latents, labels: pixels * math.nan)
    with pytest.raises(ModelError, match="not finite"):
        draw(stub, half, [0], [0], 0, SamplingOptions(num_steps=4))


def test_the_decoder_gets_the_vaes_latents_in_fp32():
    seen = []

    def decode(latents):
        seen.append(latents)
        return latents

    stub = Stub()
    draw(stub, decode, torch.tensor([0]), torch.arange(1), 0, SamplingOptions(output="vae"))
    (latents,) = seen
    assert latents.dtype == torch.float32

    def noise(stream, number):
        return batch_noise([0], number, (3, 4, 4)).double()

    drawn = walk(stub, None, torch.tensor([0]), noise, SamplingOptions(output="vae"))
    torch.testing.assert_close(latents, (2 * drawn.latents).float())


def test_progress_counts_every_step():
    steps = []
    draw(
        *(Stub(), half, [0], [0], 0, SamplingOptions(num_steps=5)),
        on_step=lambda step, num_steps: steps.append((step, num_steps)),
    )
    assert steps == [(i, 5) for i in range(1, 6)]


# Options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "sda"}, 'unknown mode "sda"; did you mean "sde"'),
        ({"output": "pixel"}, 'unknown output "pixel"; did you mean "pixels"'),
        ({"heun": True}, "heun is a way to solve the ODE"),
        ({"num_steps": 1}, "num-steps 1 is not between 2 and 10000"),
        ({"mode": "ode", "num_steps": 0}, "num-steps 0 is not between 1"),
        ({"guidance_low": 0.8, "guidance_high": 0.2}, "no interval in"),
        ({"guidance_low": math.nan}, "no interval in"),
        ({"guidance_high": 1.5}, "no interval in"),
        ({"cfg_scale": math.nan}, "cfg-scale nan is not between"),
        ({"cfg_scale": -1.0}, "cfg-scale -1.0 is not between"),
        ({"pixel_cfg_scale": math.inf}, "pixel-cfg-scale inf is not between"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        SamplingOptions(**fields)
