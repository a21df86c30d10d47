"""What I1 reads of a prompt: CLIP-L, CLIP-G, T5 and Llama behind one `encode`.

    encoder   folder            what of it is used
    clip_l    text_encoder      the projected output at the text's end
    clip_g    text_encoder_2    the same
    t5        text_encoder_3    the last layer, of every token
    llama     wherever it is    every layer, of every token; the last one after the final norm

Each reads 128 tokens, shorter texts filled up; filled places are masked inside T5 and Llama, but
I1 was trained to see what comes out of them, and sees it. A text is encoded alone, so that what
else is asked for changes no bit of it, and once: outputs are kept by content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hidream.errors import InputError, ModelError, UsageError
from hidream.folder import Folder, open_folder, read_config
from hidream.models.i1.config import I1Config
from hidream.models.i1.llama import find_llama
from hidream.models.i1.model import Features
from hidream.models.loading import check_tensors, quiet_imports, tensor_shapes
from hidream.models.placement import layer_by_layer
from hidream.registry import nearest
from hidream.request import GenerateRequest

NUM_TOKENS = 128
MAX_KEPT = 512 * 1024**2  # bytes; a prompt is 35 MB in bf16
_AGAIN = "Download the folder again."


@dataclass(frozen=True)
class Texts:
    """What each encoder reads."""

    clip_l: str
    clip_g: str
    t5: str
    llama: str

    @classmethod
    def of(cls, prompt: str, apart: Mapping[str, str] | None = None) -> Texts:
        """`prompt` for all encoders but those that have a text of their own in `apart`.

        Raises UsageError for an encoder that is not there.
        """
        texts = dict.fromkeys(NAMES, prompt)
        for name, text in (apart or {}).items():
            if name not in texts:
                raise UsageError(f'unknown text encoder "{name}"; {nearest(name, NAMES)}')
            texts[name] = text
        return cls(**texts)

    def apart(self, prompt: str) -> dict[str, str]:
        """Those that are another text than `prompt`: `Texts.of(prompt, apart)` is this again."""
        return {name: text for name in NAMES if (text := getattr(self, name)) != prompt}


NAMES = tuple(field.name for field in fields(Texts))


def texts_of(request: GenerateRequest) -> tuple[Texts, Texts]:
    """What the encoders read for a resolved request's two branches: prompt and negative prompt."""
    texts = Texts.of(request.full_prompt, dict(request.encoder_prompts))
    return texts, Texts.of((request.negative_prompt or "").strip())


@dataclass(frozen=True)
class _Kind:
    """One of the four: where it is, what it must be, and the names in its file that it ignores."""

    label: str
    folder: str
    model_type: str
    config: str
    model: str
    tokenizer: str
    prefix: str = ""
    ignored: tuple[str, ...] = ()


_CLIP = ("clip_text_model", "CLIPTextConfig", "CLIPTextModelWithProjection", "CLIPTokenizer")
_POSITIONS = ("text_model.embeddings.position_ids",)  # no weights; older versions wrote them
_KINDS = {
    "clip_l": _Kind("CLIP-L", "text_encoder", *_CLIP, ignored=_POSITIONS),
    "clip_g": _Kind("CLIP-G", "text_encoder_2", *_CLIP, ignored=_POSITIONS),
    "t5": _Kind(
        *("T5", "text_encoder_3", "t5", "T5Config", "T5EncoderModel", "T5Tokenizer"),
        ignored=("encoder.embed_tokens.weight",),  # the same as `shared`
    ),
    "llama": _Kind(
        *("Llama", "text_encoder_4", "llama", "LlamaConfig", "LlamaModel"),
        tokenizer="PreTrainedTokenizerFast",
        prefix="model.",
        ignored=("lm_head.weight",),
    ),
}


class TextEncoders:
    """The four encoders of an I1, on `device` where they are in memory.

    `keep` False drops each after it was used, so that only one of them is ever there; `piecewise`
    leaves it in CPU memory, from where its layers come to the device one by one. At most
    `max_kept` bytes of outputs are kept, on the CPU, the longest unused go first. Threads must not
    share it.
    """

    def __init__(
        self,
        encoders: Mapping[str, _Encoder],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        keep: bool = True,
        piecewise: bool = False,
        max_kept: int = MAX_KEPT,
    ):
        self._encoders = dict(encoders)
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self.device = torch.device(device)
        self.dtype = dtype
        self.keep = keep
        self.piecewise = piecewise
        self.max_kept = max_kept

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        llama: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep: bool = True,
        piecewise: bool = False,
        max_kept: int = MAX_KEPT,
    ) -> TextEncoders:
        """Those of a repository's folder, and `llama` (see `find_llama`); no weights are read.

        Raises ModelError where one is missing or not whole, is of another kind, or its width does
        not fit the transformer in the folder, if there is one.
        """
        folder = Path(folder).expanduser()
        encoders = {name: _open_encoder(name, folder, llama) for name in NAMES}
        opened = cls(
            encoders, device=device, dtype=dtype, keep=keep, piecewise=piecewise, max_kept=max_kept
        )
        if (folder / "transformer" / "config.json").is_file():
            config, _ = read_config(folder / "transformer")
            opened.check(I1Config.from_dict(config))
        return opened

    def check(self, config: I1Config) -> None:
        """Raise ModelError unless the encoders are those that an I1 was trained with, in size."""
        _check_sizes(self._encoders, config)

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(
        self, texts: Sequence[Texts], given: Mapping[Texts, Features] | None = None
    ) -> Features:
        """What the transformer reads of each, a row each, on `device`.

        Those of `given` are taken from there; an encoder whose outputs are all kept is not loaded.

        Raises ModelError where an encoder's weights cannot be read, InputError where the given have
        another number of tokens than the others.
        """
        found = dict(given or {})
        unknown = [t for t in dict.fromkeys(texts) if t not in found]
        if unknown and not self._encoders:
            raise ModelError(
                f'no text encoder is here to read "{unknown[0].t5[:60]}".',
                "Give an embedding file of this prompt, or load the model with its encoders.",
            )
        names = NAMES if unknown else ()
        rows = {name: self._rows(name, [getattr(t, name) for t in unknown]) for name in names}
        for i, text in enumerate(unknown):
            found[text] = Features(
                t5=rows["t5"][i][None],
                llama=rows["llama"][i][:, None],
                pooled=torch.cat([rows["clip_l"][i], rows["clip_g"][i]])[None],
            )
        lengths = {(found[t].t5.shape[1], found[t].llama.shape[2]) for t in texts}
        if len(lengths) > 1:
            raise InputError(
                "an embedding file has another number of tokens than the text beside it.",
                "Make the file of both prompts: hidream embed PROMPT -n NEGATIVE.",
            )
        return Features(
            t5=torch.cat([found[t].t5 for t in texts]).to(self.device, self.dtype),
            llama=torch.cat([found[t].llama for t in texts], dim=1).to(self.device, self.dtype),
            pooled=torch.cat([found[t].pooled for t in texts]).to(self.device, self.dtype),
        )

    def cut(self, texts: Texts) -> tuple[str, ...]:
        """A sentence for each encoder that does not read its whole text."""
        counts = {n: e.num_tokens(getattr(texts, n)) for n, e in self._encoders.items()}
        return tuple(
            f"{_KINDS[name].label} reads {read} of the prompt's {there} tokens; the rest is cut."
            for name, (read, there) in counts.items()
            if read < there
        )

    def release(self) -> None:
        """Drop the encoders' weights; they are read again when they are needed."""
        for encoder in self._encoders.values():
            encoder.drop()

    def to(self, device: torch.device | str) -> TextEncoders:
        """Encode on this device from now on."""
        if torch.device(device) != self.device:
            self.release()
        self.device = torch.device(device)
        return self

    @property
    def in_memory(self) -> tuple[str, ...]:
        """Whose weights are there now."""
        return tuple(name for name, encoder in self._encoders.items() if encoder.module is not None)

    @property
    def num_params(self) -> dict[str, int]:
        """How many values each encoder has, of those that are used."""
        return {name: encoder.folder.num_params for name, encoder in self._encoders.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the outputs depend on: weights, configurations, tokenizers."""
        files = {file for encoder in self._encoders.values() for file in encoder.files}
        return tuple(sorted(files))

    def _rows(self, name: str, texts: list[str]) -> list[Tensor]:
        encoder = self._encoders[name]
        rows = {}
        for text in dict.fromkeys(texts):
            row = self._kept.pop((name, text), None)
            if row is None:
                row = (
                    encoder.encode(text, self.device, self.dtype, self.piecewise)
                    .to(self.dtype)
                    .cpu()
                )
            rows[text] = self._kept[name, text] = row  # as the latest
        if not self.keep:
            encoder.drop()
        while sum(row.nbytes for row in self._kept.values()) > self.max_kept:
            self._kept.popitem(last=False)
        return [rows[text] for text in texts]


def verify_encoders(folder: Path, config: I1Config) -> tuple[dict[str, Folder], list[ModelError]]:
    """Check those that lie in a repository, Llama only if it does, and the tokenizers.

    Returns the folders, by name, that are whole, and what is wrong with the others, or with their
    sizes for the transformer of `config`. No weights are read.
    """
    encoders: dict[str, _Encoder] = {}
    faults = []
    for name, kind in _KINDS.items():
        if name == "llama" and not (folder / kind.folder).is_dir():
            continue
        try:
            encoder = _open_encoder(name, folder)
            encoder.num_tokens("")
            encoders[name] = encoder
        except ModelError as error:
            faults.append(error)
    try:
        _check_sizes(encoders, config)
    except ModelError as error:
        faults.append(error)
    return {_KINDS[name].folder: encoder.folder for name, encoder in encoders.items()}, faults


def _open_encoder(name: str, folder: Path, llama: str | Path | None = None) -> _Encoder:
    """That of a repository's folder; Llama's wherever `find_llama` finds it."""
    kind = _KINDS[name]
    place = folder / kind.folder
    tokenizer = folder / kind.folder.replace("text_encoder", "tokenizer")
    if name == "llama":
        place, tokenizer = find_llama(folder, llama)
    for needed in (place, tokenizer):
        if not needed.is_dir():
            raise ModelError(
                f"{folder} has no {needed.name}, which HiDream-I1 reads prompts with.", _AGAIN
            )
    return _Encoder(kind, place, tokenizer)


def _check_sizes(encoders: Mapping[str, _Encoder], config: I1Config) -> None:
    """Raise ModelError unless those that are here are as large as the transformer was trained."""
    sizes = {name: encoder.size for name, encoder in encoders.items()}
    layers = encoders["llama"].config.num_hidden_layers if "llama" in encoders else 0
    clips = [sizes[name] for name in ("clip_l", "clip_g") if name in sizes]
    if len(clips) == 2 and sum(clips) != config.pooled_size:
        which = f"CLIP-L and CLIP-G give {clips[0]} and {clips[1]} values"
        wanted = f"{config.pooled_size} together"
    elif sizes.get("t5", config.t5_size) != config.t5_size:
        which, wanted = f"T5 gives {sizes['t5']} values a token", f"{config.t5_size}"
    elif "llama" in sizes and (
        sizes["llama"] != config.llama_size or layers <= max(config.llama_layers)
    ):
        which = f"Llama has {layers} layers of {sizes['llama']} values"
        wanted = f"{max(config.llama_layers) + 1} of {config.llama_size}"
    else:
        return
    raise ModelError(
        f"{which}; this transformer reads {wanted}.",
        "Use the encoders of its own repository, and Llama-3.1-8B-Instruct.",
    )


class _Encoder:
    """One of them: headers and configuration, checked; tokenizer and weights when they are used."""

    def __init__(self, kind: _Kind, place: Path, tokenizer: Path):
        self.kind = kind
        self.tokenizer_folder = tokenizer
        self.module: nn.Module | None = None
        folder = open_folder(place)
        found = folder.config.get("model_type")
        if found != kind.model_type:
            raise ModelError(
                f'{place} holds a model of type "{found}"; {kind.label} is "{kind.model_type}".',
                "Use the folder as it was published.",
            )
        if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ModelError(f"{tokenizer} holds no tokenizer.json.", _AGAIN)
        tensors = {
            name.removeprefix(kind.prefix): info
            for name, info in folder.tensors.items()
            if name not in kind.ignored and not name.endswith("rotary_emb.inv_freq")
        }
        self.folder = Folder(
            path=place, config=folder.config, settings=folder.settings, tensors=tensors
        )
        self.config, shapes = self._described()
        check_tensors(self.folder, shapes)

    @property
    def size(self) -> int:
        """How many values it gives: for a text (CLIP) or a token."""
        config, is_clip = self.config, self.kind.model_type == "clip_text_model"
        return config.projection_dim if is_clip else config.hidden_size

    @property
    def files(self) -> tuple[Path, ...]:
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
        there = (self.tokenizer_folder / name for name in names)
        return (*self.folder.files, *(file for file in there if file.is_file()))

    def num_tokens(self, text: str) -> tuple[int, int]:
        """How many of a text's tokens are read, and how many there are."""
        there = len(self._tokens(text)["input_ids"])
        return min(there, self._most), there

    def encode(
        self, text: str, device: torch.device, dtype: torch.dtype, piecewise: bool
    ) -> Float[Tensor, "..."]:
        """(p,) of CLIP; (t, f) of T5; (layers, l, g) of Llama."""
        tokens = self._tokens(text, padding="max_length", max_length=self._most, truncation=True)
        ids, mask = (
            torch.tensor([tokens[name]], device=device) for name in ("input_ids", "attention_mask")
        )
        if self.module is None:
            module = self._load(dtype)
            apart = piecewise and device.type != "cpu"
            self.module = layer_by_layer(module, device) if apart else module.to(device)
        if self.kind.model_type == "clip_text_model":
            return self.module(ids).text_embeds[0]
        if self.kind.model_type == "t5":
            return self.module(ids, attention_mask=mask)[0][0]
        out = self.module(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat(out.hidden_states[1:])

    def drop(self) -> None:
        if self.module is None:
            return
        device = next(self.module.parameters()).device
        self.module = None
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _most(self) -> int:
        if self.kind.model_type == "clip_text_model":
            return min(NUM_TOKENS, self.config.max_position_embeddings)
        return min(NUM_TOKENS, self._tokenizer.model_max_length)

    def _tokens(self, text: str, **options: Any) -> Mapping[str, list[int]]:
        """A token's name in a text is text, not the token."""
        if self.kind.model_type == "t5":  # its pieces hold the names themselves
            for name in self._tokenizer.all_special_tokens:
                text = text.replace(name, f"{name[0]} {name[1:]}")
        return self._tokenizer(text, split_special_tokens=True, verbose=False, **options)

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        kind = getattr(transformers, self.kind.tokenizer)
        with _told_if_broken(self.tokenizer_folder):
            tokenizer = kind.from_pretrained(self.tokenizer_folder, local_files_only=True)
        if self.kind.model_type == "llama":
            if tokenizer.eos_token is None:
                raise ModelError(
                    f"the tokenizer in {self.tokenizer_folder} has no token that ends a text.",
                    "Use Llama-3.1-8B-Instruct's.",
                )
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"  # mirrors of Llama may say otherwise
        return tokenizer

    def _described(self) -> tuple[Any, dict[str, list[int]]]:
        """The configuration, and every tensor that a model of it needs."""
        import transformers

        with _told_if_broken(self.folder.path), torch.device("meta"):
            config = getattr(transformers, self.kind.config).from_pretrained(
                self.folder.path, local_files_only=True
            )
            return config, tensor_shapes(getattr(transformers, self.kind.model)(config))

    def _load(self, dtype: torch.dtype) -> nn.Module:
        import transformers

        with _told_if_broken(self.folder.path):
            module = getattr(transformers, self.kind.model).from_pretrained(
                self.folder.path, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        for name, weight in module.named_parameters():
            if not weight.isfinite().all():
                raise ModelError(
                    f"{name} in {self.folder.path} holds values that are not finite.", _AGAIN
                )
        return module.requires_grad_(False).eval()


@contextmanager
def _told_if_broken(folder: Path) -> Iterator[None]:
    """transformers in silence; what it raises as ModelError."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_imports():
            yield
    except Exception as error:  # tokenizers raises that very class
        if isinstance(error, MemoryError | RuntimeError):  # of the machine, not of the folder
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{folder} cannot be read: {reason}", _AGAIN) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
