"""LoRA in training: a family's learner, of which adapters alone are trained, averaged, saved."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hidream.errors import InputError, UsageError
from hidream.nn.lora import Adapter, adapted
from hidream.pipelines.base import Pipeline
from hidream.train.config import Lora, Recipe
from hidream.train.distributed import PendingSums
from hidream.train.draws import Stream, generator
from hidream.train.learner import Learner, Losses, StepBatch, class_of

RESULT = "lora.safetensors"
# What stands before a layer's name, and whether a tensor of the file says alpha: diffusers reads it
# in the header alone and takes no such tensor, ComfyUI takes nothing else.
STYLES = {"diffusers": ("transformer.", False), "comfyui": ("diffusion_model.", True)}


class Adapters(nn.Module):
    """The adapters of a frozen model. Parameters and state are theirs alone.

    `network` is the model as they change it; `layers` are they, by the changed layer's name. A copy
    has adapters of its own, on the same model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Adapter]):
        super().__init__()
        self.layers = dict(layers)
        for name, adapter in layers.items():
            _place(self, name, adapter)
        self._unseen = (model, adapted(model, layers))  # in a tuple: no modules of this one

    @property
    def network(self) -> nn.Module:
        return self._unseen[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Adapters:
        """The model goes along to another device."""
        self._unseen[0]._apply(fn)
        super()._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        copied = {name: copy.deepcopy(adapter, memo) for name, adapter in self.layers.items()}
        return Adapters(self._unseen[0], copied)


def _place(root: nn.Module, name: str, adapter: Adapter) -> None:
    """The adapter under the dotted name of its layer, so that its tensors' names tell of it."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, adapter)


@dataclass(frozen=True)
class Seeded:
    """A batch, and what the dropout of its step is drawn from."""

    batch: StepBatch
    seed: int

    @property
    def counts(self) -> Sequence[int]:
        return self.batch.counts

    @property
    def redrawn(self) -> int:
        return self.batch.redrawn

    @property
    def corrupt(self) -> int:
        return self.batch.corrupt

    def to(self, device: torch.device | str) -> Seeded:
        return replace(self, batch=self.batch.to(device))


class LoraLearner(Learner):
    """Another learner's batches, losses and pictures, with its model frozen under adapters."""

    result = RESULT

    def __init__(self, inner: Learner):
        super().__init__(inner.recipe)
        self.inner = inner
        self.options = inner.recipe.lora
        self.targets = find_targets(self.options, inner)

    def build(self) -> Adapters:
        options = self.options
        model = self.inner.build().requires_grad_(False)
        model.to(getattr(torch, options.frozen_dtype))
        drawn = torch.Generator().manual_seed(self.recipe.seed)
        return Adapters(
            model,
            {
                name: Adapter(
                    model.get_parameter(f"{name}.weight"),
                    options.rank,
                    alpha_of(options),
                    dora=options.dora,
                    dropout=options.dropout,
                    generator=drawn,
                )
                for name in self.targets
            },
        )

    def make_batch(self, step: int, rank: int = 0, world: int = 1) -> StepBatch:
        batch = self.inner.make_batch(step, rank, world)
        if not self.options.dropout:
            return batch
        dice = generator(self.recipe.seed, Stream.ADAPTERS, step * world + rank)
        return Seeded(batch, int(dice.integers(2**62)))

    def losses(self, model: Adapters, batch: Any, sums: PendingSums) -> Losses:
        if not isinstance(batch, Seeded):
            return self.inner.losses(model.network, batch, sums)
        with torch.random.fork_rng():
            torch.manual_seed(batch.seed)
            return self.inner.losses(model.network, batch.batch, sums)

    def blocks(self, model: Adapters) -> Sequence[nn.Module]:
        return self.inner.blocks(model.network)

    def units(self, model: Adapters) -> Sequence[nn.Module]:
        return self.inner.units(model.network)

    def describe(self) -> None:
        self.inner.describe()

    def grid(self, model: Adapters, step: int) -> Image.Image:
        return self.inner.grid(model.eval().network, step)

    def pipeline(self, model: Adapters) -> Pipeline:
        return self.inner.pipeline(model.eval().network)

    def export(self, model: Adapters, out_dir: Path) -> Path:
        """One file, which `hidream generate --lora` reads."""
        save_lora(model, out_dir, self.recipe, style=self.options.keys or self.inner.lora_keys)
        return out_dir


def alpha_of(options: Lora) -> float:
    """What the product of the matrices is multiplied by, times the rank."""
    return options.alpha or float(options.rank)


def find_targets(options: Lora, learner: Learner) -> list[str]:
    """The layers to change, from the headers of `init`. Raises UsageError for targets that are not
    there, and for a family without LoRAs."""
    wanted = options.targets or default_targets(learner.recipe)
    layers = learner.lora_layers()
    found = chosen(layers, wanted)
    for one in wanted:
        if not any(f".{name}".endswith(f".{one}") for name in found):
            last = sorted({name.rpartition(".")[2] for name in layers})
            near = difflib.get_close_matches(one, last, n=3, cutoff=0.0)
            raise UsageError(
                f'lora.targets: no layer of {learner.recipe.init} ends in "{one}".',
                f"Near are {', '.join(near)}.",
            )
    return found


def default_targets(recipe: Recipe) -> tuple[str, ...]:
    """How the names of the layers end that a LoRA changes if its recipe does not say; UsageError
    for a family without LoRAs."""
    if not (targets := class_of(recipe).lora_targets):
        raise UsageError(
            f"{recipe.model} has no LoRAs.", "O1, I1 and E1 have; lora.rank = 0 is none."
        )
    return targets


def chosen(layers: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The layers that are wanted, or whose names end so."""
    return [name for name in layers if any(f".{name}".endswith(f".{w}") for w in wanted)]


def num_values(size: tuple[int, int], options: Lora) -> int:
    """Of the adapter of a layer of (in, out)."""
    return options.rank * sum(size) + size[1] * options.dora


def save_lora(adapters: Adapters, file: Path, recipe: Recipe, *, style: str) -> None:
    """Write adapters under the names that `style` reads, with alpha, and how they were made.

    The file is there whole or not at all. Raises InputError where it cannot be written.
    """
    prefix, with_alphas = STYLES[style]
    options, dtype = recipe.lora, getattr(torch, recipe.lora.dtype)
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.layers.items():
        named: dict[str, Tensor] = {
            "lora_A.weight": adapter.lora_A,
            "lora_B.weight": adapter.lora_B,
        }
        if (lengths := adapter.lora_magnitude_vector) is not None:
            if style == "comfyui":
                named["dora_scale"] = lengths[:, None]
            else:
                named["lora_magnitude_vector"] = lengths
        if with_alphas:
            named["alpha"] = torch.tensor(alpha_of(options))
        for role, tensor in named.items():
            tensors[f"{prefix}{name}.{role}"] = tensor.detach().to("cpu", dtype).contiguous()
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata=_metadata(recipe, sorted(adapters.layers)))
        draft.chmod(0o644)  # safetensors writes for the owner alone
        draft.replace(file)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}.") from error
    finally:
        draft.unlink(missing_ok=True)


def _metadata(recipe: Recipe, layers: Sequence[str]) -> dict[str, str]:
    """The header's: PEFT's settings as diffusers writes them, and the run for people."""
    options = recipe.lora
    settings = {
        "r": options.rank,
        "lora_alpha": alpha_of(options),
        "lora_dropout": options.dropout,
        "use_dora": options.dora,
        "target_modules": list(layers),
    }
    run = {
        "name": recipe.name,
        "model": recipe.model,
        "base": Path(recipe.init).name,
        "data": Path(recipe.data.path).name,
        "steps": recipe.num_steps,
        "samples": recipe.first_sample(recipe.num_steps),
        "size": recipe.stages[-1].size,
        "seed": recipe.seed,
    }
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()}),
        "hidream_training": json.dumps(run),
    }
