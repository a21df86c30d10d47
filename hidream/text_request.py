"""One request for text, about pictures or none: the command line's flags and the library's
keywords."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hidream.errors import InputError, UsageError
from hidream.limits import (
    TEXT_RANGES,
    check_in_range,
    check_pictures,
    check_seed,
    clean_prompt,
)

DESCRIBE = "Describe the picture."


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What to write and how, checked when it is made.

    `pictures` are paths or PIL images, up to 11; they stand before the prompt. `temperature` 0
    always takes the likeliest token; above it tokens are drawn, of the `top_k` likeliest (None:
    all) as few as together have probability `top_p`. `seed` None or -1 draws one.

    Raises:
        UsageError: a field has the wrong type or is out of range.
        InputError: the prompt is not usable.
    """

    prompt: str
    pictures: tuple[Any, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen for everyone else
        put(self, "prompt", clean_prompt(self.prompt, may_be_empty=True))
        for name in TEXT_RANGES:
            if getattr(self, name) is None and name != "top_k":
                raise UsageError(f"{name} is not given.", "Leave it out for its default.")
            put(self, name, check_in_range(name, getattr(self, name), TEXT_RANGES))
        if isinstance(self.seed, list | tuple):
            raise UsageError("a text has one seed.", "Make a request for each seed.")
        put(self, "seed", check_seed(self.seed, None))
        put(self, "pictures", check_pictures(self.pictures, "picture"))

    @classmethod
    def about(cls, picture: Any, question: str | None = None, **fields: Any) -> TextRequest:
        """A question about a picture, or the wish to have it described. Raises as the class."""
        if question is None:
            question = DESCRIBE
        elif not clean_prompt(question, "question", may_be_empty=True).strip():
            raise InputError("the question is empty.", "Leave it out for a description.")
        return cls(prompt=question, pictures=(picture,), **fields)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should be told of fields that do nothing."""
        given = [
            name
            for name, unset in (("top_p", 1.0), ("top_k", None))
            if getattr(self, name) != unset
        ]
        if self.temperature > 0 or not given:
            return ()
        return (f"{' and '.join(given)} without effect: the temperature is 0.",)
