"""Linear layers' weights in 8 bits, by torchao (the `quant` extra)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from hidream.memory import Quantised


def quantised(weight: Float[Tensor, "o i"], numbers: Quantised) -> Tensor:
    """The weight as torchao keeps it: 8 bits a value and a scale a row.

    Only weights are rounded: a product takes them back to the weight's dtype first.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[numbers]()
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.Sequential(layer)  # torchao changes the layers inside of what it is given
    quantize_(holder, config)
    changed = holder[0]
    assert isinstance(changed, nn.Linear)
    return changed.weight
