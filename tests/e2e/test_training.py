"""Whole runs of a tiny model: what they write, that they learn, and that a resume is exact."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hidream.errors import ModelError, UsageError
from hidream.train import load_recipe, run
from hidream.train.export import export
from hidream.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
RECIPE = """
name = "tiny"
model = "o1-tiny"
precision = "float32"
log_every = 1
checkpoint_every = 0
grid_every = 0
seed = 11
[[stages]]
size = 32
steps = 4
batch_size = 4
learning_rate = 1e-3
warmup = 2
tasks = { text_to_image = 0.4, edit = 0.3, language = 0.2, understanding = 0.1 }
[[stages]]
size = 48
steps = 2
batch_size = 2
learning_rate = 5e-4
tasks = { text_to_image = 0.5, subject = 0.5 }
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    from hidream.train.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("recipe")
    build_tokenizer(folder / "tokenizer", num_texts=500)
    (folder / "tiny.toml").write_text(
        RECIPE.replace("seed", f'tokenizer = "{folder}/tokenizer"\nseed')
    )
    return folder / "tiny.toml"


def last_tensors(run_dir):
    """Every tensor of a run's latest checkpoint."""
    root = run_dir / "checkpoints"
    folder = root / (root / "latest").read_text()
    files = ("model", "ema", "optimizer")
    return {f"{f}/{n}": t for f in files for n, t in load_file(folder / f"{f}.safetensors").items()}


def assert_same_run(a, b):
    """Two runs ended with the same bits, in weights, averages and optimizer."""
    first, second = last_tensors(a), last_tensors(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def after(num_steps):
    """A stop that is asked for in the step that follows `num_steps - 1` others."""
    asked = iter([False] * (num_steps - 1))
    return lambda: next(asked, True)


@pytest.mark.parametrize("muon", [0.0, 2.0])
def test_resume_is_bit_identical_in_one_process(recipe_file, tmp_path, muon):
    optimizer = f"optimizer.muon={muon}"
    whole = load_recipe(recipe_file, [f"out={tmp_path / 'whole'}", optimizer])
    assert train(whole)
    parts = load_recipe(recipe_file, [f"out={tmp_path / 'parts'}", optimizer])
    assert not train(parts, stop_requested=after(3))
    assert (parts.run_dir / "checkpoints" / "latest").read_text() == "step-00000003"
    assert train(parts, resume=True)
    assert_same_run(whole.run_dir, parts.run_dir)

    logs = [
        [json.loads(line) for line in (r.run_dir / "log.jsonl").read_text().splitlines()]
        for r in (whole, parts)
    ]
    steps, resumed = ([r for r in log if "message" not in r] for log in logs)
    assert [r["step"] for r in steps] == [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    clock = {"samples_per_second", "seconds_left", "waiting", "mfu"}
    for a, b in zip(steps, resumed, strict=True):
        assert {k: a[k] for k in a.keys() - clock} == {k: b[k] for k in b.keys() - clock}


def test_resume_is_bit_identical_in_two_processes(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    common = ["processes=2", "stages.0.steps=6", "optimizer.muon=2.0"]
    assert run(recipe_file, [*common, f"out={tmp_path / 'whole'}"]) == 0
    parts = [*common, f"out={tmp_path / 'parts'}", "checkpoint_every=4"]
    assert run(recipe_file, parts) == 0
    latest = tmp_path / "parts" / "checkpoints" / "latest"
    latest.write_text("step-00000004")
    with pytest.raises(UsageError, match="already holds a run"):
        run(recipe_file, parts)
    assert run(recipe_file, parts, resume=True) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_exported_run_loads_and_draws(recipe_file, tmp_path):
    from hidream.models.o1.weights import load_o1
    from hidream.train.grids import PROMPTS
    from hidream.train.o1 import sample_pictures

    recipe = load_recipe(recipe_file, [f"out={tmp_path / 'run'}", "grid_every=3", "processes=1"])
    train(recipe)
    with Image.open(recipe.run_dir / "grids" / "0000006.png") as grid:
        assert grid.size == (4 * (48 + 4) + 4,) * 2
    out = export(recipe.run_dir, tmp_path / "model")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (recipe.run_dir / "model").iterdir()
    )
    model, tokenizer = load_o1(out)
    averages = last_tensors(recipe.run_dir)
    for name, value in model.state_dict().items():
        assert torch.equal(value, averages[f"ema/{name}"].bfloat16().float()), name
    (picture,) = sample_pictures(model, tokenizer, PROMPTS[:1], size=48, num_steps=2)
    assert picture.size == (48, 48)
    with pytest.raises(ModelError, match="state"):
        export(recipe.run_dir, tmp_path / "other", step=77)


def test_training_goes_on_from_exported_weights(recipe_file, tmp_path):
    first = load_recipe(recipe_file, [f"out={tmp_path / 'first'}"])
    train(first)
    again = load_recipe(
        recipe_file, [f"out={tmp_path / 'again'}", f"init={first.run_dir / 'model'}"]
    )
    assert train(again)
    assert (again.run_dir / "model" / "model.safetensors").exists()


def test_a_resume_with_other_finished_stages_is_refused(recipe_file, tmp_path):
    out = f"out={tmp_path / 'run'}"
    train(load_recipe(recipe_file, [out]), stop_requested=after(3))
    with pytest.raises(UsageError, match="differ from the checkpoint"):
        train(load_recipe(recipe_file, [out, "stages.0.batch_size=8"]), resume=True)


def test_it_learns_eight_pictures_by_heart(recipe_file, tmp_path, monkeypatch):
    from hidream.world import tasks

    sample = tasks.sample
    monkeypatch.setattr(tasks, "sample", lambda t, seed, i, **more: sample(t, seed, i % 8, **more))
    recipe = load_recipe(
        recipe_file,
        [
            f"out={tmp_path / 'run'}",
            "stages.0.steps=40",
            "stages.0.batch_size=8",
            "stages.0.learning_rate=3e-3",
            "stages.0.tasks={text_to_image = 1.0}",
            "stages.1.steps=1",
            "max_text=60",
        ],
    )
    train(recipe)
    lines = (recipe.run_dir / "log.jsonl").read_text().splitlines()
    losses = [r["loss_text_to_image"] for r in map(json.loads, lines) if "loss_text_to_image" in r]
    assert sum(losses[30:40]) / 10 < 0.5 * sum(losses[:5]) / 5


def test_an_interrupt_ends_the_step_saves_and_exits_130(recipe_file, tmp_path):
    out = tmp_path / "run"
    code = "import sys; from hidream.train import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
    changes = [f"out={out}", "stages.0.steps=100000", "processes=2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe_file), *changes],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        log = out / "log.jsonl"
        for _ in range(600):
            if log.exists() and len(log.read_text().splitlines()) > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    step = int((out / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert step >= 2
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["step"] == step
    assert not list((out / "checkpoints").glob(".step*"))


@pytest.mark.slow
@pytest.mark.parametrize("saving", [True, False], ids=["while it saves", "between saves"])
def test_a_killed_run_goes_on_bit_for_bit(recipe_file, tmp_path, saving):
    """SIGKILL, at once after a draft of a checkpoint is there, or after one is finished."""
    changes = ["stages.0.steps=40", "checkpoint_every=1"]
    code = "import sys; from hidream.train import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe_file), f"out={killed}", *changes],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    checkpoints, deadline = killed / "checkpoints", time.monotonic() + 120
    awaited = ".step-*.draft" if saving else "step-0000000[3-9]"
    while not (killed / "checkpoints" / "latest").exists() or not list(checkpoints.glob(awaited)):
        assert time.monotonic() < deadline
        assert process.poll() is None
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert run(recipe_file, [f"out={killed}", *changes], resume=True) == 0
    assert run(recipe_file, [f"out={whole}", *changes]) == 0
    assert_same_run(whole, killed)
