"""The VAE by latent diffusion's names: sizes, parity with diffusers' AutoencoderKL, and files."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError, UsageError
from hidream.models.hidit.vae import (
    VAES,
    LdmVae,
    VaeConfig,
    config_of,
    load_vae,
    new_vae,
    open_vae,
    save_vae,
    shapes_of,
)
from hidream.models.loading import quiet_imports

# f16d32 and f8d4 made small: the same levels, attention in the same places.
SMALL = {
    "f16d32": VaeConfig(channels=6, width=8, attention_levels=(4,), num_groups=4),
    "f8d4": VaeConfig(channels=4, width=8, multipliers=(1, 2, 4, 4), num_groups=4),
}
TINY = VaeConfig(channels=4, width=32, multipliers=(1, 2), num_blocks=1)
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def vae():
    return random_vae(TINY)


@pytest.fixture(scope="module")
def saved(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    save_vae(vae, folder)
    return folder


def random_vae(config, seed=0):
    """Norms are random too, which a fresh model's are not."""
    generator = torch.Generator().manual_seed(seed)
    vae = new_vae(config, generator).requires_grad_(False)
    for name, weight in vae.named_parameters():
        if "norm" in name:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return vae.eval()


def pictures(side, batch=2):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def diffusers_name(name, num_levels):
    """Our name of a tensor in diffusers' words, and whether a 1×1 convolution is linear there."""
    part, _, rest = name.partition(".")
    if part not in ("encoder", "decoder"):
        return name, False
    words = rest.split(".")
    if words[0] in ("down", "up"):
        level = int(words[1])
        if words[0] == "up":
            level = num_levels - 1 - level
        prefix = f"{part}.{words[0]}_blocks.{level}."
        kind, words = words[2], words[3:]
        if kind in ("downsample", "upsample"):
            return f"{prefix}{kind}rs.0." + ".".join(words), False
        prefix += {"block": "resnets.", "attn": "attentions."}[kind] + words[0] + "."
        words = words[1:]
    elif words[0] == "mid":
        kind, number = words[1].split("_")
        prefix = f"{part}.mid_block."
        prefix += f"resnets.{int(number) - 1}." if kind == "block" else "attentions.0."
        words = words[2:]
    elif words[0] == "norm_out":
        return f"{part}.conv_norm_out.{words[1]}", False
    else:
        return name, False
    theirs = {
        "nin_shortcut": "conv_shortcut",
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "proj_out": "to_out.0",
        "norm": "group_norm",
    }
    linear = words[0] in ("q", "k", "v", "proj_out")
    return f"{prefix}{theirs.get(words[0], words[0])}.{words[1]}", linear


def theirs_of(config, weights):
    with quiet_imports():
        from diffusers import AutoencoderKL
    last, attends = config.num_levels - 1, config.attention_levels
    down = ["AttnDown" if i in attends else "Down" for i in range(last + 1)]
    up = ["AttnUp" if i in attends else "Up" for i in reversed(range(last + 1))]
    theirs = AutoencoderKL(
        down_block_types=tuple(f"{kind}EncoderBlock2D" for kind in down),
        up_block_types=tuple(f"{kind}DecoderBlock2D" for kind in up),
        block_out_channels=config.widths,
        layers_per_block=config.num_blocks,
        latent_channels=config.channels,
        norm_num_groups=config.num_groups,
    )
    named = {}
    for name, tensor in weights.items():
        found, linear = diffusers_name(name, config.num_levels)
        named[found] = tensor.flatten(1) if linear and tensor.ndim == 4 else tensor
    theirs.load_state_dict(named)  # strict: no name is made up, none is left
    return theirs.eval()


# Structure


def test_sizes():
    """69.8M values of f16d32; attention at its coarsest level, f8d4's in the middle alone."""
    counts, attentions = {}, {}
    for arch, config in VAES.items():
        shapes = shapes_of(config)
        counts[arch] = sum(torch.Size(shape).numel() for shape in shapes.values())
        attentions[arch] = {n.rsplit(".", 2)[0] for n in shapes if n.endswith(".q.weight")}
    assert counts == {"f16d32": 69_836_067, "f8d4": 83_653_863}
    both = {"encoder.mid.attn_1", "decoder.mid.attn_1"}
    assert attentions["f8d4"] == both
    assert attentions["f16d32"] == both | {
        *(f"encoder.down.4.attn.{i}" for i in range(2)),
        *(f"decoder.up.4.attn.{i}" for i in range(3)),
    }
    shapes = shapes_of(VAES["f16d32"])
    assert shapes["quant_conv.weight"] == [64, 64, 1, 1]
    assert shapes["post_quant_conv.weight"] == [32, 32, 1, 1]
    assert shapes["decoder.conv_in.weight"] == [512, 32, 3, 3]
    assert shapes["encoder.down.4.block.0.nin_shortcut.weight"] == [512, 256, 1, 1]
    assert "encoder.down.4.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert (VAES["f16d32"].factor, VAES["f8d4"].factor) == (16, 8)


@pytest.mark.parametrize("arch", SMALL)
def test_it_is_diffusers_autoencoder(arch):
    config = SMALL[arch]
    ours = random_vae(config).double()  # what rounding leaves of 1e-5 hides nothing
    theirs = theirs_of(config, ours.state_dict()).double()
    x = pictures(2 * config.factor).double()
    mean, std = ours.moments(x)
    with torch.no_grad():
        drawn = theirs.encode(x).latent_dist
        torch.testing.assert_close(mean, drawn.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(std, drawn.std, rtol=0, atol=1e-10)
        decoded = theirs.decode(drawn.mean).sample
    torch.testing.assert_close(ours.decode(mean), decoded, rtol=0, atol=1e-10)
    assert mean.shape == (2, config.channels, 2, 2)
    assert decoded.std() > 0.01


def test_a_row_is_what_it_is_alone_and_layouts_do_not_matter(vae):
    x = pictures(16, batch=3)
    mean, std = vae.moments(x)
    for row in range(3):
        one = vae.moments(x[row : row + 1])
        torch.testing.assert_close(mean[row], one[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(std[row], one[1][0], rtol=0, atol=1e-6)
    last = vae.moments(x.to(memory_format=torch.channels_last))
    assert torch.equal(last[0], mean)
    assert mean.is_contiguous()
    assert vae.decode(mean).is_contiguous()


def test_deviations_stay_within_bounds(vae):
    loud = LdmVae(TINY)
    loud.load_state_dict(vae.state_dict())
    with torch.no_grad():
        loud.quant_conv.bias[4:] += 1000.0
        torch.testing.assert_close(loud.moments(pictures(8))[1].max(), torch.tensor(10.0).exp())
        loud.quant_conv.bias[4:] -= 2000.0
        torch.testing.assert_close(loud.moments(pictures(8))[1].min(), torch.tensor(-15.0).exp())


def test_sides_must_be_whole_latents(vae):
    with pytest.raises(ValueError, match="not whole latents"):
        vae.moments(pictures(15))


def test_it_learns_and_fresh_weights_depend_on_the_seed_alone():
    vae = new_vae(TINY, torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    again = new_vae(TINY, torch.Generator().manual_seed(1)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in vae.state_dict().items())
    mean, std = vae.moments(pictures(8))
    (vae.decode(mean).square().mean() + std.mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


# Files


def test_saved_and_loaded_to_the_bit(vae, saved):
    loaded = load_vae(saved)
    assert loaded.config == TINY
    weights = vae.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(
        loaded.decode(torch.ones(1, 4, 4, 4)), vae.decode(torch.ones(1, 4, 4, 4))
    )
    assert load_vae(saved, dtype=torch.bfloat16).moments(pictures(8))[0].dtype == torch.float32
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", MODEL]


def test_a_bare_file_tells_its_configuration(saved, tmp_path):
    assert load_vae(saved / MODEL).config == TINY
    for config in VAES.values():
        assert config_of(shapes_of(config)) == config
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"encoder\.conv_in\.weight"):
        load_vae(tmp_path / "x.safetensors")


def test_an_arch_is_a_promise(saved, tmp_path):
    with pytest.raises(ModelError, match=r"is one of its own, not f16d32"):
        open_vae(saved, "f16d32")
    with pytest.raises(UsageError, match='unknown VAE "f16d23"; did you mean "f16d32"'):
        open_vae(saved, "f16d23")
    with pytest.raises(ModelError, match=r"do not fit.*missing.*wrong shape"):
        load_vae(saved / MODEL, "f16d32")


def test_a_folder_that_names_its_arch_alone():
    assert VaeConfig.from_dict({"arch": "f8d4"}) == VAES["f8d4"]
    assert VaeConfig.from_dict(VAES["f16d32"].to_dict()) == VAES["f16d32"]
    assert VAES["f16d32"].to_dict()["arch"] == "f16d32"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"arch": "f99"},
        {"channels": 0},
        {"channels": 4, "multipliers": [], "width": 32},
        {"channels": 4, "multipliers": [1], "width": 33},
        {"channels": 4, "multipliers": [1], "width": 32, "attention_levels": [1]},
        {"channels": 4, "multipliers": [1], "width": 32, "depth": 1},
        {**TINY.to_dict(), "model_type": "hidit"},
    ],
)
def test_a_configuration_of_nonsense_is_refused(config):
    with pytest.raises(ModelError, match="is not that of a VAE of Hi-DiT"):
        VaeConfig.from_dict(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("quant_conv.bias"), "1 missing: quant_conv.bias"),
        (lambda tensors: tensors.update({"loss.x": torch.ones(1)}), "not of this model: loss.x"),
        (lambda tensors: tensors["quant_conv.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_what_does_not_fit_is_named(saved, tmp_path, change, said):
    tensors = load_file(saved / MODEL)
    change(tensors)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    save_file(tensors, tmp_path / MODEL)
    with pytest.raises(ModelError, match=said):
        load_vae(tmp_path)


@pytest.mark.parametrize("name", ["vae.pt", "vae.ckpt", "vae.pth"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(ModelError, match="hidream models convert"):
            load_vae(place, "f16d32")


def test_other_weights_in_the_folder_are_not_buried(vae, tmp_path, caplog):
    save_file({"x": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="holds other weights"):
        save_vae(vae, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
