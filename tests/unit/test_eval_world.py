"""The world's suite with two stand-ins for a model: one draws the truth, one nothing."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from hidream.eval import world
from hidream.eval.outside import outside_change
from hidream.eval.statistics import wilson
from hidream.request import GenerateRequest
from hidream.world.tasks import eval_seed, sample

CATEGORIES = ("single", "position", "edits", "subjects")


@dataclass
class Made:
    images: list[Image.Image]
    request: GenerateRequest


def oracle(seed: int, num_scenes: int):
    """Draws the true picture of every prompt of the suite; counts the requests."""
    truths = {}
    for category in CATEGORIES:
        for index in range(num_scenes):
            item = sample("text_to_image", eval_seed(seed), index, category=category)
            truths[item.prompt, index] = item

    def pipe(requests):
        pipe.num_requests += len(requests)
        return [Made([_truth(truths, request)], request) for request in requests]

    pipe.num_requests = 0
    return pipe


def _truth(truths, request):
    item = truths.get((request.prompt, request.seed))
    if item is None:  # another scene's instruction
        return request.references[0]
    return Image.fromarray(item.target(128, 128))


def blank(requests):
    return [Made([Image.new("RGB", (128, 128), "grey")], request) for request in requests]


def test_a_model_that_draws_the_truth_reaches_the_ceiling(tmp_path):
    pipe = oracle(11, 2)
    results = world.run(pipe, num_scenes=2, seed=11, categories=CATEGORIES, out=tmp_path)
    assert tuple(results["categories"]) == CATEGORIES
    for name, row in results["categories"].items():
        assert row["n"] == 2
        assert row["accuracy"] == row["ceiling"], name
        assert row["floor"] < row["accuracy"], name
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert len(list((tmp_path / name).glob("*.png"))) == 2
        assert len((tmp_path / name / "verdicts.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / f"{name}.png").is_file()
    change = results["categories"]["edits"]["outside_change"]
    assert change["model"] == change["ceiling"] == 0
    assert "outside_change" not in results["categories"]["single"]
    assert pipe.num_requests == 2 * len(CATEGORIES) + 2  # and the edits' floor
    assert {"right_on_true", "wrong_on_damaged"} <= set(results["judge"])


def test_a_model_that_draws_nothing_is_never_right():
    results = world.run(blank, num_scenes=2, seed=3, categories=("single", "edits"))
    assert [row["accuracy"] for row in results["categories"].values()] == [0, 0]


def test_one_scene_has_no_floor():
    results = world.run(blank, num_scenes=1, seed=3, categories=("single",))
    assert results["categories"]["single"]["floor"] is None


def test_outside_change_counts_only_what_the_edit_is_not_about():
    edits = (sample("edit", eval_seed(2), i, category="recolour") for i in range(50))
    item = next(edit for edit in edits if len(edit.scene.objects) == 1)
    true = item.target(128, 128)
    assert outside_change(true, item) == 0
    left, top, right, bottom = (round(128 * v) for v in item.scene.objects[0].box)
    inside, beside = true.copy(), true.copy()
    inside[top:bottom, left:right] = 0
    assert outside_change(inside, item) == 0
    source = item.reference_pictures(128, 128)[0].astype(float)
    beside[:2] = 255 - beside[:2]  # rows that no object reaches
    least = np.abs(beside - source)[:2].mean() * 2 / 128 / 2.55
    assert outside_change(beside, item) > least  # over fewer pixels than the picture has


def test_outside_change_leaves_backgrounds_alone():
    item = sample("edit", eval_seed(2), 0, category="background")
    assert outside_change(item.target(64, 64), item) is None


@pytest.mark.parametrize(("right", "num"), [(0, 10), (5, 10), (10, 10), (90, 100)])
def test_wilson_solves_its_own_equation(right, num):
    """The ends are the shares p at which |right/num - p| is z standard errors of p."""
    for p in wilson(right, num):
        if 0 < p < 1:
            assert abs(right / num - p) == pytest.approx(
                1.959964 * (p * (1 - p) / num) ** 0.5, abs=1e-6
            )
