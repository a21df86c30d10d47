"""The documentation's pages: their links, their pictures, and how what they show is read."""

import pytest

from hidream.cli import main
from tests import pages
from tests.pages import ROOT, Page

PAGE = """\
`a.txt`:

```text
a
```

```console
$ hidream generate "a # b" \\
    --seed 1 # first
$ hidream info a.png
size 1.0
was red
$ hidream info b.png
size 1.0
…
```

![](images/page/x/b.png) ![](images/other.png)
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    file = tmp_path / "docs" / "page.md"
    file.write_text(PAGE)
    return Page(file)


@pytest.mark.parametrize("page", pages.all_pages(), ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    assert not page.missing


def test_every_picture_of_the_documentation_is_shown():
    text = "".join(page.text for page in pages.all_pages())
    pictures = list((ROOT / "docs" / "images").rglob("*.png"))
    assert pictures
    assert not [p for p in pictures if p.relative_to(ROOT / "docs").as_posix() not in text]


def test_what_a_page_shows(page, tmp_path):
    block = page.blocks[0]
    assert (block.name, block.text) == ("a.txt", "a\n")
    first, *_ = page.commands
    assert first.arguments == ("generate", "a # b", "--seed", "1")
    assert [command.shown for command in page.commands] == [
        (),
        ("size 1.0", "was red"),
        ("size 1.0", "…"),
    ]
    assert page.pictures == {"x/b.png": tmp_path / "docs" / "images" / "page" / "x" / "b.png"}
    assert page.missing == ["images/page/x/b.png", "images/other.png"]


def test_outputs_are_compared_and_renewed(page, tmp_path, monkeypatch):
    outs = iter(["", "size 2.5\nwas blue\nand 3\n", "size 2.5\nmore\n"])
    monkeypatch.setattr(pages, "main", lambda arguments: print(next(outs), end="") or 0)
    ran = page.run(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "a\n"
    assert [pages.is_as_shown(one) for one in ran] == [True, False, True]
    renewed = PAGE.replace("size 1.0", "size 2.5").replace("was red", "was blue\nand 3")
    assert page.with_outputs(ran) == renewed


def test_a_command_that_fails_is_told(page, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "main", lambda arguments: main(["info", "nothing.png"]))
    with pytest.raises(AssertionError, match=r"docs/page\.md: hidream generate .*nothing\.png"):
        page.run(tmp_path)
