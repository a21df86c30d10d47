"""I1 checkpoints: every published layout loads, strictly; ours loads in diffusers."""

import json
import shutil

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError
from hidream.locating import locate
from hidream.models.i1.weights import load_i1, open_i1, save_i1, verify_i1
from hidream.nn.moe import pack
from tests.tiny_i1 import TINIEST, features, latents, random_i1

FILE = "diffusion_pytorch_model.safetensors"
A_TENSOR = "single_stream_blocks.0.block.ff_i.experts.2.w1.weight"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def model():
    return random_i1(TINIEST)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("i1") / "transformer"
    save_i1(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "transformer")


def equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_saved_and_loaded_to_the_bit(model, saved):
    loaded = load_i1(saved)
    assert equal(loaded, model)
    assert loaded.config == TINIEST
    assert not loaded.training


def test_diffusers_loads_what_we_save(model, saved):
    theirs = HiDreamImageTransformer2DModel.from_pretrained(saved).eval()
    assert equal(theirs, model)
    text = features(TINIEST)
    with torch.no_grad():
        out = theirs(
            latents(8, 8), torch.tensor([500.0, 500.0]), text.t5, text.llama, text.pooled
        ).sample
    ours = model.velocity(latents(8, 8), torch.tensor(0.5), model.prefill(text, height=8, width=8))
    torch.testing.assert_close(-out, ours, rtol=0, atol=1e-5)


def test_what_diffusers_saves_loads_here_in_shards(model, saved, tmp_path):
    theirs = HiDreamImageTransformer2DModel.from_pretrained(saved)
    theirs.save_pretrained(tmp_path / "repository" / "transformer", max_shard_size="1MB")
    names = {info.file.name for info in open_i1(tmp_path / "repository")[0].tensors.values()}
    assert len(names) > 2
    assert equal(load_i1(tmp_path / "repository"), model)
    spec, _ = locate(tmp_path / "repository")
    assert (spec.family, spec.variant) == ("i1", "full")


def test_saved_in_shards_from_weights_that_lie_side_by_side(model, tmp_path):
    packed = random_i1(TINIEST)
    pack(packed)
    save_i1(packed, tmp_path, max_shard_bytes=1_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert equal(load_i1(tmp_path), model)
    assert verify_i1(tmp_path).num_params == sum(t.numel() for t in model.state_dict().values())
    with pytest.raises(ModelError, match="holds other weights"):
        save_i1(model, tmp_path)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_single_files(model, tmp_path, prefix):
    file = tmp_path / "hidream_i1.safetensors"
    save_file({prefix + name: t.half() for name, t in model.state_dict().items()}, file)
    loaded = load_i1(file, config=TINIEST, dtype=torch.float32)
    assert torch.equal(loaded.state_dict()[A_TENSOR], model.state_dict()[A_TENSOR].half().float())


def test_a_file_with_the_prefix_on_some_names_only(model, tmp_path):
    tensors = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    save_file({**tensors, "vae.x": torch.ones(1)}, tmp_path / "whole.safetensors")
    with pytest.raises(ModelError, match=r"1 not of this model: vae\.x"):
        load_i1(tmp_path / "whole.safetensors", config=TINIEST)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(A_TENSOR), f"1 missing: {A_TENSOR}"),
        (lambda tensors: tensors.update({"vae.x": torch.ones(1)}), "not of this model: vae.x"),
        (lambda tensors: tensors.update({A_TENSOR: torch.ones(2)}), f"{A_TENSOR} [2] instead of"),
        (lambda tensors: tensors[A_TENSOR].fill_(float("nan")), f"{A_TENSOR} in"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, said):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    with pytest.raises(ModelError) as caught:
        load_i1(folder)
    assert said in str(caught.value)


def test_a_file_is_of_full_size_where_nothing_else_is_said(tmp_path):
    save_file({A_TENSOR: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"1614 missing.*instead of \[6912, 2560\]"):
        load_i1(tmp_path / "x.safetensors")


def test_files_that_are_not_there_or_not_safe(tmp_path, folder):
    with pytest.raises(ModelError, match="does not exist"):
        load_i1(tmp_path / "no.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match="is a pickle"):
        load_i1(tmp_path / "model.ckpt")
    (folder / "config.json").write_text(json.dumps({"_class_name": "Flux"}))
    with pytest.raises(ModelError, match="not an I1 configuration"):
        load_i1(folder)
    (folder / FILE).unlink()
    with pytest.raises(ModelError, match="holds no diffusion_pytorch_model"):
        load_i1(folder)
