"""The models by name: where they come from and what their authors publish as defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hidream.errors import ModelError, UsageError

SAMPLERS = ("euler", "heun", "unipc", "flash", "flash-official")
TASKS = ("text_to_image", "edit", "subject")
Variant = Literal["full", "dev", "fast"]
VARIANTS = ("full", "dev", "fast")

# Dev's published timesteps, out of 1000; the sampler appends the final 0.
DEV_TIMESTEPS = (
    *(999, 987, 974, 960, 945, 929, 913, 895, 877, 857, 836, 814, 790, 764),
    *(737, 707, 675, 640, 602, 560, 515, 464, 409, 347, 278, 199, 110, 8),
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request's fields become where the user leaves them out.

    `sigmas` None means the schedule computed from the number of steps and the shift; a tuple is
    used as it stands when the number of steps is its length. `noise_scale` is the standard
    deviation of the first state (and of flash's step noise); `width` and `height` are pixels and
    give the native area. `hires_strength` is the strength at which an initial picture is drawn
    larger than that. `sparsity` is above 0 only for a checkpoint that was tuned for it.
    `published_edit` is what an edit's own script, which `as_published` follows, does with a source:
    "stretch" it to the native size, or "crop" its middle to about the native area.
    """

    num_inference_steps: int
    guidance_scale: float
    shift: float
    sampler: str
    noise_scale: float
    noise_clip_std: float | None = None
    image_guidance_scale: float | None = None
    hires_strength: float | None = None
    sigmas: tuple[float, ...] | None = None
    width: int = 2048
    height: int = 2048
    sparsity: float = 0.0
    published_edit: Literal["stretch", "crop"] | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One model: its name here, its home, and how requests to it are filled in.

    `repo` is the hub id, or None for the checkpoint that ships inside the package. `pipeline` is
    "module:class", imported only when the model is loaded. `tasks`: what it does; `max_area`: the
    most pixels of one picture, None for no limit of its own; `file`: a single file of the network's
    weights, where they are not in the model's folder.
    """

    name: str
    repo: str | None
    family: str
    variant: Variant
    patch_size: int
    defaults: Defaults
    defaults_by_task: Mapping[str, Defaults] = field(default_factory=lambda: MappingProxyType({}))
    licence: str
    description: str
    pipeline: str
    tasks: tuple[str, ...] = TASKS
    max_area: int | None = None
    file: Path | None = None

    def defaults_for(self, task: str) -> Defaults:
        """The defaults of one of `TASKS`."""
        return self.defaults_by_task.get(task, self.defaults)


_FULL = Defaults(
    num_inference_steps=50, guidance_scale=5.0, shift=3.0, sampler="unipc", noise_scale=8.0
)
_DEV = Defaults(
    num_inference_steps=28,
    guidance_scale=0.0,
    shift=1.0,
    sampler="flash",
    noise_scale=7.5,
    noise_clip_std=2.5,
    sigmas=tuple(t / 1000 for t in DEV_TIMESTEPS),
)
_FULL_TASKS = MappingProxyType({"subject": replace(_FULL, shift=1.0)})
_DEV_TASKS = MappingProxyType(
    {"edit": replace(_DEV, sampler="euler", noise_scale=8.0, noise_clip_std=None)}
)
_O1_PIPELINE = "hidream.pipelines.o1:O1Pipeline"
_I1_PIPELINE = "hidream.pipelines.i1:I1Pipeline"
_I1 = Defaults(
    num_inference_steps=50,
    guidance_scale=5.0,
    shift=3.0,
    sampler="unipc",
    noise_scale=1.0,
    hires_strength=0.35,
    width=1024,
    height=1024,
)
_I1_DISTILLED = replace(_I1, guidance_scale=0.0, sampler="flash")
_E1_FULL = replace(
    _I1,
    num_inference_steps=28,
    image_guidance_scale=4.0,
    width=768,
    height=768,
    published_edit="stretch",
)
_E1_1 = replace(
    _I1,
    num_inference_steps=28,
    guidance_scale=3.0,
    image_guidance_scale=1.5,
    published_edit="crop",
)


def _latent(
    name: str,
    repo: str,
    variant: Variant,
    defaults: Defaults,
    description: str,
    task: str = "text_to_image",
) -> Spec:
    """One of those that draw latents: a picture's sides are whole patches of 2×2 latents."""
    return Spec(
        name=name,
        repo=f"HiDream-ai/{repo}",
        family="e1" if task == "edit" else "i1",
        variant=variant,
        patch_size=16,
        defaults=defaults,
        licence="MIT",
        description=description,
        pipeline=_I1_PIPELINE,
        tasks=(task,),
        max_area=defaults.width * defaults.height,
    )


SPECS: Mapping[str, Spec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            Spec(
                name="o1-nano",
                repo=None,
                family="o1",
                variant="full",
                patch_size=16,
                defaults=replace(
                    _FULL, shift=1.0, noise_scale=1.0, guidance_scale=3.0, width=128, height=128
                ),
                licence="MIT",
                description="small O1 trained by this project on its procedural world; shipped",
                pipeline=_O1_PIPELINE,
            ),
            Spec(
                name="o1",
                repo="HiDream-ai/HiDream-O1-Image",
                family="o1",
                variant="full",
                patch_size=32,
                defaults=_FULL,
                defaults_by_task=_FULL_TASKS,
                licence="MIT",
                description="HiDream-O1-Image, 8B, 50 guided steps",
                pipeline=_O1_PIPELINE,
            ),
            Spec(
                name="o1-dev",
                repo="HiDream-ai/HiDream-O1-Image-Dev",
                family="o1",
                variant="dev",
                patch_size=32,
                defaults=_DEV,
                defaults_by_task=_DEV_TASKS,
                licence="MIT",
                description="HiDream-O1-Image-Dev, 8B, distilled to 28 steps without guidance",
                pipeline=_O1_PIPELINE,
            ),
            Spec(
                name="o1-dev-2604",
                repo="HiDream-ai/HiDream-O1-Image-Dev-2604",
                family="o1",
                variant="dev",
                patch_size=32,
                defaults=_DEV,
                defaults_by_task=_DEV_TASKS,
                licence="MIT",
                description="HiDream-O1-Image-Dev, edition of April 2026",
                pipeline=_O1_PIPELINE,
            ),
            _latent(
                *("i1-full", "HiDream-I1-Full", "full", _I1),
                "HiDream-I1, 17B mixture of experts, 50 guided steps",
            ),
            _latent(
                *("i1-dev", "HiDream-I1-Dev", "dev"),
                replace(_I1_DISTILLED, num_inference_steps=28, shift=6.0),
                "HiDream-I1, distilled to 28 steps without guidance",
            ),
            _latent(
                *("i1-fast", "HiDream-I1-Fast", "fast"),
                replace(_I1_DISTILLED, num_inference_steps=16),
                "HiDream-I1, distilled to 16 steps without guidance",
            ),
            _latent(
                *("e1-full", "HiDream-E1-Full", "full", _E1_FULL),
                "HiDream-E1, I1's network tuned to edit",
                task="edit",
            ),
            _latent(
                *(
                    "e1-1",
                    "HiDream-E1-1",
                    "full",
                    _E1_1,
                ),
                "HiDream-E1.1, edits at about one megapixel",
                task="edit",
            ),
        )
    }
)
ALIASES: Mapping[str, str] = MappingProxyType({"hidream/hidream-i1": "i1-full"})
DEFAULT_MODEL = "o1-nano"
# What a folder's settings are laid over, where the folder says no more than family and variant.
_PUBLISHED = {
    ("o1", "full"): "o1",
    ("o1", "dev"): "o1-dev",
    ("i1", "full"): "i1-full",
    ("i1", "dev"): "i1-dev",
    ("i1", "fast"): "i1-fast",
    ("e1", "full"): "e1-1",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean "x"?` for a misspelt name, or the list of the known ones."""
    known = list(known)
    lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f'"{lower[item]}"' for item in close) + "?"
    return "known: " + ", ".join(known) + "."


def near(repo: str) -> bool:
    """Whether a hub id looks like a misspelt one of ours."""
    known = [spec.repo.lower() for spec in SPECS.values() if spec.repo]
    return bool(difflib.get_close_matches(repo.lower(), known, n=1, cutoff=0.85))


def known(name: str) -> Spec | None:
    """The model of this name, hub id or alias, if there is one."""
    name = ALIASES.get(name.lower(), name.lower())
    for spec in SPECS.values():
        if name in (spec.name, (spec.repo or "").lower()):
            return spec
    return None


def find(name: str) -> Spec:
    """The model of this name, hub id or alias.

    Raises:
        UsageError: there is none; the message has the nearest names.
    """
    found = known(name)
    if found is not None:
        return found
    names = [*SPECS, *(spec.repo for spec in SPECS.values() if spec.repo)]
    hint = nearest(name, names if "/" in name else SPECS)
    raise UsageError(f'unknown model "{name}"; {hint}', "A model is a name, a hub id or a folder.")


def of_folder(
    settings: Mapping[str, Any],
    *,
    name: str | None = None,
    base: Spec | None = None,
    variant: str | None = None,
    family: str = "o1",
    assumed: str = "full",
) -> Spec:
    """The Spec of a model folder: `base` (or the published model of its family and variant) with
    the folder's own `hidream.json` on top.

    `settings` may hold `name`, `variant`, `patch_size`, any field of `Defaults`, and under
    `tasks` the same per task; other keys belong to the model. `variant` wins over the file, and
    without either the folder counts as `assumed`.

    Raises:
        UsageError: its family has no such `variant`.
        ModelError: a value of the wrong kind.
    """
    told = settings.get("variant") or (base.variant if base else assumed)
    family = base.family if base else family
    variants = [v for f, v in _PUBLISHED if f == family]
    if variant not in (None, *variants):
        raise UsageError(
            f"--variant {variant}: {name or 'this model'} is {told}; an {family.upper()} can be "
            f"{' or '.join(variants)}.",
            "Leave --variant out.",
        )
    if variant is None and told not in variants:
        raise ModelError(f'hidream.json: variant is "{told}"; it can be {" or ".join(variants)}.')
    chosen = variant or told
    if base is None or base.variant != chosen:
        base = replace(SPECS[_PUBLISHED[family, chosen]], repo=None, description="")
    patch_size = settings.get("patch_size", base.patch_size)
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ModelError(f"hidream.json: patch_size={patch_size!r} is not a positive number.")
    defaults = _overlaid(base.defaults, settings)
    per_task = settings.get("tasks", {})
    if not isinstance(per_task, Mapping) or not set(per_task) <= set(TASKS):
        raise ModelError(f"hidream.json: tasks must be an object with keys among {TASKS}.")
    tasks = {
        task: _overlaid(_overlaid(base.defaults_for(task), settings), per_task.get(task, {}))
        for task in TASKS
        if task in base.defaults_by_task or task in per_task
    }
    return replace(
        base,
        name=name or settings.get("name") or base.name,
        patch_size=patch_size,
        defaults=defaults,
        defaults_by_task=MappingProxyType(tasks),
    )


def limited(spec: Spec, max_area: int) -> Spec:
    """`spec` for a checkpoint of so many pixels: its own sizes are squares within them."""
    side = math.isqrt(max_area) // spec.patch_size * spec.patch_size

    def smaller(defaults: Defaults) -> Defaults:
        if defaults.width * defaults.height <= max_area:
            return defaults
        return replace(defaults, width=side, height=side)

    tasks = {task: smaller(defaults) for task, defaults in spec.defaults_by_task.items()}
    return replace(
        spec,
        max_area=max_area,
        defaults=smaller(spec.defaults),
        defaults_by_task=MappingProxyType(tasks),
    )


def _overlaid(defaults: Defaults, settings: Mapping[str, Any]) -> Defaults:
    found: dict[str, Any] = {}
    for item in fields(Defaults):
        if item.name not in settings:
            continue
        value = settings[item.name]
        if item.name == "sampler":
            good = value in SAMPLERS
        elif item.name == "sigmas":
            good = value is None or (isinstance(value, list | tuple) and all(map(_number, value)))
            value = None if value is None or not good else tuple(map(float, value))
        elif item.name in ("noise_clip_std", "image_guidance_scale", "hires_strength"):
            good = value is None or _number(value)
        elif item.name in ("num_inference_steps", "width", "height"):
            good = isinstance(value, int) and value > 0
        elif item.name == "published_edit":
            good = value in (None, "stretch", "crop")
        elif item.name == "sparsity":
            good = _number(value) and 0 <= value < 1
        else:
            good = _number(value)
        if not good:
            raise ModelError(f"hidream.json: {item.name}={settings[item.name]!r} is not usable.")
        found[item.name] = value
    return replace(defaults, **found)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
