"""Trackers: what reaches them, and what is said of one that is not installed."""

import sys
import types

import pytest
from PIL import Image

from hidream.errors import UsageError
from hidream.train.track import tracker

RECORD = {"step": 5, "num_steps": 9, "loss": 0.5, "samples": 40, "message": "text"}


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "grids" / "0000005.png"
    file.parent.mkdir()
    Image.new("RGB", (6, 4)).save(file)
    return file


def test_wandb_gets_the_numbers_by_step(tmp_path, monkeypatch, picture):
    seen = []
    run = types.SimpleNamespace(
        log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("end")
    )
    wandb = types.SimpleNamespace(init=lambda **told: seen.append(told) or run, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        with tracker("wandb", tmp_path, "mine", {"seed": 1}) as track:
            track(RECORD)
            track({"step": 5, "message": "nothing to draw"})
            track({"step": 5, "picture": str(picture)})
    assert seen[0]["name"] == "mine"
    assert seen[0]["config"] == {"seed": 1}
    assert seen[1:4] == [({"loss": 0.5, "samples": 40.0}, 5), ({"grids": str(picture)}, 5), "end"]
    assert seen[4]["resume"] == "allow"
    assert seen[4]["id"] == seen[0]["id"]  # the same run goes on


def test_tensorboard_gets_numbers_and_pictures(tmp_path, picture):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracker("tensorboard", tmp_path, "mine", {}) as track:
        track(RECORD)
        track({"step": 7, "picture": str(picture)})
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(5, 0.5)]
    (shown,) = read.Images("grids")
    assert (shown.step, shown.width, shown.height) == (7, 6, 4)
    assert shown.encoded_image_string == picture.read_bytes()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_one_that_is_not_installed_is_named(tmp_path, monkeypatch, kind):
    for name in ("wandb", "tensorboard", "tensorboard.compat.proto.event_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"pip install {kind}"), tracker(kind, tmp_path, "a", {}):
        pass


def test_a_run_that_never_begins_is_not_tracked(tmp_path, monkeypatch):
    wandb = types.SimpleNamespace(init=lambda **told: pytest.fail("it was told"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with tracker("wandb", tmp_path, "mine", {}):
        pass


def test_none_is_none_and_others_are_unknown(tmp_path):
    with tracker("none", tmp_path, "a", {}) as track:
        track(RECORD)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="mlflow"), tracker("mlflow", tmp_path, "a", {}):
        pass
