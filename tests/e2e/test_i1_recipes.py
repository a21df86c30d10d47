"""The recipes of the small I1 and E1, to their ends. Two hours: `make slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hidream.eval import world
from hidream.pipelines.loading import load
from hidream.train import run

RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawer(tmp_path_factory):
    out = tmp_path_factory.mktemp("i1")
    assert run(RECIPES / "i1_tiny.toml", [f"out={out}"]) == 0
    return out


def scores(model, *categories):
    """(lower, upper end of the interval, floor) of each category, of 50 scenes."""
    found = world.run(load(model, device="cpu"), num_scenes=50, seed=22, categories=categories)
    return {name: (*row["ci95"], row["floor"]) for name, row in found["categories"].items()}


def test_a_small_i1_draws_objects_and_its_skewed_experts_share_the_work(drawer):
    for name, (low, _, floor) in scores(drawer / "model", "single", "colors").items():
        assert low > floor, name
    last = json.loads((drawer / "log.jsonl").read_text().splitlines()[-2])
    assert last["load_max"] <= 1.25


def test_out_of_it_comes_an_editor(drawer, tmp_path):
    out = tmp_path / "e1"
    assert run(RECIPES / "e1_tiny.toml", [f"init={drawer / 'model'}", f"out={out}"]) == 0
    low, _, floor = scores(out / "model", "edits")["edits"]
    assert low > floor
