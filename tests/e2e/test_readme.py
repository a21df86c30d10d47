"""Everything the README shows is run, and its pictures come from the commands beside them."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hidream.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ELSEWHERE = {  # what this test cannot run, and the test or file that holds it
    "make": "Makefile",
    "pip": "tests/e2e/test_wheel.py",
}


def commands() -> list[list[str]]:
    """Command lines of the console blocks, in order, without comments."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which every `hidream` command of the README was run."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        for program, *arguments in commands():
            if program == "hidream":
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = main(arguments)
                assert code == 0, f"hidream {shlex.join(arguments)}: {said.getvalue()}"
    return folder


def test_every_program_that_the_readme_shows_is_known():
    programs = {program for program, *_ in commands()}
    assert "hidream" in programs
    assert programs <= {"hidream", *ELSEWHERE}
    for where in ELSEWHERE.values():
        assert (ROOT / where).is_file()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {arguments[0] for program, *arguments in commands() if program == "make"} <= targets


def test_the_commands_make_the_pictures_beside_them(made):
    shown = {Path(path).name for path in re.findall(r"\(docs/images/([^)]+)\)", README)}
    assert shown
    for name in shown:
        ours = np.asarray(Image.open(made / name).convert("RGB")).astype(int)
        theirs = np.asarray(Image.open(ROOT / "docs" / "images" / name).convert("RGB")).astype(int)
        assert ours.shape == theirs.shape, name
        # machines round differently: a level or two, and a few edge pixels a little more
        assert np.abs(ours - theirs).mean() < 1, name


def test_a_picture_made_again_from_itself_is_the_same(made):
    first, again = (np.asarray(Image.open(made / n)) for n in ("stars.png", "again.png"))
    assert np.array_equal(first, again)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "cubes.png").is_file()
    assert "two blue hearts" in capsys.readouterr().out


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
