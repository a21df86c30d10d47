"""E1: prompts, sizes, and the split of its steps."""

import numpy as np
import pytest
from PIL import Image

from hidream import registry
from hidream.errors import InputError, UsageError
from hidream.models.e1 import (
    edit_prompt,
    edit_steps,
    published_source,
    target_description,
)
from hidream.request import GenerateRequest, check_ability, resolve, warnings_of


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


# -- as its own scripts do -------------------------------------------------------------------------


def asked(**fields):
    return GenerateRequest(prompt="redden it", references=("a.png",), as_published=True, **fields)


def resolved(request, name, source):
    spec = registry.find(name)
    return resolve(request, spec.defaults_for("edit"), spec.patch_size, source_size=source)


@pytest.mark.parametrize(
    ("name", "source", "size"),
    [
        ("e1-full", (1500, 1000), (768, 768)),
        ("e1-full", (64, 640), (768, 768)),
        ("e1-1", (1500, 1000), (1248, 832)),
        ("e1-1", (4097, 2049), (1440, 720)),  # of 2048x1024, its half
        ("e1-1", (500, 500), (1024, 1024)),
    ],
)
def test_the_sizes_of_its_scripts(name, source, size):
    for fields in ({}, {"width": 512, "height": 256}):
        once = resolved(asked(**fields), name, source)
        assert (once.width, once.height) == size
        assert resolved(once, name, source) == once
        told = warnings_of(asked(**fields), once)
        assert any("is scaled to" in text for text in told) == bool(fields)
        check_ability(registry.find(name), once)


@pytest.mark.parametrize("fields", [{"mask": "m.png"}, {"init_image": "b.png"}, {"expand": 16}])
def test_what_its_scripts_do_not_know(fields):
    request = resolved(asked(**fields), "e1-1", (512, 512))
    with pytest.raises(UsageError, match="own script knows no"):
        check_ability(registry.find("e1-1"), request)


def test_a_stretched_source_is_all_there():
    source = Image.new("L", (40, 10))
    source.paste(255, (20, 0, 40, 10))
    seen = np.asarray(published_source(source, (32, 32), "stretch", 32))
    assert (seen[:, :12] == 0).all()
    assert (seen[:, 20:] == 255).all()


def test_a_cropped_source_is_its_middle():
    """Columns of a picture that is a little too wide: as many are missing on the left and right."""
    columns = np.tile(np.arange(100, dtype=np.uint8), (32, 1))
    seen = np.asarray(published_source(Image.fromarray(columns), (64, 32), "crop", 45), int)
    assert (seen == np.arange(18, 82)).all()


def test_large_sources_are_halved_first():
    """By the mean of four pixels each, so that a pattern of single pixels is grey."""
    pattern = np.indices((256, 192)).sum(0) % 2 * 254
    source = Image.fromarray(pattern.astype(np.uint8))
    assert published_source(source, (64, 80), "crop", 96).size == (64, 80)
    assert set(np.unique(published_source(source, (48, 64), "crop", 48))) == {127}
