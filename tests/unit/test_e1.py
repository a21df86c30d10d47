"""E1: prompts, sizes, and the split of its steps."""

import math

import pytest

from hidream.errors import InputError, UsageError
from hidream.models.e1 import (
    check_edit_size,
    edit_prompt,
    edit_size,
    edit_steps,
    parse_refined,
    target_description,
)
from hidream.models.i1.config import E1_1, E1_FULL

THREE = (
    "A street with three cars.\nPaint the middle car red.\n\n  Three cars, the middle one red.\n"
)


def test_the_refined_instruction_becomes_e1s_prompt():
    refined = parse_refined(THREE)
    assert refined.source == "A street with three cars."
    assert refined.prompt == (
        "Editing Instruction: Paint the middle car red. "
        "Target Image Description: Three cars, the middle one red."
    )
    assert target_description(refined.prompt) == "Three cars, the middle one red."


@pytest.mark.parametrize("prompt", ["Paint it red.", "Target Image Description:  "])
def test_a_plain_instruction_has_no_target(prompt):
    assert target_description(prompt) is None


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "has 0 lines"),
        ("a street\npaint it red", "has 2 lines"),
        (f"Here you are:\n{THREE}", "has 4 lines"),
        ("Line 1: a street\nLine 2: paint it\nLine 3: red", "line 1 .* has a label"),
        ("a street\n---\na red street", "line 2 .* has no words"),
    ],
)
def test_any_other_answer_is_an_error(answer, problem):
    with pytest.raises(InputError, match=problem):
        parse_refined(answer)


def test_an_empty_half_of_a_prompt_is_an_error():
    with pytest.raises(InputError, match="target description is empty"):
        edit_prompt("Paint it red", " ")
    with pytest.raises(InputError, match="instruction is empty"):
        edit_prompt(" . ", "A red car")


def test_published_sizes():
    assert edit_size((768, 768), E1_FULL.max_patches) == (768, 768)
    assert edit_size((1600, 900), E1_FULL.max_patches, keep_aspect=False) == (768, 768)
    assert edit_size((512, 512), E1_1.max_patches) == (1024, 1024)


@pytest.mark.parametrize("max_patches", [E1_FULL.max_patches, E1_1.max_patches])
def test_a_size_keeps_the_aspect_and_uses_what_there_is(max_patches):
    limit = max_patches // 2 * 256
    for step in range(-12, 13):  # aspects from 1:64 to 64:1
        source = (round(4096 * 2 ** (step / 2)), 4096)
        aspect = source[0] / source[1]
        width, height = edit_size(source, max_patches)
        assert width % 16 == height % 16 == 0
        assert 0.7 * limit < width * height <= limit
        assert abs(math.log(width / height / aspect)) <= math.log(1.02) + 1e-9
        if 1 / 3 < aspect < 3:
            assert width * height > 0.94 * limit
        check_edit_size(width, height, max_patches)


def test_a_size_over_the_limit_names_one_below():
    with pytest.raises(UsageError, match=r"8192 patches; .* edits 4608\. Choose 768x768"):
        check_edit_size(1024, 1024, E1_FULL.max_patches)


@pytest.mark.parametrize(
    ("num_steps", "strength", "edits"), [(28, 0.3, 19), (28, 0.0, 28), (10, 1.0, 0), (50, 0.3, 35)]
)
def test_the_split_of_the_steps(num_steps, strength, edits):
    assert edit_steps(num_steps, strength) == edits
