"""Hi-DiT's network: that it is SiT without pixels, and what pixels may and may not change."""

import importlib
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hidream.errors import ModelError, UsageError
from hidream.models.hidit.blocks import positions
from hidream.models.hidit.config import (
    ATTENTIONS,
    HIDIT_TINY,
    PIXEL_CLOCKS,
    SIZES,
    HiDiTConfig,
    size_of,
)
from hidream.models.hidit.model import (
    freeze_pixels,
    has_trained_pixels,
    new_hidit,
    pixel_parameters,
)
from hidream.models.hidit.pixels import first_width, pixel_noise_level, prime_factors
from hidream.models.hidit.weights import num_params, shapes_of
from tests.tiny_hidit_model import inputs, random_hidit

XL = SIZES["SiT-XL/1"]


@pytest.fixture(scope="module")
def model():
    return random_hidit()


def plain_hidit(weights, config, x_t, sigma, labels, pixels=None):
    """The network written down once more, with nothing but functions.

    Velocity, REPA's features and, with pixels in every row, the tokens that the pixel head is
    given and their condition. Without pixels it is SiT.
    """

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def normed(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def time(sigma, name):
        half = torch.arange(128) / 128
        angles = sigma[:, None] * torch.exp(-half * torch.log(torch.tensor(1e4)))
        sinusoids = torch.cat([angles.cos(), angles.sin()], 1)
        return linear(F.silu(linear(sinusoids, name + ".mlp.0")), name + ".mlp.2")

    def patches(x, name, side):
        x = F.conv2d(x, weights[name + ".weight"], weights[name + ".bias"], side)
        return x.flatten(2).transpose(1, 2) + weights["pos_embed"]

    def queries_keys_values(x, block):
        shape = *x.shape[:2], 3, config.num_heads, config.hidden_size // config.num_heads
        q, k, v = linear(x, block + "attn.qkv").reshape(shape).permute(2, 0, 3, 1, 4)
        if config.qk_norm:
            of_q, of_k = (
                [weights[f"{block}attn.{n}.{part}"] for part in ("weight", "bias")]
                for n in ("q_norm", "k_norm")
            )
            q, k = (F.layer_norm(t, t.shape[-1:], *w) for t, w in ((q, of_q), (k, of_k)))
        return q, k, v

    label = weights["y_embedder.embedding_table.weight"][labels]
    streams = [patches(x_t, "x_embedder.proj", config.patch_size)]
    conditions = [time(sigma, "t_embedder") + label]
    if pixels is not None:
        tokens = patches(pixels, "pixel_embedder.proj", config.pixel_patch)
        streams.append(tokens + weights["pixel_type"])
        if config.pixel_clock == "shared":
            conditions.append(conditions[0])
        else:
            own = (sigma / config.gate).clamp(max=1)
            conditions.append(time(own, "pixel_t_embedder") + label)
    features = None
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        modulations = [
            linear(F.silu(c), block + "adaLN_modulation.1").chunk(6, dim=1) for c in conditions
        ]
        projected = [
            queries_keys_values(normed(x, m[0], m[1]), block)
            for x, m in zip(streams, modulations, strict=True)
        ]
        for kind, (x, m) in enumerate(zip(streams, modulations, strict=True)):
            seen = len(streams) if config.attention == "full" else kind + 1
            q = projected[kind][0]
            k, v = (torch.cat([p[j] for p in projected[:seen]], dim=2) for j in (1, 2))
            read = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
            read = linear(read.transpose(1, 2).flatten(2), block + "attn.proj")
            x = x + m[2][:, None] * read
            inner = F.gelu(linear(normed(x, m[3], m[4]), block + "mlp.fc1"), approximate="tanh")
            streams[kind] = x + m[5][:, None] * linear(inner, block + "mlp.fc2")
        if i + 1 == config.encoder_depth:
            inner = F.silu(linear(streams[0], "projectors.0.0"))
            features = linear(F.silu(linear(inner, "projectors.0.2")), "projectors.0.4")
    modulation = linear(F.silu(conditions[0]), "final_layer.adaLN_modulation.1")
    x = linear(normed(streams[0], *modulation.chunk(2, dim=1)), "final_layer.linear")
    p = config.patch_size
    x = x.reshape(-1, config.grid, config.grid, p, p, config.in_channels)
    velocity = torch.einsum("nhwpqc->nchpwq", x).reshape(x_t.shape)
    return velocity, features, streams[-1], conditions[-1]


# Names and sizes


def test_names_are_those_of_sit_and_repa_e():
    names = {n for n in shapes_of(XL) if not n.startswith("pixel_")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    modules = {f"blocks.{i}.{layer}" for i in range(28) for layer in layers}
    modules |= {f"projectors.0.{i}" for i in (0, 2, 4)} | {"t_embedder.mlp.0", "t_embedder.mlp.2"}
    modules |= {"x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    expected = {f"{m}.{part}" for m in modules for part in ("weight", "bias")}
    expected |= {"pos_embed", "y_embedder.embedding_table.weight"}
    expected |= {f"bn.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert names == expected
    shapes = shapes_of(XL)
    assert shapes["x_embedder.proj.weight"] == [1152, 32, 1, 1]
    assert shapes["pos_embed"] == [1, 256, 1152]
    assert shapes["y_embedder.embedding_table.weight"] == [1001, 1152]
    assert shapes["bn.num_batches_tracked"] == []
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias"} <= shapes_of(
        replace(HIDIT_TINY, qk_norm=True)
    ).keys()


def test_sizes_in_parameters():
    """675.15M of SiT-XL/1 at 32 channels, 683.28M with REPA's projector, 689.49M in all."""
    shapes = {n: s for n, s in shapes_of(XL).items() if not n.startswith("bn.")}
    count = {
        name: sum(torch.Size(s).numel() for n, s in shapes.items() if n.startswith(name))
        for name in ("", "projectors.", "pixel_")
    }
    assert count[""] - count["pixel_"] - count["projectors."] == 675_148_064
    assert count[""] - count["pixel_"] == 683_279_392
    assert count[""] == num_params(XL) == 689_485_868
    assert num_params(replace(XL, pixel_clock="rescaled")) == 691_110_188
    assert num_params(replace(XL, projector_dims=())) == count[""] - count["projectors."]


def test_sizes_are_named():
    assert len(SIZES) == 24
    assert (size_of("SiT-S/2").patch_size, size_of("SiT-B/1").num_layers) == (2, 12)
    with pytest.raises(UsageError, match='did you mean "SiT-XL/1"'):
        size_of("sit-xl1")
    assert HiDiTConfig.from_dict(XL.to_dict()) == XL


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "both"},
        {"pixel_clock": "fast"},
        {"hidden_size": 30},
        {"hidden_size": 36, "num_heads": 5},
        {"num_layers": 0},
        {"latent_size": True},
        {"patch_size": 3},
        {"image_size": 30},
        {"encoder_depth": 4},
        {"projector_dims": [0]},
        {"gate": 1.5},
        {"gate": float("nan")},
        {"qk_norm": 1},
        {"depth": 3},
        {"model_type": "llama"},
    ],
)
def test_a_configuration_of_nonsense_is_refused(change):
    with pytest.raises(ModelError, match="is not a Hi-DiT configuration"):
        HiDiTConfig.from_dict({**HIDIT_TINY.to_dict(), **change})


# SiT


@pytest.mark.parametrize("change", [{}, {"patch_size": 2}, {"qk_norm": True, "mlp_ratio": 3.0}])
def test_without_pixels_it_is_sit(change):
    config = replace(HIDIT_TINY, latent_size=8, **change)
    model = random_hidit(config)
    x_t, sigma, labels, _ = inputs(config)
    made = model(x_t, sigma, labels, with_features=True)
    velocity, features, *_ = plain_hidit(model.state_dict(), config, x_t, sigma, labels)
    torch.testing.assert_close(made.velocity, velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.features[0], features, rtol=0, atol=1e-5)
    assert made.pixels is None
    assert model(x_t, sigma, labels).features == ()


def test_positions_are_those_of_sit():
    """At row 2, column 3: sines, then cosines, of the column; then of the row."""
    table = positions(16, 5)[0, 2 * 5 + 3]
    frequencies = 1 / 10_000 ** (torch.arange(4) / 4)
    wanted = [f(place * frequencies) for place in (3, 2) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(table, torch.cat(wanted))


def test_a_fresh_model_predicts_nothing_and_depends_on_the_seed_alone():
    model = new_hidit(HIDIT_TINY, torch.Generator().manual_seed(5))
    x_t, sigma, labels, pixels = inputs()
    made = model(x_t, sigma, labels, pixels, with_features=True)
    assert not made.velocity.any()
    assert not made.pixels.any(), "the first prediction is mid-grey"
    assert made.features[0].any()
    assert not has_trained_pixels(model)
    torch.manual_seed(99)
    again = new_hidit(HIDIT_TINY, torch.Generator().manual_seed(5)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    of_add = new_hidit(replace(HIDIT_TINY, attention="add"), torch.Generator().manual_seed(5))
    for name, tensor in of_add.state_dict().items():
        if not name.startswith("pixel_"):
            assert torch.equal(tensor, again[name]), "stage 1 is the same in every mode"


def test_latent_statistics_and_their_published_asymmetry(model):
    latents = torch.randn(2, 4, 4, 4)
    mean, variance = model.bn.running_mean, model.bn.running_var
    theirs = nn.BatchNorm2d(4, eps=1e-4, affine=False).eval()
    theirs.load_state_dict(model.bn.state_dict())
    torch.testing.assert_close(model.normalise(latents), theirs(latents))
    scaled = latents * variance.sqrt()[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(model.denormalise(latents), scaled)
    assert not torch.equal(model.denormalise(model.normalise(latents)), latents)
    assert model.normalise(latents.half()).dtype == torch.float32


# Pixels


@pytest.mark.parametrize("clock", PIXEL_CLOCKS)
@pytest.mark.parametrize("attention", ["readonly", "full"])
def test_with_pixels_it_is_what_is_written_down_above(attention, clock):
    config = replace(HIDIT_TINY, attention=attention, pixel_clock=clock, gate=0.2)
    model = random_hidit(config)
    given = inputs(config)
    velocity, features, tokens, condition = plain_hidit(model.state_dict(), config, *given)
    made = model(*given, with_features=True)
    torch.testing.assert_close(made.velocity, velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.features[0], features, rtol=0, atol=1e-5)
    head = model.pixel_head(tokens, condition)
    torch.testing.assert_close(made.pixels, head, rtol=0, atol=1e-5)


def test_the_head_is_convolutions_and_shuffles(model):
    """Depth to space, written as a reshape; SiLU before every convolution but the first."""
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    head = model.pixel_head
    shift, scale = head.adaLN_modulation[1](F.silu(condition)).chunk(2, dim=1)
    x = F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    x = x.transpose(1, 2).reshape(2, 32, 4, 4)
    for i, conv in enumerate(head.convs):
        x = conv(F.silu(x) if i else x)
        b, c, h, w = x.shape
        x = x.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, 2 * h, 2 * w)
    torch.testing.assert_close(head(tokens, condition), x)


@pytest.mark.parametrize("clock", PIXEL_CLOCKS)
def test_readonly_pixels_never_change_a_bit_of_a_latent(clock):
    model = random_hidit(replace(HIDIT_TINY, pixel_clock=clock))
    x_t, sigma, labels, pixels = inputs(batch=4)
    wanted = model(x_t, sigma, labels, with_features=True)
    for rows in (None, [0], [3], [1, 2], [0, 1, 2, 3]):
        some = pixels if rows is None else pixels[rows]
        rows = None if rows is None else torch.tensor(rows)
        made = model(x_t, sigma, labels, some, rows=rows, with_features=True)
        assert torch.equal(made.velocity, wanted.velocity)
        assert torch.equal(made.features[0], wanted.features[0])
        assert made.pixels.shape == some.shape


@pytest.mark.parametrize("attention", ["full", "add"])
def test_other_modes_let_latents_see_pixels_in_their_rows_alone(attention):
    model = random_hidit(replace(HIDIT_TINY, attention=attention))
    x_t, sigma, labels, pixels = inputs(batch=4)
    alone = model(x_t, sigma, labels).velocity
    made = model(x_t, sigma, labels, pixels[[1, 3]], rows=torch.tensor([1, 3])).velocity
    assert torch.equal(made[[0, 2]], alone[[0, 2]])
    assert ((made - alone).abs().amax((1, 2, 3)) > 0.01).tolist() == [False, True, False, True]


def test_modes_differ_in_pixels_too():
    x_t, sigma, labels, pixels = inputs()
    made = [
        random_hidit(replace(HIDIT_TINY, attention=a))(x_t, sigma, labels, pixels).pixels
        for a in ATTENTIONS
    ]
    assert all((a - b).abs().max() > 0.01 for a, b in ((made[0], made[1]), (made[1], made[2])))


def test_added_pixels_change_nothing_at_first():
    """Their embedding is zero, so that stage 2 begins at stage 1's velocity."""
    config = replace(HIDIT_TINY, attention="add")
    model = random_hidit(config)
    model.init_pixels(torch.Generator().manual_seed(0))
    x_t, sigma, labels, pixels = inputs()
    made = model(x_t, sigma, labels, pixels)
    assert torch.equal(made.velocity, model(x_t, sigma, labels).velocity)
    assert not made.pixels.any()


@pytest.mark.parametrize(("attention", "clock"), list(product(ATTENTIONS, PIXEL_CLOCKS)))
def test_gated_rows_are_what_each_is_alone(attention, clock):
    model = random_hidit(replace(HIDIT_TINY, attention=attention, pixel_clock=clock))
    x_t, sigma, labels, pixels = inputs(batch=4)
    rows = torch.tensor([0, 2, 3])
    made = model(x_t, sigma, labels, pixels[rows], rows=rows)
    for place, row in enumerate(rows.tolist()):
        one = slice(row, row + 1)
        single = model(x_t[one], sigma[one], labels[one], pixels[one])
        torch.testing.assert_close(made.pixels[place], single.pixels[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(made.velocity[row], single.velocity[0], rtol=0, atol=2e-6)


def test_pixels_read_latents_labels_and_their_own_noise_level(model):
    x_t, sigma, labels, pixels = inputs(batch=1)
    made = model(x_t, sigma, labels, pixels).pixels
    assert torch.equal(made, model(x_t, sigma, labels, pixels, pixel_sigma=sigma).pixels)
    for changed in (
        model(x_t + 0.1, sigma, labels, pixels),
        model(x_t, sigma, (labels + 1) % 5, pixels),
        model(x_t, sigma, labels, pixels + 0.1),
        model(x_t, sigma, labels, pixels, pixel_sigma=sigma + 0.2),
    ):
        assert (changed.pixels - made).abs().max() > 1e-4


def test_the_head_reaches_across_patches(model):
    """A change in one pixel token moves pixels of its neighbours by the convolutions alone."""
    tokens, condition = torch.randn(1, 16, 32), torch.randn(1, 32)
    other = tokens.clone()
    other[0, 5] += 1  # row 1, column 1
    moved = (model.pixel_head(other, condition) - model.pixel_head(tokens, condition)).abs()
    patch = model.config.pixel_patch
    inside = moved[..., patch : 2 * patch, patch : 2 * patch].clone()
    moved[..., patch : 2 * patch, patch : 2 * patch] = 0
    assert inside.max() > 0
    assert moved.max() > 0
    assert moved[..., 3 * patch :, :].max() == 0, "but not across a whole patch"


@pytest.mark.parametrize(
    ("latent_size", "patch_size", "image_size", "channels"),
    [
        (4, 1, 64, 4),
        (8, 2, 64, 8),
        (8, 4, 24, 3),
        (4, 1, 12, 4),
        (4, 1, 4, 4),
        (6, 2, 21, 4),
        (8, 8, 16, 4),
    ],
)
def test_any_sizes(latent_size, patch_size, image_size, channels):
    config = replace(
        HIDIT_TINY,
        latent_size=latent_size,
        patch_size=patch_size,
        image_size=image_size,
        in_channels=channels,
    )
    x_t, sigma, labels, pixels = inputs(config, batch=2)
    made = random_hidit(config)(x_t, sigma, labels, pixels)
    assert made.velocity.shape == x_t.shape
    assert made.pixels.shape == pixels.shape
    assert made.pixels.std() > 0.01


def test_the_heads_layout_at_full_size():
    shapes = shapes_of(XL)
    convs = [shapes[f"pixel_head.convs.{i}.weight"] for i in range(4)]
    assert convs == [[1024, 1152, 1, 1], [512, 256, 3, 3], [256, 128, 3, 3], [12, 64, 3, 3]]
    assert [prime_factors(n) for n in (1, 2, 16, 12, 7)] == [[], [2], [2] * 4, [2, 2, 3], [7]]
    assert [first_width(n) for n in (1152, 768, 384, 32, 8)] == [256, 128, 64, 8, 8]


def test_clocks():
    sigma = torch.tensor([0.0, 0.15, 0.3, 0.9])
    assert torch.equal(pixel_noise_level(sigma, HIDIT_TINY), sigma)
    rescaled = pixel_noise_level(sigma, replace(HIDIT_TINY, pixel_clock="rescaled"))
    torch.testing.assert_close(rescaled, torch.tensor([0.0, 0.5, 1.0, 1.0]))


# Training


def test_every_parameter_learns_except_what_is_frozen():
    model = random_hidit().requires_grad_(True)
    x_t, sigma, labels, pixels = inputs()
    made = model(x_t, sigma, labels, pixels[:2], rows=torch.tensor([0, 2]), with_features=True)
    loss = made.velocity.square().mean() + made.pixels.square().mean()
    (loss + made.features[0].square().mean()).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert "pos_embed" not in dict(model.named_parameters()), "positions are never trained"
    freeze_pixels(model)
    names = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if n.startswith("pixel_")}
    assert len(names) == len(pixel_parameters(model))
    freeze_pixels(model, False)
    assert all(p.requires_grad for p in model.parameters())
    assert has_trained_pixels(model)


def test_low_precision_keeps_what_must_be_wide(model):
    x_t, sigma, labels, pixels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model(x_t, sigma, labels, pixels, with_features=True)
    exact = model(x_t, sigma, labels, pixels, with_features=True)
    for ours, theirs in (
        (made.velocity, exact.velocity),
        (made.pixels, exact.pixels),
        (made.features[0], exact.features[0]),
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()
    halved = random_hidit().to(torch.bfloat16)
    assert halved(x_t, sigma, labels, pixels).pixels.dtype == torch.float32


@pytest.fixture
def unhooked(monkeypatch):
    """The model's modules without checks of shapes, which torch.compile does not see through."""
    plain = [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
    assert len(plain) < len(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", plain)
    for name in [n for n in sys.modules if n.startswith(("hidream.models.hidit", "hidream.nn"))]:
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module("hidream.models.hidit.model")
    for name in [n for n in sys.modules if n.startswith(("hidream.models.hidit", "hidream.nn"))]:
        del sys.modules[name]  # monkeypatch puts the checked ones back


def test_one_graph(unhooked):
    """torch.compile finds nothing that it would have to stop at."""
    x_t, sigma, labels, pixels = inputs()
    given = {"rows": torch.tensor([0, 2]), "with_features": True}
    for attention in ("readonly", "full"):
        config = replace(HIDIT_TINY, attention=attention, num_layers=1, encoder_depth=1)
        checked = random_hidit(config)
        model = unhooked.HiDiT(config)
        model.load_state_dict(checked.state_dict())
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        made = compiled(x_t, sigma, labels, pixels[given["rows"]], **given)
        wanted = checked(x_t, sigma, labels, pixels[given["rows"]], **given)
        torch.testing.assert_close(made.velocity, wanted.velocity)
        torch.testing.assert_close(made.pixels, wanted.pixels)
