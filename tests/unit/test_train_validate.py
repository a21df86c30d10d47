"""Validation: fixed scenes, verdicts in log and trackers, and time that is not counted."""

import json
import re
import sys
import tomllib
import types
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hidream.errors import UsageError
from hidream.train import load_recipe, rate, run, worker
from hidream.train.config import Recipe, parse_recipe
from hidream.train.learner import learner_of
from hidream.train.log import Meter, readable
from hidream.train.validate import scenes, validate
from hidream.world.tasks import TRAIN_SEEDS, eval_seed
from tests.unit.test_train_config import NANO, PLAIN, RECIPES

OPTIONS = {"every": 2, "scenes": 3, "categories": ["single", "edits"], "steps": 2}


def recipe_of(tmp_path, **changes) -> Recipe:
    stage = PLAIN["stages"][0] | {"size": 128, "steps": 3, "batch_size": 2}
    return parse_recipe(
        PLAIN
        | {"stages": [stage], "out": str(tmp_path / "run"), "precision": "float32"}
        | {"validation": OPTIONS, "checkpoint_every": 0, "grid_every": 0, "log_every": 1}
        | changes
    )


@pytest.mark.parametrize(("shift", "right"), [(0, 1.0), (1, 0.0)])
def test_it_judges_what_is_drawn(tmp_path, shift, right):
    """True pictures are right, those of other scenes are wrong."""
    recipe, asked = recipe_of(tmp_path), []
    items = scenes(recipe)

    def pipe(requests):
        asked.extend(requests)
        order = [(i + shift) % len(items) for i in range(len(items))]
        pictures = [Image.fromarray(items[i].target(128, 128)) for i in order]
        return [types.SimpleNamespace(images=[picture]) for picture in pictures]

    record = validate(recipe, pipe, 2)
    assert (record["step"], record["right_all"]) == (2, right)
    assert record["right_single"] == record["right_edits"] == right
    assert [r.prompt for r in asked] == [item.prompt for item in items]
    assert [len(r.references) for r in asked] == [0, 0, 0, 1, 1, 1]
    assert all((r.num_inference_steps, r.width) == (2, 128) for r in asked)
    with Image.open(tmp_path / "run" / "validation" / "0000002.png") as sheet:
        assert sheet.size == (4 * 132 + 4, 2 * 132 + 4)
    assert "\n" not in readable(record)


def test_its_scenes_are_no_training_scenes_and_never_change(tmp_path):
    recipe = recipe_of(tmp_path)
    assert scenes(recipe) == scenes(replace(recipe, seed=99))
    assert [item.category for item in scenes(recipe)][:3] == ["single"] * 3
    assert eval_seed(0) not in TRAIN_SEEDS


def test_a_run_validates_its_averages_and_tells_the_tracker(tmp_path, monkeypatch, tiny_folder):
    told = []
    run_of = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: None
    )
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run_of, Image=str)
    )
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    recipe = recipe_of(
        tmp_path,
        tokenizer=str(tiny_folder),
        report_to="wandb",
        max_text=200,
        stages=[PLAIN["stages"][0] | {"size": 32, "steps": 3, "batch_size": 2}],
        validation=OPTIONS | {"scenes": 1},
    )
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    monkeypatch.setattr(sys, "argv", ["worker", str(file)])
    threads = torch.get_num_threads()
    assert worker.main() == 0
    torch.set_num_threads(threads)
    log = [json.loads(line) for line in (recipe.run_dir / "log.jsonl").read_text().splitlines()]
    (record,) = (line for line in log if "right_all" in line)
    assert record["step"] == 2
    assert [p.name for p in (recipe.run_dir / "validation").iterdir()] == ["0000002.png"]
    steps = [line for line in log if "loss_text_to_image" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 < line["mfu"] < 1.5 for line in steps)
    seen = {(step, name) for step, values in told for name in values}
    assert (2, "validation") in seen
    assert {(2, "right_all"), (2, "right_edits"), (3, "mfu"), (3, "loss_text_to_image")} <= seen


def test_a_lora_is_validated_as_its_model_with_it(tmp_path, tiny_folder):
    drawn = []
    for scale in (0.0, 1.0):
        recipe = recipe_of(
            tmp_path,
            init=str(tiny_folder),
            tokenizer=str(tiny_folder),
            lora={"rank": 2},
            stages=[PLAIN["stages"][0] | {"size": 32, "steps": 3, "batch_size": 2}],
            validation=OPTIONS | {"scenes": 1, "categories": ["single"]},
        )
        learner = learner_of(recipe)
        adapters = learner.build()
        for parameter in adapters.parameters():
            parameter.data.fill_(scale)
        assert validate(recipe, learner.pipeline(adapters), 2)["step"] == 2
        drawn.append((recipe.run_dir / "validation" / "0000002.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(NANO, [f"out={tmp_path / 'run'}", "report_to=wandb"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("report_to=mlflow", "tensorboard"),
        ('validation={every = 1, categories = ["sinlge"]}', "sinlge"),
        ("validation={every = 1, categories = []}", "must be some of"),
        ("validation={every = 1, scenes = 0}", "must be positive"),
        ("validation.evry=1", 'did you mean "every"'),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(NANO, [change])


def test_families_without_scenes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="draws no scenes"):
        recipe_of(tmp_path, model="hidit-SiT-T/1")
    before = load_recipe(RECIPES / "i1_tiny.toml", ["validation.every=5"]).before
    assert before is not None
    assert before.validation.every == 0


def test_time_aside_is_not_counted_and_utilisation_is():
    now = [0.0]
    meter = Meter(lambda: now[0], rate=100.0)
    now[0] = 4.0
    with meter.paused():
        now[0] = 50.0
    meter.add(0, {"loss": 1.0}, samples=8, flops=120)
    means = meter.report()
    assert (means["samples_per_second"], means["mfu"], means["loss"]) == (2.0, 0.3, 1.0)
    meter.add(1, {}, samples=8)
    assert "mfu" not in meter.report()


def test_a_line_says_speed_time_and_utilisation():
    record = {"step": 3, "num_steps": 9, "loss_edit": 0.5, "lr": 1e-3, "grad_norm": 1.0}
    record |= {"samples_per_second": 0.5, "seconds_left": 65.0, "mfu": 0.414}
    line = readable(record)
    for part in ("step 3/9", "edit 0.500", "0.50 pictures/s", "MFU 41%", "1:05 left"):
        assert part in line
    assert readable({"step": 1, "message": "two\nlines"}) == "two lines"


def test_emulated_bf16_is_warned_of(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(rate.platform, "machine", lambda: "x86_64")
    slow = load_recipe(NANO, ["precision=bfloat16"])
    warning = rate.slow_precision(slow)
    assert warning is not None
    assert "ten times slower" in warning
    assert "\n" not in warning
    assert rate.slow_precision(replace(slow, device="cuda")) is None
    for file in RECIPES.glob("*_[nt]*.toml"):  # what is made for small machines
        assert rate.slow_precision(load_recipe(file)) is None, file
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert rate.slow_precision(slow) is None


def test_the_page_shows_a_table_that_a_recipe_takes():
    page = (RECIPES.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(\[validation\].*?)```", page, flags=re.S)
    found = parse_recipe(PLAIN | tomllib.loads(shown)).validation
    assert (found.every, found.scenes, len(found.categories)) == (500, 4, 4)
