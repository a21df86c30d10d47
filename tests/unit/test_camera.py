"""Named camera language: spelling, refusals, and the words that reach the model."""

import re

import pytest

from hidream.camera import CAMERA
from hidream.errors import UsageError
from hidream.request import GenerateRequest


def test_the_papers_fifteen():
    assert {field: len(values) for field, values in CAMERA.items()} == {
        "shot": 7,
        "angle": 4,
        "view": 4,
    }


@pytest.mark.parametrize("field", CAMERA)
def test_every_value_is_known_by_name_and_by_its_words(field):
    for name, words in CAMERA[field].items():
        for spelt in (name, words, words.title(), name.replace("-", "_"), f" {words}  "):
            request = GenerateRequest(prompt="a cat", **{field: spelt})
            assert getattr(request, field) == name, spelt
            first = words[0].upper() + words[1:]
            assert request.full_prompt == f"{first}. a cat"


def test_they_stand_together_before_the_prompt():
    request = GenerateRequest(prompt="a cat", view="side", shot="Close Up", angle="bird’s-eye view")
    assert request.full_prompt == "Close-up, bird's-eye view, side view. a cat"
    assert request.prompt == "a cat"
    assert GenerateRequest.from_dict(request.to_dict()) == request
    assert GenerateRequest(prompt="a cat").full_prompt == "a cat"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shot": "closeup"}, 'unknown shot "closeup"; did you mean'),
        ({"angle": "dutch"}, 'unknown angle "dutch"; known: high'),
        ({"view": ""}, "known: front"),
        ({"view": 3}, "view=3 is not a name"),
    ],
)
def test_others_are_refused_with_the_nearest(values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        GenerateRequest(prompt="a cat", **values)
