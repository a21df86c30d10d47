"""Schedules: equal to the published ones, and what every schedule promises."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hidream.errors import UsageError
from hidream.sampling import (
    custom_sigmas,
    dev_sigmas,
    full_sigmas,
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


@pytest.mark.parametrize("num_steps", [1, 2, 27, 28, 50, 1000])
@pytest.mark.parametrize("schedule", [full_sigmas, dev_sigmas, linear_sigmas])
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


@pytest.mark.parametrize("schedule", [full_sigmas, dev_sigmas, linear_sigmas])
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
