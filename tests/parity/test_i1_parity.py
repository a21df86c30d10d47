"""Our I1 against diffusers', block by block and whole, and against its tensor names at 17B."""

import json

import pytest
import torch

from hidream.models.i1.config import I1_FULL
from hidream.models.i1.weights import shapes_of
from tests.parity import i1

BOUND = 1e-5


@pytest.mark.parametrize(("number", "name"), list(enumerate(i1.CASES)))
def test_case(number, name):
    line = i1.run_case(name, i1.CASES[name], number)
    assert {
        key: value for key, value in line.items() if key.endswith("_rel") and value > BOUND
    } == {}
    if name in ("ties", "near_ties"):  # which of the two is picked is rounding's choice
        assert line["tied"] > 0.1
    else:
        assert line.get("routes_equal", 1) > 0.99


@pytest.mark.parametrize(("number", "name"), list(enumerate(i1.GRADIENT_CASES)))
def test_gradients_of_every_tensor(number, name):
    line = i1.run_gradients(name, i1.GRADIENT_CASES[name], number)
    assert (line["num_tensors"], line["without_gradient"]) == (157, 0)
    assert line["gradients_rel"] <= 1e-6  # in fp64; angles and timesteps are fp32 in both


@pytest.mark.parametrize(
    ("name", "missed", "alone"), [("an_expert_nobody_picks", 1, None), ("all_to_one", None, 2)]
)
def test_the_corners_are_corners(name, missed, alone):
    case = i1.CASES[name]
    generator = torch.Generator().manual_seed(0)
    _, ours = i1.build(case, generator)
    inputs = i1.draw(case, generator)
    with torch.no_grad():
        loads = ours(inputs.x_t, inputs.sigma, inputs.features).expert_loads
    if missed is not None:
        assert loads[:, missed].max() == 0
    if alone is not None:
        assert loads[:, alone].min() == 1


def test_names_and_shapes_at_17b(shared):
    keys = json.loads((shared / "parity" / "i1_full_keys.json").read_text())
    shapes = shapes_of(I1_FULL)
    assert shapes == keys
    assert len(shapes) == 1615
