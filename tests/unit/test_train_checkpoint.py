"""Checkpoints: whole or not there at all; and the log beside them."""

import json
import os

import pytest
import torch

from hidream.errors import HidreamError, ModelError
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import O1
from hidream.train import checkpoint
from hidream.train.checkpoint import Progress
from hidream.train.config import Optimizer
from hidream.train.log import Meter, RunLog, duration, readable
from hidream.train.optim import build_optimizers


def trained(seed):
    """A tiny model whose optimizers have had a step on some of its parameters."""
    model = O1(O1_TINY)
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizers = build_optimizers(model, Optimizer(muon=1.0))
    for parameter in model.model.language_model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def progress(step):
    return Progress(step=step, samples=4 * step, seconds=1.5, recipe={"name": "x"})


def test_everything_comes_back(tmp_path):
    model, optimizers = trained(0)
    ema, _ = trained(1)
    checkpoint.save(tmp_path, progress(7), model, ema, optimizers, keep=2)
    other, its_optimizers = trained(2)
    its_ema, _ = trained(3)
    found = checkpoint.load(checkpoint.latest(tmp_path), other, its_ema, its_optimizers)
    assert found == progress(7)
    for a, b in ((model, other), (ema, its_ema)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    expected = checkpoint.optimizer_tensors(model, optimizers)
    actual = checkpoint.optimizer_tensors(other, its_optimizers)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_only_the_newest_are_kept(tmp_path):
    model, optimizers = trained(0)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, progress(step), model, model, optimizers, keep=2)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_what_is_no_checkpoint_is_left_alone_and_what_a_kill_left_goes(tmp_path):
    model, optimizers = trained(0)
    root = tmp_path / "checkpoints"
    (root / "step-00000001.bak").mkdir(parents=True)
    draft = root / f".step-00000002.{os.getpid()}"  # in a container, the next run has the same id
    draft.mkdir()
    for step in (2, 3):
        checkpoint.save(tmp_path, progress(step), model, model, optimizers, keep=1)
    names = sorted(p.name for p in root.iterdir())
    assert names == ["latest", "step-00000001.bak", "step-00000003"]
    assert checkpoint.steps_of(tmp_path) == [3]
    assert checkpoint.latest(tmp_path).name == "step-00000003"


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizers = trained(0)
    checkpoint.save(tmp_path, progress(1), model, model, optimizers, keep=2)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, progress(2), model, model, optimizers, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000001"]
    assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_what_is_missing_or_damaged_is_said(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        checkpoint.latest(tmp_path)
    model, optimizers = trained(0)
    folder = checkpoint.save(tmp_path, progress(1), model, model, optimizers, keep=2)
    whole = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="ema"):
        checkpoint.load(folder, model, model, optimizers)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(ModelError, match="ema"):
        checkpoint.load_ema(folder, model)
    (folder / "state.json").write_text("{")
    with pytest.raises(ModelError, match="state"):
        checkpoint.load(folder, model)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path, caplog, name):
    model, optimizers = trained(0)
    for step in (1, 2):
        folder = checkpoint.save(tmp_path, progress(step), model, model, optimizers, keep=2)
    file = folder / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one value
    file.write_bytes(content)
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert f"{name}.safetensors is not what was written" in caplog.text
    (checkpoint.folder_of(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(ModelError, match=r"no checkpoint in .* is whole"):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    from dataclasses import replace

    model, optimizers = trained(0)
    folder = checkpoint.save(tmp_path, progress(1), model, model, optimizers, keep=2)
    with pytest.raises(ModelError, match="differ in"):
        checkpoint.load(folder, O1(replace(O1_TINY, patch_size=8)))


def test_the_log_holds_every_step_once_after_a_resume(tmp_path):
    path, seen = tmp_path / "log.jsonl", []
    log = RunLog(path)
    for step in (1, 2, 3, 4):
        log.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # a crash
    RunLog(path, seen.append, first_step=2).write({"step": 3, "again": True})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert seen == [{"step": 3, "again": True}]


def test_the_meter_averages_a_value_over_the_steps_that_had_it():
    now = [0.0]
    meter = Meter(lambda: now[0])
    meter.add(0, {"loss_edit": 1.0, "grad_norm": torch.tensor(2.0)}, 8)
    meter.add(1, {"loss_text_to_image": 3.0, "grad_norm": 4.0}, 8)
    now[0] = 4.0
    assert meter.report() == {
        "grad_norm": 3.0,
        "loss_edit": 1.0,
        "loss_text_to_image": 3.0,
        "samples_per_second": 4.0,
        "waiting": 0.0,
    }


def test_the_meter_tells_how_long_the_steps_waited_for_their_batches():
    now = [0.0]
    meter = Meter(lambda: now[0])

    def slow():
        for item in range(2):
            now[0] += 1.0
            yield item

    for item in meter.waiting(slow()):
        now[0] += 3.0
        meter.add(item, {}, 1)
    assert meter.report()["waiting"] == pytest.approx(2 / 8)


def test_what_is_not_finite_is_an_error_but_to_a_gradient_scale_a_step_less():
    meter = Meter(lambda: 1.0)
    meter.add(7, {"loss": torch.tensor(float("nan"))}, 1)
    with pytest.raises(HidreamError, match="not finite at step 7"):
        meter.check()
    scaled = Meter(lambda: 1.0, bounded=False)
    scaled.add(0, {"loss": 1.0, "grad_norm": float("inf")}, 1)
    scaled.add(1, {"loss": 3.0, "grad_norm": 2.0}, 1)
    report = scaled.report()
    assert (report["loss"], report["grad_norm"], report["skipped"]) == (3.0, 2.0, 1)
    for step in range(101):
        scaled.add(step, {"grad_norm": float("inf")}, 1)
    with pytest.raises(HidreamError, match="not finite"):
        scaled.check()


def test_lines_for_people():
    record = {
        "step": 5,
        "num_steps": 10,
        "lr": 1e-3,
        "loss_edit": 0.25,
        "grad_norm": 0.5,
        "samples_per_second": 100.0,
        "seconds_left": 125,
    }
    line = readable(record)
    assert line == "step 5/10  edit 0.250  lr 1.00e-03  |g| 0.50  100 pictures/s  2:05 left"
    assert readable({"step": 1, "message": "hello"}) == "hello"
    assert duration(3725) == "1:02:05"
