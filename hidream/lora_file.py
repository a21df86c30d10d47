"""LoRA files, read without their weights: which layers of a model each of them changes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hidream.errors import InputError, ModelError
from hidream.folder import PICKLES, TensorInfo, read_header
from hidream.locating import fetch

# What stands before a layer's name: PEFT, ComfyUI and ai-toolkit, diffusers, kohya and musubi,
# LyCORIS, DiffSynth.
_PREFIXES = (
    *("base_model.model.", "diffusion_model.", "model.diffusion_model.", "transformer."),
    *("lora_unet_", "lora_transformer_", "lycoris_", "pipe.dit."),
)
# What stands after it; PEFT and DiffSynth may put the adapter's name before ".weight".
_NAMED = r"(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
_ROLES = {
    "down": re.compile(rf"(.+)\.(?:lora_A|lora_down|lora\.down){_NAMED}"),
    "up": re.compile(rf"(.+)\.(?:lora_B|lora_up|lora\.up){_NAMED}"),
    "alpha": re.compile(r"(.+)\.alpha"),
    "magnitude": re.compile(rf"(.+)\.(?:lora_magnitude_vector|dora_scale){_NAMED}"),
}
_OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "lora_mid": "LoCon"}
_OTHER_KINDS |= {"lora_embedding_": "changes of embeddings", ".diff": "whole weights"}
_DTYPES = ("F64", "F32", "F16", "BF16")
_TABLES = ("embed_tokens", "pos_embed")  # two-dimensional, but looked up, not multiplied
_PEFT_FILE = "adapter_model.safetensors"
_FOLDER_FILES = (_PEFT_FILE, "pytorch_lora_weights.safetensors")  # PEFT's name and diffusers'
_AGAIN = "Download or copy the file again."


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One layer's tensors, by their names in the file: `down` is (rank, in), `up` (out, rank).

    `layer` is the model's own name. Its weight changes by scale · up · down, where scale is
    `alpha` (a tensor) over the rank, or else `scale`. `magnitude`, one number a row, makes it a
    DoRA (arXiv 2402.09353).
    """

    layer: str
    down: str
    up: str
    rank: int
    scale: float
    alpha: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a LoRA file does to one model: the layers that fit, and what a user should know.

    `whole`: tensors of the model that the file brings whole, and their names in the file.
    """

    path: Path
    stamp: tuple[int, int]
    layers: tuple[LoraLayer, ...]
    whole: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def linear_layers(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """(in, out) of the layers that a LoRA can change, from a model's tensor names and shapes."""
    found = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and len(shape) > 1 and not layer.endswith(_TABLES):
            found[layer] = (math.prod(shape[1:]), shape[0])
    return found


def find_lora(path: str) -> Path:
    """The safetensors file of a path (a file, or a folder that holds one) or hub name.

    A hub name is `owner/name` or `owner/name/file.safetensors`, and must be on this machine.

    Raises:
        InputError: missing, a pickle, or a folder with no or several safetensors files.
        ModelError: a hub name that is not on this machine.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() in PICKLES:
        raise InputError(
            f"the LoRA {path} is a pickle, which can run any code and is never loaded.",
            "Use its safetensors file.",
        )
    try:
        if not place.is_file() and not place.is_dir():
            place = _from_hub(path)
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    except OSError as error:
        raise InputError(f"the LoRA {path} cannot be read: {error.strerror}.") from error
    files = [file for file in files if file.name in _FOLDER_FILES] or files
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3]) or "none"
        raise InputError(
            f"the folder {path} holds {len(files)} safetensors files ({names}); a LoRA is one.",
            "Name the file.",
        )
    return files[0]


def read_lora(
    path: str,
    layers: Mapping[str, tuple[int, int]],
    model: str,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> LoraFile:
    """Match a LoRA file's tensors with a model's linear layers (see `linear_layers`).

    With `shapes`, those of all the model's tensors, a file may bring some whole beside its LoRA,
    as HiDream-E1-Full.safetensors does.

    Raises:
        InputError: no such file, not safetensors, damaged, none of its layers fits the model,
            their shapes are not the model's, or it is of a kind that cannot be applied.
        ModelError: a hub name that is not on this machine.
    """
    file = find_lora(path)
    try:
        stamp = stamp_of(file)
        tensors = read_header(file)
        config = _config(file)
    except ModelError as error:
        raise InputError(error.problem, error.remedy.replace("folder", "file")) from error
    except OSError as error:
        raise InputError(f"the LoRA {file} cannot be read: {error.strerror}.") from error
    whole = _whole(tensors, shapes or {}, file)
    taken = set(whole.values())
    groups = _grouped({name: info for name, info in tensors.items() if name not in taken})
    names = _names(layers)
    fitting: dict[str, LoraLayer] = {}
    left_out, rest = [], []
    for group, roles in groups.items():
        layer = _layer_of(group, names, file)
        if layer is None or not {"down", "up"} & roles.keys():
            left_out.append(group)
            continue
        if layer in fitting:
            raise InputError(f"{file} changes the layer {layer} twice.", _AGAIN)
        rest += [roles["other"]] if "other" in roles else []
        _check(file, group, roles, tensors, layers[layer])
        fitting[layer] = _lora_layer(layer, roles, tensors, config)
        if "magnitude" in roles and f"{layer}.weight" in whole:
            raise InputError(f"{file} brings {layer} whole and as a DoRA.", _AGAIN)
    if not fitting:
        raise _unfit(file, left_out, tensors, model)
    warnings = []
    if left_out:
        warnings.append(
            f"{file.name}: {len(fitting)} of {len(groups)} layers fit {model} and are applied; "
            f"left out: {_two_of(left_out)}."
        )
    if rest:
        warnings.append(f"{file.name}: tensors of other kinds are left out: {_two_of(rest)}.")
    if file.name == _PEFT_FILE and config is None:
        warnings.append(
            f"{file} has no adapter_config.json beside it: its alpha is taken to be its rank."
        )
    return LoraFile(
        path=file,
        stamp=stamp,
        layers=tuple(fitting.values()),
        whole=whole,
        warnings=tuple(warnings),
    )


def stamp_of(file: Path) -> tuple[int, int]:
    """Time of change in ns and size in bytes: another stamp, another LoRA."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _from_hub(path: str) -> Path:
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?", path)
    if not hub or (hub[2] is None and path.endswith(".safetensors")) or ".." in path:
        raise InputError(f"the LoRA {path} does not exist.", "Check its path.")
    repo, file = hub[1], hub[2]
    missing = ModelError(
        f"the LoRA {path} is neither a file nor, from the hub, on this machine.",
        f'Check its path, or get it with "hf download {repo}{f" {file}" if file else ""}".',
    )
    try:
        folder = fetch(repo, local_only=True)
    except ModelError as error:
        raise missing from error
    place = folder / file if file else folder
    if not place.exists():
        raise missing
    return place


def _grouped(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """For each layer, as the file calls it, its tensors by role; "other" is one of none."""
    groups: dict[str, dict[str, str]] = {}
    for name, info in tensors.items():
        group, role = _role_of(name)
        roles = groups.setdefault(group, {})
        if role in roles and role != "other":
            raise InputError(
                f"{info.file} holds {roles[role]} and {name}: two LoRAs in one file.",
                "Save them apart.",
            )
        roles[role] = name
    return groups


def _whole(
    tensors: Mapping[str, TensorInfo], shapes: Mapping[str, Sequence[int]], file: Path
) -> dict[str, str]:
    """Tensors of the model that the file holds under their own names, and these names.

    Where a layer has a LoRA as well, PEFT puts `.base_layer` before the tensor's last word.
    """
    found: dict[str, str] = {}
    for key, info in tensors.items():
        name = key.replace(".base_layer.", ".")
        while name not in shapes:
            prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
            if prefix is None:
                break
            name = name.removeprefix(prefix)
        if name not in shapes:
            continue
        if name in found:
            raise InputError(f"{file} changes the tensor {name} twice.", _AGAIN)
        if info.dtype not in _DTYPES:
            raise InputError(f"{key} in {file} is {info.dtype}; it must be a float.")
        if list(info.shape) != list(shapes[name]):
            raise InputError(
                f"{file} is for a model of another size: {key} is {list(info.shape)}, here "
                f"{list(shapes[name])}.",
                "Use a LoRA of this model.",
            )
        found[name] = key
    return found


def _role_of(name: str) -> tuple[str, str]:
    for role, pattern in _ROLES.items():
        match = pattern.fullmatch(name)
        if match:
            return match[1], role
    return name.removesuffix(".weight").rpartition(".")[0] or name, "other"


def _names(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every way to write a layer's name, with or without the outer `model.`, and whose it is."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        short = layer.removeprefix("model.")
        for form in {layer, short, layer.replace(".", "_"), short.replace(".", "_")}:
            names.setdefault(form, []).append(layer)
    return names


def _layer_of(group: str, names: Mapping[str, list[str]], file: Path) -> str | None:
    while group not in names:
        prefix = next((p for p in _PREFIXES if group.startswith(p)), None)
        if prefix is None:
            return None
        group = group.removeprefix(prefix)
    if len(names[group]) > 1:
        raise InputError(
            f'"{group}" in {file} may be {" or ".join(names[group])}.',
            "Save the LoRA with dots in its names.",
        )
    return names[group][0]


def _check(
    file: Path,
    group: str,
    roles: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    sides: tuple[int, int],
) -> None:
    """Raise InputError unless a layer's tensors are whole, fit each other and the model."""
    for role in ("down", "up"):
        if role not in roles:
            raise InputError(f"{file} is incomplete: {group} has no {role} matrix.", _AGAIN)
    for role, name in roles.items():
        if role != "other" and tensors[name].dtype not in _DTYPES:
            raise InputError(
                f"{name} in {file} is {tensors[name].dtype}; a LoRA is one of {', '.join(_DTYPES)}."
            )
    down, up = (tensors[roles[role]].shape for role in ("down", "up"))
    if len(down) < 2 or len(up) < 2 or up[1:] != (down[0],) + (1,) * (len(up) - 2) or not down[0]:
        raise InputError(
            f"{file} is damaged: {group} multiplies {list(up)} by {list(down)}.", _AGAIN
        )
    there = (math.prod(down[1:]), up[0])
    if there != sides:
        raise InputError(
            f"{file} is for a model of another size: {group} maps {there[0]} values to {there[1]}, "
            f"here {sides[0]} to {sides[1]}.",
            "Use a LoRA of this model.",
        )
    if "alpha" in roles and math.prod(tensors[roles["alpha"]].shape) != 1:
        raise InputError(f"{file} is damaged: {roles['alpha']} is not one number.", _AGAIN)
    if "magnitude" in roles:
        shape = tensors[roles["magnitude"]].shape
        if shape[:1] != (up[0],) or math.prod(shape) != up[0]:
            raise InputError(
                f"{roles['magnitude']} in {file} is {list(shape)}; only a DoRA with one magnitude "
                f"for each of the {up[0]} rows can be applied."
            )


def _lora_layer(
    layer: str,
    roles: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
) -> LoraLayer:
    rank = tensors[roles["down"]].shape[0]
    return LoraLayer(
        layer=layer,
        down=roles["down"],
        up=roles["up"],
        rank=rank,
        scale=_scale(layer, rank, config or {}),
        alpha=roles.get("alpha"),
        magnitude=roles.get("magnitude"),
    )


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """PEFT keeps alpha beside the tensors: one for all, or by a pattern of the layer's name."""
    alpha = config.get("lora_alpha", rank)
    for name, value in (config.get("alpha_pattern") or {}).items():
        if f".{layer}".endswith(f".{_plain_name(name)}"):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config(file: Path) -> dict[str, Any] | None:
    """The settings of PEFT's `adapter_config.json`, or those that diffusers puts in the header."""
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    if text is None and file.name == _PEFT_FILE and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return None
    try:
        config = json.loads(text)
        found = {name.removeprefix("transformer."): value for name, value in config.items()}
        patterns = found.get("alpha_pattern") or {}
        alphas = [found.get("lora_alpha", 1), *patterns.values()]
        good = all(math.isfinite(alpha) for alpha in alphas)
        good = good and all(re.fullmatch(r"[\w.]+", _plain_name(name)) for name in patterns)
    except (ValueError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InputError(
            f"the alphas that belong to {file} cannot be read.",
            "They are in adapter_config.json or in the file's header.",
        )
    return found


def _plain_name(pattern: str) -> str:
    """A layer's name out of a regular expression for it, as PEFT and diffusers write them."""
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _two_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _unfit(
    file: Path, left_out: Sequence[str], tensors: Mapping[str, TensorInfo], model: str
) -> InputError:
    kinds = {kind for part, kind in _OTHER_KINDS.items() for name in tensors if part in name}
    if kinds:
        return InputError(
            f"{file} holds {' and '.join(sorted(kinds))}, which cannot be applied.",
            "LoRA and DoRA can.",
        )
    if not any(_role_of(name)[1] == "down" for name in tensors):
        return InputError(
            f"{file} is no LoRA: it holds no lora_A and no lora_down matrix.", "Check its path."
        )
    return InputError(
        f"none of the {len(left_out)} layers in {file} fits {model}; left out: "
        f"{_two_of(left_out)}.",
        "The LoRA was made for another model.",
    )
