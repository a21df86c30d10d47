"""Hi-DiT's files: strict loading, REPA-E's checkpoints, latent statistics, nothing half-written."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hidream.data.latents import save_statistics
from hidream.errors import InputError, ModelError
from hidream.models.hidit import files
from hidream.models.hidit.config import ATTENTIONS, HIDIT_TINY, PIXEL_CLOCKS, SIZES
from hidream.models.hidit.model import has_trained_pixels
from hidream.models.hidit.weights import (
    config_of,
    load_hidit,
    open_hidit,
    read_stats,
    save_hidit,
    shapes_of,
)
from tests.tiny_hidit_model import inputs, random_hidit

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def model():
    return random_hidit()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidit") / "tiny"
    save_hidit(model, folder)
    return folder


@pytest.fixture
def plain(model, tmp_path):
    """A checkpoint as REPA-E has it: no pixel branch."""
    weights = model.state_dict()
    save_file({n: t for n, t in weights.items() if not n.startswith("pixel_")}, tmp_path / MODEL)
    files.write_json(tmp_path / "config.json", HIDIT_TINY.to_dict())
    return tmp_path


def equal(ours, theirs, names=None):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    names = ours.keys() | theirs.keys() if names is None else names
    return all(torch.equal(ours[n], theirs[n]) for n in names)


def test_saved_and_loaded_to_the_bit(model, saved):
    loaded = load_hidit(saved)
    assert equal(loaded, model)
    assert loaded.config == HIDIT_TINY
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    given = inputs()
    assert torch.equal(loaded(*given).pixels, model(*given).pixels)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", MODEL]


def test_every_tensor_has_the_type_that_it_is_used_in(saved):
    """Statistics stay wide, counts whole; all else is what was asked for."""
    loaded = load_hidit(saved, dtype=torch.bfloat16)
    kinds = {n: t.dtype for n, t in loaded.state_dict().items()}
    assert kinds.pop("bn.num_batches_tracked") == torch.int64
    assert {kinds.pop(f"bn.running_{n}") for n in ("mean", "var")} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    x_t, sigma, labels, pixels = inputs()
    made = loaded(x_t, sigma, labels, pixels)
    wanted = load_hidit(saved)(x_t, sigma, labels, pixels)
    for ours, theirs in ((made.velocity, wanted.velocity), (made.pixels, wanted.pixels)):
        assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_saving_again_replaces_it_and_a_failure_leaves_it(model, saved, tmp_path, monkeypatch):
    save_hidit(model, tmp_path)
    other = random_hidit(seed=1)
    save_hidit(other, tmp_path)
    assert equal(load_hidit(tmp_path), other)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(InputError, match="No space left on device"):
        save_hidit(model, tmp_path)
    assert equal(load_hidit(tmp_path), other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", MODEL]


# REPA-E's checkpoints


def test_a_plain_checkpoint_gets_a_fresh_pixel_branch_and_says_so(model, plain, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_hidit(plain, allow_no_pixels=True)
    assert "no pixel branch" in caplog.text
    assert not has_trained_pixels(loaded)
    names = [n for n in model.state_dict() if not n.startswith("pixel_")]
    assert equal(loaded, model, names)
    x_t, sigma, labels, pixels = inputs()
    made = loaded(x_t, sigma, labels, pixels)
    assert torch.equal(made.velocity, model(x_t, sigma, labels).velocity)
    assert not made.pixels.any()
    assert equal(loaded, load_hidit(plain, allow_no_pixels=True)), "it is the same every time"
    narrow = load_hidit(plain, dtype=torch.bfloat16, allow_no_pixels=True)
    assert narrow.pixel_head.convs[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("clock", PIXEL_CLOCKS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_plain_checkpoint_in_every_mode(plain, attention, clock):
    config = replace(HIDIT_TINY, attention=attention, pixel_clock=clock)
    loaded = load_hidit(plain, config, allow_no_pixels=True)
    assert loaded.config == config
    assert not loaded(*inputs()).pixels.any()


def test_a_plain_checkpoint_is_refused_unless_it_is_expected(plain):
    with pytest.raises(ModelError, match=r"missing: pixel_"):
        load_hidit(plain)


def test_only_a_whole_branch_may_be_missing(model, tmp_path):
    """Neither half a branch nor anything else."""
    files.write_json(tmp_path / "config.json", HIDIT_TINY.to_dict())
    for missing in ("pixel_type", "bn.running_var"):
        weights = model.state_dict()
        weights.pop(missing)
        save_file(weights, tmp_path / MODEL)
        with pytest.raises(ModelError, match=f"1 missing: {missing}"):
            load_hidit(tmp_path, allow_no_pixels=True)


# What does not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.bias"), "1 missing: blocks.1.attn.qkv.bias"),
        (lambda t: t.update({"vae.x": torch.ones(1)}), "not of this model: vae.x"),
        (lambda t: t.update({"pos_embed": torch.ones(2)}), "pos_embed [2] instead of [1, 16, 32]"),
        (lambda t: t["pos_embed"].fill_(float("inf")), "pos_embed in"),
    ],
)
def test_what_does_not_fit_is_named(saved, tmp_path, change, said):
    tensors = load_file(saved / MODEL)
    change(tensors)
    save_file(tensors, tmp_path / MODEL)
    files.write_json(tmp_path / "config.json", HIDIT_TINY.to_dict())
    with pytest.raises(ModelError) as caught:
        load_hidit(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["0400000.pt", "model.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(ModelError, match="hidream models convert"):
            load_hidit(place)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_hidit(tmp_path / "no.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="not those of a Hi-DiT"):
        load_hidit(tmp_path / "x.safetensors")


# Configurations that tensors tell


@pytest.mark.parametrize("name", ["SiT-XL/1", "SiT-B/2", "SiT-S/4"])
def test_published_sizes_are_told_by_their_tensors(name):
    assert config_of(shapes_of(SIZES[name])) == SIZES[name]
    plain = {n: s for n, s in shapes_of(SIZES[name]).items() if not n.startswith("pixel_")}
    assert config_of(plain) == SIZES[name]


def test_what_tensors_tell_of_a_file(model, saved):
    wanted = replace(HIDIT_TINY, num_heads=1, encoder_depth=3)  # the two that they do not
    assert open_hidit(saved / MODEL)[1] == wanted
    told = {"num_heads": 4, "encoder_depth": 2}
    shapes = shapes_of(HIDIT_TINY)
    assert config_of(shapes, told) == HIDIT_TINY
    for attention, clock in (("add", "shared"), ("readonly", "rescaled")):
        config = replace(HIDIT_TINY, attention=attention, pixel_clock=clock, qk_norm=True)
        assert config_of(shapes_of(config), told) == config
    assert equal(load_hidit(saved / MODEL, HIDIT_TINY), model)


# Latent statistics


def test_statistics_round_trip_in_repa_e_s_form(tmp_path):
    mean, std = torch.randn(32), 0.1 + torch.rand(32)
    save_statistics(tmp_path / "stats.safetensors", mean.numpy(), std.numpy(), "latents")
    tensors = load_file(tmp_path / "stats.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "latents_scale": (1, 32, 1, 1),
        "latents_bias": (1, 32, 1, 1),
    }
    torch.testing.assert_close(tensors["latents_scale"].flatten(), 1 / std)
    found = read_stats(tmp_path / "stats.safetensors")
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], std)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"latents_scale": torch.ones(4)}, "not latents_scale and latents_bias"),
        ({"latents_scale": torch.ones(4), "latents_bias": torch.ones(3)}, "different lengths"),
        ({"latents_scale": torch.zeros(4), "latents_bias": torch.ones(4)}, "no latents can have"),
        (
            {"latents_scale": torch.ones(2), "latents_bias": torch.tensor([0.0, float("nan")])},
            "no latents can have",
        ),
    ],
)
def test_statistics_of_no_use(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "stats.safetensors")
    with pytest.raises(ModelError, match=said):
        read_stats(tmp_path / "stats.safetensors")
    with pytest.raises(ModelError, match="hidream models convert"):
        read_stats(tmp_path / "e2e-vavae-400k-latents-stats.pt")
