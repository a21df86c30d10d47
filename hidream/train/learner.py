"""What a family of models brings to the loop: its network, batches, losses, pictures and export."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from hidream.errors import UsageError
from hidream.pipelines.base import Pipeline
from hidream.train.config import Recipe
from hidream.train.datasets import TrainingData
from hidream.train.distributed import PendingSums, World

FAMILIES = {
    "o1": "hidream.train.o1:O1Learner",
    "i1": "hidream.train.i1:I1Learner",
    "e1": "hidream.train.e1:E1Learner",
    "vae": "hidream.train.vae:VaeLearner",
    "hidit": "hidream.train.hidit:HiDiTLearner",
}


class StepBatch(Protocol):
    """One process's share of a step's samples.

    `counts`: numbers whose sums over the processes its losses need (see `Learner.losses`).
    `redrawn`: samples that did not fit and were replaced; `corrupt`: pictures that could not be
    read, and were.
    """

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def redrawn(self) -> int: ...
    @property
    def corrupt(self) -> int: ...
    def to(self, device: torch.device | str) -> StepBatch: ...


@dataclass(frozen=True)
class Losses:
    """The loss that is minimised, and its parts and other numbers as they are logged."""

    total: Tensor
    parts: dict[str, Tensor]


class Learner(ABC):
    """A family, for one recipe. Every process of `world` has one of its own.

    `may_be_new`: how names of tensors begin that a run may lack which this one starts from;
    `result`: what `export` writes into the run's folder; `lora_targets`: how the names of the
    layers end that a LoRA changes (none: there are no LoRAs), `lora_keys`: whose names it has.
    """

    may_be_new: str = ""
    result: str = "model"
    lora_targets: tuple[str, ...] = ()
    lora_keys: str = "diffusers"

    def __init__(self, recipe: Recipe, world: World | None = None):
        self.recipe = recipe

    @classmethod  # noqa: B027 (some families have nothing to check)
    def check(cls, recipe: Recipe) -> None:
        """UsageError for what does not go with the family or `init`, by their headers alone."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, from the recipe's seed or from its `init`, in fp32 on the CPU."""

    def network(self) -> nn.Module:
        """What `build` builds, on torch's default device, its values left to others."""
        raise NotImplementedError(f"a LoRA of {self.recipe.model} is not trained in shards")

    def skeleton(self) -> nn.Module:
        """The network without values, which takes no memory: on the meta device."""
        with torch.device("meta"):
            return self.network()

    @abstractmethod
    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> StepBatch:
        """Process `rank`'s samples of a step: a pure function, called in a thread."""

    @abstractmethod
    def losses(self, model: Any, batch: Any, sums: PendingSums) -> Losses:
        """Forward and losses of one batch. `sums`: its `counts` over all processes, and more."""

    def flops(self, batch: Any) -> int:
        """Floating-point operations of a step on `batch`, forward and backward, as
        `hidream.train.flops` counts them; 0 where nobody has counted them."""
        return 0

    @abstractmethod
    def grid(self, model: Any, step: int) -> Image.Image:
        """The same prompts as training goes on, after `step` steps, as one picture."""

    @abstractmethod
    def export(self, model: Any, out_dir: Path) -> Path:
        """Write the averaged weights as a folder in the published layout, or as a LoRA's file."""

    def pipeline(self, model: Any) -> Pipeline:
        """What `hidream.load` would make of the export, around this very model: for validation.

        Families that draw no scenes of the world have none: NotImplementedError.
        """
        raise NotImplementedError(f"{self.recipe.model} has no pipeline in training")

    def describe(self) -> None:  # noqa: B027 (most families have nothing to say)
        """Write what the network is into the run's folder: the first process does, as it begins."""

    @classmethod
    def open_data(cls, recipe: Recipe, *, unpack: bool = False) -> TrainingData | None:
        """The recipe's dataset; None for the world. `unpack`: each picture is read whole once.

        Raises InputError for one with anything wrong, UsageError where the family cannot use it.
        """
        if recipe.data.path:
            raise UsageError(f"{recipe.model} does not learn from data.path.", "O1, I1 and E1 do.")
        return None

    def lora_layers(self) -> Sequence[str]:
        """The linear layers of `init`, from its files' headers."""
        return ()

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """What is compiled and computed anew one by one."""
        return ()

    def units(self, model: Any) -> Sequence[nn.Module]:
        """What is sharded one by one: the blocks, and before a block such parts of it as are
        called by themselves."""
        return self.blocks(model)

    def decoder_sizes(self) -> tuple[int, int, int] | None:
        """Heads, key heads and inner size of the part that tensor and sequence parallel divide."""
        return None

    def decoder(self, model: Any) -> Any:
        """That part of the network: for learners with `decoder_sizes`."""
        raise NotImplementedError

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The recipe's, for a forward pass."""
        if self.recipe.precision == "float32":
            return contextlib.nullcontext()
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(torch.device(self.recipe.device).type, dtype=dtype)


def class_of(recipe: Recipe) -> type[Learner]:
    """The family's learner; UsageError for none."""
    if recipe.family not in FAMILIES:
        raise UsageError(f'unknown model "{recipe.model}"; families are {", ".join(FAMILIES)}.')
    module, name = FAMILIES[recipe.family].split(":")
    found: type[Learner] = getattr(import_module(module), name)
    return found


def learner_of(recipe: Recipe, world: World | None = None) -> Learner:
    """The learner of the recipe's `model`, which is named FAMILY-SIZE; UsageError for none."""
    found = class_of(recipe)(recipe, world)
    if recipe.lora.rank:
        from hidream.train.lora import LoraLearner

        return LoraLearner(found)
    return found
