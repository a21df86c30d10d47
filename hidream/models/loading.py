"""Weights from safetensors into a module that was built on the meta device, strictly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hidream.errors import ModelError
from hidream.folder import Folder

Module = TypeVar("Module", bound=nn.Module)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names whose tensor also stands under an earlier name, and that name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        earlier = first.setdefault(id(tensor), name)
        if earlier != name:
            tied[name] = earlier
    return tied


def tensor_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Name and shape of every tensor that a checkpoint of `module` holds, tied ones once."""
    tied = tied_names(module)
    return {n: list(t.shape) for n, t in module.state_dict().items() if n not in tied}


def check_tensors(folder: Folder, expected: Mapping[str, list[int]]) -> None:
    """Compare a folder's headers with what a module needs, before any weight is read.

    Raises ModelError that lists what is missing, left over or of another shape.
    """
    missing = [name for name in expected if name not in folder.tensors]
    unexpected = [name for name in folder.tensors if name not in expected]
    reshaped = [
        f"{name} {list(folder.tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in folder.tensors and list(folder.tensors[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for names, what in (
            (missing, "missing"),
            (unexpected, "not of this model"),
            (reshaped, "of a wrong shape"),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"the tensors in {folder.path} do not fit the model; {'; '.join(problems)}.",
            "Download the folder again, or check its config.json.",
        )


def load_weights(
    module: Module,
    folder: Folder,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    names: Collection[str] | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Module:
    """Fill `module` (on meta) tensor by tensor, each read straight to `device`; eval mode.

    `names` limits what is loaded; the rest stays on meta. `change(name, tensor)` is what is kept
    of a tensor that was read.

    Raises ModelError for keys too many or too few, wrong shapes, and values that are not finite.
    """
    expected = tensor_shapes(module)
    check_tensors(folder, expected)
    names = expected.keys() if names is None else names
    module.requires_grad_(False)  # first: 8-bit weights cannot have a gradient
    tensors: dict[str, Tensor] = {}
    for file in sorted({folder.tensors[name].file for name in names}):
        with safe_open(file, framework="pt", device=str(device)) as shard:
            for name in [n for n in names if folder.tensors[n].file == file]:
                tensor = shard.get_tensor(folder.prefix + name).to(dtype)
                _check_finite(name, tensor, file)
                tensors[name] = change(name, tensor)
    for name, earlier in tied_names(module).items():
        if earlier not in tensors:
            continue
        if not isinstance(tensors[earlier], nn.Parameter):
            tensors[earlier] = nn.Parameter(tensors[earlier], requires_grad=False)
        tensors[name] = tensors[earlier]  # the same object, so that they stay one
    module.load_state_dict(tensors, strict=len(names) == len(expected), assign=True)
    return module.eval()


class Reader:
    """A folder's tensors, again and again: files stay open, so that they stay what they are.

    They are mapped into memory: read to a CPU in the file's own dtype, a tensor is a view of its
    file, and takes no memory that the system could not have back.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self._opened: dict[tuple[Path, str], Any] = {}
        self._finite: set[str] = set()

    def read(
        self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor, in the file's dtype unless given. ModelError where it is not finite."""
        file = self.folder.tensors[name].file
        key = (file, str(device))
        if key not in self._opened:
            self._opened[key] = safe_open(file, framework="pt", device=str(device))
        tensor = self._opened[key].get_tensor(self.folder.prefix + name)
        tensor = tensor if dtype is None else tensor.to(dtype)
        if name not in self._finite:
            _check_finite(name, tensor, file)
            self._finite.add(name)
        return tensor


def _check_finite(name: str, tensor: Tensor, file: Path) -> None:
    if not tensor.isfinite().all():
        raise ModelError(
            f"{name} in {file} holds values that are not finite.",
            "The file is damaged, or the training run that wrote it diverged.",
        )
