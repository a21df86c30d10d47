"""Exact resume: everything a run needs to go on, in safetensors and JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hidream.errors import ModelError
from hidream.train.sharding import like, whole

logger = logging.getLogger(__name__)

FORMAT = 1
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


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
    write: bool = True,
) -> Path:
    """Write `run_dir/checkpoints/step-N`, point `latest` at it, keep the newest `keep`.

    A crash at any moment leaves the checkpoint before it whole and current. Of a sharded model
    every process calls this, and one of them writes (`write`).
    """
    contents = {
        FILES[0]: _on_cpu(model.state_dict()),
        FILES[1]: _on_cpu(ema.state_dict()),
        FILES[2]: _on_cpu(optimizer_tensors(model, optimizers)),
    }
    if not write:
        return folder_of(run_dir, progress.step)
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    folder = folder_of(run_dir, progress.step)
    for left in root.glob(".step-*"):  # by a run that was killed while it wrote
        shutil.rmtree(left)
    draft = root / f".{folder.name}.{os.getpid()}"
    draft.mkdir()
    try:
        for name, tensors in contents.items():
            save_file(tensors, draft / name)
        state = {"format": FORMAT, **vars(progress), "digests": _digests(draft)}
        (draft / FILES[3]).write_text(json.dumps(state, indent=1))
        for name in FILES:
            _sync(draft / name)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
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


def latest(run_dir: Path) -> Path:
    """The current checkpoint's folder; where that is damaged, the newest before it that is not.

    Every file is read, for its digest. Raises ModelError where there is no checkpoint at all, or
    none that is whole.
    """
    newest = current(run_dir)
    older = [folder_of(run_dir, step) for step in reversed(steps_of(run_dir))]
    for folder in (newest, *(folder for folder in older if folder.name < newest.name)):
        try:
            verify(folder)
            return folder
        except ModelError as error:
            logger.warning("%s The one before it is used.", error.problem)
    raise ModelError(f"no checkpoint in {run_dir} is whole.", "Start anew, in another folder.")


def verify(folder: Path) -> None:
    """ModelError unless a checkpoint's files are those that were written, by their SHA-256."""
    progress = _state(folder)
    try:
        found = _digests(folder)
    except OSError as error:
        raise _broken(folder, f"{error.filename}: {error.strerror}") from error
    for name, digest in progress.get("digests", {}).items():
        if found.get(name) != digest:
            raise _broken(folder, f"{name} is not what was written")


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
    _fill(model, folder / FILES[0], may_be_new)
    if ema is not None:
        _fill(ema, folder / FILES[1], may_be_new)
    if optimizers:
        restore_optimizers(model, optimizers, _read(folder / FILES[2]), folder)
    return progress


def load_ema(folder: Path, model: nn.Module) -> Progress:
    """Fill `model` with the checkpoint's averaged weights."""
    _fill(model, folder / FILES[1])
    return read_progress(folder)


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
        state: dict[str, Any] = json.loads((folder / FILES[3]).read_text())
        number = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(folder, f"state.json: {error}") from error
    if number != FORMAT:
        raise _broken(folder, f"format {number}, this version reads {FORMAT}")
    return state


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but state.json, which holds them."""
    found = {}
    for name in FILES[:3]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def _fill(module: nn.Module, file: Path, may_be_new: str = "") -> None:
    tensors, own = _read(file), module.state_dict()
    if may_be_new:
        tensors = {n: t for n, t in own.items() if n.startswith(may_be_new)} | tensors
    different = sorted(tensors.keys() ^ own.keys())
    different += [n for n in tensors.keys() & own.keys() if tensors[n].shape != own[n].shape]
    if different:
        raise ModelError(
            f"{file} is of another model: they differ in {', '.join(different[:3])}.",
            "Choose the model that it was trained as, or start anew.",
        )
    module.load_state_dict({name: like(tensor, own[name]) for name, tensor in tensors.items()})


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
