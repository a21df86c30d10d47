"""Scripts: how they are written, what is refused, and the words that reach the model."""

import json
import re

import pytest

from hidream.errors import InputError, UsageError
from hidream.storyboard import Panel, compose, read_script

FULL = {
    "title": "The door",
    "style": "ink wash",
    "subject": "a girl in a red coat",
    "panels": [
        "she wakes up",
        {"prompt": "she opens the door.", "shot": "Close Up", "angle": "low"},
        {"prompt": "the sea", "view": "front"},
    ],
}


def prompts(text, **options):
    return [panel.prompt for panel in read_script(text, **options).panels]


def test_plain_text_has_a_panel_a_line_or_a_paragraph():
    assert prompts("a cat\n  a dog \na cow\n") == ["a cat", "a dog", "a cow"]
    assert prompts("a cat\non a mat\n\n \n\na dog\r\n\r\na cow") == [
        "a cat on a mat",
        "a dog",
        "a cow",
    ]
    assert prompts("[wide] a cat\na dog") == ["[wide] a cat", "a dog"]


def test_json_has_everything():
    script = read_script(json.dumps(FULL))
    assert script.panels[1] == Panel(prompt="she opens the door.", shot="close-up", angle="low")
    assert (script.title, script.style, script.subject) == tuple(list(FULL.values())[:3])
    assert read_script(json.dumps(script.to_dict())) == script
    assert prompts(' ["a cat", {"prompt": "a dog"}]') == ["a cat", "a dog"]
    assert prompts('["a cat",\n"a dog"]', is_json=False) == ['["a cat",', '"a dog"]']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "2 … 64 panels; the script has 0"),
        ("one", "the script has 1"),
        ("a\n" * 65, "the script has 65"),
        ("a\x1bb\nc", "panel 1's prompt holds a control character, U+001B"),
        ('{"panels": ["a", "b"]', "the script is not JSON"),
        ("[" * 100_000, None),
        ('{"panels": "a"}', "no list of panels"),
        ('{"panel": ["a", "b"]}', 'unknown key "panel"; did you mean "panels"'),
        ('{"panels": ["a", "b"], "style": 7}', "the script's style is int"),
        ('{"panels": ["a", "b"], "title": ""}', "the script's title is empty"),
        ('["a", 7]', "panel 2 is neither a text nor an object"),
        ('["a", ""]', "panel 2's prompt is empty"),
        ('["a", {"shot": "close-up"}]', "panel 2 has no prompt"),
        ('["a", {"prompt": 3}]', "panel 2: its prompt is int"),
        (
            '["a", {"prompt": "b", "shot": "closup"}]',
            'panel 2: unknown shot "closup"; did you mean',
        ),
        ('["a", {"prompt": "b", "shoot": "full"}]', 'panel 2 has an unknown key "shoot"'),
    ],
)
def test_scripts_that_are_none(text, message):
    is_json = True if message is None else None
    with pytest.raises(InputError, match=re.escape(message or "not JSON")):
        read_script(text, is_json=is_json)


def test_the_prompt_tells_the_arrangement_then_each_panel():
    request = compose(read_script(json.dumps(FULL)), columns=2)
    assert request.prompt == (
        "A storyboard of 3 panels in a grid of 2 rows and 2 columns, read row by row from the top "
        "left, with plain white gutters between the panels. The story: The door. "
        "Style of all panels: ink wash. In all panels: a girl in a red coat. "
        "Characters, objects and style stay the same from panel to panel. "
        "Panel 1, top left: she wakes up. "
        "Panel 2, top right: Close-up, low angle. she opens the door. "
        "Panel 3, bottom left: Front view. the sea."
    )
    assert request.full_prompt == request.prompt
    assert (request.sheet.number, request.sheet.columns) == (3, 2)


def test_places_in_words():
    def places(number, columns, **options):
        prompt = compose([f"p{n}" for n in range(number)], columns=columns, **options).prompt
        return re.findall(r"Panel \d+, ([^:]*):", prompt)

    assert places(2, 2) == ["left", "right"]
    assert places(2, 1) == ["top", "bottom"]
    assert places(9, 3)[3:6] == ["middle left", "centre", "middle right"]
    assert places(8, 4)[5] == "row 2, column 2"
    assert "gutters" not in compose("a\nb", gutter=0).prompt
    assert "a grid of 2 rows and 1 column," in compose("a\nb").prompt


def test_fields_of_the_request_pass_through():
    request = compose("a\nb", shot="full", seed=3, references=("x.png",), panel_size=(64, 32))
    assert (request.seed, request.references, request.shot) == (3, ("x.png",), None)
    assert request.prompt.count("Full shot.") == 2
    assert "reference pictures" in request.prompt
    assert (request.sheet.width, request.sheet.height) == (64, 32)
    own = compose([{"prompt": "a", "shot": "medium"}, "b"], shot="full").prompt
    assert "Medium shot. a" in own
    assert "Full shot. b" in own
    assert compose("a\nb\nc\nd", width=1024, height=128).sheet.columns == 4
    with pytest.raises(UsageError, match="unknown shot"):
        compose("a\nb", shot="closup")


def test_a_script_that_is_too_long_for_one_prompt():
    with pytest.raises(InputError, match="the limit is 32000"):
        compose(["x" * 20_000, "y" * 20_000])
