"""E1: prompts, sizes, and the split of its steps."""

import pytest

from hidream.errors import InputError
from hidream.models.e1 import (
    edit_prompt,
    edit_steps,
    target_description,
)


def test_an_instruction_and_its_result_are_e1s_prompt():
    prompt = edit_prompt("Paint the middle car red.", "Three cars, the middle one red.")
    assert prompt == (
        "Editing Instruction: Paint the middle car red. "
        "Target Image Description: Three cars, the middle one red."
    )
    assert target_description(prompt) == "Three cars, the middle one red."


@pytest.mark.parametrize("prompt", ["Paint it red.", "Target Image Description:  "])
def test_a_plain_instruction_has_no_target(prompt):
    assert target_description(prompt) is None


def test_an_empty_half_of_a_prompt_is_an_error():
    with pytest.raises(InputError, match="target description is empty"):
        edit_prompt("Paint it red", " ")
    with pytest.raises(InputError, match="instruction is empty"):
        edit_prompt(" . ", "A red car")


@pytest.mark.parametrize(
    ("num_steps", "strength", "edits"), [(28, 0.3, 19), (28, 0.0, 28), (10, 1.0, 0), (50, 0.3, 35)]
)
def test_the_split_of_the_steps(num_steps, strength, edits):
    assert edit_steps(num_steps, strength) == edits
