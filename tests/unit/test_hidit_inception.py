"""Inception as FID uses it: structure, names, resize, and the network stated a second time."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from hidream.errors import ModelError
from hidream.eval.inception import Inception, load_inception, open_inception, resize_as_tensorflow
from hidream.eval.stand_in import StandIn


@pytest.fixture(scope="module")
def weights():
    """A random state dict under which every layer matters and no activation dies or explodes."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Inception().state_dict().items()}
    made = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator)
        if name.endswith(("conv.weight", "fc.weight")):
            made[name] = normal * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            made[name] = 1 + 0.3 * normal.clamp(-2, 2)
        else:
            made[name] = 0.3 * normal
    return made


@pytest.fixture(scope="module")
def network(weights):
    model = Inception()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def restated(w, x):
    """The network once more, from the published layer table, with nothing of ours: (b, 2048)
    features and (b, 1008) logits without bias of pictures that are 299x299 already."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        norm = (
            w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, *norm, training=False, eps=1e-3).clamp(min=0)

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block_a(x, m):
        b5 = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", padding=2)
        b3 = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", padding=1)
        b3 = conv(b3, f"{m}.branch3x3dbl_3", padding=1)
        pool = conv(average(x), f"{m}.branch_pool")
        return torch.cat([conv(x, f"{m}.branch1x1"), b5, b3, pool], 1)

    def block_c(x, m):
        b7 = conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", padding=(0, 3))
        b7 = conv(b7, f"{m}.branch7x7_3", padding=(3, 0))
        bb = conv(conv(x, f"{m}.branch7x7dbl_1"), f"{m}.branch7x7dbl_2", padding=(3, 0))
        bb = conv(bb, f"{m}.branch7x7dbl_3", padding=(0, 3))
        bb = conv(bb, f"{m}.branch7x7dbl_4", padding=(3, 0))
        bb = conv(bb, f"{m}.branch7x7dbl_5", padding=(0, 3))
        pool = conv(average(x), f"{m}.branch_pool")
        return torch.cat([conv(x, f"{m}.branch1x1"), b7, bb, pool], 1)

    def block_e(x, m, pool):
        b3 = conv(x, f"{m}.branch3x3_1")
        b3a = conv(b3, f"{m}.branch3x3_2a", padding=(0, 1))
        b3b = conv(b3, f"{m}.branch3x3_2b", padding=(1, 0))
        bb = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", padding=1)
        bba = conv(bb, f"{m}.branch3x3dbl_3a", padding=(0, 1))
        bbb = conv(bb, f"{m}.branch3x3dbl_3b", padding=(1, 0))
        last = conv(pool(x), f"{m}.branch_pool")
        return torch.cat([conv(x, f"{m}.branch1x1"), b3a, b3b, bba, bbb, last], 1)

    x = (x.float() - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", stride=2)
    x = conv(x, "Conv2d_2a_3x3")
    x = conv(x, "Conv2d_2b_3x3", padding=1)
    assert x.shape[1:] == (64, 147, 147)
    x = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = conv(x, "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for letter in "bcd":
        x = block_a(x, f"Mixed_5{letter}")
    assert x.shape[1:] == (288, 35, 35)
    small = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", padding=1)
    small = conv(small, "Mixed_6a.branch3x3dbl_3", stride=2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", stride=2), small, F.max_pool2d(x, 3, 2)], 1)
    for letter in "bcde":
        x = block_c(x, f"Mixed_6{letter}")
    assert x.shape[1:] == (768, 17, 17)
    left = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", stride=2)
    mid = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", padding=(0, 3))
    mid = conv(mid, "Mixed_7a.branch7x7x3_3", padding=(3, 0))
    mid = conv(mid, "Mixed_7a.branch7x7x3_4", stride=2)
    x = torch.cat([left, mid, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1:] == (1280, 8, 8)
    x = block_e(x, "Mixed_7b", average)
    x = block_e(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))
    features = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return features, F.linear(features, w["fc.weight"])


def test_the_network_stated_twice(network, weights):
    pictures = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        seen = network(pictures)
        features, logits = restated(weights, pictures)
    assert features.std(0).mean() > 0.01 * features.mean()  # the two pictures differ
    assert (seen.features - features).abs().max() < 1e-4 * features.abs().max()
    assert (seen.logits - logits).abs().max() < 1e-4 * logits.abs().max()
    assert seen.features.shape == (2, 2048)
    assert seen.logits.shape == (2, 1008)


def test_size_and_names(weights):
    """torchvision's Inception-v3 without its second head has 23,834,568 parameters for 1000
    classes, which is Keras's 23,817,352 trainable ones and a scale for each of the 17,216
    normalised channels. Eight more classes are 8 · (2048 + 1). Means and variances are buffers.
    """
    with torch.device("meta"):
        model = Inception()
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 23_834_568 + 8 * 2049 == 23_850_960
    assert sum(b.numel() for b in model.buffers()) == 2 * 17_216
    assert sum(name.endswith("conv.weight") for name in weights) == 94
    assert len(weights) == 94 * 5 + 2
    blocks = {name.split(".")[0] for name in weights}
    assert blocks == {
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        *(f"Mixed_5{letter}" for letter in "bcd"),
        *(f"Mixed_6{letter}" for letter in "abcde"),
        *(f"Mixed_7{letter}" for letter in "abc"),
        "fc",
    }
    assert weights["Mixed_5b.branch_pool.conv.weight"].shape == (32, 192, 1, 1)
    assert weights["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert weights["fc.weight"].shape == (1008, 2048)


def resized_by_loops(x, size):
    """What TensorFlow 1's kernel does to each value of a picture (c, h, w)."""
    channels, height, width = x.shape
    out = torch.empty(channels, size, size)
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            top, left = int(y), int(z)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dz = y - top, z - left
            upper = x[:, top, left] * (1 - dz) + x[:, top, right] * dz
            lower = x[:, bottom, left] * (1 - dz) + x[:, bottom, right] * dz
            out[:, i, j] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize("shape", [(7, 11), (32, 32), (40, 23), (1, 1)])
def test_resize_against_loops(shape):
    x = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(1)) * 255
    found = resize_as_tensorflow(x, 23, 23)
    for picture, source in zip(found, x, strict=True):
        assert (picture - resized_by_loops(source, 23)).abs().max() < 1e-3


def test_resize_starts_at_the_corner_and_is_not_pytorchs():
    x = torch.arange(4.0).view(1, 1, 1, 4) * 10
    assert resize_as_tensorflow(x, 1, 8).flatten().tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    for aligned in (True, False):
        theirs = F.interpolate(x, (1, 8), mode="bilinear", align_corners=aligned)
        assert (theirs - resize_as_tensorflow(x, 1, 8)).abs().max() > 1
    same = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize_as_tensorflow(same, 299, 299), same)


def test_pictures_of_any_size_and_batch(network):
    pictures = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        both, alone = network(pictures), network(pictures[1:])
    torch.testing.assert_close(both.features[1:], alone.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counted", [False, True])
def test_weights_from_a_file(tmp_path, weights, counted):
    """The published file has `num_batches_tracked` or not, by which tool it came from."""
    extra = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)} if counted else {}
    save_file({**weights, **extra}, tmp_path / "model.safetensors")
    loaded = load_inception(tmp_path / "model.safetensors" if counted else tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_files_that_are_no_inception(tmp_path, weights):
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"hidream models convert w\.pth"):
        open_inception(tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"do not exist.*hidream models convert"):
        open_inception(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="do not exist"):
        open_inception(tmp_path)
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678" * 9)
    with pytest.raises(ModelError, match="damaged"):
        open_inception(tmp_path / "damaged.safetensors")
    torchvisions = {**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    save_file(torchvisions, tmp_path / "vision.safetensors")
    with pytest.raises(
        ModelError, match=r"no Inception-v3 of 2015-12-05.*fc.weight \[1000, 2048\]"
    ):
        open_inception(tmp_path / "vision.safetensors")


def test_the_stand_in_is_fixed_and_named():
    network, pictures = StandIn(), torch.randint(0, 256, (3, 3, 20, 16), dtype=torch.uint8)
    assert "not FID" in network.name
    assert network.digest() == StandIn().digest()
    assert network.digest().startswith("937f104eb386e5ad")  # the same on every machine
    seen = network(pictures)
    assert seen.features.shape == (3, network.num_features)
    assert seen.features.std(0).min() > 0
    assert torch.equal(seen.features, StandIn()(pictures).features)
    # grain moves it, with the mean colour kept
    flat = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    grain = flat + 20 * (torch.arange(16) % 2 * 2 - 1)
    assert (network(flat).features - network(grain.to(torch.uint8)).features).abs().max() > 0.01
