"""Plans without weights, the pre-training recipes, and which samples a stage's filter takes."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hidream.cli.main import main
from hidream.errors import ModelError, UsageError
from hidream.models.o1.config import O1_8B, O1_NANO
from hidream.models.o1.model import O1
from hidream.train import run
from hidream.train.config import Data, load_recipe, parse_recipe
from hidream.train.data import num_words
from hidream.train.draws import draw_sample
from hidream.train.filter import Filter
from hidream.train.learner import learner_of
from hidream.train.o1 import O1Learner
from hidream.train.optim import build_optimizers
from hidream.train.plan import plan

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE, SMALL = RECIPES / "o1_8b_pretrain.toml", RECIPES / "o1_nano_pretrain.toml"


def recipe_of(**stage):
    stage = {"size": 64, "steps": 6, "batch_size": 4, "learning_rate": 1e-3} | stage
    stage = {"tasks": {"text_to_image": 1}} | stage
    return parse_recipe({"name": "tiny", "model": "o1-tiny", "seed": 3, "stages": [stage]})


def test_the_large_recipe_is_that_of_the_published_network():
    recipe = load_recipe(LARGE)
    assert parse_recipe(recipe.to_dict()) == recipe
    with torch.device("meta"):
        model = O1(O1_8B)
    found = plan(recipe)
    assert found.num_values == sum(p.numel() for p in model.parameters())
    assert 8e9 < found.num_values < 10e9
    assert [stage.size for stage in found.stages] == [512, 1024, 2048]
    assert found.weights == -(-4 * found.num_values // 64) == found.ema == found.gradients
    assert found.optimizer == -(-8 * found.num_values // 64)
    assert recipe.stages[0].tasks.keys() == {"text_to_image", "language", "understanding"}
    assert recipe.stages[2].filter.min_size == 2048


def test_the_small_recipe_has_the_large_ones_stages_at_an_eighth():
    large, small = load_recipe(LARGE), load_recipe(SMALL)
    for number, (a, b) in enumerate(zip(large.stages, small.stages, strict=True)):
        assert a.size == 8 * b.size
        assert a.tasks == b.tasks
        ratio = large.objective_of(number).noise_scale / small.objective_of(number).noise_scale
        assert ratio == 4


@pytest.mark.parametrize("muon", [0.0, 2.0])
def test_a_plan_counts_what_training_keeps(muon):
    changes = [f"optimizer.muon={muon}", "compile=false", "processes=1", "init="]
    recipe = load_recipe(SMALL, changes)
    model = O1(O1_NANO)
    optimizers = build_optimizers(model, recipe.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    ]
    found = plan(recipe)
    assert found.optimizer == sum(value.nbytes for value in states)
    assert found.weights == sum(p.nbytes for p in model.parameters()) == found.gradients


@pytest.mark.parametrize("dora", [False, True])
def test_a_plan_counts_adapters(dora):
    recipe = load_recipe(RECIPES / "lora.toml", ["data=x", f"lora.dora={str(dora).lower()}"])
    found = plan(recipe)
    learner = learner_of(dataclasses.replace(recipe, data=Data()))
    adapters = sum(p.numel() for p in learner.build().parameters())
    assert found.num_adapters == adapters
    assert (found.ema, found.gradients, found.optimizer) == (
        4 * adapters,
        4 * adapters,
        8 * adapters,
    )
    assert f"frozen, and {adapters:,} of adapters" in found.told


@pytest.mark.parametrize("name", ["lora_o1_8b", "lora_i1"])
def test_the_large_loras_freeze_half_precision(name):
    recipe = load_recipe(RECIPES / f"{name}.toml", ["data=x"])
    found = plan(recipe)
    assert found.weights == 2 * found.num_values + 4 * found.num_adapters
    assert found.num_values > 8e9
    assert found.num_adapters < 0.02 * found.num_values


@pytest.mark.parametrize("task", ["text_to_image", "edit", "language", "understanding"])
def test_tokens_of_a_step_are_its_batchs_but_for_the_chats_own(task):
    chats = set()
    for size in (64, 96):
        stage = {"size": size, "steps": 1, "batch_size": 4, "learning_rate": 1, "tasks": {task: 1}}
        changes = {"stages": [stage], "max_text": 64, "objective": {"caption_dropout": 0.0}}
        recipe = parse_recipe(load_recipe(SMALL).to_dict() | changes)
        learner = O1Learner(recipe)
        planned, rest = divmod(plan(recipe).stages[0].tokens, 4)
        assert rest == 0
        for index, n in enumerate(learner.make_batch(0).batch.lengths):
            sample = draw_sample(recipe, recipe.stages[0], task, index)
            chats.add(n.total - num_words(learner.tokenizer, sample) - (planned - 64))
    (chat,) = chats  # as long at every size
    assert 0 < chat < 20


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(LARGE), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "stage 2: 2048x2048, 50,000 steps of 128: 6,400,000 samples" in out
    assert "64 processes (fsdp); one keeps" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_looks_at_the_data(tmp_path, capsys):
    assert (
        main(["train", str(RECIPES / "lora.toml"), f"data={tmp_path / 'none'}", "--dry-run"]) == 3
    )
    assert "does not exist" in capsys.readouterr().err


def test_the_page_shows_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    page = (RECIPES.parent / "docs" / "training.md").read_text()
    assert main(["train", "recipes/o1_8b_pretrain.toml", "--dry-run"]) == 0
    command = "$ hidream train recipes/o1_8b_pretrain.toml --dry-run\n"
    assert command + capsys.readouterr().out in page


def test_several_processes_on_gpus_are_planned_but_not_started(tmp_path):
    with pytest.raises(UsageError, match='processes = 64 needs device = "cpu"'):
        run(LARGE, [f"out={tmp_path / 'run'}"])
    assert list(tmp_path.iterdir()) == []


def test_a_filter_says_what_is_taken():
    assert Filter().admits("", 0)
    assert Filter(min_size=512).admits("a", 512 * 512)
    assert not Filter(min_size=512).admits("a", 512 * 511)
    assert Filter(min_size=512).admits("a")  # yet to be drawn
    rules = Filter(min_words=2, max_words=3, only=("Cube", "sphere"), without=("red",))
    assert rules.admits("a blue cube")
    for prompt in ("cube", "one two three cube", "a blue cone", "a Red cube", "two cubes"):
        assert not rules.admits(prompt)


def test_a_stages_samples_are_the_first_that_its_filter_admits():
    recipe = recipe_of(filter={"max_words": 4, "without": ["red"]})
    (stage,) = recipe.stages
    samples = [draw_sample(recipe, stage, "text_to_image", i) for i in range(30)]
    assert all(stage.filter.admits(sample.prompt) for sample in samples)
    every = dataclasses.replace(stage, filter=Filter())
    unfiltered = [draw_sample(recipe, every, "text_to_image", i) for i in range(30)]
    same = [a == b for a, b in zip(samples, unfiltered, strict=True)]
    assert same == [stage.filter.admits(sample.prompt) for sample in unfiltered]
    assert 0 < sum(same) < 30


def test_a_filter_that_nothing_passes_is_told(monkeypatch):
    monkeypatch.setattr("hidream.train.draws.MAX_DRAWS", 5)
    recipe = recipe_of(filter={"only": ["zebra"]})
    with pytest.raises(ModelError, match="passes the stage's filter"):
        draw_sample(recipe, recipe.stages[0], "text_to_image", 0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_size": -1}, "stages.0.filter.min_size = -1 must be 0 or more"),
        ({"min_words": 5, "max_words": 4}, "max_words = 4 is below min_words = 5"),
        ({"only": ["two words"]}, 'has "two words", which is not one word'),
        ({"min_sise": 3}, 'unknown key "stages.0.filter.min_sise"; did you mean "min_size"?'),
    ],
)
def test_wrong_rules_are_named(rules, message):
    with pytest.raises(UsageError) as caught:
        recipe_of(filter=rules)
    assert message in str(caught.value)
