"""Memory policies: where a model's weights are while nothing reads them, and in which numbers.

No torch here: a misspelt policy is refused before it loads. What a policy needs of a model is
counted in `models/o1/memory.py` and `models/i1/memory.py`; what it does is in
`models/placement.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from hidream.errors import UsageError
from hidream.registry import nearest

Quantised = Literal["int8", "fp8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One way to keep a model's weights.

    `lends`: what a step does not need is on the device only while it is used: O1's language head
    and vision tower; I1's text encoders, one after the other, its VAE, and what a prompt alone
    goes through. `piecewise`: and never as a whole: of token embeddings, which stay in CPU memory,
    rows are looked up, and a large text encoder comes layer by layer. `streamed`: the share of the
    blocks that live in CPU memory and come to the device in turn; of I1, which is four times as
    large, it is `streamed_i1`. `weights`: the numbers that the blocks' linear layers are kept in;
    None: the model's dtype. `smaller` names the policy that needs less of the device.
    """

    name: str
    what: str
    lends: bool = True
    piecewise: bool = True
    streamed: float = 0.0
    streamed_i1: float = 0.0
    weights: Quantised | None = None
    smaller: str | None = None

    @property
    def exact(self) -> bool:
        """Whether pictures are those of `auto` to the last bit."""
        return self.weights is None

    def streamed_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Which blocks are streamed: evenly spread, so that the others hide the copying."""
        return spread(math.ceil(self.streamed * num_blocks), num_blocks)


def spread(count: int, num_blocks: int) -> tuple[int, ...]:
    """`count` of so many blocks, evenly spread; the last is one of them."""
    return tuple((i + 1) * num_blocks // count - 1 for i in range(count))


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy(
                name="auto",
                what="everything on the device",
                lends=False,
                piecewise=False,
                smaller="balanced",
            ),
            Policy(
                name="balanced",
                what="what a step does not need is on the device only while it is used",
                piecewise=False,
                smaller="low",
            ),
            Policy(
                name="low",
                what="balanced, and that in pieces: embeddings row by row, encoders layer by layer",
                smaller="16gb",
            ),
            Policy(
                name="16gb",
                what="low, and a part of the blocks streamed: for a 16 GB card",
                streamed=0.25,
                streamed_i1=0.625,
                smaller="12gb",
            ),
            Policy(
                name="12gb",
                what="low, and a larger part of the blocks streamed: for a 12 GB card",
                streamed=0.5,
                streamed_i1=0.8125,
                smaller="stream",
            ),
            Policy(
                name="stream", what="low, and every block streamed", streamed=1.0, streamed_i1=1.0
            ),
            Policy(
                name="int8",
                what="low, and the blocks in 8-bit integers (torchao); pictures differ a little",
                weights="int8",
                smaller="stream",
            ),
            Policy(
                name="fp8",
                what="low, and the blocks in 8-bit floats (torchao); pictures differ a little",
                weights="fp8",
                smaller="stream",
            ),
            Policy(
                name="int4",
                what="low, and the blocks in 4-bit integers (torchao); pictures differ visibly",
                weights="int4",
                smaller="stream",
            ),
        )
    }
)
AUTO = POLICIES["auto"]


def find_policy(name: str) -> Policy:
    """The policy of this name, usable here.

    Raises UsageError with the nearest names, or with how to install what it needs.
    """
    policy = POLICIES.get(name.lower())
    if policy is None:
        raise UsageError(f'unknown memory policy "{name}"; {nearest(name, POLICIES)}')
    if not available(policy):
        raise UsageError(
            f"--memory {policy.name} needs torchao, which is not installed.",
            'Install it with: pip install "hidream[quant]". --memory stream needs less, without.',
        )
    return policy


def available(policy: Policy) -> bool:
    """Whether the packages that a policy needs are here."""
    return policy.weights is None or importlib.util.find_spec("torchao") is not None
