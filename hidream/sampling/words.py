"""The next token of a text: the likeliest, or drawn by its probability."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

GREEDY = 1e-6  # a temperature below this is 0


def choose_token(
    logits: Float[Tensor, " vocab"],
    draw: float,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> int:
    """A token's id: the likeliest at temperature 0, else the one on which `draw` falls.

    `draw`, in [0, 1), falls among the probabilities softmax(logits / temperature), laid end to end
    from the likeliest down. `top_k` leaves the k likeliest in; of them `top_p` leaves as few as
    together reach that probability (nucleus sampling, arXiv 1904.09751).
    """
    if temperature < GREEDY:
        return int(logits.argmax())
    logits = logits.float()
    scores, ids = ((logits - logits.max()) / temperature).sort(descending=True, stable=True)
    probabilities = scores[:top_k].softmax(dim=0)
    reached = probabilities.cumsum(dim=0)
    if top_p < 1:
        reached = reached[: int((reached < top_p).sum()) + 1]
    place = int((reached <= draw * reached[-1]).sum())
    last = int((reached < reached[-1]).sum())  # rounding may carry a draw near 1 past it
    return int(ids[min(place, last)])
