"""The next token: drawn by its probability, from what top_k and top_p leave."""

import numpy as np
import pytest
import torch

from hidream.sampling import choose_token, uniform

P = torch.tensor([0.15, 0.5, 0.05, 0.3])
LOGITS = P.log()


def shares(num=2000, **options):
    """How often each token is drawn by evenly spaced draws."""
    draws = [(i + 0.5) / num for i in range(num)]
    ids = [choose_token(LOGITS, draw, **options) for draw in draws]
    return np.bincount(ids, minlength=4) / num


def test_greedy_takes_the_likeliest_whatever_is_drawn():
    for draw in (0.0, 0.5, 0.999999):
        assert choose_token(LOGITS, draw) == 1
        assert choose_token(LOGITS, draw, temperature=1e-300) == 1
        assert choose_token(LOGITS, draw, temperature=1e-5) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_probabilities(temperature):
    expected = (LOGITS / temperature).softmax(0).numpy()
    assert shares(temperature=temperature) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.79}, [1, 3]),
        ({"top_p": 0.81}, [0, 1, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 0.5 of the 0.8 that are left reach it
        ({"top_k": 2, "top_p": 0.65}, [1, 3]),
    ],
)
def test_what_is_left_keeps_its_proportions(options, left):
    expected = torch.zeros(4)
    expected[left] = P[left] / P[left].sum()
    assert shares(temperature=1.0, **options) == pytest.approx(expected.numpy(), abs=1e-3)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1000,), float("-inf"))
    logits[[3, 700]] = torch.tensor([0.1, 0.2])
    largest = 1 - 2**-32
    drawn = {choose_token(logits, d, temperature=1.0) for d in (0.0, 0.3, 0.7, largest)}
    assert drawn == {3, 700}
    assert choose_token(logits * 1000, largest, temperature=1.0) == 700


def test_half_precision_logits():
    assert choose_token(LOGITS.bfloat16(), 0.2, temperature=1.0) == 1


def test_uniform_numbers_are_a_function_of_seed_and_place():
    numbers = [uniform(7, i) for i in range(4000)]
    assert numbers == [uniform(7, i) for i in range(4000)]
    assert len(set(numbers)) > 3990
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02)
    assert np.corrcoef(numbers[:-1], numbers[1:])[0, 1] == pytest.approx(0, abs=0.05)
    assert uniform(8, 0) != numbers[0]
    assert uniform(7 + 2**32, 0) != numbers[0]
    # The generator's published answers for the counters 0 and (all key and counter words 0).
    assert uniform(0, 0) == 0x6627E8D5 / 2**32
    with pytest.raises(ValueError, match="seed"):
        uniform(2**63, 0)
