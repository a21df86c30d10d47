"""`hidream describe` as a person uses it."""

import json
import sys
from pathlib import Path

import pytest

from hidream.cli import describe, main
from hidream.text_request import DESCRIBE
from tests import tiny

FEW = ["--max-tokens", "12"]


@pytest.fixture
def hidream(tiny_folder, tmp_path, capsys, monkeypatch):
    """Run `describe` beside a.png; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    tiny.picture(0).save("a.png")

    def run(*arguments):
        code = main(["describe", *map(str, arguments), "-m", str(tiny_folder)])
        return code, *capsys.readouterr()

    return run


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(hidream):
    code, out, err = hidream("a.png", *FEW)
    assert code == 0
    assert len(out.strip()) > 0
    assert "loading" in err
    assert "--max-tokens" in err  # the tiny model never ends
    assert hidream("a.png", DESCRIBE, *FEW)[1] == out
    assert hidream("a.png", "red?", *FEW)[1] != out
    assert Path.cwd().joinpath("a.png").exists()


def test_json(hidream):
    warm = ["--temperature", 1.5, "--top-p", 0.9, "--seed", 4]
    found = [json.loads(hidream("a.png", "red?", *FEW, *warm, "--json")[1]) for _ in range(2)]
    assert found[0]["text"] == found[1]["text"]
    assert found[0]["finish_reason"] == "length"
    assert {name: found[0][name] for name in ("num_tokens", "question", "seed", "image")} == {
        "num_tokens": 12,
        "question": "red?",
        "seed": 4,
        "image": "a.png",
    }
    warm[-1] = 5
    assert (
        json.loads(hidream("a.png", "red?", *FEW, *warm, "--json")[1])["text"] != found[0]["text"]
    )


def test_a_terminal_sees_the_text_grow(hidream, monkeypatch):
    plain = hidream("a.png", *FEW)[1]
    pieces = []
    show = describe._show_piece

    def spy(place, number, text):
        pieces.append(text)
        show(place, number, text)

    monkeypatch.setattr(describe, "_show_piece", spy)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = hidream("a.png", *FEW)
    assert code == 0
    assert len(pieces) >= 12
    assert out == "".join(map(describe._harmless, plain))


def test_a_text_cannot_steer_the_terminal():
    shown = "".join(map(describe._harmless, "a\x1b[31m\x07\x9b né\n\t猫"))
    assert shown == "a\ufffd[31m\ufffd\ufffd né\n\t猫"


def test_settings_without_effect_are_told(hidream):
    code, _, err = hidream("a.png", *FEW, "--top-p", 0.5)
    assert code == 0
    assert "warning: top_p without effect" in err


def test_the_shipped_model_describes_and_stops(tmp_path, capsys, monkeypatch):
    from PIL import Image

    from hidream.world import tasks

    monkeypatch.chdir(tmp_path)
    sample = tasks.sample("understanding", tasks.eval_seed(0), 0)
    Image.fromarray(sample.reference_pictures(128, 128)[0]).save("a.png")
    assert main(["describe", "a.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] == "stop"
    assert found["num_tokens"] >= 3
    assert found["text"].isprintable()
