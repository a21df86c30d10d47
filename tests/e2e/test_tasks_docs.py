"""Everything that docs/tasks.md shows is run, as it stands there."""

import pytest

from hidream.pictures import read_metadata
from tests.pages import ROOT, Page, assert_as_shown, pixels

PAGE = Page(ROOT / "docs" / "tasks.md")


def assert_kept():
    """What one picture keeps of another, however many steps it was drawn in."""
    assert (pixels("again.png") == pixels("yellow.png")).all()
    assert (pixels("part.png")[:, :64] == pixels("cube.png")[:, :64]).all()
    assert (pixels("more.png")[:128, 32:160] == pixels("cube.png")).all()
    assert len(read_metadata("again.png")["embedded"]) == 1


def test_every_command_runs_and_draws_what_the_page_shows_in_size(tmp_path, monkeypatch):
    """In fewer steps; the README's pictures, and by `make slow` this page's, are compared whole."""
    monkeypatch.chdir(tmp_path)
    PAGE.run(tmp_path, ["--steps", "9"])
    assert PAGE.pictures
    for name, shown in PAGE.pictures.items():
        if "-step" not in name:  # a preview of a step that is not reached
            assert pixels(name).shape == pixels(shown).shape, name
    assert_kept()


@pytest.mark.slow
def test_what_the_page_shows_is_what_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_as_shown(PAGE, PAGE.run(tmp_path), tmp_path)
    assert_kept()


def test_every_command_that_draws_or_reads_is_there():
    shown = {command.arguments[0] for command in PAGE.commands}
    assert {"generate", "edit", "subject", "storyboard", "describe", "info"} <= shown
