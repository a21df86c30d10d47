"""What is timed: pictures of several sizes, prompts of several lengths, references."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hidream.models.o1.config import O1Config
from hidream.models.o1.tokens import UNCONDITIONAL_PROMPT, Tokenizer, Tokens, encode, with_prompt


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture of `side`² patches, `num_text` causal tokens of words, and references."""

    side: int
    num_text: int
    num_references: int = 0

    @property
    def name(self) -> str:
        kind = {0: "text_to_image", 1: "edit"}.get(self.num_references, "subject")
        return f"{kind}_{self.side**2}_patches_{self.num_text}_words"


TEXT_TO_IMAGE = tuple(Case(side=s, num_text=n) for s in (8, 16, 24) for n in (40, 200))
WITH_REFERENCES = (
    Case(side=16, num_text=40, num_references=1),
    Case(side=16, num_text=40, num_references=10),
)


def branches_of(case: Case, tokenizer: Tokenizer, config: O1Config) -> list[Tokens]:
    """The conditional and the unconditional branch of a case, the former of exact length.

    `num_text` counts all causal tokens but those of pictures: the chat's own, too.
    """
    size = case.side * config.patch_size
    pixels = np.random.default_rng(0).integers(0, 256, (case.num_references, size, size, 3))
    pictures = [Image.fromarray(p.astype(np.uint8)) for p in pixels]
    empty = encode(
        tokenizer, config, UNCONDITIONAL_PROMPT, width=size, height=size, references=pictures
    )
    words = ""
    tokens = empty
    while _num_words(tokens) < case.num_text:
        words += " red"
        tokens = with_prompt(empty, tokenizer, config, words)
    return [tokens, empty]


def _num_words(tokens: Tokens) -> int:
    return len(tokens.input_ids) - int(tokens.image_slots.sum())
