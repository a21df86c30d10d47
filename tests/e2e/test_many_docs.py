"""Everything that docs/many.md shows is run, as it stands there."""

import pytest
from PIL import Image

from hidream.models.o1.config import O1_8B, O1_NANO
from hidream.pictures import read_metadata
from tests.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "many.md")


def test_the_commands_and_the_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *drawn, example = PAGE.run(tmp_path)
    printed = [one.out.split() for one in drawn]
    assert sorted(printed[0]) == [f"pictures/{i}.png" for i in range(4)]
    assert printed[1] == ["changed-0.png", "changed-1.png"]
    assert Image.open("pictures/3.png").size == (64, 64)
    seeds = [read_metadata(f"pictures/{i}.png")["request"]["seed"] for i in range(4)]
    assert seeds == [7, 3, 4, 7]
    references = [read_metadata(path)["request"]["references"] for path in printed[1]]
    assert references == [["pictures/0.png"], ["pictures/1.png"]]
    assert example.out == "10 3 0\n2\nthe call was cancelled.\n"


@pytest.mark.parametrize(("config", "width", "size"), [(O1_NANO, 4, 0.4), (O1_8B, 2, 3.7)])
def test_the_sizes(config, width, size):
    text = config.text
    per_token = text.num_layers * 2 * text.num_kv_heads * text.head_dim * width
    assert round(25 * per_token / 1e6, 1) == size
