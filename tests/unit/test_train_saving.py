"""Saving in a thread: what is written is what was, and until it is there, the one before counts."""

from threading import Event

import pytest
import torch

from hidream.errors import InputError, ModelError
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import O1
from hidream.train import checkpoint, shards
from hidream.train.checkpoint import Progress
from hidream.train.config import Optimizer
from hidream.train.distributed import World
from hidream.train.optim import build_optimizers
from hidream.train.saving import Saver


@pytest.fixture(scope="module")
def state():
    """A model, averages, and an optimizer that has had a step."""
    model, ema = O1(O1_TINY), O1(O1_TINY)
    optimizers = build_optimizers(model, Optimizer())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    for optimizer in optimizers:
        optimizer.step()
    return model, ema, optimizers


def progress(step):
    return Progress(step=step, samples=4 * step, seconds=1.5, recipe={"name": "x"})


@pytest.fixture(params=[False, True], ids=["whole", "shards"])
def saver(request, tmp_path):
    """Of one process, which writes everything either way."""
    return Saver(tmp_path, World(), keep=2, sharded=request.param, in_shards=request.param)


@pytest.fixture
def writing(monkeypatch):
    """The thread waits at the digests, with every file written, until this is set."""
    go_on, digest = Event(), shards.digest

    def waiting(file):
        assert go_on.wait(60)
        return digest(file)

    monkeypatch.setattr(shards, "digest", waiting)
    return go_on


def test_training_goes_on_while_it_is_written(saver, state, writing, tmp_path):
    model, _, _ = state
    weight = model.model.language_model.norm.weight
    before = weight.detach().clone()
    saver.save(progress(1), *state)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(ModelError, match="no checkpoint"):
        checkpoint.current(tmp_path)
    writing.set()
    saver.wait()
    found, ema = O1(O1_TINY), O1(O1_TINY)
    optimizers = build_optimizers(found, Optimizer())
    assert checkpoint.load(checkpoint.latest(tmp_path), found, ema, optimizers) == progress(1)
    assert torch.equal(found.model.language_model.norm.weight, before)
    expected = checkpoint.optimizer_tensors(model, state[2])
    actual = checkpoint.optimizer_tensors(found, optimizers)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_kill_while_saving_leaves_the_one_before(saver, state, writing, tmp_path):
    root = tmp_path / "checkpoints"
    writing.set()
    saver.save(progress(1), *state)
    saver.wait()
    writing.clear()
    saver.save(progress(2), *state)
    for _ in range(600):  # until its files are there
        if list(root.glob(".step-*/*.safetensors")):
            break
        Event().wait(0.01)
    names = sorted(path.name for path in root.iterdir())
    assert names == [".step-00000002.draft", "latest", "step-00000001"]
    assert checkpoint.current(tmp_path).name == "step-00000001"
    writing.set()
    saver.save(progress(3), *state)  # after the second
    saver.wait()
    names = sorted(path.name for path in root.iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]


def test_what_cannot_be_written_is_told_with_its_step(saver, state, tmp_path, monkeypatch):
    saver.save(progress(1), *state)
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    saver.save(progress(2), *state)
    with pytest.raises(InputError, match=r"checkpoint of step 2 cannot be written.*No space left"):
        saver.save(progress(3), *state)
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert not list((tmp_path / "checkpoints").glob(".step-*"))


def test_shards_of_another_model_or_half_of_them_are_refused(state, tmp_path):
    from dataclasses import replace

    saver = Saver(tmp_path, World(), keep=2, sharded=True, in_shards=True, ahead=False)
    saver.save(progress(1), *state)
    folder = checkpoint.current(tmp_path)
    with pytest.raises(ModelError, match="differ in"):
        checkpoint.load(folder, O1(replace(O1_TINY, patch_size=8)))
    (shard,) = folder.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is broken"):
        checkpoint.load(folder, O1(O1_TINY))
