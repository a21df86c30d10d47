"""`storyboard`, `edit --expand` and `info --analyse` as a person uses them; their pages run."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hidream as library
from hidream.pictures import read_metadata
from tests import tiny
from tests.pages import ROOT, Page

FEW = ["--steps", "1", "--seed", "3"]


@pytest.fixture
def hidream(hidream):
    """The shared one, with a script lying there."""
    Path("story.txt").write_text("a red cube\na blue cube\nthe red cube and the blue one\n")
    return hidream


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_script_becomes_a_sheet_and_its_panels(hidream):
    code, out, err = hidream("storyboard", "story.txt", *FEW, "--panel", "32x16", "-o", "a.png")
    assert code == 0, err
    names = ["a.png", "a-panel1.png", "a-panel2.png", "a-panel3.png"]
    assert out.split() == names
    sheet = pixels("a.png")
    assert sheet.shape == (80, 32, 3)
    for number, top in enumerate((0, 32, 64), 1):
        assert np.array_equal(pixels(f"a-panel{number}.png"), sheet[top : top + 16])
        note = read_metadata(f"a-panel{number}.png")
        assert note["panel"] == {"number": number, "box": [0, top, 32, top + 16]}
        assert {**note, "panel": None} == {**read_metadata("a.png"), "panel": None}
    note = read_metadata("a.png")
    assert note["storyboard"]["panels"][1] == {"prompt": "a blue cube"}
    assert "Panel 3, bottom: the red cube and the blue one." in note["request"]["prompt"]
    assert hidream("storyboard", "story.txt", *FEW, "-o", "a.png", "--overwrite")[0] == 0
    code, _, err = hidream("storyboard", "story.txt", *FEW, "-o", "a.png")
    assert code == 3
    assert "a.png exists" in err


@pytest.mark.parametrize("source", ["a.png", "a-panel2.png"])
def test_a_sheet_is_made_again(hidream, source):
    hidream("storyboard", "story.txt", *FEW, "--shot", "close-up", "-o", "a.png")
    for command in ("storyboard", "generate"):
        code, _, err = hidream(command, "--from", source, "-o", "b.png", "--overwrite", model=False)
        assert (code, "warning" in err) == (0, False), err
        assert np.array_equal(pixels("b.png"), pixels("a.png"))
        assert read_metadata("b.png")["request"] == read_metadata("a.png")["request"]
    assert np.array_equal(pixels("b-panel3.png"), pixels("a-panel3.png"))
    assert read_metadata("b-panel3.png") == read_metadata("a-panel3.png")
    out = hidream("info", source, model=False)[1]
    assert f"make it again: hidream storyboard --from {source}" in out
    assert ("panel 2 of 3" in out) == (source == "a-panel2.png")


def test_a_sheet_in_another_size_or_of_another_script(hidream):
    hidream("storyboard", "story.txt", *FEW, "--panel", "32x16", "-o", "a.png")
    again = ["storyboard", "--from", "a.png", "-o"]
    code, _, err = hidream(*again, "b.png", "--size", "64x80", model=False)
    assert code == 0, err
    assert pixels("b-panel1.png").shape == (16, 64, 3)
    Path("two.txt").write_text("a cube\na sphere")
    code, _, err = hidream(*again, "c.png", "two.txt", "--columns", 2, model=False)
    assert code == 0, err
    request = read_metadata("c.png")["request"]
    assert (request["sheet"]["number"], request["seed"]) == (2, 3)
    hidream("generate", "a cube", *FEW, "--size", "32x32", "-o", "d.png")
    code, _, err = hidream("storyboard", "--from", "d.png", model=False)
    assert code == 3
    assert "d.png is no storyboard" in err


def test_json_standard_input_seeds_and_a_dry_run(hidream, monkeypatch):
    script = {"style": "ink", "panels": ["a cube", {"prompt": "a sphere", "shot": "full"}]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(script)))
    flags = ["--steps", 1, "--seed", 1, 2, "--panel", "32x32", "--columns", 2, "--json"]
    code, out, err = hidream("storyboard", "-", *flags, "-o", "s/a.png", "--no-metadata")
    assert code == 0, err
    images = json.loads(out)["images"]
    assert [image["path"] for image in images] == ["s/a-1.png", "s/a-2.png"]
    assert images[1]["panels"] == ["s/a-2-panel1.png", "s/a-2-panel2.png"]
    assert not np.array_equal(pixels("s/a-1-panel1.png"), pixels("s/a-2-panel1.png"))
    assert read_metadata("s/a-1-panel1.png") is None
    Path("odd.txt").write_text("\n".join(f"cube {n}" for n in range(10)))
    dry = ["--dry-run", "--json", "--seed", 4, "-o", "dry.png"]
    found = json.loads(hidream("storyboard", "odd.txt", *dry)[1])
    assert found["request"]["sheet"]["number"] == 10
    assert found["outputs"][:2] == ["dry.png", "dry-panel01.png"]
    assert len(found["outputs"]) == 11
    assert not Path("dry.png").exists()


def test_references_recur(hidream):
    tiny.picture(0).save("cube.png")
    flags = [*FEW, "--panel", "32x32", "--ref", "cube.png", "-o", "a.png"]
    assert hidream("storyboard", "story.txt", *flags)[0] == 0
    note = read_metadata("a.png")
    assert note["request"]["references"] == ["cube.png"]
    assert "reference pictures" in note["request"]["prompt"]
    assert len(note["inputs"]["references"]) == 1


def test_outpainting_is_made_again_and_over_another_picture(hidream):
    tiny.picture(1, 40, 32).save("source.png")
    more = ["--expand", "0,16,8,0", *FEW, "-o", "a.png"]
    code, _, err = hidream("edit", "source.png", "more", *more)
    assert code == 0, err
    assert pixels("a.png").shape == (48, 48, 3)
    assert np.array_equal(pixels("a.png")[16:, :40], pixels("source.png"))
    again = ["edit", "--from", "a.png", "-o", "b.png", "--overwrite"]
    code, _, err = hidream(*again, model=False)
    assert (code, "warning" in err) == (0, False), err
    assert np.array_equal(pixels("b.png"), pixels("a.png"))
    assert read_metadata("b.png") == read_metadata("a.png")
    assert hidream(*again, "--expand", "8,0,0,0", model=False)[0] == 0
    assert pixels("b.png").shape == (32, 48, 3)
    tiny.picture(2, 24, 16).save("other.png")
    assert hidream(*again, "other.png", "more", model=False)[0] == 0
    assert np.array_equal(pixels("b.png")[16:, :24], pixels("other.png"))
    code, _, err = hidream("edit", "source.png", "more", *more[2:], "--expand", "9", "--overwrite")
    assert code == 2
    assert "--expand 9,9,15,7" in err
    assert hidream(*again, "--expand", "9", "--snap", "nearest", model=False)[0] == 0
    assert np.array_equal(pixels("b.png")[9:41, 9:49], pixels("source.png"))


def test_the_seam_check(hidream):
    hidream("generate", "a red cube", *FEW, "--size", "64x64", "-o", "a.png")
    out = hidream("info", "a.png", "--analyse", model=False)[1]
    assert "seams of patches of 16 pixels" in out
    found = json.loads(hidream("info", "a.png", "--analyse", "--json", model=False)[1])["seams"]
    assert found["patch"] == 16
    assert found["x"]["ratio"] == pytest.approx(found["x"]["border"] / found["x"]["inside"], 0.01)
    mosaic = Image.new("RGB", (64, 16))
    for column in range(0, 64, 32):
        mosaic.paste((200, 0, 0), (column, 0, column + 16, 16))
    mosaic.save("mosaic.png")
    out = hidream("info", "mosaic.png", "--analyse", "--patch", 16, model=False)[1]
    assert "more than any of them" in out
    assert "no border there" in out
    argv = ["info", "mosaic.png", "--analyse", "--patch", 8, "--json"]
    found = json.loads(hidream(*argv, model=False)[1])["seams"]
    assert found["y"] == {
        "border": 0,
        "inside": 0,
        "ratio": 1,
        "other_offsets": [1, 1],
        "shows": False,
    }
    assert "seams" not in json.loads(hidream("info", "mosaic.png", "--json", model=False)[1])


# -- the pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["storyboard.md", "editing.md"])
def test_a_page_runs(name, tmp_path, tiny_folder, monkeypatch):
    """Its commands with few steps, its Python with a tiny model."""
    load = library.load
    monkeypatch.setattr(library, "load", lambda name: load(tiny_folder))
    tiny.picture(0, 90, 64).save(tmp_path / "photo.png")
    page = Page(ROOT / "docs" / name)
    ran = page.run(tmp_path, more=["--steps", 1, "--overwrite"])
    assert {one.command for one in ran} >= set(page.commands)
    assert (tmp_path / "panel-1.png").is_file() == (name == "storyboard.md")
