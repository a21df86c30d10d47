"""`hidream train` as a process of a group that torchrun started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hidream.cli import console, main
from hidream.train.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "tiny"
model = "o1-tiny"
precision = "float32"
log_every = 1
grid_every = 0
tokenizer = "TOKENIZER"
parallel = { shard = 0, activation_checkpointing = "selective" }
[[stages]]
size = 32
steps = 2
batch_size = 4
learning_rate = 1e-3
tasks = { language = 1.0 }
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    build_tokenizer(folder / "tokenizer", num_texts=200)
    (folder / "tiny.toml").write_text(RECIPE.replace("TOKENIZER", str(folder / "tokenizer")))
    return folder / "tiny.toml"


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "hidream", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180
    )


def records(run_dir):
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [record for record in lines if "message" not in record]


def test_a_process_of_a_group_takes_its_part(recipe, tmp_path, monkeypatch):
    """A group of one, which needs nobody to meet."""
    threads = torch.get_num_threads()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    out = f"out={tmp_path / 'run'}"
    assert main(["train", str(recipe), out, "processes=2"]) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["processes"] == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert main(["train", str(recipe), out]) == 2  # there is a run
    torch.set_num_threads(threads)


def test_the_first_process_says_what_is_wrong_with_the_command(recipe, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(console.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", str(recipe), "sed=5"]) == 2
        assert 'unknown key "sed"' in capsys.readouterr().err
        assert waited == [console.SECONDS_FOR_THE_FIRST] * int(rank)  # to be ended meanwhile


@pytest.mark.slow
def test_two_processes_of_torchrun_are_one(recipe, tmp_path):
    done = torchrun(recipe, f"out={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert "2 process(es) (fsdp)" in done.stderr
    folder = tmp_path / "two" / "checkpoints" / "step-00000002"
    assert len(list(folder.glob("shard-*.safetensors"))) == 2
    assert main(["train", str(recipe), f"out={tmp_path / 'one'}"]) == 0
    for two, one in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    more = (f"out={tmp_path / 'two'}", "stages.0.steps=3", "--resume")
    assert main(["train", str(recipe), *more]) == 0
    assert records(tmp_path / "two")[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("sed=5", 'unknown key "sed"'), ("parallel.tp=3", "[parallel] is for 3 processes")],
)
def test_torchrun_shows_one_message(recipe, tmp_path, change, message):
    failed = torchrun(recipe, f"out={tmp_path / 'run'}", change)
    assert failed.returncode != 0
    assert failed.stderr.count(message) == 1
    assert not (tmp_path / "run").exists()
