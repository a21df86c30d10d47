"""Inception-v3 as FID uses it: the graph that Google published on 2015-12-05, with its quirks.

Szegedy et al. 2015 (arXiv 1512.00567), 1008 outputs. Modules have the names of torch-fidelity's and
pytorch-fid's, so that their file `…-inception-2015-12-05-6726825d.pth` fits once it is converted.
What differs from the Inception of torchvision, and moves an FID: pictures are resized as TensorFlow
1 did and scaled to (x − 128) / 128; an average does not count the padding; the last block takes a
maximum where the one before it takes an average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from hidream.errors import ModelError
from hidream.folder import PICKLES, Folder, open_file
from hidream.models.loading import check_tensors, load_weights, tensor_shapes

NAME = "inception-v3 2015-12-05"
SIDE = 299  # pixels that the network sees
NUM_FEATURES = 2048
NUM_CLASSES = 1008
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's release v0.2.0
CONVERTED = "inception-2015-12-05.safetensors"


@dataclass(frozen=True)
class Seen:
    """What a network says of pictures: features for a Fréchet distance, and logits up to a
    constant a class for an Inception Score. Inception's lack the bias, as torch-fidelity's
    `logits_unbiased`."""

    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b c"]


@dataclass(frozen=True)
class Conv:
    """A convolution in the table below: its name, output channels, kernel (height, width)."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True  # to the same size; not where the stride is 2


# A step of a branch: a convolution, several of the same input whose outputs are joined, or a pool.
Step = Conv | tuple[Conv, ...] | str
Branches = tuple[tuple[Step, ...], ...]

AVERAGE, MAXIMUM, HALVING = "average", "maximum", "halving maximum"


def _conv(name: str, channels: int, height: int = 1, width: int | None = None) -> Conv:
    return Conv(name, channels, height, height if width is None else width)


def _halving(name: str, channels: int) -> Conv:
    return Conv(name, channels, 3, 3, stride=2, padded=False)


def _block_35(pool_channels: int) -> Branches:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        (
            _conv("branch3x3dbl_1", 64),
            _conv("branch3x3dbl_2", 96, 3),
            _conv("branch3x3dbl_3", 96, 3),
        ),
        (AVERAGE, _conv("branch_pool", pool_channels)),
    )


def _block_35_to_17() -> Branches:
    return (
        (_halving("branch3x3", 384),),
        (
            _conv("branch3x3dbl_1", 64),
            _conv("branch3x3dbl_2", 96, 3),
            _halving("branch3x3dbl_3", 96),
        ),
        (HALVING,),
    )


def _block_17(c: int) -> Branches:
    return (
        (_conv("branch1x1", 192),),
        (
            _conv("branch7x7_1", c),
            _conv("branch7x7_2", c, 1, 7),
            _conv("branch7x7_3", 192, 7, 1),
        ),
        (
            _conv("branch7x7dbl_1", c),
            _conv("branch7x7dbl_2", c, 7, 1),
            _conv("branch7x7dbl_3", c, 1, 7),
            _conv("branch7x7dbl_4", c, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ),
        (AVERAGE, _conv("branch_pool", 192)),
    )


def _block_17_to_8() -> Branches:
    return (
        (_conv("branch3x3_1", 192), _halving("branch3x3_2", 320)),
        (
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, 1, 7),
            _conv("branch7x7x3_3", 192, 7, 1),
            _halving("branch7x7x3_4", 192),
        ),
        (HALVING,),
    )


def _block_8(pool: str) -> Branches:
    return (
        (_conv("branch1x1", 320),),
        (
            _conv("branch3x3_1", 384),
            (_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)),
        ),
        (
            _conv("branch3x3dbl_1", 448),
            _conv("branch3x3dbl_2", 384, 3),
            (_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)),
        ),
        (pool, _conv("branch_pool", 192)),
    )


# The network from its picture to its last block, each name with what it is.
LAYERS: tuple[tuple[str, Conv | str | Branches], ...] = (
    ("Conv2d_1a_3x3", Conv("", 32, 3, 3, stride=2, padded=False)),
    ("Conv2d_2a_3x3", Conv("", 32, 3, 3, padded=False)),
    ("Conv2d_2b_3x3", Conv("", 64, 3, 3)),
    ("MaxPool_1", HALVING),
    ("Conv2d_3b_1x1", Conv("", 80)),
    ("Conv2d_4a_3x3", Conv("", 192, 3, 3, padded=False)),
    ("MaxPool_2", HALVING),
    ("Mixed_5b", _block_35(32)),
    ("Mixed_5c", _block_35(64)),
    ("Mixed_5d", _block_35(64)),
    ("Mixed_6a", _block_35_to_17()),
    ("Mixed_6b", _block_17(128)),
    ("Mixed_6c", _block_17(160)),
    ("Mixed_6d", _block_17(160)),
    ("Mixed_6e", _block_17(192)),
    ("Mixed_7a", _block_17_to_8()),
    ("Mixed_7b", _block_8(AVERAGE)),
    ("Mixed_7c", _block_8(MAXIMUM)),
)


class Inception(nn.Module):
    """The whole network, from pictures of any size to 2048 features and 1008 logits."""

    name = NAME
    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, kind in LAYERS:
            if isinstance(kind, Conv):
                self.add_module(name, ConvNorm(channels, kind))
                channels = kind.channels
            elif isinstance(kind, tuple):
                block = Mixed(channels, kind)
                self.add_module(name, block)
                channels = block.channels
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Seen:
        x = resize_as_tensorflow(pictures.to(self.fc.weight.dtype), SIDE, SIDE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        for name, kind in LAYERS:
            x = _pooled(x, kind) if isinstance(kind, str) else self.get_submodule(name)(x)
        features = x.mean((2, 3))  # (b, 2048)
        return Seen(features=features, logits=features @ self.fc.weight.T)


class Mixed(nn.Module):
    """Branches of one input, their outputs joined by channels."""

    def __init__(self, in_channels: int, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            channels = in_channels
            for step in branch:
                if isinstance(step, str):
                    continue
                convs = step if isinstance(step, tuple) else (step,)
                for conv in convs:
                    self.add_module(conv.name, ConvNorm(channels, conv))
                channels = sum(conv.channels for conv in convs)
            self.channels += channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return torch.cat([self._along(branch, x) for branch in self.branches], 1)

    def _along(self, branch: Sequence[Step], x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pooled(x, step)
            else:
                convs = step if isinstance(step, tuple) else (step,)
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in convs], 1)
        return x


class ConvNorm(nn.Module):
    """A convolution without bias, its batch normalisation with the running statistics, ReLU."""

    def __init__(self, in_channels: int, conv: Conv) -> None:
        super().__init__()
        kernel = conv.height, conv.width
        padding = (conv.height // 2, conv.width // 2) if conv.padded else 0
        self.conv = nn.Conv2d(
            in_channels, conv.channels, kernel, conv.stride, padding=padding, bias=False
        )
        self.bn = Norm(conv.channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return F.relu(self.bn(self.conv(x)))


class Norm(nn.Module):
    """Batch normalisation that never counts batches, and so has no `num_batches_tracked`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3
        )


def resize_as_tensorflow(
    x: Float[Tensor, "b c h w"], height: int, width: int
) -> Float[Tensor, "b c {height} {width}"]:
    """TensorFlow 1's `resize_bilinear` without `align_corners`.

    Output pixel i is at i · (old size / new size) of the input, counted from the corner pixels and
    not from their outer edges, and beyond the last pixel that pixel goes on.
    """
    x = _interpolated(x, 3, width)
    return _interpolated(x, 2, height)


def _interpolated(x: Tensor, axis: int, size: int) -> Tensor:
    old = x.shape[axis]
    place = torch.arange(size, device=x.device, dtype=torch.float32) * (old / size)
    before = place.long().clamp(max=old - 1)
    after = (before + 1).clamp(max=old - 1)
    shape = [1] * x.ndim
    shape[axis] = size
    share = (place - before).to(x.dtype).view(shape)
    first = x.index_select(axis, before)
    return first + (x.index_select(axis, after) - first) * share


def _pooled(x: Tensor, kind: str) -> Tensor:
    if kind == AVERAGE:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == MAXIMUM:
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2)


def open_inception(path: str | Path) -> Folder:
    """The headers of Inception's weights, checked against the network; no weights are read.

    Raises ModelError: missing, a pickle, damaged, or of another network.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix in PICKLES and path.is_file():
        raise ModelError(
            f"{path} is a pickle, which can run any code and is never loaded here.",
            f"Turn it into safetensors: hidream models convert {path.name} {CONVERTED}",
        )
    if not path.is_file():
        raise ModelError(f"the Inception weights {path} do not exist.", HOW_TO_GET)
    folder = open_file(path)
    counted = ".num_batches_tracked"  # of no use without training; not all files have them
    kept = {name: info for name, info in folder.tensors.items() if not name.endswith(counted)}
    folder = replace(folder, tensors=kept)
    with torch.device("meta"):
        expected = tensor_shapes(Inception())
    try:
        check_tensors(folder, expected)
    except ModelError as error:
        raise ModelError(
            f"{path} is no Inception-v3 of 2015-12-05: {error.problem}", HOW_TO_GET
        ) from error
    return folder


HOW_TO_GET = (
    f"Get {PUBLISHED} (torch-fidelity's release v0.2.0), run \"hidream models convert {PUBLISHED} "
    f'{CONVERTED}", and name the result with --inception or lay it beside the statistics.'
)


def load_inception(path: str | Path | Folder, *, device: torch.device | str = "cpu") -> Inception:
    """Inception in float32 from a safetensors file, a folder with a `model.safetensors`, or what
    `open_inception` found. Raises ModelError as there, and for values that are not finite."""
    folder = path if isinstance(path, Folder) else open_inception(path)
    with torch.device("meta"):
        model = Inception()
    return load_weights(model, folder, device=device, dtype=torch.float32)
