"""Rotary positions: rotations that make scores depend on distances, dealt over three axes."""

import pytest
import torch

from hidream.nn.rope import (
    axial_angles,
    cos_sin,
    interleaved_mrope,
    inverse_frequencies,
    rotate,
    rotate_pairs,
)

HEAD_DIM, THETA, SECTIONS = 32, 5e6, (6, 5, 5)


def rope_at(time, row, column):
    positions = torch.tensor([[time], [row], [column]])
    return interleaved_mrope(positions, HEAD_DIM, THETA, SECTIONS)


def vectors(count, seed=0):
    return torch.randn(count, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def test_frequencies():
    found = inverse_frequencies(8, 10_000.0, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_rotation_by_hand():
    """(x_i, x_{i+d/2}) turns as a point of the plane does."""
    angle = torch.tensor([[0.3, 1.1]])
    turned = rotate(torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), cos_sin(angle))[0, 0]
    expected = [torch.cos(angle[0, 0]), -2 * torch.sin(angle[0, 1])]
    expected += [torch.sin(angle[0, 0]), 2 * torch.cos(angle[0, 1])]
    torch.testing.assert_close(turned, torch.stack(expected))


def test_position_zero_turns_nothing_and_lengths_stay():
    x = vectors(1)
    assert torch.equal(rotate(x, rope_at(0, 0, 0)), x)
    turned = rotate(x, rope_at(17, 4099, 4101))
    torch.testing.assert_close(turned.norm(), x.norm())
    assert (turned - x).abs().max() > 0.1


@pytest.mark.parametrize("shift", [(5, 5, 5), (0, 9, 0), (3, 0, 7)])
def test_scores_depend_on_distances_alone(shift):
    q, k = vectors(2).split(1)
    here, there = (2, 3, 4), (8, 5, 1)

    def score(move):
        at_q, at_k = (
            rope_at(*(p + m for p, m in zip(at, move, strict=True))) for at in (here, there)
        )
        return (rotate(q, at_q) * rotate(k, at_k)).sum()

    torch.testing.assert_close(score(shift), score((0, 0, 0)), rtol=1e-4, atol=1e-4)
    moved_apart = (rotate(q, rope_at(2, 3, 9)) * rotate(k, rope_at(*there))).sum()
    assert (moved_apart - score((0, 0, 0))).abs() > 1e-2


def test_axes_are_interleaved():
    """Frequencies go time, row, column in turn; row and column have 5 each, time keeps the rest."""
    half = HEAD_DIM // 2
    for axis, mine in ((0, {0, 3, 6, 9, 12, 15}), (1, {1, 4, 7, 10, 13}), (2, {2, 5, 8, 11, 14})):
        position = [0, 0, 0]
        position[axis] = 1000
        cos, sin = rope_at(*position)
        moved = {i for i in range(half) if cos[0, i] != 1 or sin[0, i] != 0}
        assert moved == mine
        assert torch.equal(cos[0, :half], cos[0, half:])


def test_sections_may_be_uneven():
    """Time takes what row and column leave, also past the interleaved part."""
    cos, _ = interleaved_mrope(torch.tensor([[0], [1], [0]]), 16, 100.0, (4, 2, 2))
    assert [i for i in range(8) if cos[0, i] != 1] == [1, 4]


def test_text_is_ordinary_rope():
    positions = torch.arange(5).expand(3, -1)
    angles = torch.arange(5)[:, None] * inverse_frequencies(HEAD_DIM, THETA, torch.device("cpu"))
    for ours, plain in zip(
        interleaved_mrope(positions, HEAD_DIM, THETA, SECTIONS), cos_sin(angles), strict=True
    ):
        assert torch.equal(ours, plain)


def test_batches_of_positions():
    positions = torch.randint(0, 5000, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    cos, _ = interleaved_mrope(positions, HEAD_DIM, THETA, SECTIONS)
    assert cos.shape == (2, 6, HEAD_DIM)
    alone = interleaved_mrope(positions[:, 1], HEAD_DIM, THETA, SECTIONS)[0]
    assert torch.equal(cos[1], alone)


def test_half_precision_is_turned_in_fp32():
    x = vectors(1).bfloat16()
    turned = rotate(x, rope_at(4100, 4101, 4102))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rope_at(4100, 4101, 4102)).bfloat16())


def test_neighbouring_pairs_by_hand():
    """(x_i, x_{i+1}) turns by position · theta^(−2i/dim) of its axis; what is outside stays."""
    rope = axial_angles(torch.tensor([[3], [2]]), (4, 2), 100.0)
    turned = rotate_pairs(torch.tensor([[[5.0, 6, 1, 0, 0, 2, 3, 0, 7]]]), rope, first=2)[0, 0]
    angles = torch.tensor([3.0, 0.3, 2.0])
    expected = torch.tensor([5.0, 6, 0, 0, 0, 0, 0, 0, 7])
    expected[2:4] = torch.stack([angles[0].cos(), angles[0].sin()])
    expected[4:6] = 2 * torch.stack([-angles[1].sin(), angles[1].cos()])
    expected[6:8] = 3 * torch.stack([angles[2].cos(), angles[2].sin()])
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_pairs_every_way(dtype, monkeypatch):
    """As complex numbers, as traced, and in place: the same, and only where it was said to be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator).to(dtype)
    before = x.clone()
    rope = axial_angles(torch.arange(10).view(2, 5), (6, 4), 100.0)
    turned = rotate_pairs(x, rope, first=4)
    assert torch.equal(x, before)
    torch.testing.assert_close(rotate_pairs(x.clone(), rope, first=4, overwrite=True), turned)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate_pairs(x, rope, first=4), turned)
