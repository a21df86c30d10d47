"""Schedules: equal to the published ones, and what every schedule promises."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from safetensors import safe_open

from hidream.errors import UsageError
from hidream.sampling import (
    at_timesteps,
    custom_sigmas,
    dev_sigmas,
    full_sigmas,
    i1_distilled_sigmas,
    i1_sigmas,
    i1_timesteps,
    linear_sigmas,
    shift_sigma,
    truncate,
)

FIXTURES = Path(__file__).parents[3] / "shared" / "parity" / "o1"


@pytest.mark.skipif(not FIXTURES.exists(), reason=f"no parity fixtures at {FIXTURES}")
@pytest.mark.parametrize(
    ("case", "sigmas"),
    [
        ("t2i_full", full_sigmas(10, 3.0)),
        ("edit_full", full_sigmas(6, 3.0)),
        ("subject_3refs", full_sigmas(4, 1.0)),
        ("layout_2refs", full_sigmas(4, 1.0)),
        ("t2i_dev_flash", dev_sigmas()),
        ("edit_dev_flow_match", dev_sigmas()),
    ],
)
def test_equals_the_reference_to_the_bit(case, sigmas):
    with safe_open(FIXTURES / f"{case}.safetensors", "pt") as stored:
        assert torch.equal(sigmas, stored.get_tensor("sigmas"))


def test_full_sigmas_known_values():
    # From the published code; holds where the fixtures are not.
    expected = [0.99988878, 0.93738270, 0.85702026, 0.74987489, 0.59987986, 0.37490615, 0.0]
    torch.testing.assert_close(full_sigmas(6, 3.0), torch.tensor(expected), atol=6e-8, rtol=0)


def distilled(num_steps):
    return i1_distilled_sigmas(num_steps, 6.0)


@pytest.mark.parametrize("num_steps", [1, 2, 27, 28, 50, 1000])
@pytest.mark.parametrize(
    "schedule",
    [
        full_sigmas,
        dev_sigmas,
        linear_sigmas,
        i1_sigmas,
        partial(i1_sigmas, official=True),
        distilled,
    ],
)
def test_every_schedule_falls_strictly_to_zero(schedule, num_steps):
    sigmas = schedule(num_steps)
    assert (sigmas.shape, sigmas.dtype) == ((num_steps + 1,), torch.float32)
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_dev_sigmas_known_values():
    timesteps = 1000 * dev_sigmas().double()
    assert timesteps[[0, 1, 14, 27, 28]].round().tolist() == [999, 987, 737, 8, 0]
    assert round(float(timesteps.sum())) == 18791


def test_dev_sigmas_follow_the_same_curve_at_other_step_counts():
    assert torch.equal(dev_sigmas(14), dev_sigmas(28)[::2])


def test_shift_keeps_the_ends_and_multiplies_noise_to_signal():
    assert (shift_sigma(0.0, 3.0), shift_sigma(1.0, 3.0)) == (0, 1)
    assert shift_sigma(0.3, 1.0) == pytest.approx(0.3)
    sigma, shift = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 3.0
    shifted = shift_sigma(sigma, shift)
    torch.testing.assert_close(shifted / (1 - shifted), shift * sigma / (1 - sigma))


def test_custom_sigmas_may_leave_out_the_zero():
    expected = torch.tensor([1.0, 0.5, 0.0])
    assert torch.equal(custom_sigmas([1.0, 0.5]), expected)
    assert torch.equal(custom_sigmas([1.0, 0.5, 0.0]), expected)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [1.5],
        [-0.1],
        [float("nan")],
        [float("inf")],
        [0.5, 0.5],
        [0.5, 0.7],
        [0.5, 0.0, 0.0],
    ],
)
def test_custom_sigmas_refuses(values):
    with pytest.raises(UsageError):
        custom_sigmas(values)


def test_custom_sigmas_refuses_values_that_fp32_cannot_tell_apart():
    with pytest.raises(UsageError):
        custom_sigmas([0.5, 0.5 - 1e-12])


@pytest.mark.parametrize("schedule", [full_sigmas, dev_sigmas, linear_sigmas, i1_sigmas, distilled])
def test_schedules_refuse_no_steps(schedule):
    with pytest.raises(UsageError, match="num_inference_steps"):
        schedule(0)


@pytest.mark.parametrize(
    ("strength", "kept"), [(1.0, 100), (0.57, 57), (0.5, 50), (0.001, 1), (0.0, 0)]
)
def test_truncate_keeps_that_share_of_the_steps(strength, kept):
    sigmas = full_sigmas(100)
    assert torch.equal(truncate(sigmas, strength), sigmas[100 - kept :])


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_truncate_refuses(strength):
    with pytest.raises(UsageError, match="strength"):
        truncate(full_sigmas(4), strength)


# I1 and E1


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 28, 50, 333])
def test_i1_full_equals_diffusers_to_the_bit(num_steps, shift):
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    theirs.set_timesteps(num_steps)
    assert torch.equal(i1_sigmas(num_steps, shift), theirs.sigmas)
    assert torch.equal(i1_timesteps(num_steps, shift), theirs.timesteps)


@pytest.mark.parametrize(("num_steps", "shift"), [(28, 6.0), (16, 3.0), (1, 3.0), (40, 1.7)])
def test_i1_distilled_equals_diffusers_to_the_bit(num_steps, shift):
    theirs = FlowMatchLCMScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    sigmas = i1_distilled_sigmas(num_steps, shift)
    assert torch.equal(sigmas, theirs.sigmas)
    # The network is shown 1000 * sigma here, nothing cut off.
    torch.testing.assert_close(theirs.timesteps, 1000 * sigmas[:-1], rtol=1e-7, atol=0)


def test_i1_known_values():
    sigmas = i1_sigmas(50)
    assert float(sigmas[0]) == pytest.approx(1 - 1e-6, abs=3e-8)
    assert i1_timesteps(50)[:4].tolist() == [999, 993, 986, 979]
    official = i1_sigmas(50, official=True)
    assert float(official[0]) == pytest.approx(0.99989, abs=5e-6)
    even = np.linspace(0.9996664, 0, 51)[25]
    assert float(official[25]) == pytest.approx(3.158193 * even / (1 + 2.158193 * even), abs=1e-6)
    assert i1_timesteps(50, official=True)[0] == 999
    assert float(i1_distilled_sigmas(28, 6.0)[-2]) == pytest.approx(0.0348, abs=5e-5)
    assert float(i1_distilled_sigmas(16, 3.0)[-2]) == pytest.approx(0.0089, abs=5e-5)


def test_a_network_can_be_shown_whole_timesteps():
    def shown(x_t, sigma):
        assert sigma.dtype == torch.float32
        return float(1000 * sigma)

    sigmas, timesteps = i1_sigmas(28), i1_timesteps(28)
    for part in (sigmas, truncate(sigmas, 0.4), truncate(sigmas, 0.0)):
        denoise = at_timesteps(shown, part, timesteps)
        seen = [denoise(None, sigma) for sigma in part[:-1]]
        assert seen == pytest.approx(timesteps[28 - len(seen) :].tolist(), abs=1e-4)
