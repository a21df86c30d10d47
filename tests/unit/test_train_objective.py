"""How noise levels are drawn, by their quantiles, and what a stage may change of the objective."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from hidream.errors import UsageError
from hidream.train.config import parse_recipe
from hidream.train.draws import noise_levels
from hidream.train.losses import velocity_weight
from hidream.train.objective import flux_shift, sd3_shift

STAGE = {"size": 32, "steps": 6, "batch_size": 4, "learning_rate": 1e-3, "tasks": {"edit": 1}}
QUANTILES = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])


def recipe_of(objective, *stages):
    rows = [STAGE | {"objective": stage} for stage in stages or [{}]]
    return parse_recipe({"name": "x", "model": "o1-tiny", "objective": objective, "stages": rows})


def drawn(objective, num_tokens=256, step=0):
    """t of 4096 samples, in their order."""
    return 1 - noise_levels(recipe_of(objective), 4096, step, num_tokens).double().numpy()


def normals():
    return np.array([NormalDist().inv_cdf(q) for q in QUANTILES])


def test_logit_normal_timesteps_have_its_quantiles_one_in_each_stratum():
    t = drawn({"t_mean": -0.5, "t_std": 1.2})
    wanted = 1 / (1 + np.exp(-(-0.5 + 1.2 * normals())))
    np.testing.assert_allclose(np.quantile(t, QUANTILES), wanted, atol=2e-3)
    assert (np.diff(t) > 0).all()  # stratum i for sample i
    assert not np.array_equal(t, drawn({"t_mean": -0.5, "t_std": 1.2}, step=1))


def test_uniform_timesteps_give_late_steps_their_share():
    t = drawn({"timesteps": "uniform"})
    np.testing.assert_allclose(np.quantile(t, QUANTILES), QUANTILES, atol=5e-4)
    assert np.mean(t > 0.8) == pytest.approx(0.2, abs=1e-3)
    assert np.mean(drawn({}) > 0.8) < 0.005  # the paper's reason for uniform ones in SFT


@pytest.mark.parametrize("timesteps", ["uniform", "logit-normal"])
def test_a_shift_moves_every_quantile_towards_noise(timesteps):
    t = np.quantile(drawn({"timesteps": timesteps}), QUANTILES)
    shifted = np.quantile(drawn({"timesteps": timesteps, "shift": 3}), QUANTILES)
    np.testing.assert_allclose(shifted, t / (t + 3 * (1 - t)), atol=1e-3)


def test_shifts_by_the_number_of_tokens():
    """FLUX's two ends; SD3's factor of two for twice the side."""
    assert flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flux_shift(4096) == pytest.approx(math.exp(1.15))
    assert [sd3_shift(n) for n in (256, 1024, 4096)] == [1, 2, 4]
    for name, function in (("flux", flux_shift), ("sd3", sd3_shift)):
        expected = drawn({"shift": function(1024)})
        np.testing.assert_array_equal(drawn({"shift": name}, 1024), expected)


def test_each_sample_is_shifted_by_its_own_number_of_tokens():
    lengths = [256, 1024] * 2048
    t = drawn({"shift": "sd3"}, lengths)
    np.testing.assert_array_equal(t[::2], drawn({})[::2])
    np.testing.assert_array_equal(t[1::2], drawn({"shift": 2.0})[1::2])


def test_uniform_levels_weigh_as_their_integral_says():
    """The mean of 1 / max(1 - t, delta)^2 over uniform t is 2 / delta - 1."""
    sigma = noise_levels(recipe_of({"timesteps": "uniform"}), 20_000, 0, 256)
    mean = velocity_weight(sigma.double(), 0.05).mean().item()
    assert mean == pytest.approx(2 / 0.05 - 1, rel=1e-3)


def test_a_stage_changes_what_it_names_and_keeps_the_rest():
    recipe = recipe_of({"t_mean": -1, "delta": 0.1}, {}, {"timesteps": "uniform", "noise_scale": 2})
    first, second = recipe.objective_of(0), recipe.objective_of(1)
    assert first == recipe.objective
    assert (second.timesteps, second.noise_scale, second.delta) == ("uniform", 2.0, 0.1)
    assert recipe.at(5).objective == first
    assert recipe.at(6).objective == second
    assert parse_recipe(recipe.to_dict()) == recipe
    a, b = (noise_levels(recipe, 64, step, 256) for step in (5, 6))
    assert torch.quantile(a, 0.05) > torch.quantile(b, 0.05) + 0.2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"timestep": "uniform"}, 'unknown key "stages.0.objective.timestep"; did you mean'),
        ({"timesteps": "normal"}, 'stages.0.objective.timesteps = "normal" must be one of logit'),
        ({"shift": "flu"}, 'stages.0.objective.shift = "flu" must be a positive number or one of'),
        ({"shift": 0}, "stages.0.objective.shift = 0.0 must be a positive"),
        ({"shift": True}, "stages.0.objective.shift = True is not a float or str"),
        ({"lpips_onset": 1.5}, "must be between 0 and 1"),
        ({"delta": 0}, "must be positive"),
        ({"lm_weight": -1}, "must be 0 or more"),
    ],
)
def test_what_is_wrong_with_a_stage_is_named(stage, message):
    with pytest.raises(UsageError) as caught:
        recipe_of({}, stage)
    assert message in str(caught.value)
