"""From requests for text to what the model writes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hidream.limits import MAX_BATCH
from hidream.models.o1.model import O1
from hidream.models.o1.text import STOP_TOKENS, write
from hidream.models.o1.tokens import Tokenizer, Tokens, encode_text
from hidream.pictures import read_picture
from hidream.sampling import choose_token, uniform
from hidream.text_request import TextRequest

MAX_PREFIX = 16_384  # tokens of prompts and pictures read at once, unless one request has more

OnToken = Callable[[int, int, str], object]


@dataclass(frozen=True)
class TextOutput:
    """What was written, and how.

    `num_tokens` counts without the token that ends a text. `finish_reason` is "stop" where the
    model ended it, and "length" where `max_new_tokens` did. `request` has the seed that was drawn.
    `timings` are seconds of the whole call, other requests included.
    """

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    request: TextRequest
    timings: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def write_texts(
    model: O1,
    tokenizer: Tokenizer,
    requests: Sequence[TextRequest],
    on_token: OnToken | None = None,
) -> list[TextOutput]:
    """The text for each request, as if it had been alone; see `Pipeline.generate_text`."""
    start = time.perf_counter()
    requests = [_with_seed(request) for request in requests]
    encoded = [_encode(model, tokenizer, request) for request in requests]
    begun = time.perf_counter()
    stop = [tokenizer.special[name] for name in STOP_TOKENS]
    written: list[list[int]] = []
    with model.elsewhere.in_use("lm_head") if model.elsewhere else nullcontext():
        for batch in _batches([len(tokens.input_ids) for tokens in encoded]):
            chosen = [requests[i] for i in batch]
            speller = _Speller(tokenizer, batch, on_token)
            written += write(
                model,
                [encoded[i] for i in batch],
                _chooser(chosen),
                limits=[request.max_new_tokens for request in chosen],
                stop=stop,
                on_token=speller.add,
            )
            speller.close()
    end = time.perf_counter()
    timings = {"encode": begun - start, "write": end - begun, "total": end - start}
    return [
        TextOutput(
            text=tokenizer.decode(ids),
            num_tokens=len(ids),
            finish_reason="stop" if len(ids) < request.max_new_tokens else "length",
            request=request,
            timings=timings,
            warnings=request.warnings,
        )
        for request, ids in zip(requests, written, strict=True)
    ]


class _Speller:
    """Hands on the text of tokens as they come, every character whole.

    A token may end inside a character; its bytes wait for the rest.
    """

    def __init__(self, tokenizer: Tokenizer, places: Sequence[int], on_token: OnToken | None):
        self.tokenizer = tokenizer
        self.places = places
        self.on_token = on_token
        self.counts = [0] * len(places)
        self.waiting: list[list[int]] = [[] for _ in places]

    def add(self, row: int, token: int) -> None:
        if self.on_token is None:
            return
        self.counts[row] += 1
        self.waiting[row].append(token)
        text = self.tokenizer.decode(self.waiting[row])
        if text.endswith("\ufffd"):
            text = ""
        else:
            self.waiting[row] = []
        self.on_token(self.places[row], self.counts[row], text)

    def close(self) -> None:
        """What still waits is no whole character, and is shown as it is."""
        for row, waiting in enumerate(self.waiting):
            if waiting and self.on_token is not None:
                self.on_token(self.places[row], self.counts[row], self.tokenizer.decode(waiting))


def _with_seed(request: TextRequest) -> TextRequest:
    drawn = request.seed is None or request.seed == -1
    return replace(request, seed=secrets.randbelow(2**32)) if drawn else request


def _encode(model: O1, tokenizer: Tokenizer, request: TextRequest) -> Tokens:
    pictures = [
        read_picture(picture, f"picture {number}" if len(request.pictures) > 1 else "picture")
        for number, picture in enumerate(request.pictures, 1)
    ]
    return encode_text(tokenizer, model.config, request.prompt, pictures)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of neighbours that are written together."""
    batches: list[list[int]] = []
    total = 0
    for place, length in enumerate(lengths):
        if not batches or len(batches[-1]) == MAX_BATCH or total + length > MAX_PREFIX:
            batches.append([])
            total = 0
        batches[-1].append(place)
        total += length
    return batches


def _chooser(
    requests: Sequence[TextRequest],
) -> Callable[[int, int, Float[Tensor, " vocab"]], int]:
    """Each token by its request's settings and by a number that only seed and place decide."""

    def choose(row: int, number: int, logits: Tensor) -> int:
        request = requests[row]
        return choose_token(
            logits,
            uniform(request.seed, number) if request.temperature else 0.0,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
        )

    return choose
