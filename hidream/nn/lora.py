"""Low-rank changes of linear layers (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353).

A changed model is a view of the unchanged one: `adapted` shares every weight and leaves the given
module as it is, so that many LoRAs can be used in turn, or at once, and none has to be undone. Some
files bring a few tensors whole, too: the view has those in place of the module's.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Layer = nn.Linear | nn.Conv3d  # a convolution whose kernel is the whole input is linear, too


@dataclass(frozen=True)
class Branch:
    """What is added to a linear layer W x + bias: up (down x) + gain · (W x).

    `gain` is what DoRA needs beside the product. Tensors have the layer's dtype and device;
    given as Parameters they can be trained.
    """

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]
    gain: Float[Tensor, " o"] | None = None


class Adapter(nn.Module):
    """What is trained of a LoRA's layer: its two matrices, and the lengths of the rows for DoRA.

    It starts as no change at all. Dropout falls on what `lora_A` reads, in training alone.
    """

    def __init__(
        self,
        weight: Float[Tensor, "o ..."],
        rank: int,
        alpha: float,
        *,
        dora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        out, inner = weight.flatten(1).shape
        self.alpha_over_rank = alpha / rank
        self.dropout = dropout
        drawn = torch.empty(rank, inner).uniform_(-1, 1, generator=generator)
        self.lora_A = nn.Parameter(drawn / inner**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, rank))
        lengths = torch.linalg.vector_norm(weight.detach().flatten(1).float(), dim=1)
        self.lora_magnitude_vector = nn.Parameter(lengths) if dora else None

    def branch(self, weight: Float[Tensor, "o ..."]) -> Branch:
        """The branch of a layer of this weight; gradients reach the parameters through it."""
        return scaled(
            weight,
            self.lora_A,
            self.lora_B,
            alpha_over_rank=self.alpha_over_rank,
            scale=1.0,
            magnitude=self.lora_magnitude_vector,
        )


class _Changed(nn.Module):
    """A linear layer and more; `weight` and `bias` are those of the layer itself."""

    base: Layer

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def changed(self, x: Tensor, read: Tensor, branch: Branch) -> Tensor:
        """The layer of `x`, and what the branch adds, which reads `read` for it."""
        out = self.base(x)
        added = F.linear(F.linear(read, branch.down), branch.up)
        if branch.gain is not None:
            product = out if self.bias is None else out - self.bias
            added = added + branch.gain * product
        return out + added


class LoraLinear(_Changed):
    """A linear layer with a branch."""

    def __init__(self, base: Layer, branch: Branch):
        super().__init__()
        self.base = base
        self.lora_A = branch.down
        self.lora_B = branch.up
        self.gain = branch.gain

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return self.changed(x, x, Branch(self.lora_A, self.lora_B, self.gain))


class AdaptedLinear(_Changed):
    """A linear layer with an adapter: the same numbers, from what is trained."""

    def __init__(self, base: Layer, adapter: Adapter):
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        read = F.dropout(x, self.adapter.dropout, self.adapter.training)
        return self.changed(x, read, self.adapter.branch(self.weight))


def adapted(
    module: Module,
    branches: Mapping[str, Branch] | Mapping[str, Adapter],
    whole: Mapping[str, Tensor] | None = None,
) -> Module:
    """`module` with these branches, by layer name, and these tensors, by their own, as its own.

    It shares everything else with the module given, and its adapters with who trains them. Raises
    AttributeError for a name that the module does not have.
    """
    whole = whole or {}
    for name in branches:
        module.get_submodule(name)
    for name in whole:
        module.get_parameter(name)
    view = _view(module, branches, whole, "")
    assert isinstance(view, type(module))
    return view


def _view(
    module: nn.Module,
    branches: Mapping[str, Branch] | Mapping[str, Adapter],
    whole: Mapping[str, Tensor],
    name: str,
) -> nn.Module:
    below = name and name + "."
    if not any(other == name or other.startswith(below) for other in (*branches, *whole)):
        return module
    own: dict[str, nn.Parameter | None] = {
        key: nn.Parameter(whole[below + key], requires_grad=False)
        for key in module._parameters
        if below + key in whole
    }
    view = module
    if name not in branches or own:
        view = copy.copy(module)
        # The others are looked up in the module itself, where they may come and go.
        if own:
            view._parameters = ChainMap(own, module._parameters)  # type: ignore[assignment]
        view._modules = {
            child: _view(part, branches, whole, below + child) if part is not None else None
            for child, part in module._modules.items()
        }
    if name in branches:
        assert isinstance(view, Layer)
        change = branches[name]
        if isinstance(change, Adapter):
            return AdaptedLinear(view, change)
        return LoraLinear(view, change)
    return view


def summed(branches: Sequence[Branch], *, like: Float[Tensor, "o ..."]) -> Branch:
    """Several branches of one layer as one: the ranks stand side by side, the gains add up.

    The result has the dtype and device of `like`.
    """
    gains = [branch.gain for branch in branches if branch.gain is not None]
    return Branch(
        down=torch.cat([branch.down for branch in branches]).to(like),
        up=torch.cat([branch.up for branch in branches], dim=1).to(like),
        gain=torch.stack(gains).sum(dim=0).to(like) if gains else None,
    )


def scaled(
    weight: Float[Tensor, "*w"],
    down: Float[Tensor, "r i"],
    up: Float[Tensor, "o r"],
    *,
    alpha_over_rank: float,
    scale: float,
    magnitude: Float[Tensor, " o"] | None = None,
) -> Branch:
    """The branch that moves a layer `scale` of the way from its weight W to the tuned one, fp32.

    LoRA's tuned weight is V = W + alpha/rank · up · down. DoRA's is V with its rows brought to
    the lengths `magnitude`: g · V, which is V + (g − 1) · V, so W's part of it is a gain. No
    gradient passes through the length of V (section 4.3 of DoRA). A LoRA does not look at W.
    """
    down, up = down.float(), alpha_over_rank * up.float()
    if magnitude is None:
        return Branch(down, scale * up)
    tuned = weight.flatten(1).float() + up @ down
    g = magnitude.float() / torch.linalg.vector_norm(tuned, dim=1).detach()
    return Branch(down, scale * g[:, None] * up, scale * (g - 1))
