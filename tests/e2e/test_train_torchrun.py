"""`hidream train` as a process of a group that torchrun started."""

import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hidream.cli import console, main
from hidream.errors import InputError
from hidream.train.distributed import World, first_alone
from hidream.train.tokenizer import build_tokenizer
from tests import tiny

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


def test_the_data_are_checked_before_training(recipe, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    tiny.picture(1, 140, 140).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-100])
    more = ("stages.0.tasks={ text_to_image = 1.0 }", f"out={tmp_path / 'run'}")
    assert main(["train", str(recipe), f"data={tmp_path}", *more]) == 3
    assert "a.jpg: it is truncated or damaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_others_wait_for_the_first_and_end_with_it():
    """A queue stands for the sum over two processes."""
    sums, asked = queue.Queue(), []

    class Told(World):
        def sum(self, values):
            if self.main:
                sums.put(values)
                return values
            return sums.get(timeout=30)

    def fail():
        asked.append(1)
        raise InputError("the data are bad.")

    with pytest.raises(InputError, match="the data are bad"):
        first_alone(Told(rank=0), fail)
    with pytest.raises(InputError, match="the first process found something wrong"):
        first_alone(Told(rank=1), fail)
    first_alone(Told(rank=0), lambda: None)
    first_alone(Told(rank=1), fail)
    assert asked == [1]


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
    [
        ("sed=5", 'unknown key "sed"'),
        ("parallel.tp=3", "[parallel] is for 3 processes"),
        ("data=/none", "the data /none does not exist."),
    ],
)
def test_torchrun_shows_one_message(recipe, tmp_path, change, message):
    failed = torchrun(recipe, f"out={tmp_path / 'run'}", change)
    assert failed.returncode != 0
    assert failed.stderr.count(message) == 1
    assert not (tmp_path / "run").exists()
