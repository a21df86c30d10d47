"""REPA's targets: which tokens of DINOv2 they are, and what is said where it is not there."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F

from hidream.errors import ModelError, UsageError
from hidream.models.hidit.encoder import MEAN, STAND_IN_WIDTH, STD, Encoder, StandIn, open_encoder
from hidream.models.loading import quiet_imports

WIDTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DINOv2 with random weights, learnt at 5×5 patches of 14 pixels."""
    with quiet_imports():
        from transformers import Dinov2Config, Dinov2Model
        from transformers.utils import logging as theirs
    theirs.disable_progress_bar()
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
            layerscale_value=0.5,
        )
    )
    with torch.no_grad():
        model.embeddings.position_embeddings.normal_()
    path = tmp_path_factory.mktemp("dinov2") / "tiny"
    model.save_pretrained(path)
    theirs.enable_progress_bar()
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return open_encoder("dinov2-vit-b", folder)


def pictures(side, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)


def test_targets_are_the_normed_patch_tokens(folder, encoder):
    """At 80 pixels the grid is the learnt one, 5×5, so that transformers alone says it all."""
    with quiet_imports():
        from transformers import Dinov2Model
    theirs = Dinov2Model.from_pretrained(folder).eval()
    x = pictures(80)
    pixels = F.interpolate(x / 255, (70, 70), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    with torch.no_grad():
        wanted = theirs((pixels - mean) / std).last_hidden_state[:, 1:]
    found = encoder(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found.dtype, encoder.width, encoder.name) == (torch.float32, WIDTH, "dinov2-vit-b")
    assert isinstance(encoder, Encoder)


def test_positions_are_resampled_once_antialiased_from_what_was_learnt(folder):
    """As timm does it. A larger grid, then the first again: both from the learnt table."""
    encoder = open_encoder("dinov2-vit-b", folder)
    learnt = encoder.module.embeddings.position_embeddings.detach().clone()
    first = encoder(pictures(48))
    table = encoder.module.embeddings.position_embeddings
    grid = learnt[:, 1:].reshape(1, 5, 5, WIDTH).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (3, 3), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(table[:, 1:], wanted)
    assert torch.equal(table[:, :1], learnt[:, :1])
    assert encoder(pictures(96)).shape == (2, 36, WIDTH)
    assert encoder.module.embeddings.position_embeddings.shape == (1, 37, WIDTH)
    assert torch.equal(encoder(pictures(48)), first)


@pytest.mark.parametrize("enc_type", ["dinov2-vit-b", "stand-in"])
def test_one_target_for_every_latent_token(folder, enc_type):
    """A token for 16 pixels, or the grid that is asked for; row by row."""
    open_one = {"path": folder} if enc_type != "stand-in" else {}
    assert open_encoder(enc_type, **open_one)(pictures(64)).shape[1] == 16
    encoder = open_encoder(enc_type, **open_one, grid=4)
    x = pictures(32)
    found = encoder(x)
    assert found.shape == (2, 16, encoder.width)
    assert not found.requires_grad
    torch.testing.assert_close(encoder(x[1:])[0], found[1], rtol=0, atol=1e-5)
    changed = x.clone()
    changed[:, :, 8:16, 24:] = 255 - changed[:, :, 8:16, 24:]  # row 1, column 3
    moved = (encoder(changed) - found).norm(dim=-1)
    assert (moved.argmax(dim=1) == 7).all()


def test_the_stand_in_is_fixed_and_says_what_it_is():
    torch.manual_seed(1)
    ours = open_encoder("stand-in")
    torch.manual_seed(2)
    assert torch.equal(ours(pictures(32)), StandIn()(pictures(32)))
    assert not torch.equal(ours(pictures(32)), StandIn(seed=1)(pictures(32)))
    assert "random" in ours.name
    assert "seed 0" in ours.name
    assert ours.width == STAND_IN_WIDTH == ours(pictures(32)).shape[-1]
    found = ours(pictures(64))
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    assert found.std(dim=(0, 1)).min() > 0.05, "every feature varies from token to token"
    assert isinstance(ours, Encoder)


def test_half_precision(folder):
    encoder = open_encoder("dinov2-vit-b", folder, dtype=torch.bfloat16)
    exact = open_encoder("dinov2-vit-b", folder)(pictures(80))
    found = encoder(pictures(80))
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_nothing_is_said_while_it_loads_but_what_matters(folder, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        open_encoder("dinov2-vit-b", folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading" not in err
    assert "16 wide; dinov2-vit-b has 768" in caplog.text


# What is wrong


def test_unknown_names():
    with pytest.raises(UsageError, match='did you mean "dinov2-vit-b"'):
        open_encoder("dinov2-vitb")
    with pytest.raises(UsageError, match="stand-in"):
        open_encoder("clip")


def test_without_weights_it_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hidream models pull facebook/dinov2-base"):
        open_encoder("dinov2-vit-b")
    with pytest.raises(ModelError, match="does not exist"):
        open_encoder("dinov2-vit-b", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        ({"model_type": "llama"}, (), "holds a llama, not DINOv2"),
        ({"model_type": "dinov2"}, (), "holds no weights"),
        ({"model_type": "dinov2"}, ("pytorch_model.bin",), "a pickle, which is never loaded"),
        ({"model_type": "dinov2"}, ("model.safetensors",), "cannot be read"),
    ],
)
def test_a_folder_of_something_else(tmp_path, config, files, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in files:
        (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ModelError, match=said):
        open_encoder("dinov2-vit-b", tmp_path)


def test_a_tensor_that_is_missing_is_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"lacks 1 tensors: layernorm\.weight"):
        open_encoder("dinov2-vit-b", tmp_path)
