"""Whole runs of LoRAs on a dataset: they resume exactly, are small, and draw by the command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hidream.cli.main import main
from hidream.train import load_recipe, run
from hidream.train.learner import learner_of
from hidream.train.loop import train
from tests import tiny
from tests.e2e.test_training import after, assert_same_run, last_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Path(__file__).parents[2] / "recipes" / "lora.toml"
STAGE = "{ size = 64, steps = 4, batch_size = 2, learning_rate = 3e-2, tasks = { TASK = 1.0 } }"
FEW = (
    "log_every=1",
    "checkpoint_every=0",
    "lora.rank=2",
    "lora.alpha=2.0",
    "optimizer.ema_decay=0",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of two shapes, and two edits, each in a folder."""
    root = tmp_path_factory.mktemp("data")
    for name in ("pictures", "edits"):
        (root / name).mkdir()
    for i, size in enumerate(((90, 54), (84, 50), (54, 90))):
        tiny.picture(i, *size).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text("a red cube\n")
    for i in range(2):
        tiny.picture(i, 90, 70).save(root / "edits" / f"{i}.source.png")
        tiny.picture(i + 1, 90, 70).save(root / "edits" / f"{i}.target.png")
        (root / "edits" / f"{i}.txt").write_text("make it blue\n")
    return root


def lora_run(init, out, data, *changes, model="o1-tiny", task="text_to_image"):
    given = [f"model={model}", f"init={init}", f"out={out}", f"data={data}", *FEW]
    return load_recipe(RECIPE, [*given, f"stages=[{STAGE.replace('TASK', task)}]", *changes])


def say(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def drawn(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("changes", [(), ("lora.dora=true", "lora.dropout=0.3")])
def test_an_o1s_lora_resumes_exactly_and_draws_by_the_command(
    tiny_folder, pictures, tmp_path, changes, monkeypatch
):
    whole, parts = (
        lora_run(tiny_folder, tmp_path / name, pictures / "pictures", *changes)
        for name in ("whole", "parts")
    )
    assert train(whole)
    assert not train(parts, stop_requested=after(2))
    assert train(parts, resume=True)
    assert_same_run(whole.run_dir, parts.run_dir)
    tensors = last_tensors(whole.run_dir)
    assert all("lora_" in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) < 0.4 * sum(
        t.numel() for t in load_file(tiny_folder / "model.safetensors").values()
    )
    files = [run.run_dir / "lora.safetensors" for run in (whole, parts)]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    monkeypatch.chdir(tmp_path)
    common = ("generate", "a red cube", "-m", tiny_folder, "--seed", 1, "--steps", 2)
    say(*common, "-o", "plain.png")
    say(*common, "-o", "lora.png", "--lora", files[0], 1.0)
    assert np.abs(drawn("lora.png") - drawn("plain.png")).max() > 3
    assert (drawn("lora.png") == by_the_trained(whole, tensors, tmp_path)).all()


def by_the_trained(recipe, tensors, folder):
    """What the command draws with the run's own averaged adapters in the model."""
    from hidream.pipelines import load

    adapters = learner_of(recipe).build().eval()
    averages = {n.removeprefix("ema/"): t for n, t in tensors.items() if n.startswith("ema/")}
    adapters.load_state_dict(averages)
    pipe = load(recipe.init, device="cpu")
    pipe.model = adapters.network
    with torch.no_grad():
        return np.asarray(pipe("a red cube", seed=1, num_inference_steps=2).images[0]).astype(int)


@pytest.mark.parametrize(
    ("model", "task", "folder"),
    [("i1-tiny", "text_to_image", "pictures"), ("e1-tiny", "edit", "edits")],
)
def test_i1s_and_e1s_loras(tiny_i1_folder, pictures, tmp_path, monkeypatch, model, task, folder):
    whole, parts = (
        lora_run(
            *(tiny_i1_folder, tmp_path / name, pictures / folder),
            'lora.targets=["to_q", "to_out_t", "w2"]',
            model=model,
            task=task,
        )
        for name in ("whole", "parts")
    )
    assert train(whole)
    tensors = load_file(whole.run_dir / "lora.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    assert any(".experts.3.w2.lora_B" in name for name in tensors)
    assert not any(name.endswith(".alpha") for name in tensors)
    if model == "i1-tiny":
        assert not train(parts, stop_requested=after(2))
        assert train(parts, resume=True)
        assert_same_run(whole.run_dir, parts.run_dir)
        monkeypatch.chdir(tmp_path)
        common = ("generate", "a red cube", "-m", tiny_i1_folder, "--seed", 1, "--steps", 2)
        say(*common, "-o", "plain.png")
        say(*common, "-o", "lora.png", "--lora", whole.run_dir / "lora.safetensors", 1.0)
        assert (drawn("lora.png") != drawn("plain.png")).any()


def test_full_fine_tuning_on_a_dataset(tiny_folder, pictures, tmp_path):
    recipe = load_recipe(
        RECIPE,
        [
            *("model=o1-tiny", f"init={tiny_folder}", f"out={tmp_path / 'run'}"),
            *(f"data={pictures / 'edits'}", "lora.rank=0"),
            f"stages=[{STAGE.replace('TASK', 'edit').replace('steps = 4', 'steps = 1')}]",
        ],
    )
    assert train(recipe)
    assert (recipe.run_dir / "model" / "model.safetensors").is_file()
    assert json.loads((recipe.run_dir / "data.json").read_text())["items"] == 2


def test_a_bad_dataset_is_refused_before_anything_begins(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.picture(0, 200, 150).save(folder / "a.jpg")
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-100])
    (folder / "a.txt").write_text("a red cube")
    tiny.picture(1, 200, 150).save(folder / "b.png")
    out = tmp_path / "run"
    assert main(["train", str(RECIPE), f"data={folder}", f"out={out}"]) == 3
    assert "b.png: it has no caption (b.txt is not there)." in capsys.readouterr().err
    (folder / "b.txt").write_text("cube " * 70)
    assert main(["train", str(RECIPE), f"data={folder}", f"out={out}"]) == 3
    told = capsys.readouterr().err
    assert re.search(r"b: its caption has \d+ tokens; max_text is 64.", told)
    (folder / "b.txt").write_text("a cube")
    assert main(["train", str(RECIPE), f"data={folder}", f"out={out}"]) == 3
    told = capsys.readouterr().err.splitlines()
    assert "error: one thing is wrong with the data" in told[0]
    assert "a.jpg" in told[1]
    assert "truncated or damaged" in told[1]
    assert not out.exists()


def test_a_picture_that_breaks_during_a_run_is_counted(
    tiny_folder, pictures, tmp_path, caplog, monkeypatch
):
    data = tmp_path / "data"
    shutil.copytree(pictures / "pictures", data)
    recipe = lora_run(tiny_folder, tmp_path / "run", data, "data.world=0.0")

    learner = learner_of(recipe)
    (data / "0.png").write_bytes(b"broken")
    counts = [learner.make_batch(step).corrupt for step in range(4)]
    assert sum(counts) > 0
    monkeypatch.setattr("hidream.train.loop.learner_of", lambda recipe, world: learner)
    assert train(recipe)
    lines = list(map(json.loads, (recipe.run_dir / "log.jsonl").read_text().splitlines()))
    assert [line["corrupt"] for line in lines if "corrupt" in line] == counts
    assert sum("0 is left out" in record.getMessage() for record in caplog.records) == 1


def test_the_command_from_a_folder_to_a_lora(tiny_folder, pictures, tmp_path, capfd, caplog):
    caplog.set_level("INFO")
    changes = [
        "model=o1-tiny",
        f"init={tiny_folder}",
        f"out={tmp_path / 'run'}",
        "processes=2",
        "objective.noise_scale=2.0",
    ]
    stage = f"stages=[{STAGE.replace('TASK', 'text_to_image')}]"
    assert run(RECIPE, [*changes, *FEW, stage, f"data={pictures / 'pictures'}"]) == 0
    assert "data: 3 of text_to_image (2 at 80x48, 1 at 48x80)" in caplog.text
    assert f"done: {tmp_path / 'run' / 'lora.safetensors'}" in capfd.readouterr().err
    assert (tmp_path / "run" / "lora.safetensors").is_file()
