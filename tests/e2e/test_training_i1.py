"""Whole runs of a tiny I1 and of an E1 out of it: they resume exactly, and draw and edit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hidream.cli.main import main
from hidream.errors import UsageError
from hidream.train import load_recipe
from hidream.train.loop import train
from tests.e2e.test_training import after, assert_same_run

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = Path(__file__).parents[2] / "recipes"
STAGE = "{ size = 64, steps = 3, batch_size = 2, learning_rate = 1e-3, tasks = { TASK = 1.0 } }"
FEW = ("processes=1", "log_every=1", "checkpoint_every=0", "grid_every=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def tiny(name, out, *changes):
    task = {"i1": "text_to_image", "e1": "edit"}[name[:2]]
    changes = [f"stages=[{STAGE.replace('TASK', task)}]", f"out={out}", *FEW, *changes]
    return load_recipe(RECIPES / f"{name}.toml", [f"model={name[:2]}-tiny", *changes])


@pytest.fixture(scope="module")
def drawer(root):
    """An I1's run in one piece."""
    recipe = tiny("i1_tiny", root / "i1", *SMALL_VAE)
    assert train(recipe)
    return recipe


SMALL_VAE = (
    "vae.channels=4",
    "vae.widths=[8, 8, 8, 8]",
    f"vae.stages=[{STAGE.replace('TASK', 'text_to_image')}]",
)


def test_a_resume_is_exact_within_the_autoencoder_and_after_it(drawer, tmp_path):
    parts = tiny("i1_tiny", tmp_path / "parts", *SMALL_VAE)
    assert not train(parts, stop_requested=after(2))
    vae = parts.run_dir / "vae"
    assert (vae / "checkpoints" / "latest").read_text() == "step-00000002"
    assert not train(parts, resume=True, stop_requested=after(3))  # one of it, two of the rest
    assert (parts.run_dir / "checkpoints" / "latest").read_text() == "step-00000002"
    assert train(parts, resume=True)
    assert_same_run(drawer.run_dir / "vae", vae)
    assert_same_run(drawer.run_dir, parts.run_dir)


def test_what_was_trained_draws_and_is_judged(drawer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(drawer.run_dir / "model")
    assert main(["generate", "a red cube", "-m", model, "--steps", "2", "-o", "out.png"]) == 0
    assert Image.open("out.png").size == (64, 64)
    capsys.readouterr()
    assert (
        main(["eval", "world", "-m", model, "--categories", "single", "--scenes", "1", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["categories"]["single"]["n"] == 1
    lines = map(json.loads, (drawer.run_dir / "log.jsonl").read_text().splitlines())
    logged = [line for line in lines if "message" not in line]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert logged[0]["load_max"] == 2  # the recipe's gates begin skewed


def test_an_editor_comes_of_it(drawer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = f"init={drawer.run_dir / 'model'}"
    recipe = tiny("e1_tiny", "e1", start, "grid_every=3")
    assert train(recipe)
    assert (recipe.run_dir / "grids" / "0000003.png").exists()
    Image.new("RGB", (64, 64), "red").save("a.png")
    flags = ["-m", "./e1/model", "--steps", "2", "-o", "out.png"]
    assert main(["edit", "a.png", "make it blue", *flags]) == 0
    assert Image.open("out.png").size == (64, 64)
    with pytest.raises(UsageError, match="learns edit alone"):
        train(tiny("e1_tiny", "other", start, "stages.0.tasks={text_to_image = 1.0}"))
    with pytest.raises(UsageError, match="no autoencoder"):
        train(tiny("e1_tiny", "other", "init=nowhere"))
