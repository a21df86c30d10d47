"""Scenes with a camera: what they draw, what their prompts say, and what the judge sees."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hidream.camera import CAMERA, with_camera
from hidream.cli import main
from hidream.cli.evaluate import _outside as outside_column
from hidream.judges.measure import DAMAGES
from hidream.judges.shots import find_shot
from hidream.judges.world import judge
from hidream.train.config import load_recipe
from hidream.train.o1 import O1Learner
from hidream.world.contact import camera_sheet
from hidream.world.figures import FIGURES, figure
from hidream.world.lens import ANGLES, HORIZONS, SHOTS, VIEWS, figure_maps
from hidream.world.prompts import Group
from hidream.world.render import render
from hidream.world.scene import Camera, Dice
from hidream.world.shots import place, shot_prompt, shot_scene, tellable
from hidream.world.solids import Eye, bar, box, cylinder, ellipsoid, prism, see
from hidream.world.tasks import eval_seed, sample
from hidream.world.typed import SHORT
from tests.pages import ROOT

SEED = 77
USUAL = Camera(shot="full", angle="eye-level", view="three-quarter")


def scene(index):
    return sample("text_to_image", eval_seed(SEED), index, category="shots")


def coverage(kind, **seen):
    camera = replace(USUAL, **seen)
    return figure_maps(kind, camera, *place(kind, camera), 64, 64)[0] / 255


def test_camera_names_are_those_of_a_request():
    assert set(CAMERA["shot"]) == set(SHOTS)
    assert set(CAMERA["angle"]) == set(ANGLES) == set(HORIZONS)
    assert set(CAMERA["view"]) == set(VIEWS)
    for field, words in SHORT.items():
        assert set(words) == set(CAMERA[field])


def test_a_sphere_is_seen_as_a_disc():
    """Area, depth order and normals against what geometry says."""
    axis = np.linspace(-2, 2, 400)
    for eye in (Eye(0, 0), Eye(33, 20), Eye(-90, -26)):
        seen = see([ellipsoid((0, 0, 0), (1, 1, 1))], eye, axis, axis[::-1])
        assert (seen.face > 0).mean() == pytest.approx(np.pi / 16, rel=0.01)
        assert seen.normal[200, 200] @ eye.axes[2] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("solid", "area"),
    [
        (box((-1, -1, -1), (1, 1, 1)), 4),
        (cylinder((0, 0, 0), (1, 1, 1), 2), np.pi),
        (cylinder((0, 0, 0), (1, 1, 1), 1), 4),
        (bar((-1, 0, 0), (1, 0, 0), 0.5), 1),
        (prism((-1, -1, -1), (1, 1, 1), [((1, 1, 0), (0, 0, 0))]), 2),
    ],
)
def test_solids_have_the_areas_of_their_faces(solid, area):
    axis = np.linspace(-2, 2, 400)
    seen = see([solid], Eye(0, 0), axis, axis[::-1])
    assert (seen.face > 0).mean() * 16 == pytest.approx(area, rel=0.02)


def test_the_nearer_solid_hides_the_other():
    axis = np.linspace(-1, 1, 50)
    near, far = box((-1, -1, 0.5), (1, 1, 1), 0.3), box((-1, -1, -1), (1, 1, -0.5), 0.7)
    for solids in ([near, far], [far, near]):
        for azimuth, shade in ((0, 0.3), (180, 0.7)):
            seen = see(solids, Eye(azimuth, 0), axis, axis[::-1])
            assert seen.shades[seen.face[25, 25]] == np.float32(shade)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_closer_shot_shows_a_larger_figure(kind):
    shares = [coverage(kind, shot=shot).mean() for shot in SHOTS]
    whole = shares[: list(SHOTS).index("medium") + 1]
    assert all(b > 1.2 * a for a, b in pairwise(whole)), shares
    assert min(shares[-3:]) > 0.4
    rows, columns = np.nonzero(coverage(kind, shot="full") > 0.5)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    assert longer / 64 == pytest.approx(SHOTS["full"][0], abs=0.05)


@pytest.mark.parametrize("kind", FIGURES)
def test_views_and_angles_differ(kind):
    """No two views, and no two angles, of a figure are alike."""
    for names in ({"view": v} for v in VIEWS), ({"angle": a} for a in ANGLES):
        drawn = [
            render(shot_scene(kind, "red", "studio", replace(USUAL, **seen)), 64, 64).astype(int)
            for seen in names
        ]
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                assert (np.abs(one - other).sum(-1) > 60).mean() > 0.02


def test_figures_stand_on_the_ground():
    for kind in FIGURES:
        lowest = min(solid.corners[:, 1].min() for solid in figure(kind).solids)
        assert -0.05 <= lowest <= 0.1, kind


def test_a_sample_is_drawn_the_same_again_and_at_any_size():
    item = scene(3)
    picture = item.target(64, 64)
    figure_maps.cache_clear()
    assert np.array_equal(picture, item.target(64, 64))
    assert scene(3) == item
    large = item.target(128, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - picture).mean() < 6
    assert item.target(96, 64).shape == (64, 96, 3)


def test_the_contact_sheet_is_the_documentation_s():
    shown = np.asarray(Image.open(ROOT / "docs/images/camera.png"), np.int16)
    drawn = np.asarray(camera_sheet(80), np.int16)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).max() <= 2  # another CPU may round otherwise


def test_prompts_say_what_is_claimed_and_claims_are_true():
    words = {field: dict(values) for field, values in CAMERA.items()}
    as_requested = 0
    for index in range(150):
        item = scene(index)
        (claim,), (thing,) = item.claims.objects, item.scene.objects
        assert claim.kind == thing.kind
        assert claim.kind in item.prompt
        assert claim.color in (thing.color, "")
        assert claim.color in item.prompt
        told = item.claims.camera
        assert told
        assert tellable(tuple(told), {f: getattr(item.scene.camera, f) for f in CAMERA})
        for field, value in told.items():
            assert getattr(item.scene.camera, field) == value
        if ". " in item.prompt:  # written as a request's fields are
            _, text = item.prompt.split(". ", 1)
            told_of = {field: told.get(field) for field in words}
            assert item.prompt == with_camera(text, **told_of)
            as_requested += 1
    assert 40 < as_requested < 85


def test_every_value_is_said_in_free_words_too():
    for field, values in CAMERA.items():
        for value, words in values.items():
            told = {field: value}
            group = Group(kind="car", color="red")
            said = {shot_prompt(Dice(1, i), group, told) for i in range(60)}
            assert any(words in text.lower() for text in said), value
            assert any(words not in text.lower() for text in said), value


def test_the_judge_is_right_on_true_pictures_and_names_the_camera():
    for index in range(6):
        item = scene(index)
        verdict = judge(item.target(128, 128), item)
        assert verdict.right, (item.prompt, verdict.reasons)
    assert find_shot(scene(1).target(128, 128)).color == scene(1).scene.objects[0].color


@pytest.mark.parametrize(
    "damage",
    ["missing", "wrong_class", "wrong_color", "wrong_shot", "wrong_angle", "wrong_view", "blurred"],
)
def test_the_judge_is_wrong_on_damaged_pictures(damage):
    seen = 0
    for index in range(40):
        picture = DAMAGES[damage](scene(index), Dice(SEED, index), 128)
        if picture is not None:
            assert not judge(picture, scene(index)).right, scene(index).prompt
            seen += 1
            break
    assert seen


def test_the_judge_forgives_small_faults():
    generator = np.random.default_rng(0)
    for index in (2, 5):
        moved = np.roll(scene(index).target(128, 128), 2, axis=1)
        noisy = moved + 4 * generator.standard_normal((128, 128, 3))
        verdict = judge(np.clip(noisy, 0, 255).astype(np.uint8), scene(index))
        assert verdict.right, (scene(index).prompt, verdict.reasons)


def test_eval_world_has_shots(monkeypatch, capsys):
    def grey(requests):
        return [
            SimpleNamespace(images=[Image.new("RGB", (128, 128), "grey")], request=request)
            for request in requests
        ]

    monkeypatch.setattr("hidream.cli.evaluate.load_pipeline", lambda *_: grey)
    assert main(["eval", "world", "--scenes", "2", "--categories", "shots"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("shots"))
    assert row.split()[:3] == ["shots", "2", "0.000"]
    assert row.endswith("–")


def test_the_change_outside_is_a_column():
    row = {"outside_change": {"model": 0.4219, "ceiling": 0.0, "n": 8}}
    assert outside_column(row) == "0.42 / 0.00 %"


def test_a_recipe_can_train_on_shots():
    recipe = load_recipe(ROOT / "recipes/o1_nano.toml")
    stage = replace(
        recipe.stages[0],
        batch_size=4,
        tasks={"text_to_image": 1.0},
        categories={"shots": 0.5, "many_words": 0.25, "casual": 0.25},
    )
    batch = O1Learner(replace(recipe, stages=(stage,))).make_batch(0)
    assert batch.tasks == ("text_to_image",) * 4
    assert batch.batch.targets == [16] * 4
