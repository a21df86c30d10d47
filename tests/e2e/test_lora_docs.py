"""docs/datasets.md and the LoRA of docs/training.md: what they show is what happens."""

from __future__ import annotations

import shutil

import pytest

from hidream.cli.main import main
from hidream.data.dataset import open_dataset
from tests import tiny
from tests.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "datasets.md")
FEW = (
    "{ size = 64, steps = 1, batch_size = 1, learning_rate = 1e-3, tasks = { text_to_image = 1 } }"
)


def files_of(block, folder):
    """The files that a block names in columns, captions with the words at the line's end."""
    for line in block.text.splitlines():
        *names, words = line.split("   ")
        for name in " ".join(names).split():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                path.write_text(words.strip())
            else:
                tiny.picture(1, 140, 140).save(path)


def test_the_layouts_are_read(tmp_path):
    first, second, table, _ = (b for b in PAGE.blocks if b.language == "text")
    for block in (first, second):
        files_of(block, tmp_path / "folder")
    found = open_dataset(tmp_path / "folder")
    assert not found.problems
    assert sorted(i.task for i in found.items) == ["edit", "subject", *["text_to_image"] * 2]
    assert {i.caption for i in found.items} >= {"a red rocket on grass", "give him a hat"}
    rows = tmp_path / "table"
    rows.mkdir()
    (rows / table.name).write_text(table.text)
    for name in ("red", "plain", "hat", "park", "dog", "ball"):
        tiny.picture(1).save(rows / f"{name}.png")
    found = open_dataset(rows)
    assert not found.problems
    assert [i.task for i in found.items] == ["text_to_image", "edit", "subject"]


def test_the_check_says_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rocket" / "old").mkdir(parents=True)
    for name, side in (("red", 96), ("blue", 140), ("old/green", 140)):
        suffix = "jpg" if "/" in name else "png"
        tiny.picture(1, side, side).save(tmp_path / "rocket" / f"{name}.{suffix}")
    (tmp_path / "rocket" / "red.txt").write_text("a red rocket")
    (tmp_path / "rocket" / "blue.txt").write_text(" ")
    assert main(["train", str(ROOT / "recipes" / "lora.toml"), "data=rocket"]) == 3
    assert capsys.readouterr().err == PAGE.blocks[-1].text


def test_the_command_of_the_page(tmp_path, monkeypatch):
    commands = [c for c in Page(ROOT / "docs" / "training.md").commands if "lora" in str(c)]
    assert [command.arguments[0] for command in commands] == ["train", "generate"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "rocket").mkdir()
    tiny.picture(1, 90, 90).save(tmp_path / "rocket" / "a.png")
    (tmp_path / "rocket" / "a.txt").write_text("a red rocket on grass")
    more = {"train": [f"stages=[{FEW}]"], "generate": ["--steps", "1", "-o", "out.png"]}
    for command in commands:
        assert main([*command.arguments, *more[command.arguments[0]]]) == 0
    assert (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("key", ["rank", "alpha", "targets", "dropout", "dora", "keys", "dtype"])
def test_every_option_is_told(key):
    assert f"`lora.{key}`" in Page(ROOT / "docs" / "lora.md").text
