"""The documentation's pages: their blocks, and running these as a reader would.

A file that a page shows has its name before its block, as in "`story.txt`:".
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from hidream.cli import main

ROOT = Path(__file__).parents[1]
DRAWING = ("generate", "edit", "subject", "storyboard")
MORE = "…"  # ends an output that the page does not show to its end
# what differs from machine to machine and from model to model: digests, versions, measured numbers
MEASURED = r"\b[0-9a-f]{64}\b|\d+(\.\d+)+(\+\w+)?"


@dataclass(frozen=True)
class Block:
    """Lines between two fences; `name` is that of the file they are, `first` their place."""

    language: str
    name: str
    lines: tuple[str, ...]
    first: int

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


@dataclass(frozen=True)
class Command:
    """What follows "$ " in a console block, and the output that is shown below it.

    `first` is the line of the page where the output begins.
    """

    program: str
    arguments: tuple[str, ...]
    shown: tuple[str, ...]
    first: int

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])


@dataclass(frozen=True)
class Ran:
    """A command that was run, and its stdout; `command` is None for a block of Python."""

    command: Command | None
    out: str


@dataclass(frozen=True)
class Page:
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        found, name, start, language = [], "", None, ""
        lines = self.text.splitlines()
        for number, line in enumerate(lines):
            if start is None and line.startswith("```"):
                start, language = number + 1, line[3:]
            elif start is not None and line == "```":
                found.append(Block(language, name, tuple(lines[start:number]), start))
                name, start = "", None
            elif start is None and line:
                named = re.fullmatch(r"`([\w./-]+)`:", line)
                name = named[1] if named else ""
        return tuple(found)

    @cached_property
    def commands(self) -> tuple[Command, ...]:
        """Those of the console blocks, in order."""
        consoles = (block for block in self.blocks if block.language == "console")
        return tuple(command for block in consoles for command in _commands(block))

    @cached_property
    def pictures(self) -> dict[str, Path]:
        """The pictures that the page's commands make and it shows: name -> file of the repository.

        Those of the README lie in docs/images, those of docs/NAME.md in docs/images/NAME.
        """
        folder = ROOT / "docs" / "images"
        if self.path.parent != ROOT:
            folder /= self.path.stem
        shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", self.text)
        paths = [(self.path.parent / link).resolve() for link in shown]
        return {p.relative_to(folder).as_posix(): p for p in paths if p.is_relative_to(folder)}

    @property
    def missing(self) -> list[str]:
        """Its links to files that are not there."""
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", self.text)
        return [x for x in links if "://" not in x and not (self.path.parent / x).exists()]

    def run(self, folder: Path, more: Sequence[object] = ()) -> list[Ran]:
        """Do in the folder what the page does: its files, then its Python and its commands.

        Programs other than hidream are left out. `more` is added to every command that draws.
        Raises AssertionError, with what was said, where a command fails.
        """
        with contextlib.chdir(folder):
            for block in self.blocks:
                if block.name:
                    Path(block.name).write_text(block.text, encoding="utf-8")
            return list(self._run([str(value) for value in more]))

    def _run(self, more: list[str]) -> Iterator[Ran]:
        for block in self.blocks:
            if block.language == "python":
                code = compile("\n" * block.first + block.text, self.path, "exec")
                yield Ran(None, _said(lambda code=code: exec(code, {}))[0])
            for command in _commands(block) if block.language == "console" else ():
                if command.program == "hidream":
                    yield Ran(command, self._out(command, more))

    def _out(self, command: Command, more: list[str]) -> str:
        arguments = [*command.arguments]
        if arguments[0] in DRAWING:
            arguments += more
        out, err, code = _said(lambda: main(arguments))
        assert code == 0, f"{self.name}: {command}: {err}"
        return out

    def with_outputs(self, ran: Sequence[Ran]) -> str:
        """The page's text with what its commands print now, where it shows what they print."""
        lines = self.text.splitlines()
        for one in reversed(ran):
            if one.command and one.command.shown:
                shown = one.command.shown
                lines[one.command.first : one.command.first + len(shown)] = as_shown(one)
        return "".join(line + "\n" for line in lines)


def all_pages() -> list[Page]:
    return [Page(ROOT / "README.md"), *map(Page, sorted((ROOT / "docs").glob("*.md")))]


def as_shown(ran: Ran) -> list[str]:
    """The lines of what a command printed that its page shows."""
    assert ran.command is not None
    shown, lines = ran.command.shown, [line.rstrip() for line in ran.out.splitlines()]
    return [*lines[: len(shown) - 1], MORE] if shown[-1] == MORE else lines


def is_as_shown(ran: Ran) -> bool:
    """Whether a command printed what its page shows, `MEASURED` aside."""
    if ran.command is None or not ran.command.shown:
        return True
    pair = ("\n".join(lines) for lines in (as_shown(ran), ran.command.shown))
    ours, theirs = (re.sub(MEASURED, "#", text) for text in pair)
    return ours == theirs


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def assert_as_shown(page: Page, ran: Sequence[Ran], folder: Path) -> None:
    """What was run in the folder printed and drew what the page shows.

    Machines round differently: a level or two, and a few edge pixels a little more.
    """
    for one in ran:
        assert is_as_shown(one), f"{page.name}: {one.command} prints {one.out}"
    assert page.pictures
    for name, place in page.pictures.items():
        ours, theirs = pixels(folder / name), pixels(place)
        assert ours.shape == theirs.shape, place
        assert np.abs(ours - theirs).mean() < 1, place


def _commands(block: Block) -> Iterator[Command]:
    """A line that ends with a backslash goes on in the next one."""
    number = 0
    while number < len(block.lines):
        line = block.lines[number]
        assert line.startswith("$ "), line
        number += 1
        while line.endswith("\\"):
            line = line[:-1] + block.lines[number]
            number += 1
        first = number
        while number < len(block.lines) and not block.lines[number].startswith("$ "):
            number += 1
        program, *arguments = shlex.split(line[2:], comments=True)
        yield Command(
            program, tuple(arguments), tuple(block.lines[first:number]), block.first + first
        )


def _said(function: Callable[[], object]) -> tuple[str, str, object]:
    """Stdout, stderr and result of a call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = function()
    return out.getvalue(), err.getvalue(), result
