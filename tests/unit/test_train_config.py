"""Recipes: strict keys and values, overrides, and where a step stands in the run."""

from pathlib import Path

import pytest

from hidream.errors import InputError, UsageError
from hidream.train import run
from hidream.train.config import load_recipe, parse_recipe, past_recipe

STAGE = {"size": 32, "steps": 6, "batch_size": 4, "learning_rate": 1e-3}
PLAIN = {
    "name": "tiny",
    "model": "o1-tiny",
    "stages": [STAGE | {"tasks": {"text_to_image": 1.0}}, STAGE | {"tasks": {"edit": 1}}],
}
RECIPES = Path(__file__).parents[2] / "recipes"
NANO = RECIPES / "o1_nano.toml"


@pytest.mark.parametrize(
    "name", ["o1_nano", "o1_nano_sft", "o1_nano_pretrain", "i1_tiny", "e1_tiny"]
)
def test_the_shipped_recipes_are_valid_and_plain_values_give_them_back(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    assert recipe.model == f"{name[:2]}-nano"
    assert parse_recipe(recipe.to_dict()) == recipe


def test_an_autoencoder_with_stages_is_a_run_before():
    recipe = load_recipe(RECIPES / "i1_tiny.toml", ["out=there"])
    before = recipe.before
    assert before is not None
    assert (before.model, before.run_dir, before.before) == ("vae", Path("there/vae"), None)
    assert before.stages == recipe.vae.stages
    assert load_recipe(RECIPES / "i1_tiny.toml", ["init=there"]).before is None


def test_overrides_reach_into_tables_and_lists():
    changes = ["seed=5", "optimizer.clip=0.5", "stages.1.steps=9999", "out=runs/there"]
    recipe = load_recipe(NANO, changes)
    assert (recipe.seed, recipe.optimizer.clip, recipe.stages[1].steps) == (5, 0.5, 9999)
    assert recipe.run_dir == Path("runs/there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sed=5", 'unknown key "sed"; did you mean "seed"?'),
        ("optimizer.klip=1", 'unknown key "optimizer.klip"; did you mean "clip"?'),
        ("stages.0.tasks.edits=1", 'did you mean "edit"?'),
        ("stages.7.steps=1", "must be a number from 0 to"),
        ("seed=many", "seed = 'many' is not a int"),
        ("compile=1", "compile = 1 is not a bool"),
        ("processes=0", "must be at least 1"),
        ("stages.0.batch_size=7", "multiple of 2: 2 processes"),
        ("stages.0.warmup=100000", "must fit into"),
        ("max_text=0", "max_text = 0 must be at least 1"),
        ("precision=float8", "bfloat16"),
        ("seed", "is not key=value"),
        ("log_every=-1", "log_every = -1 must be 0 or more"),
        ("keep_checkpoints=-1", "keep_checkpoints = -1 must be 0 or more"),
        ("device=gpu", 'device = "gpu" must be cpu, cuda, cuda:N or mps'),
        ("optimizer.ema_decay=1.5", "optimizer.ema_decay = 1.5 must be at least 0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas = [0.9, 1.0] must be"),
        ("lora.alpha=inf", "lora.alpha = inf must be a finite number"),
        ("objective.reference_dropout=0.5", "must be at most caption_dropout = 0.1"),
        (
            "vae.stages=[{size = 8, steps = 0, batch_size = 1, learning_rate = 1, tasks = {}}]",
            "vae.stages.0.steps = 0 must be at least 1",
        ),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(UsageError) as caught:
        load_recipe(NANO, [change])
    assert message in str(caught.value)


def test_a_missing_key_and_an_unreadable_file_are_errors(tmp_path):
    with pytest.raises(UsageError, match='lacks "model"'):
        parse_recipe({"name": "x", "stages": PLAIN["stages"]})
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(InputError, match="not TOML"):
        load_recipe(tmp_path / "broken.toml")


def test_steps_and_samples_are_counted_over_stages():
    recipe = parse_recipe(PLAIN)
    assert recipe.num_steps == 12
    assert recipe.locate(5) == (0, 5)
    assert recipe.locate(6) == (1, 0)
    assert [recipe.first_sample(step) for step in (0, 6, 7)] == [0, 24, 28]
    with pytest.raises(UsageError):
        recipe.locate(12)


def test_data_is_short_for_its_path():
    recipe = load_recipe(RECIPES / "lora.toml", ["data=/my pictures/cat"])
    assert recipe.data.path == "/my pictures/cat"
    assert recipe.data.world > 0
    assert load_recipe(NANO, ["data={path = 'a', kind = 'folder'}"]).data.kind == "folder"
    assert load_recipe(NANO, ["data.path=b"]).data.path == load_recipe(NANO, ["data='b'"]).data.path


def test_the_loras_recipe_asks_for_pictures():
    with pytest.raises(UsageError, match="name them, data=FOLDER"):
        load_recipe(RECIPES / "lora.toml")


def test_a_recipe_from_before_loras_and_datasets_still_loads():
    text = {"text_to_image": [8]}
    with pytest.raises(UsageError, match=r"buckets is no longer part of a recipe: .* max_text"):
        parse_recipe(parse_recipe(PLAIN).to_dict() | {"buckets": text})
    assert past_recipe(parse_recipe(PLAIN).to_dict() | {"buckets": text}) == parse_recipe(PLAIN)
    older = {k: v for k, v in parse_recipe(PLAIN).to_dict().items() if k not in ("lora", "data")}
    assert parse_recipe(older) == parse_recipe(PLAIN)


def test_the_loras_recipe_keeps_to_the_bar_of_its_benchmark():
    recipe = load_recipe(RECIPES / "lora.toml", ["data=cat"])
    assert recipe.num_steps <= 400
    assert {stage.batch_size for stage in recipe.stages} == {8}
    assert parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("o1_nano", ["stages.1.size=100"], "stages.1.size = 100 must be a multiple of 16"),
        ("i1_tiny", ["stages.0.size=72"], "stages.0.size = 72 must be a multiple of 16"),
        ("i1_tiny", ["vae.stages.0.size=60"], "stages.0.size = 60 must be a multiple of 8"),
        ("o1_nano", ["processes=1", "device=cuda:0"], 'no device "cuda:0". Set device=cpu'),
        ("lora", ["data=x", "objective.noise_scale=8.0"], "o1_nano draws with 1.0. Set"),
        ("o1_nano", ["out=file/run"], "the run's folder file/run cannot be written"),
    ],
)
def test_what_does_not_fit_is_told_before_a_process_starts(
    name, changes, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises((UsageError, InputError)) as caught:
        run(RECIPES / f"{name}.toml", changes)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
