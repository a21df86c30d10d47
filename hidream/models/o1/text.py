"""Text from O1: after the causal prefix the same decoder goes on, one token a step.

Every request keeps the keys and values of all it has read and written, so a step computes a single
token for each. The linear layers take the tokens of all requests at once; attention goes request
by request, so that each reads exactly its own text, without padding or masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hidream.models.o1.model import O1, Prefix
from hidream.models.o1.tokens import Tokens
from hidream.nn.attention import attention

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # of an answer, and of a text without a chat

# (request, number of its next token, logits) -> id
Choose = Callable[[int, int, Float[Tensor, " vocab"]], int]


class Cache:
    """The keys and values of one request's text: (room, kv_heads, head_dim) a layer.

    The first `length` are in use. `position` is the next token's, on all three axes.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], position: int):
        self.layers = list(zip(keys, values, strict=True))
        self.length = len(keys[0])
        self.position = position

    @classmethod
    def after(cls, prefix: Prefix, row: int, tokens: Tokens) -> Cache:
        """What a request's prefix holds: row `row` of a batch, made from `tokens`."""
        keys, values = ([layer[row] for layer in part] for part in (prefix.keys, prefix.values))
        return cls(keys, values, int(tokens.position_ids[0, len(tokens.input_ids)]))

    def add(
        self, layer: int, key: Float[Tensor, "g d"], value: Float[Tensor, "g d"]
    ) -> tuple[Float[Tensor, "s g d"], Float[Tensor, "s g d"]]:
        """All keys and values of a layer, the next token's too; `advance` when every layer has it.

        Room grows by a quarter when it is used up, so that few steps copy.
        """
        keys, values = self.layers[layer]
        if self.length == len(keys):
            more = max(64, self.length // 4)
            keys, values = (pad(t, (0, 0, 0, 0, 0, more)) for t in (keys, values))
            self.layers[layer] = keys, values
        keys[self.length], values[self.length] = key, value
        return keys[: self.length + 1], values[: self.length + 1]

    def advance(self) -> None:
        self.length += 1
        self.position += 1


def write(
    model: O1,
    requests: Sequence[Tokens],
    choose: Choose,
    *,
    limits: Sequence[int],
    stop: Collection[int],
    on_token: Callable[[int, int], object] | None = None,
) -> list[list[int]]:
    """The ids that follow each request, up to its limit (1 or more), or to a `stop`, left out.

    `on_token(request, id)` is called for every id as soon as it is chosen, a step's requests in
    their order; what it raises ends the work. Raises ModelError where the model cannot write.
    """
    prefix = model.prefill(requests)
    caches = [Cache.after(prefix, row, tokens) for row, tokens in enumerate(requests)]
    logits = model.logits(prefix.last)
    written: list[list[int]] = [[] for _ in requests]
    writing = list(range(len(requests)))
    while True:
        going: dict[int, int] = {}
        for row, scores in zip(writing, logits, strict=True):
            token = choose(row, len(written[row]), scores)
            if token in stop:
                continue
            written[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if len(written[row]) < limits[row]:
                going[row] = token
        if not going:
            return written
        writing = list(going)
        tokens = torch.tensor(list(going.values()), device=logits.device)
        logits = next_logits(model, tokens, [caches[row] for row in writing])


def next_logits(
    model: O1, tokens: Int[Tensor, " b"], caches: Sequence[Cache]
) -> Float[Tensor, "b vocab"]:
    """How likely each token is to follow `tokens`, one a request, which join their caches."""
    decoder = model.model.language_model

    def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for i, cache in enumerate(caches):
            keys, values = cache.add(layer, k[i], v[i])
            row = attention(
                q[i][None, None], keys[None], values[None], backend=model.attention_backend
            )
            out.append(row[0])
        return torch.cat(out)

    positions = torch.tensor([cache.position for cache in caches], device=tokens.device)
    hidden = decoder(
        decoder.embed_tokens(tokens),
        decoder.rope(positions.expand(3, -1)),
        lambda layer: partial(read, layer),
    )
    for cache in caches:
        cache.advance()
    return model.logits(hidden)
