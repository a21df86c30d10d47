"""A tiny I1 with random weights, what it is given, and whole folders in the published layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hidream.models.i1.config import I1_TINY, I1Config
from hidream.models.i1.model import I1, Features
from hidream.models.i1.weights import save_i1
from tests.parity.i1_weights import random_state

TINIEST = replace(I1_TINY, num_layers=1, num_single_layers=1, llama_layers=(0, 1))
WORDS = ("a", "red", "blue", "cube", "sphere", "of", "the", "left", "make", "it")
CLIP_POSITIONS = (248, 218)  # CLIP-L's and CLIP-G's


def random_i1(config: I1Config = I1_TINY, seed: int = 0) -> I1:
    model = I1(config)
    model.load_state_dict(random_state(config, torch.Generator().manual_seed(seed)))
    return model.requires_grad_(False).eval()


def features(config: I1Config = I1_TINY, batch: int = 2, seed: int = 1) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        t5=torch.randn(batch, 7, config.t5_size, generator=generator),
        llama=torch.randn(
            max(config.llama_layers) + 1, batch, 5, config.llama_size, generator=generator
        ),
        pooled=torch.randn(batch, config.pooled_size, generator=generator),
    )


def latents(height: int, width: int, batch: int = 2, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, I1_TINY.in_channels, height, width, generator=generator)


def make_tiny_i1(
    path: Path,
    *,
    variant: str = "full",
    config: I1Config = I1_TINY,
    seed: int = 0,
    llama_inside: bool = False,
) -> Path:
    """A whole repository's folder as HiDream-I1's is published, everything tiny and random.

    `variant`: "full", "dev" or "fast". Llama is not in it, as it is not in the published one,
    unless `llama_inside`: as `text_encoder_4` and `tokenizer_4`.
    """
    path.mkdir(parents=True, exist_ok=True)
    save_i1(random_i1(config, seed), path / "transformer")
    clip_l = config.pooled_size * 2 // 5
    write_clip(path, "", clip_l, positions=CLIP_POSITIONS[0], seed=seed + 1)
    write_clip(path, "_2", config.pooled_size - clip_l, positions=CLIP_POSITIONS[1], seed=seed + 2)
    write_t5(path, config.t5_size, seed=seed + 3)
    write_vae(path / "vae", config.in_channels, seed=seed + 4)
    scheduler = _scheduler(variant)
    write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    if llama_inside:
        llama = make_tiny_llama(path / "llama", config=config, seed=seed + 5)
        (path / "tokenizer_4").mkdir()
        for file in llama.glob("tokenizer*"):
            shutil.move(file, path / "tokenizer_4")
        llama.rename(path / "text_encoder_4")
    parts = {
        "scheduler": ("diffusers", scheduler["_class_name"]),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "text_encoder_4": ("transformers", "LlamaForCausalLM") if llama_inside else (None, None),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": ("transformers", "T5Tokenizer"),
        "tokenizer_4": ("transformers", "PreTrainedTokenizerFast")
        if llama_inside
        else (None, None),
        "transformer": ("diffusers", "HiDreamImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    write_json(path / "model_index.json", {"_class_name": "HiDreamImagePipeline", **parts})
    return path


def make_tiny_llama(path: Path, *, config: I1Config = I1_TINY, seed: int = 5) -> Path:
    """A folder as Llama-3.1-8B-Instruct's: a model with a head to write with, and its tokenizer.

    A sequence begins with a token of its own; there is no padding token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, merges = _bytes_and_words([f"Ġ{word}" for word in WORDS])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    tokenizer.add_special_tokens([AddedToken(bos, special=True), AddedToken(eos, special=True)])
    ids = {token: tokenizer.token_to_id(token) for token in (bos, eos)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": 131072,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(path / "tokenizer_config.json", settings)
    tokenizer.save(str(path / "tokenizer.json"))
    llama = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=config.llama_size,
        intermediate_size=48,
        num_hidden_layers=max(config.llama_layers) + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=ids[bos],
        eos_token_id=ids[eos],
    )
    _save(LlamaForCausalLM(llama), path, seed)
    return path


def write_clip(path: Path, suffix: str, size: int, *, positions: int, seed: int) -> None:
    """`text_encoder` and `tokenizer`, with a `suffix`, of a projection to `size` values.

    The first finds the end of a text as old checkpoints do, by the largest id; the second fills up
    with "!".
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    words = [(*word[:-1], word[-1] + "</w>") for word in WORDS]
    vocabulary, merges = _bytes_and_words(words, endings=("", "</w>"))
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    vocabulary |= {bos: len(vocabulary), eos: len(vocabulary) + 1}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="!" if suffix else eos,
        model_max_length=positions,
    )
    folder = path / f"tokenizer{suffix}"
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # published as its two parts
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=size,
        max_position_embeddings=positions,
        hidden_act="gelu" if suffix else "quick_gelu",
        bos_token_id=0 if not suffix else vocabulary[bos],
        eos_token_id=2 if not suffix else vocabulary[eos],
        pad_token_id=1,
    )
    _save(CLIPTextModelWithProjection(clip), path / f"text_encoder{suffix}", seed)


def write_t5(path: Path, size: int, *, seed: int) -> None:
    """`text_encoder_3` and `tokenizer_3`: words, letters, and what is neither is unknown."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [*map(chr, range(33, 127)), "“", "”"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in letters]
    T5Tokenizer(vocab=pieces, model_max_length=512).save_pretrained(path / "tokenizer_3")
    t5 = T5Config(
        vocab_size=len(pieces) + 100,  # and 100 of its own
        d_model=size,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    _save(T5EncoderModel(t5), path / "text_encoder_3", seed)


def write_vae(path: Path, channels: int, *, seed: int = 0) -> None:
    """An autoencoder of FLUX's kind: `channels` latents for 8×8 pixels."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _save(vae, path, seed)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _scheduler(variant: str) -> dict[str, Any]:
    common = {"num_train_timesteps": 1000}
    if variant == "full":
        return {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "solver_type": "bh2",
            "use_flow_sigmas": True,
            **common,
        }
    shift = {"dev": 6.0, "fast": 3.0}[variant]
    return {"_class_name": "FlowMatchLCMScheduler", "shift": shift, **common}


def _bytes_and_words(
    words: Sequence[Sequence[str]], endings: tuple[str, ...] = ("",)
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE that knows every byte, with each of `endings`, and each of `words`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [letter + ending for ending in endings for letter in alphabet]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for word in words:
        for end in range(1, len(word)):
            pair = ("".join(word[:end]), word[end])
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    return vocabulary, merges


def _save(model: nn.Module, path: Path, seed: int) -> None:
    """Random weights, none of them neutral; the values are drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            elif "embed" in name or name.startswith("shared"):
                weight.copy_(noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    model.save_pretrained(path)
