"""What the 8B needs under every memory policy: as much is on the device as was counted."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hidream.errors import MemoryExceeded
from hidream.memory import AUTO, POLICIES
from hidream.models import machine, placement
from hidream.models.loading import Reader, tensor_shapes
from hidream.models.o1 import placing
from hidream.models.o1.config import O1_8B
from hidream.models.o1.memory import (
    BLOCKS,
    BatchSize,
    check_fit,
    is_quantised,
    need,
    part_of,
    weight_bytes,
)
from hidream.models.o1.model import O1
from hidream.models.placement import place
from hidream.models.quantise import quantised_bytes


class Shapes(Reader):
    """A checkpoint of shapes alone: tensors that take no memory, on devices that are not here."""

    def __init__(self, shapes):
        self.shapes = shapes

    def read(self, name, *, device="cpu", dtype=torch.bfloat16):
        return torch.empty(self.shapes[name], dtype=dtype, device=device)


@pytest.mark.parametrize("name", POLICIES)
def test_the_8b_holds_what_was_counted(name, monkeypatch):
    """Built on meta; what its policy puts on a GPU becomes tensors without storage there."""
    policy, pinned = POLICIES[name], []
    monkeypatch.setattr(placement, "stream_ahead", lambda blocks, *_: pinned.extend(blocks))
    with torch.device("meta"):
        model = O1(O1_8B).requires_grad_(False)
    shapes = tensor_shapes(model)
    source = Shapes(shapes)
    counted = weight_bytes(O1_8B, policy, width=2, device="cuda")
    with FakeTensorMode():
        like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        resident = {}
        for tensor, shape in shapes.items():
            if part_of(tensor, policy, 36) == "resident":
                resident[tensor] = source.read(tensor, device="cuda")
                if is_quantised(tensor, shape, policy):
                    size = quantised_bytes(shape, policy.weights, width=2, device="cuda")
                    resident[tensor] = torch.empty(size, dtype=torch.int8, device="cuda")
        place(model, resident)
        if policy != AUTO:
            placing.attach(model, policy, source, like)
        places = {"cuda": 0, "cpu": 0, "meta": 0}
        for weight in model.parameters():
            places[weight.device.type] += weight.numel() * weight.element_size()
        assert places["cuda"] == counted.resident
        assert places["cpu"] == (151_936 * 4096 * 2 if policy.piecewise else 0)
        if policy != AUTO:
            with model.elsewhere.in_use("lm_head"):
                assert model.lm_head.weight.is_cuda
                assert model.lm_head.weight.numel() * 2 == counted.head
            with model.elsewhere.in_use("model.visual"):
                tower = sum(w.numel() * 2 for w in model.model.visual.parameters() if w.is_cuda)
                assert tower == counted.tower
    streamed = len(pinned)
    block = sum(math.prod(s) * 2 for t, s in shapes.items() if t.startswith(f"{BLOCKS}.0."))
    assert streamed == len(policy.streamed_blocks(36))
    assert counted.streaming == (2 * block if streamed else 0)
    assert counted.cpu == places["cpu"] + streamed * block


def test_the_8b_without_its_tables_is_14_gb():
    """The issue's bar, and that nothing of the whole model is forgotten."""
    low = weight_bytes(O1_8B, POLICIES["low"], width=2, device="cuda")
    assert 13.9e9 < low.always <= 14e9
    whole = weight_bytes(O1_8B, AUTO, width=2, device="cuda")
    assert whole.always == 8_804_887_792 * 2
    assert low.always + low.tower + low.head + low.cpu == whole.always


@pytest.mark.parametrize(("name", "card"), [("16gb", 16 * 2**30), ("12gb", 12 * 2**30)])
@pytest.mark.parametrize("num_references", [0, 1, 4])
def test_cards(name, card, num_references):
    """A guided picture of 2048², with four references too, leaves a gigabyte of the card."""
    side = O1_8B.budgets.side(max(1, num_references), 2048) // 32
    vision = O1_8B.budgets.vision_side(max(1, num_references)) // 16
    batch = BatchSize(
        num_pictures=1,
        num_branches=2,
        num_target=64 * 64,
        num_references=num_references * side**2,
        num_prefix=200 + num_references * (vision // 2) ** 2,
        num_vision_patches=num_references * vision**2,
    )
    needed = need(O1_8B, POLICIES[name], batch, width=2, device="cuda")
    assert needed.total < card - 1e9
    assert need(O1_8B, AUTO, batch, width=2, device="cuda").total > card


def test_cpu_memory_is_asked_too(monkeypatch):
    """Streamed blocks of a GPU wait in CPU memory: 13.9 GB of the 8B's."""
    monkeypatch.setattr(
        machine, "total_memory", lambda device: 10e9 if device.type == "cpu" else 40e9
    )
    gpu, half = torch.device("cuda"), torch.bfloat16
    for name in ("auto", "low", "12gb"):
        check_fit(O1_8B, POLICIES[name], device=gpu, dtype=half)
    with pytest.raises(MemoryExceeded, match=r"stream keeps 13\.9 GB in CPU memory"):
        check_fit(O1_8B, POLICIES["stream"], device=gpu, dtype=half)
