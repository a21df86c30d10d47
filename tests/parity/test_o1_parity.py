"""Our O1 against the published code's own outputs, and against its tensor names at 8B."""

import json

import pytest

from hidream.folder import Folder
from hidream.models.o1.config import O1_8B, O1Config
from hidream.models.o1.weights import config_of, shapes_of
from tests.parity import o1

BOUNDS = {"x_pred_rel": 1e-5, "z_final_rel": 5e-5, "logits_rel": 1e-5, "image_max_diff": 1}


@pytest.fixture(scope="module")
def results(shared):
    return {line["case"]: line for line in o1.run(shared / "parity" / "o1")}


def test_every_case_ran(shared, results):
    cases = json.loads((shared / "parity" / "o1" / "cases.json").read_text())["cases"]
    assert list(results) == [*cases, "lm"]
    fields = ["case", "ids_equal", "positions_equal", "kinds_equal", "refs_equal"]
    fields += ["x_pred_rel", "z_final_rel", "image_max_diff"]
    assert all(list(results[name]) == fields for name in cases)
    assert list(results["lm"]) == ["case", "logits_rel"]


def test_tokens_are_equal(results):
    for case, line in results.items():
        wrong = [name for name, value in line.items() if name.endswith("_equal") and not value]
        assert not wrong, case


def test_numbers_are_within_bounds(results):
    for case, line in results.items():
        for name in line.keys() & BOUNDS.keys():
            assert line[name] <= BOUNDS[name], (case, name)


def test_lines_are_json(results):
    assert all(json.loads(json.dumps(line)) == line for line in results.values())


def test_names_and_shapes_at_8b(shared):
    """Of the module that our classes build from the published config, not of our own table."""
    published = json.loads((shared / "parity" / "o1_8b_config.json").read_text())
    keys = json.loads((shared / "parity" / "o1_8b_keys.json").read_text())
    config = O1Config.from_dict(published)
    assert config == O1_8B
    assert len(keys) == 759
    assert shapes_of(config) == keys
    folder = Folder(path=shared, config=published, settings={}, tensors=dict.fromkeys(keys))
    assert config_of(folder) == O1_8B
