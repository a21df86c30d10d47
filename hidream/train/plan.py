"""What a recipe will do and hold, counted without weights, data or a tokenizer: `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hidream.errors import UsageError
from hidream.lora_file import linear_layers
from hidream.models.loading import tensor_shapes
from hidream.train.config import Recipe, Stage
from hidream.train.layout import Layout, layout_of
from hidream.train.optim import split_parameters

FP32 = 4  # bytes: weights, gradients, averages and optimizer states are kept in it
STATES = (2, 1)  # an AdamW and a Muon keep so many values for each one


@dataclass(frozen=True)
class StagePlan:
    """A stage: steps, samples of all its steps, and tokens of one step over all processes.

    `tokens` is the mean over the stage's tasks, if all words are as long as `max_text`;
    the chat's few tokens around them are not counted, and subjects count as one reference.
    """

    size: int
    steps: int
    batch_size: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """Stages, the model's values and a LoRA's, and the bytes that one process keeps between steps.

    Activations, a batch and frozen networks (text encoders, perceptual losses) come on top. What
    processes share by `parallel.tp` is counted as if each had it whole.
    """

    name: str
    model: str
    processes: int
    layout: Layout
    num_values: int
    num_adapters: int
    stages: tuple[StagePlan, ...]
    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def told(self) -> str:
        """The plan as it is printed."""
        adapters = f", frozen, and {self.num_adapters:,} of adapters" * (self.num_adapters > 0)
        lines = [f"{self.name}: {self.model}, {self.num_values:,} values{adapters}"]
        for number, stage in enumerate(self.stages):
            lines.append(
                f"stage {number}: {stage.size}x{stage.size}, {stage.steps:,} steps of "
                f"{stage.batch_size:,}: {stage.samples:,} samples, {stage.tokens:,} tokens a step"
            )
        steps = sum(stage.steps for stage in self.stages)
        samples = sum(stage.samples for stage in self.stages)
        lines.append(f"in all: {steps:,} steps, {samples:,} samples")
        how = f" ({self.layout})" if self.processes > 1 else ""
        lines.append(f"{self.processes} process{'es' * bool(how)}{how}; one keeps")
        kept = [
            (name, getattr(self, name)) for name in ("weights", "gradients", "optimizer", "ema")
        ]
        kept.append(("together", sum(num_bytes for _, num_bytes in kept)))
        lines += [f"  {name:9} {num_bytes / 2**30:9.3f} GiB" for name, num_bytes in kept]
        return "\n".join(lines)


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. Raises UsageError for a model that is not known here.

    The run before it, of an autoencoder, is not in it.
    """
    layout = layout_of(recipe.parallel, recipe.processes)
    model, num_tokens = _family(recipe)
    inner, decayed, kept = (
        sum(parameter.numel() for parameter in group)
        for group in split_parameters(model, recipe.optimizer)
    )
    num_values = sum(parameter.numel() for parameter in model.parameters())
    adapters = _adapters(recipe, model) if recipe.lora.rank else 0
    if adapters:  # the only ones that are trained, by AdamW
        inner, decayed, kept = 0, adapters, 0
    trained = inner + decayed + kept
    states = STATES[0] * (decayed + kept) + STATES[1] * inner
    frozen = getattr(torch, recipe.lora.frozen_dtype).itemsize if adapters else FP32
    weights, gradients, optimizer, ema = (
        -(-num_bytes // layout.num_shards)
        for num_bytes in (
            frozen * num_values + FP32 * adapters,
            *(FP32 * n for n in (trained, states, adapters or num_values)),
        )
    )
    return Plan(
        name=recipe.name,
        model=recipe.model,
        processes=recipe.processes,
        layout=layout,
        num_values=num_values,
        num_adapters=adapters,
        stages=tuple(_stage(recipe, stage, num_tokens) for stage in recipe.stages),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
    )


def _adapters(recipe: Recipe, model: nn.Module) -> int:
    """The values of a LoRA's adapters; UsageError for a family that has none."""
    from hidream.train.lora import chosen, default_targets, num_values

    layers = linear_layers(tensor_shapes(model))
    wanted = recipe.lora.targets or default_targets(recipe)
    return sum(num_values(layers[name], recipe.lora) for name in chosen(layers, wanted))


def _stage(recipe: Recipe, stage: Stage, num_tokens: Callable[[int, str], int]) -> StagePlan:
    total = sum(stage.tasks.values())
    mean = sum(
        weight / total * num_tokens(stage.size, task)
        for task, weight in stage.tasks.items()
        if weight
    )
    return StagePlan(
        size=stage.size,
        steps=stage.steps,
        batch_size=stage.batch_size,
        samples=stage.steps * stage.batch_size,
        tokens=round(stage.batch_size * mean),
    )


def _family(recipe: Recipe) -> tuple[nn.Module, Callable[[int, str], int]]:
    """The recipe's network without its values, and the tokens of a sample of (size, task)."""
    if recipe.family == "o1":
        return _o1(recipe)
    if recipe.family in ("i1", "e1"):
        return _i1(recipe)
    raise UsageError(f'there is no plan for "{recipe.model}"; --dry-run knows o1, i1 and e1.')


def _o1(recipe: Recipe) -> tuple[nn.Module, Callable[[int, str], int]]:
    from hidream.models.o1.model import O1
    from hidream.train.o1 import model_config

    config = model_config(recipe)
    with torch.device("meta"):
        model = O1(config)

    def num_tokens(size: int, task: str) -> int:
        words = recipe.max_text
        seen = (config.budgets.vision_side(1) // config.vision.stride) ** 2
        if task == "language":
            return words
        if task == "understanding":
            if config.vision_pixels is not None:
                least, most = config.vision_pixels
                seen = min(max(size**2, least), most) // config.vision.stride**2
            return words + seen
        target = (size // config.patch_size) ** 2
        if task == "text_to_image":
            return words + 1 + target
        side = config.budgets.side(1, size) // config.patch_size
        return words + seen + 1 + target + side**2

    return model, num_tokens


def _i1(recipe: Recipe) -> tuple[nn.Module, Callable[[int, str], int]]:
    from hidream.models.i1.model import I1
    from hidream.train.i1 import model_config, patch_side

    with torch.device("meta"):
        model = I1(model_config(recipe))
    pixels = patch_side(recipe)

    def num_tokens(size: int, task: str) -> int:
        pictures = 2 if task == "edit" else 1  # the source stands beside it
        return pictures * (size // pixels) ** 2 + recipe.num_tokens * 3  # T5, Llama twice

    return model, num_tokens
