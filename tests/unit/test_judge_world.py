"""The judge: right on true pictures, wrong on each kind of damage, and tolerant of small faults."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hidream.judges.finding import find
from hidream.judges.measure import DAMAGES, measure_judge
from hidream.judges.world import judge
from hidream.world import render
from hidream.world.scene import BACKGROUNDS, KINDS, Dice, Object, Scene
from hidream.world.sprites import added_kind
from hidream.world.tasks import CATEGORIES, eval_seed, sample

SEED = 321
CAMERA_DAMAGES = ("wrong_shot", "wrong_angle", "wrong_view")  # test_world_shots.py has these
FLAT = [category for category in CATEGORIES if category != "shots"]


def scene(category, index, seed=SEED):
    return sample("text_to_image", eval_seed(seed), index, category=category)


@pytest.mark.parametrize("category", FLAT)
def test_true_pictures_are_right(category):
    verdicts = [judge(scene(category, i).target(128, 128), scene(category, i)) for i in range(8)]
    assert sum(v.right for v in verdicts) >= 7, [v.reasons for v in verdicts]


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in CAMERA_DAMAGES])
def test_damaged_pictures_are_wrong(damage):
    """Every scene that this damage applies to, of the first nine categories in turn."""
    seen = wrong = 0
    for index in range(27):
        item = scene(FLAT[index % 9], index)
        picture = DAMAGES[damage](item, Dice(SEED, index), 128)
        if picture is not None:
            seen += 1
            wrong += not judge(picture, item).right
    assert seen >= 3
    assert wrong >= seen - 1


def test_a_picture_is_wrong_under_another_prompt():
    items = [scene("attribute_binding", i) for i in range(10)]
    others = [*items[1:], items[0]]
    assert not any(judge(a.target(128, 128), b).right for a, b in zip(items, others, strict=True))


@pytest.mark.parametrize("size", [64, 128, 192])
def test_sizes(size):
    items = [scene("colors", i) for i in range(5)]
    assert sum(judge(item.target(size, size), item).right for item in items) >= 4


def test_small_faults_are_forgiven():
    """What a good model's pictures have: edges a little soft, noise of 4 levels."""
    generator = np.random.default_rng(0)
    items = [scene("two_objects", i) for i in range(8)]
    right = 0
    for item in items:
        soft = Image.fromarray(item.target(128, 128)).filter(ImageFilter.GaussianBlur(0.6))
        noisy = np.asarray(soft) + 4 * generator.standard_normal((128, 128, 3))
        right += judge(np.clip(noisy, 0, 255).astype(np.uint8), item).right
    assert right >= 7


def test_what_is_found_is_what_is_there():
    item = scene("position", 2)
    found = find(item.target(128, 128)).objects
    assert sorted((f.kind, f.color) for f in found) == sorted(
        (o.kind, o.color) for o in item.scene.objects
    )
    for o in item.scene.objects:
        (match,) = [f for f in found if (f.kind, f.color) == (o.kind, o.color)]
        assert abs(match.x - o.x) < 0.02
        assert abs(match.y - o.y) < 0.02


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_scene_shows_nothing(background):
    found = find(render(Scene(objects=(), background=background), 128, 128))
    assert found.objects == ()
    assert found.background == background


def test_the_figures_cover_every_category():
    figures = measure_judge(5, 2, categories=("single", "words"))
    assert set(figures["categories"]) == {"single", "words"}
    assert figures["right_on_true"] == 1
    assert figures["wrong_on_damaged"] == 1


def test_a_kind_can_be_added_for_a_time():
    def draw_bone(canvas):
        for x, y in ((0.14, 0.3), (0.14, 0.7), (0.86, 0.3), (0.86, 0.7)):
            canvas.put(canvas.ellipse(x, y, 0.14, 0.28), 1.1)
        canvas.put(canvas.box(0.14, 0.3, 0.86, 0.7), 0.9)

    thing = Object(kind="bone", color="red", size=0.43, x=0.5, y=0.5)
    with added_kind("bone", (1.0, 0.5), draw_bone):
        picture = render(Scene(objects=(thing,), background="grass"), 128, 128)
        assert [(o.color, o.kind) for o in find(picture).objects] == [("red", "bone")]
        assert not find(picture).faults
        again = added_kind("bone", (1.0, 0.5), draw_bone)
        with pytest.raises(ValueError, match="is one of the world's kinds"), again:
            pass
    assert "bone" not in KINDS
    outside = find(picture)
    assert all(o.kind != "bone" for o in outside.objects)
    assert outside.faults
