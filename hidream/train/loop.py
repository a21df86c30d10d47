"""The training loop: one process's part of a run, from its first step to its end."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hidream.errors import UsageError
from hidream.train import checkpoint
from hidream.train.checkpoint import Progress
from hidream.train.config import Recipe, past_recipe
from hidream.train.distributed import World
from hidream.train.layout import Layout
from hidream.train.learner import Learner, StepBatch, learner_of
from hidream.train.log import Meter, OnLog, RunLog
from hidream.train.optim import (
    build_optimizers,
    clip_gradients,
    ema_decay,
    learning_rate,
    set_learning_rate,
    update_ema,
)
from hidream.train.parallel import Processes, check_divisible, checked_layout
from hidream.train.prefetch import Prefetcher
from hidream.train.rate import matrix_rate, slow_precision
from hidream.train.saving import Saver
from hidream.train.sharding import gathered, local
from hidream.train.validate import validate

logger = logging.getLogger(__name__)


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
    torch.set_flush_denormal(True)  # denormals make the first steps ten times slower
    layout = checked_layout(recipe, world)
    learner = learner_of(recipe, world)
    check_divisible(layout, learner)
    trainee = Trainee(learner, Processes(layout, world))
    begun_at = trainee.begin(resume)
    on_begin()
    log = None
    if world.main:
        learner.describe()
        if warning := slow_precision(recipe):
            logger.warning(warning)
        log = RunLog(recipe.run_dir / "log.jsonl", on_log, first_step=begun_at.step)
        message = _beginning(recipe, trainee.model, begun_at, layout)
        log.write({"step": begun_at.step, "message": message})
    steps = range(begun_at.step, recipe.num_steps)
    make = partial(make_parts, learner, layout.reader(world.rank), layout.num_readers)
    batches = Prefetcher(make, steps, ahead=recipe.prefetch)
    speed = matrix_rate(recipe.device, recipe.precision)
    meter = Meter(bounded=not trainee.scaler.is_enabled(), rate=speed)
    try:
        for step, parts in zip(steps, meter.waiting(batches), strict=True):
            stops = world.start_sums(stop_requested())
            rate = learning_rate(recipe.stages, step)
            number, _ = recipe.locate(step)
            values = trainee.backward(parts)
            flops = sum(map(learner.flops, parts))
            meter.add(step, values, recipe.stages[number].batch_size, flops)
            if trainee.device.type == "cpu":
                meter.check()  # before the weights change; on a GPU, where it waits, now and then
            trainee.update(step, rate)
            done = step + 1
            stopping = any(stops.wait())
            if _due(done, recipe.log_every) or done in (1, recipe.num_steps):
                means = meter.report()
                if log is not None:
                    log.write(_record(recipe, done, number, rate, means))
            if stopping or _due(done, recipe.checkpoint_every) or done == recipe.num_steps:
                meter.check()
                trainee.save(done)
            if stopping:
                trainee.saver.wait()
                return False
            with meter.paused():
                if _due(done, recipe.grid_every):
                    trainee.with_averages(partial(_write_grid, learner, done, log))
                if _due(done, recipe.validation.every):
                    trainee.with_averages(partial(_validate, learner, done, log))
    finally:
        batches.close()
    trainee.saver.wait()
    result = recipe.run_dir / learner.result
    trainee.with_averages(lambda model: learner.export(model, result), torch.device("cpu"))
    if log is not None:
        log.write({"step": recipe.num_steps, "message": f"done: {result}"})
    world.barrier()
    return True


def make_parts(learner: Learner, reader: int, num_readers: int, step: int) -> list[StepBatch]:
    """The parts of a step that one of those who have samples of their own computes."""
    num_parts = learner.recipe.accumulate
    world = num_readers * num_parts
    return [
        learner.make_batch(step, reader + part * num_readers, world) for part in range(num_parts)
    ]


class Trainee:
    """What a run changes: weights, their averages, optimizers and fp16's gradient scale.

    Every process has one. Sharded, each holds its share of everything; else all hold the same, and
    the first alone keeps the averages.
    """

    def __init__(self, learner: Learner, processes: Processes):
        recipe = learner.recipe
        self.learner, self.recipe = learner, recipe
        self.processes, self.world = processes, processes.world
        self.device = torch.device(recipe.device)
        self.sharded = processes.sharded
        self.model, self.ema = processes.spread(learner)
        self.optimizers = build_optimizers(self.model, recipe.optimizer, self.world)
        enabled = recipe.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.parameters = list(self.model.parameters())
        self.saver = Saver(
            recipe.run_dir,
            self.world,
            keep=recipe.keep_checkpoints,
            sharded=self.sharded,
            in_shards=recipe.parallel.checkpoint == "sharded",
            ahead=recipe.parallel.async_save,
        )
        self.seconds, self.started = 0.0, time.monotonic()

    def begin(self, resume: bool) -> Progress:
        """Where the run stands: at its start, or at a checkpoint of its own or of another run."""
        recipe, step = self.recipe, self.recipe.first_step
        state = (self.model, self.ema, self.optimizers)
        samples = recipe.first_sample(step)
        progress = Progress(step=step, samples=samples, seconds=0.0, recipe=recipe.to_dict())
        if resume:
            progress = checkpoint.load(checkpoint.latest(recipe.run_dir, self.world), *state)
        elif recipe.start:
            new = self.learner.may_be_new
            progress = checkpoint.load(Path(recipe.start), *state, may_be_new=new)
        if progress.step > recipe.num_steps:
            raise UsageError(
                f"the checkpoint has {progress.step} steps behind it, the recipe "
                f"{recipe.num_steps}.",
                "The recipe's steps count from the very start; give it more.",
            )
        if resume:
            _check_same_recipe(recipe, progress)
        if progress.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(progress.scaler)
        self.seconds, self.started = progress.seconds, time.monotonic()
        return progress

    def backward(self, parts: Sequence[StepBatch]) -> dict[str, Any]:
        """The gradient of a step's parts, clipped; returns the losses and what else is logged.

        A part's losses are as if each part had a process of its own.
        """
        counts = (sum(of_one) for of_one in zip(*(part.counts for part in parts), strict=True))
        sums = self.world.start_sums(*counts, sum(part.corrupt for part in parts))
        sums = replace(sums, num_processes=self.world.size * len(parts))
        self.model.zero_grad(set_to_none=True)
        logged: dict[str, list[Tensor]] = defaultdict(list)
        for part in parts:
            losses = self.learner.losses(self.model, part.to(self.device), sums)
            self.scaler.scale(losses.total / len(parts)).backward()
            for name, value in (("loss", losses.total.detach()), *losses.parts.items()):
                logged[name].append(value)
        self.processes.finish_gradients(self.model, self.learner)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        shares = self.world if self.sharded else None
        norm = clip_gradients(self.parameters, self.recipe.optimizer.clip, shares)
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        redrawn, corrupt = sum(part.redrawn for part in parts), sums.wait()[-1]
        return {**means, "grad_norm": norm, "redrawn": redrawn, "corrupt": corrupt}

    def update(self, step: int, rate: float) -> None:
        """Weights and averages after step `step`."""
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.world.main or self.sharded:
            weights, averages = (
                [local(p.data) for p in model.parameters()] for model in (self.model, self.ema)
            )
            update_ema(averages, weights, ema_decay(self.recipe.optimizer.ema_decay, step))

    def save(self, step: int) -> None:
        """Begin a checkpoint after `step` steps, see `Saver`."""
        if not (self.world.main or self.sharded):
            return
        progress = Progress(
            step=step,
            samples=self.recipe.first_sample(step),
            seconds=self.seconds + time.monotonic() - self.started,
            recipe=self.recipe.to_dict(),
            scaler=self.scaler.state_dict(),
        )
        self.saver.save(progress, self.model, self.ema, self.optimizers)

    def with_averages(
        self, function: Callable[[nn.Module], object], device: torch.device | None = None
    ) -> None:
        """Have the first process call `function` with the averaged weights, whole: those of a
        model in shards on `device`, on the run's if not given."""
        model = self.ema
        if self.sharded:
            tensors = gathered(self.ema.state_dict(), keep=self.world.main)
            if self.world.main:
                model = self.learner.skeleton().requires_grad_(False)
                model.load_state_dict(tensors, assign=True)
                model.to(device or self.device)
        if self.world.main:
            function(model)


def _write_grid(learner: Learner, step: int, log: RunLog | None, ema: nn.Module) -> None:
    file = learner.recipe.run_dir / "grids" / f"{step:07d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    learner.grid(ema, step).save(file)
    if log is not None:
        log.write({"step": step, "picture": str(file), "message": f"step {step}: {file}"})


def _validate(learner: Learner, step: int, log: RunLog | None, ema: nn.Module) -> None:
    if log is not None:
        log.write(validate(learner.recipe, learner.pipeline(ema), step))


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


def _beginning(recipe: Recipe, model: nn.Module, progress: Progress, layout: Layout) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    malloc = "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "the system's malloc"
    place = f"from step {progress.step}" if progress.step else "from the start"
    return (
        f"{recipe.name}: {millions:.1f} M parameters, {recipe.num_steps} steps {place}, "
        f"{layout.num_processes} process(es) ({layout}) on {recipe.device}, {recipe.precision} at "
        f"{matrix_rate(recipe.device, recipe.precision) / 1e9:.0f} GFLOP/s in matrices, "
        f"{malloc}, "
        f"compile {'on' if recipe.compile else 'off'}, torch {torch.__version__}, "
        f"{platform.machine()}"
    )


def _check_same_recipe(recipe: Recipe, progress: Progress) -> None:
    """Continuing with another recipe is allowed, and said; sizes of steps already done are not."""
    now, before = recipe.to_dict(), past_recipe(progress.recipe).to_dict()
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        logger.warning("resumed with a changed recipe: %s", ", ".join(sorted(changed)))
    if recipe.first_sample(progress.step) != progress.samples:
        raise UsageError(
            "the stages already trained differ from the checkpoint's: "
            f"{recipe.first_sample(progress.step)} samples instead of {progress.samples}.",
            "Keep `steps` and `batch_size` of finished stages.",
        )
