"""A small I1's text encoders: the four published kinds, tiny, of random weights that stay so.

An untrained transformer whose layers keep the size of what they read still tells its words apart,
and says something of their neighbours: the network learns to read it. The tokenizers are learnt on
the world's prompts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hidream.models.i1.config import I1Config
from hidream.train.tokenizer import world_texts

NUM_TEXTS = 3_000
NUM_MERGES = 600
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
CLASSES = {  # for model_index.json
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
    "text_encoder_4": "LlamaForCausalLM",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5Tokenizer",
    "tokenizer_4": "PreTrainedTokenizerFast",
}


def write_encoders(
    folder: Path, config: I1Config, *, num_tokens: int, seed: int, num_texts: int = NUM_TEXTS
) -> None:
    """`text_encoder` … `_4` and `tokenizer` … `_4`, of the widths that `config` reads.

    Each reads `num_tokens`. Deterministic; `folder` is there whole or not at all.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    texts = list(world_texts(1, num_texts))
    clip_l = config.pooled_size // 2
    sizes = {"": clip_l, "_2": config.pooled_size - clip_l}
    words = learn_merges([text.lower() for text in texts], ending="</w>")
    for number, (suffix, size) in enumerate(sizes.items()):
        _write_clip(draft, suffix, size, words, num_tokens, seed + number)
    _write_t5(draft, config.t5_size, texts, num_tokens, seed + 2)
    _write_llama(draft, config, texts, num_tokens, seed + 3)
    draft.rename(folder)


def learn_merges(texts: Sequence[str], ending: str = "") -> list[tuple[str, str]]:
    """The merges of a byte-level BPE; `ending` marks the last letter of a word, as CLIP does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    marked: dict[str, Any] = {"end_of_word_suffix": ending} if ending else {}
    tokenizer = Tokenizer(models.BPE(**marked))
    cut: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if ending:  # spaces part words and are no letters of theirs
        cut = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=(2 if ending else 1) * len(alphabet) + NUM_MERGES,
        min_frequency=2,
        initial_alphabet=alphabet,
        show_progress=False,
        **marked,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]


def vocabulary_of(merges: Sequence[tuple[str, str]], ending: str = "") -> dict[str, int]:
    """Every byte, every byte that ends a word, and what is merged."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + ending for letter in alphabet if ending)]
    tokens += ["".join(pair) for pair in merges]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _write_clip(
    folder: Path,
    suffix: str,
    size: int,
    merges: list[Any],
    num_tokens: int,
    seed: int,
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    bos, eos = "<|startoftext|>", "<|endoftext|>"
    vocabulary = vocabulary_of(merges, "</w>")
    vocabulary |= {bos: len(vocabulary), eos: len(vocabulary) + 1}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=eos, model_max_length=num_tokens
    )
    tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=size,
        max_position_embeddings=num_tokens,
        bos_token_id=vocabulary[bos],
        eos_token_id=vocabulary[eos],
        pad_token_id=vocabulary[eos],
    )
    _save(CLIPTextModelWithProjection(clip), folder / f"text_encoder{suffix}", seed)


def _write_t5(folder: Path, size: int, texts: Sequence[str], num_tokens: int, seed: int) -> None:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = sorted({word for text in texts for word in re.findall(r"\w+", text)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(letter, -6.0) for letter in map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=num_tokens)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    t5 = T5Config(
        vocab_size=len(pieces),
        d_model=size,
        d_kv=size // 4,
        d_ff=2 * size,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    _save(T5EncoderModel(t5), folder / "text_encoder_3", seed)


def _write_llama(
    folder: Path, config: I1Config, texts: Sequence[str], num_tokens: int, seed: int
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    merges = learn_merges(texts)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary_of(merges), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.add_special_tokens([AddedToken(bos, special=True), AddedToken(eos, special=True)])
    ids = {token: tokenizer.token_to_id(token) for token in (bos, eos)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        model_max_length=num_tokens,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder / "tokenizer_4")
    llama = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=config.llama_size,
        intermediate_size=2 * config.llama_size,
        num_hidden_layers=max(config.llama_layers) + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(num_tokens, 64),
        bos_token_id=ids[bos],
        eos_token_id=ids[eos],
    )
    _save(LlamaForCausalLM(llama), folder / "text_encoder_4", seed)


def _save(model: nn.Module, folder: Path, seed: int) -> None:
    """With weights from `seed` that keep the size of what they read: words count most."""
    from transformers.utils import logging

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.fill_(float("norm" in name and name.endswith("weight")))
            elif "position" in name or "relative" in name:
                weight.copy_(0.3 * drawn)
            elif "embed" in name or name.startswith("shared"):
                weight.copy_(drawn)
            else:
                weight.copy_(drawn / weight.shape[1] ** 0.5)
                if name.endswith(".q.weight"):  # T5 does not divide its scores by the root
                    weight.mul_((weight.shape[0] // 4) ** -0.5)
    logging.disable_progress_bar()
    model.save_pretrained(folder)  # type: ignore[operator]
    logging.enable_progress_bar()
