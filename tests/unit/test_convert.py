"""`hidream models convert`: what becomes of published pickles, and what no pickle may do."""

import argparse
import json
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hidream.cli.convert import run
from hidream.errors import HidreamError, InputError, ModelError, UsageError
from hidream.models.hidit.config import HIDIT_TINY, SIZES, HiDiTConfig
from hidream.models.hidit.vae import VaeConfig, load_vae, new_vae
from hidream.models.hidit.weights import load_hidit, read_stats
from tests.tiny_hidit_model import random_hidit

VAE = VaeConfig(channels=4, width=32, multipliers=(1, 2), num_blocks=1, attention_levels=(1,))


@pytest.fixture(scope="module")
def small():
    """Of SiT-S's width, so that it has the heads that a file cannot tell."""
    config = replace(
        HIDIT_TINY, hidden_size=384, num_heads=6, num_layers=2, num_classes=3, image_size=64
    )
    return random_hidit(config)


@pytest.fixture
def checkpoint(small, tmp_path):
    """As REPA-E's training writes it, by DistributedDataParallel and torch.compile."""

    def plain(model, prefix=""):
        weights = model.state_dict().items()
        return OrderedDict((prefix + n, t) for n, t in weights if not n.startswith("pixel_"))

    settings = argparse.Namespace(model="SiT-S/1", encoder_depth=2, resolution=64, seed=0, vae=None)
    content = {
        "model": plain(small, "module._orig_mod."),
        "ema": plain(random_hidit(small.config, seed=1)),
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": settings,
        "steps": 400_000,
    }
    torch.save(content, tmp_path / "0400000.pt")
    return tmp_path / "0400000.pt"


def equal(found, wanted):
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def convert(*arguments):
    return run([str(argument) for argument in arguments])


# Published files


def test_a_checkpoint_with_its_namespace_becomes_a_folder(small, checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "model", "--json") == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (told["kind"], told["part"], told["steps"]) == ("hidit", "model", 400_000)
    assert "--ema takes the averaged ones" in said.err
    config = HiDiTConfig.from_dict(json.loads((tmp_path / "model/config.json").read_text()))
    assert config == small.config
    loaded = load_hidit(tmp_path / "model", allow_no_pixels=True).state_dict()
    plain = {n: t for n, t in small.state_dict().items() if not n.startswith("pixel_")}
    assert equal(loaded, plain)


def test_the_averaged_weights(small, checkpoint, tmp_path, capsys):
    convert(checkpoint, tmp_path / "ema.safetensors", "--ema")
    assert capsys.readouterr().out.strip() == str(tmp_path / "ema.safetensors")
    wanted = random_hidit(small.config, seed=1).state_dict()
    found = load_file(tmp_path / "ema.safetensors")
    assert equal(wanted, found)
    assert found["bn.num_batches_tracked"].dtype == torch.int64


def test_a_vae_and_what_its_training_left_beside_it(tmp_path, capsys):
    vae = new_vae(VAE, torch.Generator().manual_seed(0))
    beside = {"loss.logvar": torch.ones(1), "linear_proj.weight": torch.ones(2, 2)}
    torch.save({"state_dict": {**vae.state_dict(), **beside}}, tmp_path / "vae.pt")
    convert(tmp_path / "vae.pt", tmp_path / "vae")
    assert "2 tensors, as linear_proj.weight" in capsys.readouterr().err
    loaded = load_vae(tmp_path / "vae")
    assert loaded.config == VAE
    assert equal(loaded.state_dict(), vae.state_dict())
    torch.save(vae.state_dict(), tmp_path / "bare.ckpt")
    convert(tmp_path / "bare.ckpt", tmp_path / "bare.safetensors", "--kind", "vae")
    assert equal(load_file(tmp_path / "bare.safetensors"), vae.state_dict())


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4,)])
def test_statistics(tmp_path, shape):
    scale, bias = torch.tensor([1.0, 2.0, 4.0, 0.5]), torch.tensor([0.0, 1.0, -1.0, 3.0])
    content = {"latents_scale": scale.reshape(shape), "latents_bias": bias.reshape(shape)}
    torch.save(content, tmp_path / "stats.pt")
    convert(tmp_path / "stats.pt", tmp_path / "stats.safetensors")
    mean, std = read_stats(tmp_path / "stats.safetensors")
    assert torch.equal(mean, bias)
    assert torch.equal(std, 1 / scale)


def test_any_other_weights_keep_their_types_and_shared_memory_is_parted(tmp_path):
    """As Inception's: names that nobody here knows."""
    table = torch.arange(12.0).reshape(3, 4)
    weights = {
        "fc.weight": table,
        "fc.rows": table[1:],
        "fc.turned": table.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
    }
    torch.save(weights, tmp_path / "inception.pth")
    convert(tmp_path / "inception.pth", tmp_path / "inception.safetensors")
    found = load_file(tmp_path / "inception.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in weights.items())


def test_the_old_format_is_read_too(tmp_path):
    weights = {"x": torch.arange(3.0)}
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "old.safetensors")
    assert equal(load_file(tmp_path / "old.safetensors"), weights)


def test_a_published_size_is_told_by_name_in_its_arguments():
    from hidream.cli.convert import _settings

    told = {"model": "SiT-XL/2", "resolution": 512, "encoder_depth": 8, "seed": 0, "gate": "0.3"}
    settings = _settings(told)
    assert settings == {"num_heads": 16, "image_size": 512, "encoder_depth": 8}
    assert SIZES["SiT-XL/2"].num_heads == 16


# Hostile and broken files


class Runs:
    """Unpickled, it calls what it was made with."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["alone", "in a namespace", "beside weights", "as a name"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_runs_anything(tmp_path, where, zipped):
    mark = tmp_path / "ran"
    bad = Runs(os.mkdir, str(mark))
    content = {
        "alone": bad,
        "in a namespace": {"model": {"x": torch.ones(1)}, "args": argparse.Namespace(x=bad)},
        "beside weights": {"model": {"x": torch.ones(1)}, "callback": bad},
        "as a name": {"x": torch.ones(1), bad: torch.ones(1)},
    }[where]
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModelError, match=r"names (posix|nt)\.mkdir: such a pickle can run any code"
    ):
        convert(tmp_path / "bad.pt", tmp_path / "out.safetensors")
    assert not mark.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(eval, ("1",)), (getattr, ("x", "upper")), (argparse.FileType, ("w",)), (nn.Linear, (1, 1))],
)
def test_only_a_namespace_may_be_built(tmp_path, function, arguments):
    torch.save({"x": torch.ones(1), "y": Runs(function, *arguments)}, tmp_path / "bad.pt")
    named = f"names {function.__module__}.{function.__qualname__}".replace("builtins.", "")
    with pytest.raises(ModelError, match=f"{re.escape(named)}: .* any code") as caught:
        convert(tmp_path / "bad.pt", tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)


def test_a_whole_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ModelError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        convert(tmp_path / "module.pt", tmp_path / "out.safetensors")


def test_what_is_no_checkpoint(tmp_path):
    whole = {"x": torch.arange(1000.0)}
    torch.save(whole, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    contents = {
        "cut": data[:1500],
        "empty": b"",
        "text": b"not a checkpoint",
        "plain": pickle.dumps({"a": 1}),
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        with pytest.raises(HidreamError) as caught:
            convert(tmp_path / f"{name}.pt", tmp_path / "out.safetensors")
        assert caught.value.exit_code == 4
        assert "no readable PyTorch file" in str(caught.value)
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(1)], "holds a list, not named tensors"),
        ({}, "no tensors"),
        ({"a": 1}, "holds int under 'a'"),
        ({"model": {"x": torch.ones(1), "y": "text"}}, "holds str under 'y'"),
        ({"module.x": torch.ones(1), "x": torch.ones(1)}, "a name twice"),
        ({"x": torch.tensor([float("nan")])}, "x in .* not finite"),
        ({3: torch.ones(1)}, "under '3'"),
        ({"latents_scale": torch.ones(4), "latents_bias": torch.ones(3)}, "are of"),
    ],
)
def test_contents_of_no_use(tmp_path, content, said):
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(ModelError, match=said):
        convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_tensors_that_do_not_make_a_model(small, tmp_path):
    weights = small.state_dict()
    for name in ("blocks.0.attn.proj.bias", "final_layer.linear.weight"):
        torch.save({n: t for n, t in weights.items() if n != name}, tmp_path / "in.pt")
        with pytest.raises(ModelError, match=f"{name} is missing"):
            convert(tmp_path / "in.pt", tmp_path / "out")
    torch.save({**weights, "extra": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(ModelError, match="extra is left over"):
        convert(tmp_path / "in.pt", tmp_path / "out")
    convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "--kind", "weights")
    assert "extra" in load_file(tmp_path / "out.safetensors")
    assert not (tmp_path / "out").exists()


# Flags


def test_paths(checkpoint, tmp_path):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"")
    for arguments, kind, said in (
        (("no.pt", "out.safetensors"), InputError, "does not exist"),
        ((tmp_path, "out.safetensors"), InputError, "is a folder"),
        ((taken, "out.safetensors"), InputError, "is safetensors already"),
        ((checkpoint, taken), InputError, "--overwrite"),
        ((checkpoint, tmp_path / "file"), InputError, "is a file"),
        ((checkpoint, tmp_path / "out.pt"), UsageError, "would be a pickle again"),
        ((checkpoint, tmp_path / "no" / "x.safetensors"), InputError, "is not a folder"),
        ((checkpoint, tmp_path / "x", "--kind", "vae"), ModelError, "looks like hidit"),
        ((checkpoint, tmp_path / "x", "--kind", "weights"), UsageError, "cannot become a folder"),
        ((checkpoint,), UsageError, "OUT"),
        ((checkpoint, tmp_path / "x", "--kin", "vae"), UsageError, 'did you mean "--kind"'),
    ):
        with pytest.raises(kind, match=said):
            convert(*arguments)
    assert taken.read_bytes() == b"mine"
    convert(checkpoint, taken, "--overwrite")
    assert "pos_embed" in load_file(taken)
    convert(checkpoint, tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.safetensors exists already"):
        convert(checkpoint, tmp_path / "model")
    convert(checkpoint, tmp_path / "model", "--ema", "--overwrite")


def test_averages_that_are_not_there(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "in.pt")
    with pytest.raises(UsageError, match="has no averaged weights"):
        convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "--ema")
    torch.save({"x": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(UsageError, match="has no averaged weights"):
        convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "--ema")
