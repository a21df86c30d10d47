"""I1's VAE: diffusers' values, shifted and scaled; tiles that show no seams."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError
from hidream.models.vae import LatentCodec
from tests.tiny_i1 import write_vae

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def codec(tiny_i1_folder):
    return LatentCodec.open(tiny_i1_folder / "vae")


@pytest.fixture
def folder(tmp_path):
    write_vae(tmp_path / "vae", 4)
    return tmp_path / "vae"


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def waves(height, width):
    """Latents that repeat, smoothly, so that each tile has the statistics of the whole."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    turn = 2 * torch.pi / 16
    planes = [(turn * rows).sin() + 0 * columns, (turn * columns).cos() + 0 * rows]
    planes += [(turn * (rows + columns)).sin(), (turn * (rows - columns)).cos()]
    return torch.stack(planes)[None]


def steps(picture):
    """The largest difference between neighbours."""
    return max(picture.diff(dim=dim).abs().max() for dim in (-1, -2))


def test_shift_and_scale_there_and_back(codec, tiny_i1_folder):
    theirs = AutoencoderKL.from_pretrained(tiny_i1_folder / "vae").eval()
    pictures = noise(2, 3, 32, 48).clamp(-1, 1)
    latents = codec.encode(pictures)
    assert (codec.channels, codec.factor) == (4, 8)
    assert latents.shape == (2, 4, 4, 6)
    with torch.no_grad():
        mode = theirs.encode(pictures).latent_dist.mode()
        decoded = theirs.decode(latents / 0.3611 + 0.1159).sample
    torch.testing.assert_close(latents, (mode - 0.1159) * 0.3611, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(codec):
    latents = noise(3, 4, 4, 6)
    assert torch.equal(codec.decode(latents)[1:2], codec.decode(latents[1:2]))


def test_latents_are_fp32_whatever_the_weights(tiny_i1_folder):
    codec = LatentCodec.open(tiny_i1_folder / "vae", dtype=torch.bfloat16)
    latents = codec.encode(torch.zeros(1, 3, 16, 16))
    assert latents.dtype == codec.decode(latents).dtype == torch.float32
    assert codec.vae.dtype == torch.bfloat16
    narrow = LatentCodec.open(tiny_i1_folder / "vae", dtype=torch.float16)  # as its config says
    assert narrow.vae.dtype == torch.float32


def test_tiled_coding_is_close_to_whole(codec, monkeypatch):
    latents = waves(32, 48)
    whole = codec.decode(latents)
    pictures = (whole / whole.abs().max()).clamp(-1, 1)
    encoded = codec.encode(pictures)
    for name, value in (("tile", 32), ("overlap", 16), ("max_whole", 0)):
        monkeypatch.setattr(codec, name, value)
    for tiled, expected in ((codec.decode(latents), whole), (codec.encode(pictures), encoded)):
        difference = (tiled - expected).abs() / expected.std()
        assert 0 < difference.mean() < 0.06
        assert difference.max() < 0.5
        assert steps(tiled) < 1.1 * steps(expected)
    monkeypatch.setattr(codec, "overlap", 0)  # what blending is for
    assert (codec.decode(latents) - whole).abs().max() > 2 * whole.std()


def test_only_large_ones_are_tiled(codec, monkeypatch):
    monkeypatch.setattr("hidream.models.vae.split", lambda *_, **__: pytest.fail("tiled"))
    codec.decode(noise(1, 4, 16, 16))
    monkeypatch.setattr(codec, "max_whole", 255)
    with pytest.raises(pytest.fail.Exception):
        codec.decode(noise(1, 4, 16, 16))
    with pytest.raises(pytest.fail.Exception):
        codec.encode(noise(1, 3, 128, 128))


def test_without_diffusers(tiny_i1_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r'pip install "hidream\[i1\]"'):
        LatentCodec.open(tiny_i1_folder / "vae")


def test_what_is_not_there_or_does_not_fit(folder):
    tensors = load_file(folder / FILE)
    save_file({**tensors, "x": torch.ones(1)}, folder / FILE)
    with pytest.raises(ModelError, match="1 not of this model: x"):
        LatentCodec.open(folder)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, folder / FILE)
    with pytest.raises(ModelError, match=r"1 missing: decoder\.conv_out\.bias"):
        LatentCodec.open(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "down_block_types": ["None"]}))
    with pytest.raises(ModelError, match="is not that of a VAE"):
        LatentCodec.open(folder)
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    with pytest.raises(ModelError, match='holds "VQModel"'):
        LatentCodec.open(folder)
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        LatentCodec.open(folder)
