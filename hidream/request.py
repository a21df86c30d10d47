"""One request for pictures: the command line's flags, the library's keywords and a picture's
metadata are all this."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hidream.camera import CAMERA, camera_value, with_camera
from hidream.errors import InputError, UsageError
from hidream.limits import (
    RANGES,
    SPARSE_BLOCK,
    TRAINED_BOXES,
    Box,
    Lora,
    aspect_size,
    check_area,
    check_in_range,
    check_interval,
    check_loras,
    check_pictures,
    check_seed,
    check_side,
    check_sigmas,
    check_sparsity,
    clean_prompt,
    halved,
    is_picture,
    read_layout,
    size_error,
    skipped_blocks,
    snap_size,
)
from hidream.outpainting import Margins, canvas_size, check_expand, fit_expand
from hidream.registry import DEFAULT_MODEL, SAMPLERS, Defaults, Spec, nearest
from hidream.sheet import Sheet, read_sheet, resolve_sheet

DEFAULT_STRENGTH = 0.6
ENCODERS = ("clip_l", "clip_g", "t5", "llama")
NO_PROMPT = " "  # the caption of the unconditional branch, as published

# Fields that only some families' models can use, what these are called, and the value that asks
# for nothing.
_OF_FAMILIES: tuple[tuple[str, tuple[str, ...], str, Any], ...] = (
    ("image_guidance_scale", ("e1",), "E1's editing", None),
    ("clip_cfg_norm", ("e1",), "E1's editing", None),
    ("refine_strength", ("e1",), "E1's editing", 0),
    ("encoder_prompts", ("i1", "e1"), "I1 and E1", ()),
    ("embeddings", ("i1", "e1"), "I1 and E1", None),
    ("tile", ("i1",), "I1's textures", False),
    ("as_published", ("i1", "e1"), "I1 and E1", False),
)
# Fields whose function comes with a later version: accepted only at a value that does nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "refine_prompt": (None, "off"),
}


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to draw and how, checked when it is made; `None` means the model's own default.

    Pictures (`references`, `mask`, `init_image`) are paths or PIL images; they are opened by
    whoever uses the request. A mask is white where the picture may change. `layout` holds one box
    per reference, `(x1, x2, y1, y2)` as fractions of the picture. `seed` may be several, one
    picture each; -1 or None draws one. `guidance_interval` is the range of sigma where guidance
    acts. `sigmas` fall from at most 1, without the final 0. `strength` is the share of the
    schedule that an image-to-image request runs. `expand` is the pixels by which the only
    reference grows at its left, top, right and bottom: all of it is kept, what is new is drawn
    (and what a mask of the reference frees). `sheet` parts the picture into panels. `tile` makes a
    texture that goes on where it is laid beside itself.
    `sparsity` is the share of the attention between blocks of a picture's patches that is
    skipped: 0 skips nothing.
    `loras` holds (path, scale) pairs; a path is a safetensors file, a folder with one, or a hub
    name. `shot`, `angle` and `view` are names of `hidream.camera`, put into words before the
    prompt.

    Of I1 and E1: `encoder_prompts` holds (encoder, text) pairs, or is a mapping, of text encoders
    (`ENCODERS`) that read something else than the prompt; `embeddings` is a file of what they said
    of it (`hidream embed`), so that they are not needed. `as_published` does as the models' own
    pipelines do: it scales the size to the native area, shows the network whole timesteps, keeps
    latents in its dtype and takes the steps' noise from torch's own generator, whatever the seed.
    Edits then follow E1's own scripts: E1-Full stretches the source to its square, E1.1 crops its
    middle to about a megapixel, and the result is stretched to the source's own size.
    Of E1: `image_guidance_scale` leads towards the source, `clip_cfg_norm` keeps the guided
    velocity no longer than the unguided one, and `refine_strength` is the share of the steps that
    an I1 takes, after the others.

    Raises:
        UsageError: a field has the wrong type, is out of range or does not go with another.
        InputError: a prompt or a box is not usable.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    encoder_prompts: tuple[tuple[str, str], ...] = ()
    embeddings: str | Path | None = None
    width: int | None = None
    height: int | None = None
    snap: str | None = None
    keep_aspect: bool | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    image_guidance_scale: float | None = None
    clip_cfg_norm: bool | None = None
    shift: float | None = None
    sampler: str | None = None
    sigmas: tuple[float, ...] | None = None
    noise_scale: float | None = None
    noise_clip_std: float | None = None
    seed: int | tuple[int, ...] | None = None
    num_images: int | None = None
    references: tuple[Any, ...] = ()
    mask: Any = None
    strength: float | None = None
    layout: tuple[Box, ...] | None = None
    loras: tuple[Lora, ...] = ()
    shot: str | None = None
    angle: str | None = None
    view: str | None = None
    init_image: Any = None
    expand: Margins | None = None
    sheet: Sheet | None = None
    tile: bool | None = None
    as_published: bool | None = None
    refine_prompt: str | None = None
    refine_strength: float | None = None
    sparsity: float | None = None
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen for everyone else
        if self.model is not None and not isinstance(self.model, str):
            put(self, "model", str(self.model))
        put(self, "prompt", clean_prompt(self.prompt))
        if self.negative_prompt is not None:
            cleaned = clean_prompt(self.negative_prompt, "negative_prompt", may_be_empty=True)
            put(self, "negative_prompt", cleaned)
        for name in RANGES:
            put(self, name, check_in_range(name, getattr(self, name)))
        put(self, "sparsity", check_sparsity(self.sparsity))
        if self.embeddings is not None and not isinstance(self.embeddings, str | Path):
            raise UsageError(f"embeddings={self.embeddings!r} is not the path of a file.")
        put(self, "encoder_prompts", _encoder_prompts(self.encoder_prompts))
        for name in ("keep_aspect", "deterministic", "clip_cfg_norm", "tile", "as_published"):
            if getattr(self, name) not in (None, True, False):
                raise UsageError(f"{name}={getattr(self, name)!r} is neither true nor false.")
        for name in ("width", "height"):
            put(self, name, check_side(name, getattr(self, name)))
        if self.width and self.height:
            check_area(self.width, self.height)
        if self.snap not in (None, "nearest"):
            raise UsageError(f'snap={self.snap!r} is unknown; it can be "nearest" or left out.')
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UsageError(
                f'unknown sampler "{self.sampler}"; {nearest(str(self.sampler), SAMPLERS)}'
            )
        put(self, "sigmas", check_sigmas(self.sigmas, self.num_inference_steps))
        put(self, "guidance_interval", check_interval(self.guidance_interval))
        put(self, "seed", check_seed(self.seed, self.num_images))
        self._check_pictures(put)
        self._check_canvas(put)
        for name in CAMERA:
            put(self, name, camera_value(name, getattr(self, name)))
        put(self, "loras", check_loras(self.loras or ()))
        for name, harmless in _NOT_YET.items():
            if getattr(self, name) not in harmless:
                raise UsageError(f"{name} is not available yet.", "Leave it out.")

    def _check_pictures(self, put: Callable[[Any, str, Any], None]) -> None:
        references = check_pictures(() if self.references is None else self.references, "reference")
        put(self, "references", references)
        for name in ("mask", "init_image"):
            if getattr(self, name) is not None and not is_picture(getattr(self, name)):
                raise UsageError(f"{name} is neither a path nor a picture.")
        if self.init_image is None and self.strength is not None:
            raise UsageError("strength is for image-to-image.", "Give the picture: --init IMAGE.")
        if self.mask is not None and self.init_image is None and len(references) != 1:
            raise UsageError(
                f"a mask belongs to one source picture; there are {len(references)} references.",
                "Edit one picture, or give the source as init_image.",
            )
        if self.layout is not None:
            put(self, "layout", read_layout(self.layout) or None)
        if self.layout is not None and len(self.layout) != len(references):
            raise InputError(
                f"{len(self.layout)} boxes for {len(references)} references: each reference needs "
                "its own box.",
                "Give one box per reference, in the references' order.",
            )

    def _check_canvas(self, put: Callable[[Any, str, Any], None]) -> None:
        put(self, "expand", check_expand(self.expand))
        put(self, "sheet", read_sheet(self.sheet))
        if self.expand is not None and (len(self.references) != 1 or self.init_image is not None):
            raise UsageError(
                f"expand makes one picture larger; there are {len(self.references)} references"
                f"{' and an initial picture' if self.init_image is not None else ''}.",
                "Edit one picture: hidream edit IMAGE INSTRUCTION --expand …",
            )
        if self.sheet is not None:
            for name in ("mask", "init_image", "expand"):
                if getattr(self, name) is not None:
                    raise UsageError(f"a sheet of panels and {name} exclude each other.")
            if (self.width is None) != (self.height is None):
                raise UsageError("a sheet has its width or its height alone.", "Give both.")
        if self.keep_aspect and (self.expand or self.sheet):
            what = "expand" if self.expand else "a sheet of panels"
            raise UsageError(f"{what} and keep_aspect exclude each other.", "Leave one out.")

    @property
    def task(self) -> str:
        """text_to_image, edit (one reference) or subject (two or more): decides the defaults."""
        return ("text_to_image", "edit", "subject")[min(len(self.references), 2)]

    @property
    def full_prompt(self) -> str:
        """What the model reads: the prompt, led by the words of shot, angle and view."""
        return with_camera(self.prompt, shot=self.shot, angle=self.angle, view=self.view)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed a picture; only of a resolved request, whose seeds are drawn."""
        if self.seed is None or self.seed == -1:
            raise UsageError("the request has no seed yet.", "Resolve it first.")
        if isinstance(self.seed, tuple):
            return self.seed
        return tuple(self.seed + index for index in range(self.num_images or 1))

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON values; a picture in memory becomes a note of its size."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerateRequest:
        """A request from its fields by name: what `to_dict` wrote, or a caller's keywords.

        Raises:
            UsageError: a name is unknown (the nearest is named) or the prompt is missing.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f'unknown field "{name}"; {nearest(str(name), known)}')
        if "prompt" not in values:
            raise UsageError("the request has no prompt.")
        return cls(**values)


def resolve(
    request: GenerateRequest,
    defaults: Defaults,
    patch_size: int,
    *,
    source_size: tuple[int, int] | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(2**32),
) -> GenerateRequest:
    """The request with every `None` replaced by what it becomes; resolving twice changes nothing.

    `source_size` is the (width, height) in pixels of the picture whose aspect a request with
    `keep_aspect` keeps: the only reference, or else the initial picture. What stays None after
    this is off: no clipping of noise, or sigmas computed from the steps and the shift.

    Raises:
        UsageError: a side is no multiple of the patch and `snap` is not "nearest".
    """
    keep_aspect = request.keep_aspect
    if keep_aspect is None:
        keep_aspect = len(request.references) == 1 or (
            not request.references and request.init_image is not None
        )
        keep_aspect = keep_aspect and request.layout is None
        keep_aspect = keep_aspect and request.width is None and request.height is None
        keep_aspect = keep_aspect and request.expand is None and request.sheet is None
    expand, sheet = request.expand, request.sheet
    if sheet is not None:
        sheet = _resolved_sheet(request, sheet, defaults, patch_size)
        width, height = sheet.size
        check_area(width, height)
    elif expand is not None and source_size is not None:
        expand = fit_expand(source_size, expand, patch_size, snap=request.snap == "nearest")
        width, height = _canvas(request, source_size, expand)
    elif request.as_published and defaults.published_edit is not None:
        width, height = _published_size(defaults, patch_size, source_size)
    else:
        width, height = _resolved_size(request, defaults, patch_size, source_size, keep_aspect)
        native = defaults.width * defaults.height
        scaled = width * height <= native < (width + patch_size) * (height + patch_size)
        if request.as_published and not scaled:
            scale = math.sqrt(native / (width * height))
            width, height = (
                max(1, int(side * scale // patch_size)) * patch_size for side in (width, height)
            )
    sigmas, steps = request.sigmas, request.num_inference_steps
    if sigmas is None and defaults.sigmas is not None:
        own_steps = steps in (None, len(defaults.sigmas))
        if own_steps and request.shift in (None, defaults.shift):
            sigmas = defaults.sigmas
    if sigmas is not None:
        steps = len(sigmas)
    seed = request.seed
    if isinstance(seed, tuple):
        seed = tuple(draw_seed() if value == -1 else value for value in seed)
    elif seed is None or seed == -1:
        seed = draw_seed()
    negative = request.negative_prompt
    larger = width * height > defaults.width * defaults.height
    strength = (defaults.hires_strength if larger else None) or DEFAULT_STRENGTH

    def or_default(name: str) -> Any:
        value = getattr(request, name)
        return getattr(defaults, name) if value is None else value

    return replace(
        request,
        negative_prompt=negative if negative and negative.strip() else NO_PROMPT,
        width=width,
        height=height,
        keep_aspect=keep_aspect,
        num_inference_steps=steps or defaults.num_inference_steps,
        guidance_scale=or_default("guidance_scale"),
        guidance_interval=request.guidance_interval or (0.0, 1.0),
        image_guidance_scale=or_default("image_guidance_scale"),
        shift=or_default("shift"),
        sampler=or_default("sampler"),
        sigmas=sigmas,
        noise_scale=or_default("noise_scale"),
        noise_clip_std=or_default("noise_clip_std"),
        seed=seed,
        num_images=len(seed) if isinstance(seed, tuple) else request.num_images or 1,
        expand=expand,
        sheet=sheet,
        strength=_or(request.strength, strength) if request.init_image else None,
        tile=bool(request.tile),
        as_published=bool(request.as_published),
        refine_prompt=request.refine_prompt or "off",
        sparsity=or_default("sparsity"),
        deterministic=bool(request.deterministic),
    )


def check_ability(spec: Spec, request: GenerateRequest) -> None:
    """UsageError for a resolved request that is not this model's to fulfil."""
    area = (request.width or 0) * (request.height or 0)
    too_large = spec.max_area is not None and area > spec.max_area
    in_tiles = any(getattr(request, name) is not None for name in ("init_image", "mask", "expand"))
    if too_large and not in_tiles:
        side = math.isqrt(spec.max_area or 0)
        raise UsageError(
            f"{request.width}x{request.height} is more than {spec.name} draws at once: "
            f"{spec.max_area} pixels.",
            f"Choose a smaller size, such as {side}x{side}"
            f"{'; --init makes a picture larger' if spec.family == 'i1' else ''}.",
        )
    if "subject" not in spec.tasks:
        _check_references(spec, request)
    if request.as_published and spec.defaults.published_edit is not None:
        for name in ("mask", "init_image", "expand"):
            if getattr(request, name) is not None:
                raise UsageError(
                    f"as_published: {spec.name}'s own script knows no {name}.", "Leave one out."
                )
    for name, families, whose, nothing in _OF_FAMILIES:
        if spec.family not in families and getattr(request, name) not in (None, nothing):
            raise UsageError(
                f"{name} is for {whose}; {spec.name} has no use for it.", "Leave it out."
            )


def _check_references(spec: Spec, request: GenerateRequest) -> None:
    count = len(request.references)
    if request.layout:
        raise UsageError(
            f"{spec.name} knows no layout of boxes.", f"Use an O1 model, such as {DEFAULT_MODEL}."
        )
    if "edit" in spec.tasks and count != 1:
        raise UsageError(
            f"{spec.name} edits one picture; there are {count}.",
            'Use: hidream edit IMAGE "INSTRUCTION"; or an I1 or O1 model to draw a new one.',
        )
    kept = request.mask is not None or request.expand is not None
    if "edit" not in spec.tasks and count and not (count == 1 and kept):
        raise UsageError(
            f"{spec.name} reads no reference pictures.",
            "Give it a mask, within which it draws anew, or --init; or use an E1 or O1 model.",
        )


def warnings_of(
    asked: GenerateRequest, resolved: GenerateRequest, spec: Spec | None = None
) -> tuple[str, ...]:
    """What a user should be told about the way from the asked to the resolved request.

    Without its model's `spec`, nothing about what the model does with it.
    """
    found = []
    for name in ("width", "height"):
        before, after = getattr(asked, name), getattr(resolved, name)
        if before is not None and before != after:
            how = "scaled" if resolved.as_published else "snapped"
            found.append(f"{name}={before} is {how} to {after}.")
    if asked.expand is not None and asked.expand != resolved.expand:
        found.append(f"expand={asked.expand} is snapped to {resolved.expand}.")
    for name in ("gutter", "width", "height"):
        before, after = getattr(asked.sheet, name, None), getattr(resolved.sheet, name, None)
        if before is not None and before != after:
            what = name if name == "gutter" else f"a panel's {name}"
            found.append(f"{what}={before} is snapped to {after}.")
    if resolved.layout and len(resolved.layout) > TRAINED_BOXES:
        found.append(
            f"{len(resolved.layout)} boxes: the published checkpoints were trained with at most "
            f"{TRAINED_BOXES}; all are drawn, but may not all be followed."
        )
    if asked.sigmas is not None and asked.shift is not None:
        found.append("shift has no effect: the sigmas are given.")
    off = resolved.guidance_scale is not None and resolved.guidance_scale <= 1
    if off and asked.negative_prompt and asked.negative_prompt.strip():
        found.append(
            f"the negative prompt has no effect: guidance_scale={resolved.guidance_scale:g} is "
            "off (1 or less)."
        )
    for name in ("image_guidance_scale", "clip_cfg_norm", "guidance_interval"):
        if off and getattr(asked, name) not in (None, (0.0, 1.0)):
            found.append(
                f"{name} has no effect: guidance_scale={resolved.guidance_scale:g} is off "
                "(1 or less)."
            )
    if asked.noise_clip_std is not None and not (resolved.sampler or "").startswith("flash"):
        found.append(
            f"noise_clip_std has no effect: {resolved.sampler} adds no noise between steps (flash "
            "does)."
        )
    if spec is not None and resolved.sparsity:
        num_patches = _num_patches(resolved, spec)
        if not skipped_blocks(num_patches, resolved.sparsity):
            found.append(
                f"sparsity={resolved.sparsity:g} has no effect: {num_patches} patches are "
                f"{num_patches // SPARSE_BLOCK} whole blocks of {SPARSE_BLOCK}, of which none can "
                "be skipped."
            )
    return tuple(found)


def _num_patches(request: GenerateRequest, spec: Spec) -> int:
    """Of a resolved request's picture, and of the source that E1 sees beside it."""
    assert request.width is not None
    assert request.height is not None
    pictures = 2 if spec.family == "e1" and request.references else 1
    return pictures * (request.width // spec.patch_size) * (request.height // spec.patch_size)


def _resolved_size(
    request: GenerateRequest,
    defaults: Defaults,
    patch_size: int,
    source_size: tuple[int, int] | None,
    keep_aspect: bool,
) -> tuple[int, int]:
    width, height = request.width, request.height
    if keep_aspect and source_size and width is None and height is None:
        return aspect_size(source_size, defaults.width * defaults.height, patch_size)
    if keep_aspect and source_size and (width is None or height is None):
        ratio = source_size[0] / source_size[1]
        if width is None:
            assert height is not None
            width = snap_size(max(1, round(height * ratio)), height, patch_size)[0]
        else:
            height = snap_size(width, max(1, round(width / ratio)), patch_size)[1]
    width, height = width or defaults.width, height or defaults.height
    problem = size_error(width, height, patch_size)
    if problem and request.snap == "nearest":
        width, height = snap_size(width, height, patch_size)
    elif problem:
        raise UsageError(problem, "Or snap to the nearest with --snap nearest.")
    check_area(width, height)
    return width, height


def _published_size(
    defaults: Defaults, patch_size: int, source_size: tuple[int, int] | None
) -> tuple[int, int]:
    """The size at which an edit's own script draws, whatever is asked for."""
    if defaults.published_edit == "stretch" or source_size is None:
        return defaults.width, defaults.height
    area = defaults.width * defaults.height
    return aspect_size(halved(source_size, math.isqrt(area)), area, patch_size)


def _resolved_sheet(
    request: GenerateRequest, sheet: Sheet, defaults: Defaults, patch_size: int
) -> Sheet:
    asked = request.width is not None and request.height is not None
    return resolve_sheet(
        sheet,
        patch_size,
        native_area=defaults.width * defaults.height,
        size=(request.width, request.height) if asked else None,  # type: ignore[arg-type]
        snap=request.snap == "nearest",
    )


def _canvas(
    request: GenerateRequest, source_size: tuple[int, int], expand: Margins
) -> tuple[int, int]:
    width, height = canvas_size(source_size, expand)
    if (request.width or width, request.height or height) != (width, height):
        raise UsageError(
            f"with expand the picture is {width}x{height}; {request.width}x{request.height} is "
            "asked for too.",
            "Leave --size out.",
        )
    check_side("width", width)
    check_side("height", height)
    check_area(width, height)
    return width, height


def _encoder_prompts(given: Any) -> tuple[tuple[str, str], ...]:
    pairs = tuple((given or {}).items()) if isinstance(given, Mapping | None) else tuple(given)
    found = {}
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise UsageError(f"encoder_prompts holds {pair!r}; each is an encoder and its text.")
        name, text = pair
        if name not in ENCODERS:
            raise UsageError(f'unknown text encoder "{name}"; {nearest(str(name), ENCODERS)}')
        if name in found:
            raise UsageError(f"encoder_prompts has two texts for {name}.", "Give one.")
        found[name] = clean_prompt(text, f"the prompt of {name}", may_be_empty=True)
    return tuple(found.items())


def _plain(value: Any) -> Any:
    if isinstance(value, Sheet):
        return asdict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if is_picture(value) and not isinstance(value, str):
        return f"memory:{value.size[0]}x{value.size[1]}"
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
