"""The training loop: one process's part of a run, from its first step to its end."""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from hidream.errors import InputError, UsageError
from hidream.train import checkpoint
from hidream.train.checkpoint import Progress
from hidream.train.config import Recipe, parse_recipe
from hidream.train.distributed import World
from hidream.train.learner import Learner, learner_of
from hidream.train.log import Meter, OnLog, RunLog
from hidream.train.optim import (
    build_optimizers,
    clip_gradients,
    ema_decay,
    learning_rate,
    set_learning_rate,
    update_ema,
)
from hidream.train.prefetch import Prefetcher

logger = logging.getLogger(__name__)

SHAPES_COMPILED_AT_MOST = 64


def train(
    recipe: Recipe,
    world: World | None = None,
    *,
    resume: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    on_begin: Callable[[], object] = lambda: None,
    on_log: OnLog | None = None,
) -> bool:
    """Run the recipe in this process; True when it reached its end, False when asked to stop.

    Every process of `world` calls this. `stop_requested` is asked once a step; when one process
    says yes, all finish the step, and the first saves a checkpoint. `on_begin` is called once all
    is loaded and fits; until then nothing is written into the run's folder. Raises ModelError for
    a checkpoint that does not fit, InputError where one cannot be written, HidreamError when the
    loss is no longer finite.

    A run that must come before (see `Recipe.before`) is run, or resumed, first.
    """
    world = world or World()
    if recipe.before is not None and not (recipe.before.run_dir / "model").exists():
        begun = (recipe.before.run_dir / "checkpoints" / "latest").exists()
        if not train(
            recipe.before,
            world,
            resume=resume and begun,
            stop_requested=stop_requested,
            on_log=on_log,
        ):
            return False
        resume = False
    device = torch.device(recipe.device)
    torch.set_flush_denormal(True)  # denormals make the first steps ten times slower
    learner = learner_of(recipe, world)
    model = learner.build().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model, recipe.optimizer, world)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    step = recipe.first_step
    progress = Progress(
        step=step, samples=recipe.first_sample(step), seconds=0.0, recipe=recipe.to_dict()
    )
    if resume:
        progress = checkpoint.load(checkpoint.latest(recipe.run_dir), model, ema, optimizers)
    elif recipe.start:
        new = learner.may_be_new
        progress = checkpoint.load(Path(recipe.start), model, ema, optimizers, may_be_new=new)
    if progress.step > recipe.num_steps:
        raise UsageError(
            f"the checkpoint has {progress.step} steps behind it, the recipe {recipe.num_steps}.",
            "The recipe's steps count from the very start; give it more.",
        )
    if resume:
        _check_same_recipe(recipe, progress)
    if progress.scaler and scaler.is_enabled():
        scaler.load_state_dict(progress.scaler)
    if recipe.compile:
        torch._dynamo.config.recompile_limit = SHAPES_COMPILED_AT_MOST
        torch._dynamo.config.accumulated_recompile_limit = 4 * SHAPES_COMPILED_AT_MOST
        for block in learner.blocks(model):
            block.compile(dynamic=False)
    on_begin()
    log = None
    if world.main:
        learner.describe()
        log = RunLog(recipe.run_dir / "log.jsonl", on_log, first_step=progress.step)
        log.write({"step": progress.step, "message": _beginning(recipe, model, progress, world)})

    def save(step: int) -> None:
        if world.main:
            seconds = progress.seconds + time.monotonic() - started
            samples = recipe.first_sample(step)
            now = Progress(
                step=step,
                samples=samples,
                seconds=seconds,
                recipe=recipe.to_dict(),
                scaler=scaler.state_dict(),
            )
            keep = recipe.keep_checkpoints
            try:
                checkpoint.save(recipe.run_dir, now, model, ema, optimizers, keep=keep)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"the checkpoint of step {step} cannot be written into {recipe.run_dir}: "
                    f"{getattr(error, 'strerror', None) or error}.",
                    "Make room, and resume from the one before.",
                ) from error

    started = time.monotonic()
    parameters = list(model.parameters())
    weights, averages = [p.data for p in parameters], [p.data for p in ema.parameters()]
    steps = range(progress.step, recipe.num_steps)
    make = partial(learner.make_batch, rank=world.rank, world=world.size)
    batches = Prefetcher(make, steps, ahead=recipe.prefetch)
    meter = Meter(bounded=not scaler.is_enabled())
    try:
        for step, batch in zip(steps, meter.waiting(batches), strict=True):
            rate = learning_rate(recipe.stages, step)
            set_learning_rate(optimizers, rate)
            labels, stops = world.start_sum(batch.num_labels), world.start_sum(stop_requested())
            model.zero_grad(set_to_none=True)
            batch = batch.to(device)
            losses = learner.losses(model, batch, labels)
            scaler.scale(losses.total).backward()
            world.average_gradients(parameters)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = clip_gradients(parameters, recipe.optimizer.clip)
            number, _ = recipe.locate(step)
            values = {**losses.parts, "grad_norm": norm, "redrawn": batch.redrawn}
            meter.add(step, values, recipe.stages[number].batch_size)
            if device.type == "cpu":
                meter.check()  # before the weights change; on a GPU, where it waits, now and then
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if world.main:
                update_ema(averages, weights, ema_decay(recipe.optimizer.ema_decay, step))
            done = step + 1
            stopping = stops.wait() > 0
            if done % recipe.log_every == 0 or done in (1, recipe.num_steps):
                means = meter.report()
                if log is not None:
                    log.write(_record(recipe, done, number, rate, means))
            if stopping or _due(done, recipe.checkpoint_every) or done == recipe.num_steps:
                meter.check()
                save(done)
            if stopping:
                return False
            if _due(done, recipe.grid_every) and world.main:
                _write_grid(learner, ema, done)
                meter.reset()
    finally:
        batches.close()
    if log is not None:
        learner.export(ema, recipe.run_dir / "model")
        log.write({"step": recipe.num_steps, "message": f"done: {recipe.run_dir / 'model'}"})
    world.barrier()
    return True


def _write_grid(learner: Learner, ema: nn.Module, step: int) -> None:
    folder = learner.recipe.run_dir / "grids"
    folder.mkdir(parents=True, exist_ok=True)
    learner.grid(ema, step).save(folder / f"{step:07d}.png")


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


def _beginning(recipe: Recipe, model: nn.Module, progress: Progress, world: World) -> str:
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
    now, before = recipe.to_dict(), parse_recipe(progress.recipe).to_dict()
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        logger.warning("resumed with a changed recipe: %s", ", ".join(sorted(changed)))
    if recipe.first_sample(progress.step) != progress.samples:
        raise UsageError(
            "the stages already trained differ from the checkpoint's: "
            f"{recipe.first_sample(progress.step)} samples instead of {progress.samples}.",
            "Keep `steps` and `batch_size` of finished stages.",
        )
