"""Every picture and output of the documentation that a command makes: `python -m tests.pictures`.

Runs the pages that show pictures, each in an empty folder, and puts what came out into them; names
of pages restrict it to these: `python -m tests.pictures docs/tasks.md`. Look at what changed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.pages import ROOT, Page, all_pages


def make(page: Page) -> None:
    """Run the page; write its pictures, and its outputs where it shows any."""
    with tempfile.TemporaryDirectory() as folder:
        ran = page.run(Path(folder))
        for name, place in page.pictures.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / name, place)
            print(place.relative_to(ROOT))
    page.path.write_text(page.with_outputs(ran), encoding="utf-8")


def main(names: list[str]) -> None:
    pages = {page.name: page for page in all_pages() if page.pictures and page.commands}
    for name in names or pages:
        if name not in pages:
            raise SystemExit(f"{name} shows no pictures of its own; {', '.join(pages)} do.")
        make(pages[name])


if __name__ == "__main__":
    main(sys.argv[1:])
