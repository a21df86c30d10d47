"""Hi-DiT draws: latents alone down to the gate, then latents and pixels side by side.

Both streams obey the convention of `sampling/flow.py`, each at its own noise level: latents at
sigma, pixels at the level `pixel_level`. Noise is a function of (seed, index) of a picture, so that
neither the batch nor the number of processes decides what is drawn.

At the gate (the first node of the schedule at or below it) the pixels need a state to start from:
with the shared clock it is `(1 - sigma) * decode(z0) + sigma * noise`, z0 being where the latents
are heading, for which they are asked once more; with the rescaled clock it is noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hidream.errors import ModelError, UsageError
from hidream.registry import nearest
from hidream.sampling.device_noise import batch_noise
from hidream.sampling.flow import add_noise, to_velocity, to_x0
from hidream.sampling.guidance import guide
from hidream.sampling.noise import philox4x32
from hidream.sampling.sde import sde_last_step, sde_sigmas, sde_step

MODES = ("sde", "ode")
OUTPUTS = ("pixels", "vae")
LABEL_SAMPLINGS = ("equal", "random")
MAX_SEED = 2**31 - 1  # of a run; a picture's own seed is made from it and the picture's index
_STREAMS: tuple[Literal["latents", "pixels"], ...] = ("latents", "pixels")
# Streams of random numbers: the latents' are 0, 1, ..., one a step.
_PIXEL_STREAMS = 2**32
_LABEL_STREAM_HIGH = 2  # 2**33, of the run's seed

Numbers = Sequence[int] | np.ndarray | Tensor

Decode = Callable[[Tensor], Tensor]
"""A VAE's: its latents (b, c, h, w) to pictures (b, 3, height, width) in about [-1, 1]."""

Noise = Callable[[Literal["latents", "pixels"], int], Tensor]
"""`(stream, number)` -> standard normal noise; number 0 starts the stream, k + 1 is step k's."""


@runtime_checkable
class Network(Protocol):
    """A HiDiT or what stands in for one."""

    @property
    def config(self) -> Any: ...

    def denormalise(self, latents: Tensor) -> Tensor: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the noise becomes a picture. Raises UsageError for what cannot be.

    Guidance is on where `guidance_low <= sigma <= guidance_high` and the scale is above 1;
    `pixel_cfg_scale` None is `cfg_scale`. `output` "vae" is what the latents decode to: the pixel
    branch is then not asked. `pixel_tail` more steps follow the published ones where pixels are
    drawn, at half the noise level each time: the last jump, to x0, blurs detail that is finer than
    the level it starts from (0.04 in the SDE, and 0.04 / gate by the rescaled clock).
    """

    mode: str = "sde"
    heun: bool = False
    num_steps: int = 50
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    pixel_cfg_scale: float | None = None
    pixel_tail: int = 0
    output: str = "pixels"

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("output", OUTPUTS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f'unknown {name} "{getattr(self, name)}"; {nearest(getattr(self, name), known)}'
                )
        if self.heun and self.mode == "sde":
            raise UsageError("heun is a way to solve the ODE.", "Leave it out, or take mode ode.")
        fewest = 2 if self.mode == "sde" else 1
        if not fewest <= self.num_steps <= 10_000:
            raise UsageError(
                f"num-steps {self.num_steps} is not between {fewest} and 10000 (mode {self.mode})."
            )
        if not 0 <= self.pixel_tail <= 16:
            raise UsageError(f"pixel-tail {self.pixel_tail} is not between 0 and 16.")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise UsageError(
                f"guidance-low {self.guidance_low} and guidance-high {self.guidance_high} "
                "are no interval in [0, 1]."
            )
        for name in ("cfg_scale", "pixel_cfg_scale"):
            scale = getattr(self, name)
            if scale is not None and not 0 <= scale <= 1000:
                raise UsageError(f"{name.replace('_', '-')} {scale} is not between 0 and 1000.")

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def scales(self, num_streams: int) -> list[float]:
        """The guidance scale of the latents and, of two streams, of the pixels."""
        pixels = self.cfg_scale if self.pixel_cfg_scale is None else self.pixel_cfg_scale
        return [self.cfg_scale, pixels][:num_streams]

    def sigmas(self) -> Float[Tensor, " num_steps_plus_1"]:
        """The noise levels that are visited, in fp64: SiT's, for either mode, and the tail's."""
        if self.mode == "sde":
            sigmas = sde_sigmas(self.num_steps)
        else:
            sigmas = torch.linspace(1.0, 0.0, self.num_steps + 1, dtype=torch.float64)
        tail = range(1, self.pixel_tail + 1 if self.output == "pixels" else 1)
        halves = [float(sigmas[-2]) / 2**step for step in tail]
        return torch.cat([sigmas[:-1], sigmas.new_tensor([*halves, 0.0])])


@dataclass(frozen=True)
class Drawn:
    """The clean end of both streams: normalised latents, and pixels if they were asked for."""

    latents: Float[Tensor, "b c h w"]
    pixels: Float[Tensor, "b 3 height width"] | None


def labels_for(
    num_samples: int, num_classes: int, how: str = "equal", seed: int = 0
) -> Int[np.ndarray, " num_samples"]:
    """The class of picture 0, 1, ...; each a function of (seed, index), whatever their number.

    "equal": of every `num_classes` pictures in a row each shows another class, in an order of its
    own. So a multiple of `num_classes` has equally many of each, and any other number has at most
    one more of some than of others. "random": each drawn by itself.
    """
    if how not in LABEL_SAMPLINGS:
        raise UsageError(f'unknown label-sampling "{how}"; {nearest(how, LABEL_SAMPLINGS)}')
    num_rounds = -(-num_samples // num_classes)
    block = np.arange(num_rounds * num_classes, dtype=np.uint64)
    zeros, stream = np.zeros_like(block), np.full_like(block, _LABEL_STREAM_HIGH)
    high, low, *_ = philox4x32((block, zeros, zeros, stream), (0, seed))
    if how == "random":
        labels = ((high * np.uint64(num_classes)) >> np.uint64(32)).astype(np.int64)
    else:
        dice = (high << np.uint64(32) | low).reshape(num_rounds, num_classes)
        labels = dice.argsort(axis=1, kind="stable").astype(np.int64).reshape(-1)
    return labels[:num_samples]


def picture_seed(seed: int, index: int) -> int:
    """The seed of one picture's noise: another for every (seed, index) below 2**31 and 2**32."""
    return seed << 32 | index


def first_pixel_step(options: SamplingOptions, gate: float) -> int | None:
    """The step at whose noise level the pixels come in; None for output "vae".

    Levels are compared as fp32 numbers, as which a network sees them.

    Raises:
        UsageError: no step is at or below the gate.
    """
    if options.output == "vae":
        return None
    levels = options.sigmas()[:-1].tolist()
    for step, sigma in enumerate(levels):
        if _at_most(sigma, gate):
            return step
    raise UsageError(
        f"num-steps {options.num_steps} ends at noise level {levels[-1]:.3g} and never meets the "
        f"gate of the pixels, {gate:.3g}.",
        "Take more steps, or output vae.",
    )


def pixel_level(sigma: float, gate: float, clock: str, *, first: bool = False) -> float:
    """The pixels' noise level when the latents' is `sigma`.

    The rescaled clock runs from 1 at the gate to 0 with the latents. Its `first` node counts as the
    gate, below which it lies by less than a step: what it finds there is pure noise.
    """
    if clock == "shared":
        return sigma
    return 1.0 if first else min(1.0, sigma / gate)


@torch.no_grad()
def draw(
    network: Network,
    decode: Decode | None,
    labels: Numbers,
    indices: Numbers,
    seed: int,
    options: SamplingOptions,
    *,
    device: torch.device | str | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> UInt8[Tensor, "b height width 3"]:
    """Pictures `indices` of a run's `seed`, one of each label, on the CPU.

    `device` None is the network's. Network and `decode` are asked in fp32, whatever their weights
    are in, and the state is fp64 (fp32 on MPS), as published. `decode` may be None where
    `needs_decoder` says so. `on_step(step, num_steps)` counts from 1; what it raises ends the
    drawing. Floats become bytes as published, by cutting off: trunc(clamp(255 (x + 1) / 2)).

    Raises:
        UsageError: as `first_pixel_step`.
        ModelError: what comes out is not finite.
    """
    if device is None:
        parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
        device = next((p.device for p in parameters), "cpu")
    config = network.config
    seeds = [picture_seed(seed, int(index)) for index in indices]
    state_dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    shapes = {
        "latents": (config.in_channels, config.latent_size, config.latent_size),
        "pixels": (3, config.image_size, config.image_size),
    }

    def noise(stream: Literal["latents", "pixels"], number: int) -> Tensor:
        offset = _PIXEL_STREAMS if stream == "pixels" else 0
        return batch_noise(seeds, offset + number, shapes[stream], device).to(state_dtype)

    drawn = walk(
        network,
        decode,
        torch.as_tensor(labels, dtype=torch.int64).to(device),
        noise,
        options,
        on_step=on_step,
    )
    pictures = drawn.pixels
    if pictures is None:
        pictures = _decoded(network, decode, drawn.latents, torch.float32)
    if not bool(pictures.isfinite().all()):
        raise ModelError(
            "the network's pictures hold values that are not finite.",
            "Take --dtype fp32, or an earlier checkpoint: the training may have diverged.",
        )
    unit = (pictures.float() + 1) / 2
    return (255 * unit).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def needs_decoder(options: SamplingOptions, clock: str) -> bool:
    """Whether a VAE takes part: for its output, or for the hand-over of the shared clock."""
    return options.output == "vae" or clock == "shared"


@torch.no_grad()
def walk(
    network: Network,
    decode: Decode | None,
    labels: Int[Tensor, " b"],
    noise: Noise,
    options: SamplingOptions,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, int], object] | None = None,
) -> Drawn:
    """From noise to both clean streams, in the dtype of what `noise` gives.

    `dtype` is what the network and `decode` are asked in.

    One call of the network a step (two with Heun, but for the last step), doubled where guidance is
    on; below the gate it answers both streams at once. The shared clock's hand-over makes one more,
    of the latents alone. Heun's second call is guided as its first, as in REPA-E.

    The last step of the SDE is SiT's "mean" for latents. Pixels go to x0: the eye would see what
    "mean" leaves of the noise.
    """
    gate, clock = network.config.gate, network.config.pixel_clock
    first = first_pixel_step(options, gate)
    sigmas = options.sigmas().tolist()
    ask = _Ask(network, labels, options, dtype)
    state = [noise("latents", 0)]
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        guided = _at_most(options.guidance_low, sigma) and _at_most(sigma, options.guidance_high)
        if step == first:
            state.append(_hand_over(ask, decode, state[0], sigma, guided, noise, clock))
        here = [sigma, pixel_level(sigma, gate, clock, first=step == first)][: len(state)]
        there = [sigma_next, pixel_level(sigma_next, gate, clock)][: len(state)]
        velocities = ask(state, here, guided)
        if options.mode == "ode":
            arrived = _straight(state, velocities, here, there)
            if options.heun and sigma_next > 0:
                again = ask(arrived, there, guided)
                mean = [(v + w) / 2 for v, w in zip(velocities, again, strict=True)]
                arrived = _straight(state, mean, here, there)
            state = arrived
        elif sigma_next > 0:
            fresh = [noise(name, step + 1) for name in _STREAMS[: len(state)]]
            state = [
                sde_step(*stream)
                for stream in zip(state, velocities, here, there, fresh, strict=True)
            ]
        else:
            ends: tuple[Literal["mean", "x0"], ...] = ("mean", "x0")
            state = [
                sde_last_step(*stream)
                for stream in zip(state, velocities, here, ends, strict=False)
            ]
        if on_step:
            on_step(step + 1, len(sigmas) - 1)
    return Drawn(state[0], state[1] if len(state) > 1 else None)


@dataclass(frozen=True)
class _Ask:
    """The network as `(state, levels, guided) -> velocities`, one of each stream."""

    network: Network
    labels: Tensor
    options: SamplingOptions
    dtype: torch.dtype

    def __call__(self, state: list[Tensor], levels: list[float], guided: bool) -> list[Tensor]:
        config = self.network.config
        scales = self.options.scales(len(state))
        branches = 2 if guided and max(scales) > 1 else 1
        null = torch.full_like(self.labels, config.num_classes)
        labels = torch.cat([self.labels, null][:branches])
        rows = [torch.cat([x] * branches) for x in state]
        sigma, *pixel_sigma = (labels.new_full(labels.shape, s, dtype=self.dtype) for s in levels)
        latents, *pixels = (x.to(self.dtype) for x in rows)
        if not pixels:
            answers = [self.network(latents, sigma, labels).velocity.to(rows[0].dtype)]
        else:
            rescaled = {} if config.pixel_clock == "shared" else {"pixel_sigma": pixel_sigma[0]}
            found = self.network(latents, sigma, labels, pixels[0], **rescaled)
            x0 = found.pixels.to(rows[1].dtype)
            answers = [found.velocity.to(rows[0].dtype), to_velocity(rows[1], x0, levels[1])]
        num = len(self.labels)
        return [
            guide(v[:num], v[num:], scale) if branches == 2 and scale > 1 else v[:num]
            for v, scale in zip(answers, scales, strict=True)
        ]


def _hand_over(
    ask: _Ask,
    decode: Decode | None,
    latents: Tensor,
    sigma: float,
    guided: bool,
    noise: Noise,
    clock: str,
) -> Tensor:
    """The pixels' first state."""
    fresh = noise("pixels", 0)
    if clock == "rescaled":
        return fresh
    z0 = to_x0(latents, ask([latents], [sigma], guided)[0], sigma)
    return add_noise(_decoded(ask.network, decode, z0, ask.dtype).to(fresh), fresh, sigma)


def _straight(
    state: list[Tensor], velocities: list[Tensor], here: list[float], there: list[float]
) -> list[Tensor]:
    """Euler's step of every stream, each by its own clock. To level 0 it lands on x0."""
    return [x + (b - a) * v for x, v, a, b in zip(state, velocities, here, there, strict=True)]


def _decoded(
    network: Network, decode: Decode | None, latents: Tensor, dtype: torch.dtype
) -> Tensor:
    if decode is None:
        raise ValueError("a decoder is needed; see `needs_decoder`.")
    return decode(network.denormalise(latents).to(dtype))


def _at_most(low: float, high: float) -> bool:
    """`low <= high` for fp32 roundings: what a schedule makes of 0.3 is still 0.3."""
    return bool(np.float32(low) <= np.float32(high))
