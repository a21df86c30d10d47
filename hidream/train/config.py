"""The recipe of a training run: one TOML file becomes one frozen dataclass, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidream.errors import InputError, UsageError
from hidream.train.checks import check_recipe
from hidream.train.filter import Filter
from hidream.train.layout import Parallel
from hidream.train.objective import Objective, Perceptual, check_objective

#: Keys of earlier recipes, and what there is in their place.
GONE = {"buckets": "samples are packed, and max_text says how long their words may be"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One resolution of the progressive run.

    `size` is the side of the square picture in pixels; `batch_size` counts the samples of one step
    over all processes. The rate climbs over the first `warmup` steps from where the stage before
    ended (from 0 in the first), holds, and falls linearly to `final_rate` over the last `decay`.
    `tasks` weights the tasks (Hi-DiT has none), `categories` those of text_to_image and of
    subject (where a task has none: the world's own mix), `filter` says which of their samples are
    taken. `composed` arranges the world's scenes in one way where the prompt leaves it open
    (`hidream.world.composed`). `objective` has what is other than in the recipe's own. `sparsity`
    of O1 is the share of the attention between blocks of a picture's patches that is left out: the
    network learns to do without (`hidream.nn.sparse`).
    """

    size: int
    steps: int
    batch_size: int
    learning_rate: float
    tasks: dict[str, float] = field(default_factory=dict)
    categories: dict[str, float] = field(default_factory=dict)
    warmup: int = 0
    decay: int = 0
    final_rate: float = 0.0
    objective: dict[str, Any] = field(default_factory=dict)
    filter: Filter = field(default_factory=Filter)
    composed: bool = False
    sparsity: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, clipping and the moving average of the weights.

    `muon` > 0: the matrices inside the transformers are updated by Muon, and move so many times as
    far a step as AdamW would move them at the same rate.
    """

    muon: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The autoencoder whose latents an I1 draws, trained first, in `RUN/vae`, by a run of its own.

    `stages` are that run's; without any, it comes with `init`. `widths`: its channels at the
    picture's size, half of it, and so on; `channels` those of a latent. `kl_weight` scales the mean
    divergence of a latent value from a standard normal one, beside the mean error of a pixel value.
    """

    stages: tuple[Stage, ...] = ()
    channels: int = 8
    widths: tuple[int, ...] = (16, 32, 64, 64)
    kl_weight: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class HiDiTOptions:
    """Of a Hi-DiT: the files that it learns from, and which of its two stages this is.

    `data_dir` holds images.h5 and the latents NAME.h5 that the VAE `vae_ckpt` made of them (`vae`:
    its kind, if the file does not tell). `ldm_only` leaves the pixel branch as it is. `gate`,
    `attention` and `pixel_clock`: see `hidream.models.hidit.config`. `weighting` "uniform" or
    "lognormal" is how noise levels are drawn. `proj_coeff` weights the alignment of block
    `encoder_depth` with the features of `enc_type` (0: none is loaded); `pixel_weight` the velocity
    error of pixels, which divides by `pixel_delta` at least. `latents_dtype` is that of the packed
    copy.
    """

    data_dir: str = ""
    vae_latents_name: str = ""
    latents_dtype: str = "float16"
    vae: str = ""
    vae_ckpt: str = ""
    ldm_only: bool = False
    gate: float = 0.3
    attention: str = "readonly"
    pixel_clock: str = "shared"
    qk_norm: bool = False
    weighting: str = "uniform"
    cfg_prob: float = 0.1
    enc_type: str = "dinov2-vit-b"
    enc_path: str = ""
    encoder_depth: int = 8
    proj_coeff: float = 0.5
    pixel_weight: float = 1.0
    pixel_delta: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Pictures of evaluation scenes and the judge's verdicts on them, as training goes on.

    Every `every` steps (0: never) the averaged weights draw `scenes` pictures of each of the
    world's `categories`, always of the same scenes, as the exported model would, in `steps` steps
    (0: as many as it would).
    """

    every: int = 0
    scenes: int = 4
    categories: tuple[str, ...] = ("single", "two_objects", "position", "counting")
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train a LoRA of `init` instead of its weights; `rank` 0 trains the weights.

    `alpha` over the rank scales the change (0: the rank, so the change itself). `targets`: names of
    layers, or how they end ("q_proj"); none means those of the family (see docs/lora.md). `keys`:
    whose names the file has, "diffusers" or "comfyui" (none: those of the family); `dtype`: its
    numbers'. `frozen_dtype`: that of the model's own weights, which are not trained.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    keys: str = ""
    dtype: str = "float32"
    frozen_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pictures to learn from (see docs/datasets.md); without a `path`, the procedural world.

    `kind`: one of `hidream.data.dataset.KINDS`. `world` is the share of a step's samples that come
    from the world all the same. `flip` shows half of them mirrored, where no caption says left or
    right. `check` unpacks every picture before the run begins.
    """

    path: str = ""
    kind: str = "auto"
    world: float = 0.0
    flip: bool = False
    check: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run: two runs of one recipe on one machine are bit-identical.

    `model` names an instance in `hidream.models.o1.config` or `hidream.models.i1.config`, or
    "hidit-" and one in `hidream.models.hidit.config`; `tokenizer` and `init` (the weights to start
    from, none for a fresh start) are folders. `start` is a checkpoint of another run, whose step,
    weights, averages and optimizer this run goes on from; `first_step` counts the steps that are
    behind `init`, where they shall count. `parallel` "fsdp" shards weights, averages and optimizer
    over the processes, "ddp" has them whole in each. A process computes its samples of a step in
    `accumulate` parts, one after the other, and adds their gradients: the step is the same, and
    needs the memory of a part. `max_text`: how many tokens the words of an O1's sample may have.

    `report_to` names one of `hidream.train.track.TRACKERS`, which gets the log's numbers too.

    Intervals are in steps, 0 for never. Of I1: its text encoders read `num_tokens`; `gate_skew` is
    the score that every gate's first expert has too much at the start, to try the balance with.
    """

    name: str
    model: str
    stages: tuple[Stage, ...]
    tokenizer: str = ""
    init: str = ""
    start: str = ""
    first_step: int = 0
    out: str = ""
    seed: int = 0
    processes: int = 1
    device: str = "cpu"
    precision: str = "bfloat16"
    parallel: Parallel = field(default_factory=Parallel)
    compile: bool = False
    accumulate: int = 1
    objective: Objective = field(default_factory=Objective)
    perceptual: Perceptual = field(default_factory=Perceptual)
    optimizer: Optimizer = field(default_factory=Optimizer)
    max_text: int = 320
    vae: Autoencoder = field(default_factory=Autoencoder)
    hidit: HiDiTOptions = field(default_factory=HiDiTOptions)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    num_tokens: int = 16
    gate_skew: float = 0.0
    validation: Validation = field(default_factory=Validation)
    report_to: str = "none"
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    grid_every: int = 2000
    prefetch: int = 2

    @property
    def run_dir(self) -> Path:
        """Where the run writes: `out`, or `runs/NAME`."""
        return Path(self.out) if self.out else Path("runs") / self.name

    @property
    def family(self) -> str:
        """What stands before the size in `model`: o1, i1, e1, vae or hidit."""
        return self.model.partition("-")[0]

    @property
    def num_steps(self) -> int:
        """Steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """(stage number, step inside it) of the run's step `step`, which counts from 0."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise UsageError(f"the recipe has {self.num_steps} steps; there is no step after them.")

    def objective_of(self, stage: int) -> Objective:
        """The objective of a stage, by its number: the recipe's, with the stage's own changes."""
        return dataclasses.replace(self.objective, **self.stages[stage].objective)

    def at(self, step: int) -> Recipe:
        """The recipe with the objective of the stage of `step`."""
        return dataclasses.replace(self, objective=self.objective_of(self.locate(step)[0]))

    def first_sample(self, step: int) -> int:
        """Global index of the first sample of `step`: the number of samples drawn before it."""
        total = 0
        for stage in self.stages:
            total += min(step, stage.steps) * stage.batch_size
            step -= min(step, stage.steps)
        return total

    @property
    def before(self) -> Recipe | None:
        """The run that must end before this one begins, if there is one: the autoencoder's."""
        if not self.vae.stages or self.init:
            return None
        return dataclasses.replace(
            self,
            name=f"{self.name}_vae",
            model="vae",
            out=str(self.run_dir / "vae"),
            init="",
            stages=self.vae.stages,
            vae=dataclasses.replace(self.vae, stages=()),
            validation=Validation(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a TOML or JSON file holds them."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path`, with `key=value` overrides (dotted: `stages.0.steps=10`).

    `data=PATH` is short for `data.path=PATH`.

    Raises InputError for a file that cannot be read, UsageError for keys or values it does not
    know, naming the nearest key.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"recipe {path} cannot be read: {error.strerror}.", "Give the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not TOML: {error}.") from error
    for override in overrides:
        _override(data, override)
    return parse_recipe(data)


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values; raises UsageError naming the key that is wrong."""
    if isinstance(data, dict):
        for key in GONE.keys() & data.keys():
            raise UsageError(f"{key} is no longer part of a recipe: {GONE[key]}.", "Remove it.")
        if isinstance(data.get("parallel"), str):
            data = data | {"parallel": dataclasses.asdict(Parallel.named(data["parallel"]))}
    recipe = _build(Recipe, data, "")
    for number, stage in enumerate(recipe.stages):
        where, changes = f"stages.{number}.objective", stage.objective
        typed = _build(Objective, changes, where)
        changes.update({key: getattr(typed, key) for key in changes})
        check_objective(recipe.objective_of(number), where if changes else "objective")
    check_recipe(recipe)
    return recipe


def past_recipe(data: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint holds, which may be older than this code."""
    return parse_recipe({key: value for key, value in data.items() if key not in GONE})


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"override {override!r} is not key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if key == "data" and not isinstance(value, dict):
        key, value = "data.path", text.strip("\"'")
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_position(part, node, key)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, list):
        node[_position(last, node, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UsageError(f"override {key}: {parents[-1]!r} has no keys inside it.")


def _position(part: str, items: list[Any], key: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise UsageError(f"override {key}: {part!r} must be a number from 0 to {len(items) - 1}.")


def _build(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a table, every key known and every value of its field's type."""
    if not isinstance(data, dict):
        raise UsageError(f"{where or 'the recipe'} must be a table, not {data!r}.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise UsageError(f'unknown key "{_join(where, key)}"; did you mean "{near}"?')
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING
        if required and item.default_factory is dataclasses.MISSING and item.name not in data:
            raise UsageError(f'the recipe lacks "{_join(where, item.name)}".')
    return cls(**{key: _value(hints[key], data[key], _join(where, key)) for key in data})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if not isinstance(value, bool) and isinstance(value, int | float | str):
            return value if isinstance(value, str) else float(value)
        raise UsageError(f"{where} = {value!r} is not a float or str.")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) == len(arguments):
            return tuple(_value(h, v, where) for h, v in zip(arguments, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {k: _value(arguments[1], v, _join(where, k)) for k, v in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UsageError(f"{where} = {value} must be a finite number.")
        return float(value)
    elif hint in (str, int, bool) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise UsageError(f"{where} = {value!r} is not a {name}.")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
