"""Composed scenes: the words of the sample, one arrangement for what they leave open."""

from dataclasses import replace

import pytest
from PIL import Image

from hidream.judges.world import judge
from hidream.train.config import parse_recipe
from hidream.train.draws import draw_sample
from hidream.world.composed import composed
from hidream.world.scene import SIZES, boxes_apart
from hidream.world.tasks import TASKS, sample

SEED = 77
OPEN = ("single", "colors", "two_objects", "counting", "attribute_binding", "casual", "words")
ARRANGED = (*OPEN, "position", "related", "free", "subjects")


def drawn(category, count=40):
    items = [sample("text_to_image", SEED, i, category=category) for i in range(count)]
    return [(item, composed(item)) for item in items]


@pytest.mark.parametrize("category", ARRANGED)
def test_words_claims_and_looks_stay(category):
    for before, after in drawn(category):
        assert (after.prompt, after.claims, after.subjects) == (
            before.prompt,
            before.claims,
            before.subjects,
        )
        assert after.scene.background == before.scene.background
        bare = {"size": 0.3, "x": 0.5, "y": 0.5}
        assert [replace(thing, **bare) for thing in after.scene.objects] == [
            replace(thing, **bare) for thing in before.scene.objects
        ]


@pytest.mark.parametrize("category", [*ARRANGED, "shots"])
def test_the_judge_agrees(category):
    for _, after in drawn(category, 4):
        verdict = judge(Image.fromarray(after.target(128, 128)), after)
        assert verdict.right, (after.prompt, verdict.reasons)


@pytest.mark.parametrize("category", [*OPEN, "position"])
def test_what_is_asked_decides_where_and_how_large(category):
    found = {}
    for _, after in drawn(category, 200):
        things = after.scene.objects
        asked = (
            tuple((len(claim.word), claim.size) for claim in after.claims.objects),
            after.claims.relations,
        )
        arranged = tuple((thing.x, thing.y, thing.size) for thing in things)
        assert found.setdefault(asked, arranged) == arranged
        boxes = [thing.box for thing in things]
        assert all(boxes_apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_said_sizes_stay_and_others_are_large():
    sizes = set()
    for before, after in drawn("free", 200):
        if any(thing.kind == "sign" for thing in after.scene.objects) or after == before:
            continue
        for thing, claim in zip(after.scene.objects, after.claims.objects, strict=True):
            assert thing.size == SIZES[claim.size or "large"]
            sizes.add(claim.size)
    assert sizes == {"", *SIZES}


@pytest.mark.parametrize("task", ["edit", "language", "understanding"])
def test_other_tasks_are_left_alone(task):
    for i in range(40):
        item = sample(task, SEED, i)
        assert composed(item) == item


def test_what_is_unsaid_of_a_camera_is_always_the_same():
    unsaid = set()
    for before, after in drawn("shots", 200):
        camera, told = after.scene.camera, after.claims.camera
        assert (after.prompt, told) == (before.prompt, before.claims.camera)
        assert after.scene.objects[0].color == before.scene.objects[0].color
        assert camera.turn == 1
        for field in ("shot", "angle", "view"):
            if field in told:
                assert getattr(camera, field) == told[field]
            else:
                unsaid.add((field, getattr(camera, field)))
    assert unsaid == {("shot", "medium-full"), ("angle", "eye-level"), ("view", "three-quarter")}


@pytest.mark.parametrize("category", ["storyboards", "layout", "many_words"])
def test_what_has_an_arrangement_of_its_own_keeps_it(category):
    for before, after in drawn(category, 20):
        assert after == before or (category == "many_words" and len(after.scene.objects) == 1)


@pytest.mark.parametrize("task", TASKS)
def test_a_stage_draws_them_where_it_says_so(task):
    stage = {"size": 64, "steps": 1, "batch_size": 1, "learning_rate": 1e-3, "tasks": {task: 1.0}}
    recipe = parse_recipe({"name": "t", "model": "o1-tiny", "stages": [stage]})
    (stage,) = recipe.stages
    plain = [draw_sample(recipe, stage, task, i) for i in range(20)]
    settled = [draw_sample(recipe, replace(stage, composed=True), task, i) for i in range(20)]
    assert settled == [composed(item) for item in plain]
    assert (settled == plain) == (task not in ("text_to_image", "subject"))
