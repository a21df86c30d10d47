"""Which samples a stage learns from, beside its tasks: a few plain rules in the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hidream.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A stage's `[stages.filter]`; a sample must keep every rule. Without any, all are taken.

    `min_size`: its picture has at least min_size² pixels where it lies; what the world draws has as
    many as are asked for. `min_words` … `max_words` (0: no limit): how many words its prompt has.
    `only`: at least one of these is among them; `without`: none of these is. Upper and lower case
    are alike.
    """

    min_size: int = 0
    min_words: int = 0
    max_words: int = 0
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def admits(self, prompt: str, num_pixels: int | None = None) -> bool:
        """Whether a sample is taken; `num_pixels` of its picture, None for one yet to be drawn."""
        if num_pixels is not None and num_pixels < self.min_size**2:
            return False
        words = re.findall(r"[\w'-]+", prompt.lower())
        if len(words) < self.min_words or 0 < self.max_words < len(words):
            return False
        only, without = ({word.lower() for word in listed} for listed in (self.only, self.without))
        return not without & set(words) and (not only or bool(only & set(words)))


def check_filter(rules: Filter, where: str) -> None:
    """Raise UsageError naming the rule that is wrong; `where` is the table's name."""
    for key in ("min_size", "min_words", "max_words"):
        if getattr(rules, key) < 0:
            raise UsageError(f"{where}.{key} = {getattr(rules, key)} must be 0 or more.")
    if 0 < rules.max_words < rules.min_words:
        raise UsageError(
            f"{where}: max_words = {rules.max_words} is below min_words = {rules.min_words}."
        )
    for key in ("only", "without"):
        for word in getattr(rules, key):
            if not re.fullmatch(r"[\w'-]+", word):
                raise UsageError(f'{where}.{key} has "{word}", which is not one word.')
