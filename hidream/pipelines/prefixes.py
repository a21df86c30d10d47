"""Prefixes read once and kept for later calls: the same text and pictures, the same tensors.

A prefix is always computed alone, never packed with others, so that its bits depend on nothing
that stands beside it. One that was kept is therefore the one that would be computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from hidream.errors import UsageError
from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.tokens import Tokens
from hidream.pipelines.base import Counter

MAX_KEPT = 256 * 1024**2  # bytes


class Prefixes:
    """Keys and values of causal tokens, and what the vision tower saw, by their content.

    An entry is found again by token ids, positions, vision pixels, and LoRAs with their scales. It
    holds for the weights that made it: where a weight was replaced, moved or changed in place, all
    are dropped. (A change through `weight.data` cannot be seen: call `clear` after it.) At most
    `max_bytes` are kept, the longest unused go first; 0 keeps nothing. Threads may share it.
    """

    def __init__(self, max_bytes: int = MAX_KEPT):
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()
        self._weights: _Weights | None = None
        self._generation = 0
        self.max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UsageError(
                f"prefix_bytes={value!r} is no number of bytes.", "Give 0 to keep no prefixes."
            )
        with self._lock:
            self._max_bytes = value
            self._shrink()

    @property
    def num_bytes(self) -> int:
        """What is kept now."""
        return sum(size for _, size in self._kept.values())

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._generation += 1

    def read(
        self,
        model: O1,
        requests: Sequence[Tokens],
        *,
        loras: Hashable = (),
        counter: Counter | None = None,
        on_prefill: Callable[[], object] | None = None,
    ) -> Prefix:
        """The prefix of `requests`, a row each; what several share is computed once.

        `model` is as the LoRAs `loras` (files and scales) have changed it. `on_prefill()` is
        called before each that is computed; what it raises ends the work.
        """
        counter = counter or Counter()
        made_by = (self._generation_of(model), loras)
        here: dict[Hashable, Any] = {}  # whatever `max_bytes` is, a batch computes nothing twice

        def found(key: Hashable) -> bool:
            if key not in here and (kept := self._get((made_by, key))) is not None:
                here[key] = kept
                return True
            return False

        def keep(key: Hashable, entry: Any, tensors: Iterable[Tensor]) -> None:
            here[key] = entry
            self._put((made_by, key), entry, sum(map(_size, tensors)))

        rows = []
        for tokens in requests:
            pixels = _pixels_key(tokens)
            key = ("text", _text_key(tokens), pixels)
            counter.num_reused += found(key)
            if key not in here:
                if on_prefill is not None:
                    on_prefill()
                if pixels and not found(pixels) and pixels not in here:
                    seen = model.see([tokens])
                    assert seen is not None
                    keep(pixels, seen, [seen.tokens, *seen.deepstack])
                computed = model.prefill([tokens], here.get(pixels))
                computed = replace(computed, references=(), ropes=())
                parts = [row for layer in (*computed.keys, *computed.values) for row in layer]
                keep(key, computed, [*parts, computed.last])
                counter.num_prefills += 1
            rows.append(model.with_generated(here[key], [tokens]))
        return Prefix.join(rows)

    def _generation_of(self, model: O1) -> int:
        with self._lock:
            if self._weights is None or not self._weights.are_those_of(model):
                self._kept.clear()
                self._generation += 1
                self._weights = _Weights(model)
            return self._generation

    def _get(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def _put(self, key: Hashable, entry: Any, size: int) -> None:
        with self._lock:
            if size <= self._max_bytes:
                self._kept[key] = entry, size
                self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)


class _Weights:
    """Which weights a model has, and in which state, without looking at their values."""

    def __init__(self, model: O1):
        self.parts = [(ref(weight), _state(weight)) for weight in _tensors(model)]
        self.how = _how(model)

    def are_those_of(self, model: O1) -> bool:
        """False, too, where changes cannot be told: of tensors made in inference mode."""
        now = list(_tensors(model))
        return (
            len(now) == len(self.parts)
            and self.how == _how(model)
            and not any(weight.is_inference() for weight in now)
            and all(
                held() is weight and state == _state(weight)
                for (held, state), weight in zip(self.parts, now, strict=True)
            )
        )


def _tensors(model: O1) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Changes with every change in place, every move and every cast."""
    try:
        place = weight.data_ptr()
    except RuntimeError:  # quantised weights have no single place
        place = 0
    return (-1 if weight.is_inference() else weight._version), place, weight.dtype


def _how(model: O1) -> tuple[Any, ...]:
    """What else decides how sums are rounded."""
    return (
        model.attention_backend,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )


def _text_key(tokens: Tokens) -> str:
    causal = tokens.position_ids[:, : len(tokens.input_ids)]
    return _digest([tokens.input_ids, causal, tokens.image_slots])


def _pixels_key(tokens: Tokens) -> Hashable:
    """None without pictures."""
    if not tokens.image_grids:
        return None
    return "pixels", _digest([tokens.pixel_values]), tokens.image_grids


def _digest(tensors: Sequence[Tensor]) -> str:
    """The SHA-256 over values and shapes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(values.numpy().tobytes())
    return found.hexdigest()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
