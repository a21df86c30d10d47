"""o1-nano's tokenizer: a small byte-level BPE learned on the world's prompts, in Qwen's format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hidream.models.o1.tokens import SPECIAL_TOKENS
from hidream.world import tasks

NUM_TEXTS = 60_000
VOCAB_SIZE = 768

# How Qwen cuts text into words before BPE: contractions, letters with the sign before them, single
# digits, runs of other signs, line breaks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIGN_WORD = re.compile(r"\b([A-Z])[A-Z]+\b")

CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ "\\n" }}
{%- if turn.content is string -%}
{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{{ "<|vision_start|><|image_pad|><|vision_end|>" if part.type == "image" else part.text }}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""


def build_tokenizer(folder: str | Path, *, seed: int = 1, num_texts: int = NUM_TEXTS) -> None:
    """Learn the tokenizer from prompts of training seed `seed` and write its four files.

    Deterministic. Words on signs are cut to their first letter in what it learns from, so that
    they stay single letters and any word can be spelt; the world's own words become one token.
    """
    write_tokenizer(folder, world_texts(seed, num_texts))


def world_texts(seed: int, count: int) -> Iterator[str]:
    """Prompts and answers of all tasks in turn, with words on signs cut to one letter."""
    for index in range(count):
        sample = tasks.sample(tasks.TASKS[index % len(tasks.TASKS)], seed, index)
        yield SIGN_WORD.sub(r"\1", sample.prompt)
        if sample.answer:
            yield SIGN_WORD.sub(r"\1", sample.answer)


def write_tokenizer(folder: str | Path, texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> None:
    """Learn byte-level BPE from `texts`: 256 bytes, merges, special tokens last, `vocab_size`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chat = ["user\n", "assistant\n"] * 100  # the template's own words are single tokens too
    tokenizer.train_from_iterator([*chat, *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    added = {tokenizer.token_to_id(t): AddedToken(t, special=True) for t in SPECIAL_TOKENS}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": [
                t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")
            ],
            "added_tokens_decoder": {
                str(number): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": True,
                }
                for number, token in sorted(added.items())
            },
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
