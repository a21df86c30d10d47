"""LPIPS and perceptual DINO: their formulas, whom gradients reach, which samples count."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError, UsageError
from hidream.models import perceptual
from hidream.models.hidit.encoder import MEAN, STAND_IN, STD, Dinov2, StandIn
from hidream.models.loading import quiet_imports
from hidream.models.perceptual import Lpips, PatchCosine, open_dino, open_lpips, stand_in_lpips
from hidream.train.config import parse_recipe
from hidream.train.draws import draw_place
from hidream.train.objective import Objective
from hidream.train.perceptual import PerceptualLosses, squares

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # VGG16's, as torchvision counts
LAST_OF_LEVEL, POOLS_BEFORE = (2, 7, 14, 21, 28), (5, 10, 17, 24)


def pictures(side=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, side, side, generator=generator) * 2 - 1


def plain_lpips(tensors, a, b):
    """Equation 1 of arXiv 1801.03924, picture by picture, from the named tensors alone."""
    totals = []
    for pair in zip(a, b, strict=True):
        x = torch.stack(pair)
        x = torch.stack([((x[:, c] + 1) / 2 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
        total = 0.0
        for place in CONVOLUTIONS:
            if place in POOLS_BEFORE:
                x = F.max_pool2d(x, 2)
            weight, bias = (tensors[f"features.{place}.{n}"] for n in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, padding=1).clamp(min=0)
            if place in LAST_OF_LEVEL:
                unit = x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10)
                linear = tensors[f"lin{LAST_OF_LEVEL.index(place)}.model.1.weight"].flatten()
                each = ((unit[0] - unit[1]) ** 2 * linear[:, None, None]).sum(0)
                total = total + each.mean()
        totals.append(total)
    return torch.stack(totals)


def write_network(path, model, **more):
    """A network's weights under the published names, the classifier that torchvision has too."""
    tensors = dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    for level in range(5):
        weight = tensors.pop(f"weights.{level}")
        drawn = torch.rand(1, len(weight), 1, 1, generator=generator)
        tensors[f"lin{level}.model.1.weight"] = drawn
    save_file({**tensors, "classifier.0.bias": torch.zeros(3), **more}, path)
    return load_file(path)


@pytest.fixture
def narrow(monkeypatch):
    """VGG16 with few channels, so that a whole one need not be drawn."""
    monkeypatch.setattr(perceptual, "VGG_WIDTHS", perceptual.STAND_IN_WIDTHS)


def test_lpips_is_its_published_formula_on_the_named_tensors(tmp_path, narrow):
    tensors = write_network(tmp_path / "vgg.safetensors", stand_in_lpips(3))
    ours = open_lpips(str(tmp_path))
    a, b = pictures(seed=1), pictures(seed=2)
    torch.testing.assert_close(ours(a, b), plain_lpips(tensors, a, b), rtol=1e-5, atol=1e-6)
    assert (ours(a, b) > 0.01).all()
    assert torch.equal(ours(a, a), torch.zeros(2))


def test_vgg16_has_the_published_names_and_shapes():
    shapes = {n: tuple(p.shape) for n, p in Lpips("", perceptual.VGG_WIDTHS).named_parameters()}
    assert {int(n.split(".")[1]) for n in shapes if n.startswith("features")} == set(CONVOLUTIONS)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert shapes["features.5.weight"] == (128, 64, 3, 3)
    assert [shapes[f"weights.{i}"] for i in range(5)] == [(64,), (128,), (256,), (512,), (512,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.weight": None}, "lacks 1 tensors: features.0.weight"),
        ({"features.2.bias": torch.zeros(9)}, r"features.2.bias .* has the shape \[9\]"),
        ({"features.2.bias": torch.full((8,), math.nan)}, "not finite"),
        ({"lin0.model.1.weight": -torch.ones(1, 8, 1, 1)}, "not all positive"),
    ],
)
def test_weights_that_are_not_lpips_are_refused(tmp_path, narrow, change, message):
    tensors = write_network(tmp_path / "vgg.safetensors", stand_in_lpips()) | change
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "vgg.safetensors")
    with pytest.raises(ModelError, match=message):
        open_lpips(str(tmp_path / "vgg.safetensors"))


def test_a_network_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="there is no perceptual network"):
        open_lpips("")
    with pytest.raises(ModelError, match="holds no safetensors"):
        open_lpips(str(tmp_path))
    (tmp_path / "vgg.pth").touch()
    with pytest.raises(ModelError, match="pickle"):
        open_lpips(str(tmp_path / "vgg.pth"))


def tiny_dinov2():
    with quiet_imports():
        from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, image_size=56, patch_size=14, layerscale_value=0.5)
    return Dinov2Model(config).requires_grad_(False).eval()


@pytest.mark.parametrize("encoder", [lambda: Dinov2("tiny", tiny_dinov2()), StandIn])
def test_perceptual_dino_is_one_minus_the_mean_cosine_of_the_last_blocks_patches(encoder):
    distance = PatchCosine(encoder())
    a, b = pictures(64, seed=1), pictures(64, seed=2)
    levels = [((t + 1) * 127.5) for t in (a, b)]
    fa, fb = (distance.encoder.features(t / 127.5 - 1).double() for t in levels)
    cosine = (fa * fb).sum(-1) / (fa.norm(dim=-1) * fb.norm(dim=-1))
    torch.testing.assert_close(distance(a, b).double(), 1 - cosine.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distance(a, a), torch.zeros(2), rtol=0, atol=1e-5)
    assert distance(pictures(1024, 1), pictures(1024, 1, 1)).shape == (1,)
    assert distance.encoder.features(pictures(64)[:, :, :32]).shape[1] == 2 * 4


@pytest.mark.parametrize("encoder", [lambda: Dinov2("tiny", tiny_dinov2()), StandIn])
def test_features_of_values_are_those_of_the_picture(encoder):
    """What REPA asks in levels and the perceptual loss in values is one question."""
    encoder = encoder()
    levels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    values = levels.float() / 127.5 - 1
    torch.testing.assert_close(encoder(levels), encoder.features(values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["lpips", "dino", "stand-in"])
def test_gradients_reach_the_picture_and_never_the_network(which):
    if which == "lpips":
        network = distance = stand_in_lpips()
    elif which == "dino":
        distance, network = PatchCosine(Dinov2("tiny", tiny_dinov2())), None
        network = distance.encoder.module
    else:
        distance, network = open_dino(STAND_IN, ""), None
    a, b = pictures(seed=1).requires_grad_(), pictures(seed=2).requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.abs().amax(dim=1).gt(0).float().mean() > 0.9
    assert b.grad is None
    if network is not None:
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_equal_dead_features_have_no_gradient_that_is_not_a_number():
    network = stand_in_lpips()
    for parameter in network.features.parameters():
        parameter.zero_()
    a = pictures().requires_grad_()
    network(a, pictures(seed=1)).sum().backward()
    assert not a.grad.any()


def losses_of(objective, **perceptual):
    stage = {"size": 32, "steps": 1, "batch_size": 4, "learning_rate": 1e-3, "tasks": {"edit": 1}}
    plain = {"name": "x", "model": "o1-tiny", "stages": [stage], "objective": objective}
    recipe = parse_recipe(plain | {"perceptual": {"network": "stand-in", **perceptual}})
    return PerceptualLosses(recipe), recipe.objective_of(0)


def test_only_samples_past_the_onset_count_and_only_they_are_divided_by(caplog):
    objective = {"lpips_weight": 0.1, "lpips_onset": 0.3, "dino_weight": 0.01, "dino_onset": 0.65}
    losses, objective = losses_of(objective)
    assert "LPIPS asks stand-in" in caplog.text
    assert "perceptual DINO asks stand-in" in caplog.text
    a, b = pictures(batch=4, seed=1), pictures(batch=4, seed=2)
    sigma, places = torch.tensor([0.9, 0.69, 0.4, 0.1]), torch.zeros(4, 2)
    found = {n: (w, v) for n, w, v in losses(a, b, sigma, places, objective, sigma)}
    assert list(found) == ["loss_lpips_stand_in", "loss_dino_stand_in"]
    assert [w for w, _ in found.values()] == [0.1, 0.01]
    torch.testing.assert_close(found["loss_lpips_stand_in"][1], losses.lpips(a, b)[1:].mean())
    torch.testing.assert_close(found["loss_dino_stand_in"][1], losses.dino(a, b)[3:].mean())
    halves = [
        losses(a[i::2], b[i::2], sigma[i::2], places[i::2], objective, sigma) for i in range(2)
    ]
    for whole, *parts in zip(found.values(), *halves, strict=True):
        torch.testing.assert_close(sum(part[2] for part in parts), whole[1])
    noise = torch.ones(4)
    assert all(v == 0 for _, _, v in losses(a, b, noise, places, objective, noise))


def test_crops_begin_anywhere_and_hold_what_is_there():
    picture = pictures(64, batch=1).expand(200, -1, -1, -1)
    places = torch.stack([draw_place(3, i) for i in range(200)])
    crops = squares(picture, places, 16)
    tops = [
        next(
            (top, left)
            for top in range(49)
            for left in range(49)
            if torch.equal(picture[0, 0, top, left : left + 16], crop[0, 0])
        )
        for crop in crops[:40]
    ]
    assert len({top % 16 for top, _ in tops}) > 8
    assert len({left % 16 for _, left in tops}) > 8
    assert max(max(pair) for pair in tops) > 40
    assert squares(picture[:2], torch.full((2, 2), 0.9999999), 16).shape == (2, 3, 16, 16)
    assert squares(picture[:, :, :32], places, 512).shape == (200, 3, 32, 32)


def test_unknown_networks_are_refused():
    with pytest.raises(UsageError, match="must be one of published, stand-in"):
        losses_of({}, network="standin")
    with pytest.raises(ModelError, match="no perceptual network"):
        losses_of({"lpips_weight": 1.0}, network="published")
    assert losses_of(vars(Objective()))[0].lpips is None
