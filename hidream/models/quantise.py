"""Linear layers' weights in 8 or 4 bits, by torchao (the `quant` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hidream.errors import UsageError
from hidream.memory import Policy, Quantised

GROUP = 64  # values of a row that share a scale and a zero in 4 bits


def check_quantised(policy: Policy, device: torch.device, dtype: torch.dtype) -> None:
    """UsageError for numbers that torchao cannot multiply by on this device, in this dtype."""
    if policy.weights == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UsageError("--memory int4 needs bf16 on a GPU.", "Use --dtype bf16, or int8.")


def quantised_bytes(shape: Sequence[int], numbers: Quantised, *, width: int, device: str) -> int:
    """Bytes of a weight that `quantised` makes of one of `width` bytes a value."""
    rows, columns = shape
    if numbers != "int4":
        return rows * columns + 8 * rows  # the row's scale, and a zero where there is one
    if device == "cuda":  # its kernel reads whole tiles
        rows, columns = -(-rows // 8) * 8, -(-columns // 1024) * 1024
    elif columns % GROUP:
        return rows * columns * width
    return rows * columns // 2 + 2 * rows * (columns // GROUP) * width


def quantised(weight: Float[Tensor, "o i"], numbers: Quantised) -> Tensor:
    """The weight as torchao keeps it: 8 bits a value and a scale a row, or 4 bits and two numbers
    for every `GROUP` values of a row. In 4 bits on a CPU, a row that is not made of whole groups
    stays as it is.

    Only weights are rounded: a product takes them back to the weight's dtype first.
    """
    from torchao.quantization import quantize_

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.Sequential(layer)  # torchao changes the layers inside of what it is given
    quantize_(holder, _config(numbers, weight.device))
    changed = holder[0]
    assert isinstance(changed, nn.Linear)
    return changed.weight


def num_bytes(weight: Tensor) -> int:
    """What a weight takes, whichever numbers it is kept in."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(num_bytes(getattr(weight, name)) for name in names)


def _config(numbers: Quantised, device: torch.device) -> Any:
    from torchao import quantization

    if numbers != "int4":
        return {
            "int8": quantization.Int8WeightOnlyConfig,
            "fp8": quantization.Float8WeightOnlyConfig,
        }[numbers]()
    if device.type == "cuda":
        return quantization.Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
