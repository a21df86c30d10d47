"""Guidance of E1, against its formulae written out number by number."""

import math

import pytest
import torch

from hidream.sampling import (
    Row,
    edit_cfg,
    edit_guide,
    edit_rows,
    i1_sigmas,
    in_two_phases,
    initial_noise,
    unipc,
)

NONE, SOURCE, BOTH = initial_noise([1, 2, 3], (2, 3, 2, 3)) * torch.tensor([1.0, 2.0, 0.5]).reshape(
    3, 1, 1, 1, 1
)


def one_value(b, c, y, x, g, ig, clip):
    """The guided velocity of one picture, channel and pixel."""
    u, i, f = (float(v[b, c, y, x]) for v in (NONE, SOURCE, BOTH))
    if not clip:
        return u + ig * (i - u) + g * (f - i)
    channels = range(NONE.shape[1])
    towards = [
        float(SOURCE[b, k, y, x]) + g * (float(BOTH[b, k, y, x]) - float(SOURCE[b, k, y, x]))
        for k in channels
    ]
    long = math.sqrt(sum(value**2 for value in towards))
    limit = math.sqrt(sum(float(BOTH[b, k, y, x]) ** 2 for k in channels))
    return u + ig * (towards[c] * min(1.0, limit / long) - u)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("g", "ig"), [(5.0, 4.0), (3.0, 1.5), (1.2, 1.0)])
def test_the_formula_in_every_pixel(g, ig, clip):
    guided = edit_guide(NONE, SOURCE, BOTH, g, ig, clip)
    expected = torch.empty_like(guided)
    for place in torch.cartesian_prod(*map(torch.arange, NONE.shape)).tolist():
        expected[tuple(place)] = one_value(*place, g, ig, clip)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_clipping_never_lengthens_and_often_shortens():
    clipped = edit_guide(torch.zeros_like(NONE), SOURCE, BOTH, 5.0, 1.0, True).norm(dim=1)
    free = (SOURCE + 5 * (BOTH - SOURCE)).norm(dim=1)
    assert (clipped <= BOTH.norm(dim=1) + 1e-5).all()
    assert (clipped <= free + 1e-5).all()
    assert (clipped < 0.99 * free).any()
    nothing = torch.zeros_like(NONE)
    assert torch.equal(edit_guide(nothing, nothing, nothing, 5.0, 4.0, True), nothing)


def test_what_each_row_sees():
    assert edit_rows(5.0) == (Row(False, "positive"), Row(True, "negative"), Row(True, "positive"))
    assert edit_rows(5.0, False)[0] == Row(False, "negative")
    assert edit_rows(1.0) == (Row(True, "positive"),)


def test_where_guidance_is_off_the_full_branch_is_asked_alone():
    asked = []

    def full(x_t, sigma):
        asked.append("full")
        return BOTH

    def all_three(x_t, sigma):
        asked.append("all")
        return NONE, SOURCE, BOTH.bfloat16()

    denoise = edit_cfg(full, all_three, 5.0, 4.0, interval=(0.25, 0.75))
    for sigma, who in ((0.1, "full"), (0.5, "all"), (0.9, "full")):
        velocity = denoise(NONE, torch.tensor(sigma))
        assert asked.pop() == who
        assert (who == "full") == torch.equal(velocity, BOTH)
    assert velocity.dtype == torch.float32
    assert edit_cfg(full, all_three, 1.0, 4.0) is full


def test_the_refinement_takes_over_and_the_solver_remembers():
    asked = []

    def field(name, slope):
        def velocity(x_t, sigma):
            asked.append(name)
            return slope * x_t + sigma

        return velocity

    sigmas, x_t = i1_sigmas(7), initial_noise([1], (3,))
    phases = in_two_phases(field("edit", 1.0), field("refine", 2.0), sigmas, 4)
    together = unipc(phases, x_t, sigmas)
    assert asked == ["edit"] * 4 + ["refine"] * 3
    states = []
    unipc(field("edit", 1.0), x_t, sigmas, on_step=lambda step, x_t, x0: states.append(x_t))
    apart = unipc(field("refine", 2.0), states[3], sigmas[4:])
    assert not torch.allclose(together, apart, atol=1e-4)
    asked.clear()
    unipc(in_two_phases(field("edit", 1.0), field("refine", 2.0), sigmas, 7), x_t, sigmas)
    assert asked == ["edit"] * 7
