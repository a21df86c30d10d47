"""Storyboards and layouts of the world: what they draw, ask and claim, and what the judge sees."""

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hidream.cli import main
from hidream.errors import UsageError
from hidream.judges.layouts import overlap
from hidream.judges.measure import damages_of
from hidream.judges.world import judge
from hidream.models.o1.tokens import encode
from hidream.storyboard import Panel, Script, compose
from hidream.train.config import load_recipe
from hidream.train.data import encode_sample
from hidream.train.o1 import O1Learner, model_config
from hidream.world.asking import request_of
from hidream.world.contact import layout_sheet, storyboard_sheet
from hidream.world.panels import cut_panels, panel_sheet
from hidream.world.scene import Dice
from hidream.world.storyboards import GRIDS
from hidream.world.tasks import eval_seed, sample
from tests.pages import ROOT, all_pages

SEED = 77
SIDE = {"storyboards": 256, "layout": 128}
SHORT = {"storyboards": 2, "layout": 0}  # panels of the scenes that the judge is shown


def scene(category, index):
    return sample("text_to_image", eval_seed(SEED), index, category=category)


def short_scenes(category):
    """Scenes with few panels, which are soon judged."""
    items = (scene(category, index) for index in range(60))
    return [item for item in items if len(item.panels) == SHORT[category]]


def trained_on(stage_tasks, categories, **changes):
    recipe = load_recipe(ROOT / "recipes/o1_nano.toml")
    stage = replace(recipe.stages[0], batch_size=4, tasks=stage_tasks, categories=categories)
    return replace(recipe, stages=(stage,), **changes)


@pytest.mark.parametrize("grid", [grid for grid, _ in GRIDS])
def test_sheets_fill_a_square_with_whole_patches(grid):
    for side, patch in ((256, 16), (512, 32), (2048, 32)):
        sheet = panel_sheet(*grid, side, side)
        assert sheet.size == (side, side)
        assert not any(value % patch for box in sheet.boxes for value in box)


def test_a_prompt_is_that_of_hidream_storyboard():
    """The words, cut at the panels' numbers, are a script whose request reads the same."""
    for index in range(40):
        item = scene("storyboards", index)
        number, columns = len(item.panels), item.columns
        head = item.prompt.split(" Characters, objects")[0]
        subject = head.split("In all panels: ")[1][:-1] if "In all panels" in head else None
        panels = tuple(Panel(prompt=panel.prompt) for panel in item.panels)
        script = Script(panels=panels, subject=subject)
        asked = request_of(item, index)
        sheet = asked.sheet
        assert asked.prompt == item.prompt
        assert asked == compose(
            script,
            columns=columns,
            gutter=sheet.gutter,
            panel_size=(sheet.width, sheet.height),
            seed=index,
            keep_aspect=None,
        )
        assert 2 <= number <= 6


def test_panels_keep_the_subject_and_differ_in_words():
    for index in range(100):
        item = scene("storyboards", index)
        first = item.panels[0].scene.objects[0]
        for panel in item.panels:
            subject, *others = panel.scene.objects
            assert (subject.kind, subject.color) == (first.kind, first.color)
            assert first.kind not in {thing.kind for thing in others}
            for claim in panel.claims.objects[1:]:
                assert f"{claim.color} {claim.kind}" in panel.prompt
            claim = panel.claims.objects[0]
            assert claim.size in (subject.size_name, "")
            assert claim.size in panel.prompt
            assert claim.color in (subject.color, "")
            assert claim.color in item.prompt
            assert panel.claims.background in (panel.scene.background, "")
        assert first.kind in item.prompt
        assert len({panel.claims for panel in item.panels}) > 1


def test_a_storyboard_s_picture_is_its_panels_before_white():
    item = scene("storyboards", 2)
    picture = Image.fromarray(item.target(256, 256))
    panels = cut_panels(picture, len(item.panels), item.columns)
    for cut, panel in zip(panels, item.panels, strict=True):
        assert np.array_equal(np.asarray(cut), panel.target(*cut.size))
    sheet = panel_sheet(len(item.panels), item.columns, 256, 256)
    for box in sheet.boxes:
        picture.paste("white", box)
    assert picture.getextrema() == ((255, 255),) * 3


def test_a_layout_s_boxes_hold_their_subjects():
    for index in range(40):
        item = scene("layout", index)
        assert item.task == "subject"
        assert 1 <= len(item.layout) == len(item.subjects) == len(item.scene.objects) <= 3
        for subject, thing, box in zip(item.subjects, item.scene.objects, item.layout, strict=True):
            assert (subject.kind, subject.pattern) == (thing.kind, thing.pattern)
            assert overlap(thing.box, box) > 0.75
        if index < 3:
            asked = request_of(item, index)
            assert asked.layout == item.layout
            assert len(asked.references) == len(item.layout)


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 0.5, 0.5), (0, 0.5, 0, 0.5)) == 1
    assert overlap((0, 0, 0.5, 0.5), (0.25, 0.75, 0, 0.5)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.5, 0.2), (0.1, 0.6, 0.3, 0.5)) == 0


@pytest.mark.parametrize(
    ("category", "damage"),
    [
        ("storyboards", "other_subject"),
        ("storyboards", "missing_panel"),
        ("storyboards", "swapped_panels"),
        ("layout", "box_off"),
        ("layout", "swapped_references"),
    ],
)
def test_the_judge_is_wrong_on_damaged_pictures(category, damage):
    for item in short_scenes(category):
        picture = damages_of(category)[damage](item, Dice(SEED), SIDE[category])
        if picture is not None:
            verdict = judge(picture, item)
            assert not verdict.right, item.prompt
            if damage in ("box_off", "too_small"):
                assert all("box" in reason for reason in verdict.reasons), verdict.reasons
            return
    pytest.fail("no scene was damaged")


def test_a_subject_whose_colour_is_unsaid_has_one_colour_in_all_panels():
    item = next(one for one in short_scenes("storyboards") if not one.claims.objects[0].color)
    picture = damages_of("storyboards")["other_color"](item, Dice(1), 256)
    assert not judge(picture, item).right


def test_eval_world_has_storyboards_and_layout(monkeypatch, capsys):
    asked = []

    def true(requests):
        """The true picture of whatever is asked."""
        made = []
        for request in requests:
            category = "storyboards" if request.sheet else "layout"
            item = sample("text_to_image", eval_seed(4), request.seed, category=category)
            side = SIDE[category]
            asked.append((request, item))
            made.append(
                SimpleNamespace(images=[Image.fromarray(item.target(side, side))], request=request)
            )
        return made

    monkeypatch.setattr("hidream.cli.evaluate.load_pipeline", lambda *_: true)
    flags = ["--seed", "4", "--scenes", "1", "--categories", "storyboards", "layout"]
    assert main(["eval", "world", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["storyboards"][1:3] == rows["layout"][1:3] == ["1", "1.000"]
    model, _, ceiling = rows["layout"][-3:]
    assert model == ceiling
    assert float(model) > 0.8
    assert all(request.layout == (item.layout or None) for request, item in asked)


@pytest.mark.parametrize(
    ("name", "sheet"), [("storyboards", storyboard_sheet), ("layout", layout_sheet)]
)
def test_the_contact_sheets_are_the_documentation_s(name, sheet):
    shown = np.asarray(Image.open(ROOT / f"docs/images/{name}.png"), np.int16)
    drawn = np.asarray(sheet(), np.int16)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).max() <= 2  # another CPU may round otherwise


def test_a_recipe_can_train_on_layouts_and_subjects():
    recipe = trained_on({"subject": 1.0}, {"layout": 0.8, "subjects": 0.2})
    batch = O1Learner(recipe).make_batch(0)
    assert batch.tasks == ("subject",) * 4
    assert batch.batch.targets == [16] * 4


def test_training_reads_a_layout_as_a_request_is_read():
    item = next(one for one in (scene("layout", i) for i in range(9)) if len(one.layout) == 2)
    recipe = trained_on({"subject": 1.0}, {"layout": 1.0})
    recipe = replace(recipe, objective=replace(recipe.objective, caption_dropout=0.0))
    tokenizer, config = O1Learner(recipe).tokenizer, model_config(recipe)
    tokens, _ = encode_sample(recipe, config, tokenizer, (128, 128), item, 0)
    asked = request_of(item, 0)
    wanted = encode(
        tokenizer,
        config,
        asked.prompt,
        width=128,
        height=128,
        references=asked.references,
        layout=asked.layout,
    )
    assert len(tokens.image_grids) == 3
    assert torch.equal(tokens.input_ids, wanted.input_ids)
    assert torch.equal(tokens.references, wanted.references)


def test_the_documented_recipe_trains_on_storyboards():
    page = next(page for page in all_pages() if page.name == "docs/world.md")
    (block,) = (block for block in page.blocks if block.language == "toml")
    told = tomllib.loads(block.text)
    (stage,) = told["stages"]
    assert set(stage["categories"]) > {"storyboards", "layout", "subjects"}
    changes = {"max_text": told["max_text"]}
    recipe = trained_on({"text_to_image": 1.0}, {"storyboards": 1.0}, **changes)
    batch = O1Learner(recipe).make_batch(0)
    assert batch.tasks == ("text_to_image",) * 4
    assert batch.redrawn == 0


def test_layouts_without_the_task_subject_are_refused(tmp_path):
    text = (ROOT / "recipes/o1_nano.toml").read_text()
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"stages.0.categories names .*layout.* no subject"):
        load_recipe(
            file, ["stages.0.categories={layout=1.0}", "stages.0.tasks={text_to_image=1.0}"]
        )
