"""Exact resume: everything a run needs to go on, in safetensors and JSON, written atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hidream.errors import ModelError
from hidream.train import shards
from hidream.train.distributed import World
from hidream.train.sharding import like, whole

logger = logging.getLogger(__name__)

FORMAT = 1
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. Randomness has no state: it is a function of (seed, sample index)."""

    step: int  # steps done; the next step's number
    samples: int  # drawn before that step, over all processes
    seconds: float  # spent so far, over all sessions
    recipe: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16's gradient scale and its counters


def save(
    run_dir: Path,
    progress: Progress,
    model: nn.Module,
    ema: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    keep: int,
) -> Path:
    """Write `run_dir/checkpoints/step-N`, point `latest` at it, keep the newest `keep`.

    A crash at any moment leaves the checkpoint before it whole and current.
    """
    return write(run_dir, progress, contents(model, ema, optimizers), keep=keep)


def contents(
    model: nn.Module, ema: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, dict[str, Tensor]]:
    """Copies of all whole tensors, by file; of a sharded model every process must call this."""
    return {
        FILES[0]: _on_cpu(model.state_dict()),
        FILES[1]: _on_cpu(ema.state_dict()),
        FILES[2]: _on_cpu(optimizer_tensors(model, optimizers)),
    }


def parts(
    model: nn.Module, ema: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Copies of this process's part of all tensors."""
    return {
        **shards.copied(model.state_dict(), "model"),
        **shards.copied(ema.state_dict(), "ema"),
        **shards.copied(optimizer_tensors(model, optimizers), "optimizer"),
    }


def write(
    run_dir: Path, progress: Progress, contents: dict[str, dict[str, Tensor]], *, keep: int
) -> Path:
    """What `save` does, with what `contents` copied: one process does it."""
    draft = _begin(run_dir, progress.step)
    try:
        for name, tensors in contents.items():
            save_file(tensors, draft / name)
        digests = {name: shards.digest(draft / name) for name in contents}
        return _finish(run_dir, progress, draft, digests, keep=keep)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_shards(
    run_dir: Path, progress: Progress, parts: dict[str, Tensor], world: World, *, keep: int
) -> Path:
    """What `save` does, with what `parts` copied: every process does it, with its own."""
    draft = _draft(run_dir, progress.step)
    if world.main:
        _begin(run_dir, progress.step)
    world.barrier()
    try:
        digests = shards.write(draft, parts, world)
        if world.main:
            _finish(run_dir, progress, draft, digests, keep=keep)
        world.barrier()
    finally:
        if world.main:
            shutil.rmtree(draft, ignore_errors=True)
    return folder_of(run_dir, progress.step)


def _draft(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f".{folder_of(run_dir, step).name}.draft"


def _begin(run_dir: Path, step: int) -> Path:
    """An empty folder to write into."""
    draft = _draft(run_dir, step)
    draft.parent.mkdir(parents=True, exist_ok=True)
    for left in draft.parent.glob(".step-*"):  # by a run that was killed while it wrote
        shutil.rmtree(left)
    draft.mkdir()
    return draft


def _finish(
    run_dir: Path, progress: Progress, draft: Path, digests: dict[str, str], *, keep: int
) -> Path:
    """The draft becomes the current checkpoint, and the oldest go."""
    root, folder = draft.parent, folder_of(run_dir, progress.step)
    state = {"format": FORMAT, **vars(progress), "digests": digests}
    (draft / STATE).write_text(json.dumps(state, indent=1))
    for name in (*digests, STATE):
        _sync(draft / name)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    pointer = root / ".latest"
    pointer.write_text(folder.name)
    _sync(pointer)
    pointer.rename(root / "latest")
    _sync(root)
    for step in steps_of(run_dir)[:-keep] if keep > 0 else []:
        if step != progress.step:
            shutil.rmtree(folder_of(run_dir, step))
    return folder


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, if there is one."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps_of(run_dir: Path) -> list[int]:
    """The steps of which there are checkpoints, rising."""
    found = [folder.name[5:] for folder in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(step) for step in found if step.isdecimal())


def current(run_dir: Path) -> Path:
    """The folder that `latest` names, unread; ModelError where there is none."""
    pointer = run_dir / "checkpoints" / "latest"
    try:
        return pointer.parent / pointer.read_text().strip()
    except OSError as error:
        raise ModelError(
            f"{run_dir} holds no checkpoint to resume from.", "Start the run without --resume."
        ) from error


def latest(run_dir: Path, world: World | None = None) -> Path:
    """The current checkpoint's folder; where that is damaged, the newest before it that is not.

    Every file is read, for its digest; the processes of `world`, which all must call this, share
    them. Raises ModelError where there is no checkpoint at all, or none that is whole.
    """
    newest = current(run_dir)
    older = [folder_of(run_dir, step) for step in reversed(steps_of(run_dir))]
    candidates = [newest, *(folder for folder in older if folder.name < newest.name)]
    for number, folder in enumerate(candidates, 1):
        try:
            verify(folder, world)
            return folder
        except ModelError as error:
            following = " The one before it is tried." if number < len(candidates) else ""
            if world is None or world.main:
                logger.warning("%s%s", error.problem, following)
    raise ModelError(f"no checkpoint in {run_dir} is whole.", "Start anew, in another folder.")


def verify(folder: Path, world: World | None = None) -> None:
    """ModelError unless a checkpoint's files are those that were written, by their SHA-256."""
    world, problem = world or World(), ""
    digests = _state(folder).get("digests") or dict.fromkeys(FILES)  # the first had none
    for name in sorted(digests)[world.rank :: world.size]:
        try:
            found = shards.digest(folder / name)
        except OSError as error:
            problem = f"{name}: {error.strerror}"
        else:
            if digests[name] not in (found, None):
                problem = f"{name} is not what was written"
    (num_problems,) = world.sum([bool(problem)])
    if num_problems:
        raise _broken(folder, problem or "another process found one of its files damaged")


def load(
    folder: Path,
    model: nn.Module,
    ema: nn.Module | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    may_be_new: str = "",
) -> Progress:
    """Fill model, moving average and optimizer in place; ModelError for anything amiss.

    Tensors whose names begin with `may_be_new` keep their values where the checkpoint has none.
    """
    progress = read_progress(folder)
    if _in_shards(folder):
        _load_shards(folder, {"model": model, "ema": ema}, optimizers, may_be_new)
        return progress
    _fill(model, folder / FILES[0], may_be_new)
    if ema is not None:
        _fill(ema, folder / FILES[1], may_be_new)
    if optimizers:
        restore_optimizers(model, optimizers, _read(folder / FILES[2]), folder)
    return progress


def load_ema(folder: Path, model: nn.Module) -> Progress:
    """Fill `model` with the checkpoint's averaged weights."""
    progress = read_progress(folder)
    if _in_shards(folder):
        _load_shards(folder, {"ema": model})
    else:
        _fill(model, folder / FILES[1])
    return progress


def read_progress(folder: Path) -> Progress:
    """Where the checkpoint's run stands."""
    state = _state(folder)
    try:
        return Progress(**{k: v for k, v in state.items() if k not in ("format", "digests")})
    except TypeError as error:
        raise _broken(folder, f"state.json: {error}") from error


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """`PARAMETER/exp_avg` and so on, for every parameter that has had a step."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizers(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: dict[str, Tensor],
    folder: Path,
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for label, value in tensors.items():
        name, _, key = label.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise _broken(folder, f"optimizer state {label} does not fit the model")
        owners[parameter].state[parameter][key] = like(value, parameter)


def _state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        number = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(folder, f"state.json: {error}") from error
    if number != FORMAT:
        raise _broken(folder, f"format {number}, this version reads {FORMAT}")
    return state


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(tensor.detach()) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    gathered = whole(tensor)
    own = gathered is tensor and tensor.device.type == "cpu"
    return (gathered.clone() if own else gathered.cpu()).contiguous()


def _fill(module: nn.Module, file: Path, may_be_new: str = "") -> None:
    tensors, own = _read(file), module.state_dict()
    if may_be_new:
        tensors = {n: t for n, t in own.items() if n.startswith(may_be_new)} | tensors
    _check_same(file, {n: t.shape for n, t in tensors.items()}, own)
    module.load_state_dict({name: like(tensor, own[name]) for name, tensor in tensors.items()})


def _check_same(
    place: Path, found: Mapping[str, torch.Size], own: Mapping[str, Tensor], may_be_new: str = ""
) -> None:
    different = sorted(found.keys() ^ own.keys())
    if may_be_new:
        different = [n for n in different if n in found or not n.startswith(may_be_new)]
    different += [n for n in found.keys() & own.keys() if found[n] != own[n].shape]
    if different:
        raise ModelError(
            f"{place} is of another model: they differ in {', '.join(different[:3])}.",
            "Choose the model that it was trained as, or start anew.",
        )


def _in_shards(folder: Path) -> bool:
    return any(folder.glob(shards.PATTERN))


def _load_shards(
    folder: Path,
    modules: Mapping[str, nn.Module | None],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    may_be_new: str = "",
) -> None:
    """Fill modules, by what their tensors' names begin with, and optimizers of the `model`."""
    model = modules.get("model")
    try:
        found = shards.shapes(folder)
        targets: dict[str, Tensor] = {}
        for prefix, module in modules.items():
            if module is not None:
                own, there = module.state_dict(), shards.below(found, prefix)
                _check_same(folder, there, own, may_be_new)
                targets |= {f"{prefix}/{name}": own[name] for name in there}
        states: dict[str, Tensor] = {}
        if optimizers and model is not None:
            states = _empty_states(model, shards.below(found, "optimizer"))
        shards.read(folder, targets | {f"optimizer/{n}": t for n, t in states.items()})
    except (OSError, SafetensorError) as error:
        raise _broken(folder, str(error)) from error
    if optimizers and model is not None:
        restore_optimizers(model, optimizers, states, folder)


def _empty_states(model: nn.Module, found: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Room for optimizer states of these shapes, in shards where the parameter is."""
    parameters, states = dict(model.named_parameters()), {}
    for label, shape in found.items():
        parameter = parameters.get(label.rpartition("/")[0])
        if parameter is not None and shape == parameter.shape:
            states[label] = torch.zeros_like(parameter)
        else:
            states[label] = torch.zeros(shape)
    return states


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _broken(file.parent, f"{file.name}: {error}") from error


def _broken(folder: Path, problem: str) -> ModelError:
    return ModelError(
        f"checkpoint {folder} is broken ({problem}).",
        "Resume from another step, or start anew.",
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
