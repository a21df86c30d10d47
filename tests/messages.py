"""Every error message in the code, for docs/troubleshooting.md: `python -m tests.messages`."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from hidream import errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- messages: python -m tests.messages -->", "<!-- end of messages -->"
CODES = {
    name: value.exit_code
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.HidreamError)
}
HEADINGS = {
    1: "1: something else",
    2: "2: flags and fields",
    3: "3: files, pictures, prompts",
    4: "4: models",
    5: "5: memory",
    130: "130: interrupted",
}


@dataclass(frozen=True, order=True)
class Message:
    """What is wrong and what to do about it; values are written as an ellipsis."""

    code: int
    problem: str
    remedy: str

    @property
    def line(self) -> str:
        return f"- `{self.problem}`" + (f" {self.remedy}" if self.remedy else "")


def messages() -> list[Message]:
    """Those that the package raises with words of its own, sorted."""
    found = set()
    for path in sorted((ROOT / "hidream").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in CODES and node.args:
                problem, *rest = (_text(argument, constants) for argument in node.args)
                if problem.strip("…. ") and not problem.startswith("… …"):
                    remedy = rest[0] if rest else ""
                    found.add(Message(CODES[_name(node.func)], problem, remedy.strip("…").strip()))
    return sorted(found)


def listing() -> str:
    """The page's list of messages, by exit code."""
    known, lines = messages(), []
    for code in sorted({message.code for message in known}):
        lines += [f"### {HEADINGS[code]}", ""]
        lines += [message.line for message in known if message.code == code] + [""]
    return "\n".join(lines)


def _constants(tree: ast.Module) -> dict[str, str]:
    """Module-level names of plain strings."""
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def _name(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (_text(value, constants) for value in node.values)
        return "".join(parts).replace("……", "…")
    if isinstance(node, ast.Name):
        return constants.get(node.id, "…")
    return "…"


def main() -> None:
    """Write the list into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{listing()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
