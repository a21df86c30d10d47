"""LoRA files' weights: read once, kept while there is room, given to a model in its own dtype."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hidream.errors import InputError
from hidream.lora_file import LoraFile, LoraLayer, stamp_of
from hidream.models.placement import Elsewhere
from hidream.nn.lora import Branch, adapted, scaled, summed

MAX_KEPT = 2 * 1024**3  # bytes
Weights = dict[str, Tensor]  # a file's tensors by name, on the CPU, as stored
Module = TypeVar("Module", bound=nn.Module)


class LoraWeights:
    """LoRA files in memory, by path, time of change and size; the longest unused go first.

    At most `max_kept` bytes stay; a larger file is read each time.
    """

    def __init__(self, max_kept: int = MAX_KEPT):
        self.max_kept = max_kept
        self._kept: OrderedDict[tuple[Path, tuple[int, int]], Weights] = OrderedDict()
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        return sum(map(_size, self._kept.values()))

    def get(self, file: LoraFile) -> Weights:
        """The tensors of the layers that fit. Raises InputError: changed, damaged, not finite."""
        key = (file.path, file.stamp)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        weights = _read(file)
        with self._lock:
            self._kept[key] = weights
            while self.num_bytes > self.max_kept:
                self._kept.popitem(last=False)
        return weights


def with_loras(
    model: Module,
    loras: Sequence[tuple[LoraFile, float]],
    weights: LoraWeights,
    elsewhere: Elsewhere | None = None,
) -> Module:
    """`model` as these LoRAs, each with its scale, change it together; the model stays as it is.

    Each is measured from the unchanged model and the changes are added, so that their order does
    not matter. So is a tensor that a file holds whole: a scale goes that share of the way to it.
    `elsewhere` is the model's, where not all of its weights are on the device.
    Raises InputError where a file cannot be read any more.
    """
    parts: dict[str, list[tuple[LoraLayer, Weights, float]]] = {}
    wholes: dict[str, list[tuple[Tensor, float]]] = {}
    for file, scale in loras:
        if scale == 0:
            continue
        tensors = weights.get(file)
        for layer in file.layers:
            parts.setdefault(layer.layer, []).append((layer, tensors, scale))
        for name, key in file.whole.items():
            wholes.setdefault(name, []).append((tensors[key], scale))
    branches = {}
    for name, changes in parts.items():
        weight, like = _weight(model, f"{name}.weight", changes, elsewhere)
        branches[name] = summed([_branch(weight, *change) for change in changes], like=like)
    whole = {name: _moved(model, name, targets, elsewhere) for name, targets in wholes.items()}
    return adapted(model, branches, whole)


def _moved(
    model: nn.Module,
    name: str,
    targets: Sequence[tuple[Tensor, float]],
    elsewhere: Elsewhere | None,
) -> Tensor:
    """A tensor W as files bring it whole: W + the sum of scale · (target - W); one at 1 is it."""
    like = elsewhere.like if elsewhere is not None else model.get_parameter(name)
    if len(targets) == 1 and targets[0][1] == 1:
        return targets[0][0].to(like)
    weight = (elsewhere.read(name) if elsewhere is not None else like).float()
    return sum((scale * (t.to(weight) - weight) for t, scale in targets), weight).to(like)


def _weight(
    model: nn.Module,
    name: str,
    changes: Sequence[tuple[LoraLayer, Weights, float]],
    elsewhere: Elsewhere | None,
) -> tuple[Tensor, Tensor]:
    """A layer's weight, which only a DoRA asks for, and a tensor of its dtype and device."""
    if elsewhere is None:
        weight = model.get_parameter(name)
        return weight, weight
    dora = any(layer.magnitude is not None for layer, _, _ in changes)
    return elsewhere.read(name) if dora else elsewhere.like, elsewhere.like


def _branch(weight: Tensor, layer: LoraLayer, tensors: Weights, scale: float) -> Branch:
    down, up = (tensors[name].flatten(1).to(weight.device) for name in (layer.down, layer.up))
    own = layer.scale if layer.alpha is None else float(tensors[layer.alpha]) / layer.rank
    magnitude = None
    if layer.magnitude is not None:
        magnitude = tensors[layer.magnitude].flatten().to(weight.device)
    return scaled(weight, down, up, alpha_over_rank=own, scale=scale, magnitude=magnitude)


def _read(file: LoraFile) -> Weights:
    tensors: Weights = {}
    try:
        if stamp_of(file.path) != file.stamp:
            raise OSError
        with safe_open(file.path, framework="pt") as opened:
            for layer in file.layers:
                for name in (layer.down, layer.up, layer.alpha, layer.magnitude):
                    if name is not None:
                        tensors[name] = opened.get_tensor(name)
            for name in file.whole.values():
                tensors[name] = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file.path} was changed or removed while in use.", "Try again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{name} in {file.path} holds values that are not finite.",
                "The file is damaged, or the training run that wrote it diverged.",
            )
    return tensors


def _size(weights: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
