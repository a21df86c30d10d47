"""Everything the README shows is run, and its pictures come from the commands beside them."""

import re
from pathlib import Path

from tests.pages import ROOT, Page, assert_as_shown, pixels

README = Page(ROOT / "README.md")
ELSEWHERE = {  # what this test cannot run, and the test or file that holds it
    "make": "Makefile",
    "pip": "tests/e2e/test_wheel.py",
}


def test_every_program_that_the_readme_shows_is_known():
    programs = {command.program for command in README.commands}
    assert "hidream" in programs
    assert programs <= {"hidream", *ELSEWHERE}
    for where in ELSEWHERE.values():
        assert (ROOT / where).is_file()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    asked = {command.arguments[0] for command in README.commands if command.program == "make"}
    assert asked <= targets


def test_what_the_readme_shows_is_what_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = README.run(tmp_path)
    assert_as_shown(README, ran, tmp_path)
    assert (pixels("stars.png") == pixels("again.png")).all()
    (example,) = [one for one in ran if one.command is None]
    assert Path("cubes.png").is_file()
    assert "two blue hearts" in example.out
