"""The training loop: one process's part of a run, from its first step to its end."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hidream.errors import HidreamError, UsageError
from hidream.models.o1.config import SIZES, O1Config
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer
from hidream.models.o1.weights import load_o1
from hidream.nn.attention import Backend
from hidream.sampling import add_noise
from hidream.train import checkpoint
from hidream.train.checkpoint import Progress
from hidream.train.config import Recipe
from hidream.train.data import Prefetcher, TrainBatch
from hidream.train.distributed import PendingSum, World
from hidream.train.export import export_model, tokenizer_folder
from hidream.train.grids import write_grid
from hidream.train.log import Meter, OnLog, RunLog
from hidream.train.losses import picture_loss, text_loss
from hidream.train.optim import (
    build_optimizers,
    clip_gradients,
    ema_decay,
    learning_rate,
    set_learning_rate,
    update_ema,
)

logger = logging.getLogger(__name__)

MATH_ATTENTION_BELOW = 200  # tokens; see hidream.nn.attention
SHAPES_COMPILED_AT_MOST = 64


@dataclass(frozen=True)
class Losses:
    """The loss that is minimised, and its parts as they are logged."""

    total: Tensor
    parts: dict[str, Tensor]


def train(
    recipe: Recipe,
    world: World | None = None,
    *,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    on_log: OnLog | None = None,
) -> bool:
    """Run the recipe in this process; True when it reached its end, False when asked to stop.

    Every process of `world` calls this. `stop_requested` is asked once a step; when one process
    says yes, all finish the step, and the first saves a checkpoint. Raises ModelError for a
    checkpoint that does not fit, HidreamError when the loss is no longer finite.
    """
    world = world or World()
    device = torch.device(recipe.device)
    torch.set_flush_denormal(True)  # denormals make the first steps ten times slower
    model, tokenizer = build_model(recipe)
    model.to(device)
    ema, _ = build_model(recipe)  # starts as an exact copy
    ema.to(device).requires_grad_(False)
    optimizers = build_optimizers(model, recipe.optimizer, world)
    progress = Progress(step=0, samples=0, seconds=0.0, recipe=recipe.to_dict())
    if resume:
        folder = checkpoint.latest(recipe.run_dir)
        progress = checkpoint.load(folder, model, ema, optimizers)
        _check_same_recipe(recipe, progress)
    if recipe.compile:
        torch._dynamo.config.recompile_limit = SHAPES_COMPILED_AT_MOST
        torch._dynamo.config.accumulated_recompile_limit = 4 * SHAPES_COMPILED_AT_MOST
        for layer in model.model.language_model.layers:  # one block compiles 8 times faster
            layer.compile(dynamic=False)
    log = None
    if world.main:
        log = RunLog(recipe.run_dir / "log.jsonl", on_log, first_step=progress.step)
        log.write({"step": progress.step, "message": _beginning(recipe, model, progress, world)})

    def save(step: int) -> None:
        if world.main:
            seconds = progress.seconds + time.monotonic() - started
            samples = recipe.first_sample(step)
            now = Progress(step=step, samples=samples, seconds=seconds, recipe=recipe.to_dict())
            keep = recipe.keep_checkpoints
            checkpoint.save(recipe.run_dir, now, model, ema, optimizers, keep=keep)

    started = time.monotonic()
    parameters = list(model.parameters())
    weights, averages = [p.data for p in parameters], [p.data for p in ema.parameters()]
    steps = range(progress.step, recipe.num_steps)
    batches = Prefetcher(recipe, model.config, tokenizer, steps, world.rank, world.size)
    meter = Meter()
    step = progress.step
    try:
        for step, batch in zip(steps, batches, strict=True):
            rate = learning_rate(recipe.stages, step)
            set_learning_rate(optimizers, rate)
            labels, stops = world.start_sum(batch.num_labels), world.start_sum(stop_requested())
            model.zero_grad(set_to_none=True)
            batch = batch.to(device)
            losses = compute_losses(recipe, model, batch, labels)
            losses.total.backward()
            world.average_gradients(parameters)
            norm = clip_gradients(parameters, recipe.optimizer.clip)
            values = {name: float(value) for name, value in losses.parts.items()}
            values["grad_norm"] = float(norm)
            if not all(abs(value) < float("inf") for value in values.values()):
                raise HidreamError(
                    f"the loss or its gradient is not finite at step {step} ({values}).",
                    "Resume from the last checkpoint with a lower learning rate.",
                )
            for optimizer in optimizers:
                optimizer.step()
            if world.main:
                update_ema(averages, weights, ema_decay(recipe.optimizer.ema_decay, step))
            number, _ = recipe.locate(step)
            values["redrawn"] = batch.redrawn
            meter.add(values, recipe.stages[number].batch_size)
            done = step + 1
            stopping = stops.wait() > 0
            if log is not None and (done % recipe.log_every == 0 or done in (1, recipe.num_steps)):
                log.write(_record(recipe, done, number, rate, meter.report()))
            if stopping:
                save(done)
                return False
            if _due(done, recipe.checkpoint_every) or done == recipe.num_steps:
                save(done)
            if _due(done, recipe.grid_every) and world.main:
                write_grid(ema, tokenizer, recipe, done)
                meter.reset()
    finally:
        batches.close()
    if log is not None:
        export_model(ema, tokenizer, recipe, recipe.run_dir / "model")
        log.write({"step": recipe.num_steps, "message": f"done: {recipe.run_dir / 'model'}"})
    world.barrier()
    return True


def compute_losses(recipe: Recipe, model: O1, batch: TrainBatch, labels: PendingSum) -> Losses:
    """Forward and losses of one batch. `labels`: how many the step has, over all processes.

    The picture loss weighs 1; text weighs `lm_weight` where the task is text and `caption_weight`
    where it is a picture's caption.
    """
    objective = recipe.objective
    parts: dict[str, Tensor] = {}
    total = torch.zeros((), device=batch.x0.device)
    with _precision(recipe):
        if batch.picture:
            x_t = add_noise(batch.x0, batch.noise, batch.sigma, objective.noise_scale)
            prediction = model(batch.batch, x_t, batch.sigma)
        else:
            prediction = model(batch.batch)
    if batch.picture:
        loss = picture_loss(
            prediction.x0, batch.x0, batch.sigma, objective.delta, objective.t_power
        )
        parts[f"loss_{batch.task}"] = loss.detach()
        total = total + loss
    weight = objective.caption_weight if batch.picture else objective.lm_weight
    if weight > 0:
        text = text_loss(
            prediction.logits, batch.batch.labels, labels.wait() / labels.num_processes
        )
        parts["loss_caption" if batch.picture else f"loss_{batch.task}"] = text.detach()
        total = total + weight * text
    return Losses(total, parts)


def build_model(recipe: Recipe) -> tuple[O1, Tokenizer]:
    """The recipe's model, from its seed or from the weights in `init`, in fp32 on the CPU."""
    tokenizer = Tokenizer(tokenizer_folder(recipe))
    if recipe.init:
        model, _ = load_o1(recipe.init, attention_backend=_backend(recipe))
        return model.requires_grad_(True).train(), tokenizer
    model = O1(model_config(recipe), _backend(recipe))
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    return model.train(), tokenizer


def model_config(recipe: Recipe) -> O1Config:
    """The named size; UsageError for one that does not exist."""
    if recipe.model not in SIZES:
        raise UsageError(f'unknown model "{recipe.model}"; sizes are {", ".join(SIZES)}.')
    return SIZES[recipe.model]


def _backend(recipe: Recipe) -> Backend:
    if recipe.device != "cpu" or recipe.precision == "float32":
        return "auto"  # measured in fp32 on a CPU: as fast at 16 patches, 1.3 times at 128
    patch = SIZES[recipe.model].patch_size if recipe.model in SIZES else 16
    longest = max(
        max(recipe.buckets.of(task)) + 32 + 2 * (stage.size // patch) ** 2
        for stage in recipe.stages
        for task in stage.tasks
    )
    return "math" if longest < 2 * MATH_ATTENTION_BELOW else "auto"


def _precision(recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    if recipe.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(recipe.device).type, dtype=torch.bfloat16)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _record(
    recipe: Recipe, done: int, stage: int, rate: float, means: dict[str, float]
) -> dict[str, float | int]:
    """A log line: where the run is, the means since the last line, and the time that is left."""
    speed = means["samples_per_second"]
    left = recipe.first_sample(recipe.num_steps) - recipe.first_sample(done)
    return {
        "step": done,
        "num_steps": recipe.num_steps,
        "stage": stage,
        "samples": recipe.first_sample(done),
        "lr": rate,
        **means,
        "seconds_left": left / speed,
    }


def _beginning(recipe: Recipe, model: O1, progress: Progress, world: World) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    malloc = "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "the system's malloc"
    place = f"from step {progress.step}" if progress.step else "from the start"
    return (
        f"{recipe.name}: {millions:.1f} M parameters, {recipe.num_steps} steps {place}, "
        f"{world.size} process(es) on {recipe.device}, {recipe.precision}, {malloc}, "
        f"compile {'on' if recipe.compile else 'off'}, torch {torch.__version__}, "
        f"{platform.machine()}"
    )


def _check_same_recipe(recipe: Recipe, progress: Progress) -> None:
    """Continuing with another recipe is allowed, and said; sizes of steps already done are not."""
    now = recipe.to_dict()
    changed = [key for key in now if _plain(now[key]) != _plain(progress.recipe.get(key))]
    if changed:
        logger.warning("resumed with a changed recipe: %s", ", ".join(sorted(changed)))
    if recipe.first_sample(progress.step) != progress.samples:
        raise UsageError(
            "the stages already trained differ from the checkpoint's: "
            f"{recipe.first_sample(progress.step)} samples instead of {progress.samples}.",
            "Keep `steps` and `batch_size` of finished stages.",
        )


def _plain(value: object) -> object:
    """Tuples and lists alike, as JSON has only lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
