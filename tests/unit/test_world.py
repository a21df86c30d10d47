"""The world: a pure function of (task, seed, index) whose words are true of its pictures."""

import numpy as np
import pytest

from hidream.errors import UsageError
from hidream.world.scene import COLORS, KINDS, boxes_apart, holds
from hidream.world.tasks import (
    CATEGORIES,
    EDITS,
    EVAL_SEEDS,
    SUBJECTS,
    TASKS,
    TRAIN_SEEDS,
    check_seed,
    eval_seed,
    sample,
)

SEED = 12_345


def samples(task, count=150, **kwargs):
    return [sample(task, SEED, index, **kwargs) for index in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_arguments(task):
    for index in (0, 7, 10**9):
        one, other = (sample(task, SEED, index) for _ in range(2))
        assert one == other
        assert np.array_equal(one.target(64, 64), other.target(64, 64))
    assert sample(task, SEED, 1) != sample(task, SEED + 1, 1)


def test_seeds_of_training_and_evaluation_never_meet():
    assert not set(map(TRAIN_SEEDS.__contains__, (EVAL_SEEDS.start, EVAL_SEEDS[-1]))) & {True}
    assert eval_seed(0) not in TRAIN_SEEDS
    with pytest.raises(UsageError):
        check_seed(eval_seed(0), "train")
    with pytest.raises(UsageError):
        check_seed(0, "eval")


@pytest.mark.parametrize("task", TASKS)
def test_objects_are_whole_and_apart(task):
    for item in samples(task):
        boxes = [o.box for o in item.scene.objects]
        for i, box in enumerate(boxes):
            assert box[0] >= 0
            assert box[1] >= 0
            assert box[2] <= 1
            assert box[3] <= 1
            assert all(boxes_apart(box, other, 0.0) for other in boxes[:i]), item


@pytest.mark.parametrize("category", [c for c in CATEGORIES if c not in ("edits", *SUBJECTS)])
def test_what_a_prompt_claims_is_true(category):
    for item in samples("text_to_image", category=category):
        objects = item.scene.objects
        assert len(item.claims.objects) == len(objects)
        for claim, thing in zip(item.claims.objects, objects, strict=True):
            assert claim.kind == thing.kind
            assert claim.color in ("", thing.color)
            assert claim.word in ("", thing.word)
        for i, relation, j in item.claims.relations:
            assert holds(relation, objects[i].box, objects[j].box)
        for claim in item.claims.objects:
            assert claim.color in item.prompt
            assert claim.word in item.prompt


def test_categories_ask_for_what_their_names_say():
    def some(category):
        return samples("text_to_image", 60, category=category)

    assert all(len(i.scene.objects) == 1 and not i.claims.objects[0].color for i in some("single"))
    assert all(i.claims.objects[0].color in COLORS for i in some("colors"))
    assert all(len({o.kind for o in i.scene.objects}) == 2 for i in some("two_objects"))
    assert all(i.claims.relations for i in some("position"))
    for item in some("counting"):
        assert 2 <= len(item.scene.objects) <= 4
        assert len({o.kind for o in item.scene.objects}) == 1
    for item in some("attribute_binding"):
        assert all(claim.color for claim in item.claims.objects)
    for item in some("words"):
        (word,) = (claim.word for claim in item.claims.objects if claim.word)
        assert 1 <= len(word) <= 8
    for item in some("many_words"):
        words = [claim.word for claim in item.claims.objects]
        assert len(" ".join(words).split()) == 2
        assert all(len(word) <= 8 for word in words)
        assert all(f'"{word}"' in item.prompt for word in words)
    assert len({len(i.scene.objects) for i in some("many_words")}) == 2
    assert all(i.prompt[0].islower() or i.prompt[0].isdigit() for i in some("casual"))
    assert all(i.source is not None for i in some("edits"))
    assert all(1 <= len(i.subjects) <= 3 for i in some("subjects"))


def test_an_edit_changes_what_it_says_and_nothing_else():
    kinds = set()
    for item in samples("edit", 300):
        assert item.source is not None
        kinds.add(item.edit)
        before, after = item.source, item.scene
        if item.edit == "background":
            assert before.background != after.background
            assert before.objects == after.objects
            continue
        assert before.background == after.background
        untouched = [o for i, o in enumerate(after.objects) if i not in item.changed]
        assert all(o in before.objects for o in untouched)
        assert before.objects != after.objects
    assert kinds == set(EDITS)


def test_pictures_scale_and_differ():
    item = sample("text_to_image", SEED, 3)
    for size in ((64, 64), (128, 128), (192, 128)):
        assert item.target(*size).shape == (size[1], size[0], 3)
    small, large = item.target(64, 64).astype(int), item.target(128, 128).astype(int)
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 6
    assert len({sample("text_to_image", SEED, i).target(64, 64).tobytes() for i in range(50)}) == 50


def test_every_kind_and_colour_appears():
    scenes = [item.scene for item in samples("text_to_image", 400)]
    seen = {(o.kind, o.color) for scene in scenes for o in scene.objects}
    assert {kind for kind, _ in seen} >= set(KINDS)
    assert {color for _, color in seen} >= set(COLORS)
