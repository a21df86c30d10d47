"""Parity with diffusers' I1: `python -m tests.parity.i1 --seed N` prints a JSON line a case.

Both networks have the same random weights, none of them neutral, and the same inputs, all drawn
from the seed. `output_rel` is the largest difference of the whole network's output, `blocks_rel`
that of any block's tokens, over the largest value of the reference's.

Routes are compared apart from values: where two experts' probabilities are closer than rounding,
one network may pick the other one. `routes_equal` is the share of tokens that went the same way;
`tie_rel` is the largest gap that a differing pick had, and values are compared with those tokens
sent the reference's way. `tied` is the share of tokens whose last pick is no more than rounding
above the next expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamBlock,
    MOEFeedForwardSwiGLU,
    MoEGate,
)
from torch import Tensor, nn

from hidream.models.i1.config import I1_TINY, I1Config
from hidream.models.i1.layers import DoubleBlock, SingleBlock
from hidream.models.i1.model import I1, Features
from hidream.models.placement import empty_out
from hidream.nn.moe import Router, Routing
from tests.parity.i1_weights import random_state

TIE = 1e-6  # of a probability: rounding, in fp32
Change = Callable[[dict[str, Tensor]], None]


def _picked(state: dict[str, Tensor], rows: dict[int, float]) -> None:
    """Shift every router's input up, and weigh all channels of these experts alike."""
    size = state["x_embedder.proj.bias"].shape[0]
    for name, tensor in state.items():
        if name.endswith("adaLN_modulation.1.bias") and "final" not in name:
            tensor[3 * size : 4 * size] += 3  # the feed-forward layer's shift
        if name.endswith("gate.weight"):
            for row, weight in rows.items():
                tensor[row] = weight


def _tied(state: dict[str, Tensor], gap: float = 0.0) -> None:
    """Experts 1 and 2 alike in every gate: for many tokens, the last that is picked and the first
    that is not."""
    for name, tensor in state.items():
        if name.endswith("gate.weight"):
            tensor[2] = tensor[1] * (1 + gap)


@dataclass(frozen=True, kw_only=True)
class Case:
    height: int = 16
    width: int = 16
    config: I1Config = I1_TINY
    source: bool = False  # side by side with a picture to edit
    change: Change = field(default=lambda state: None)
    cached: bool = False  # modulations of all steps at once, their weights thrown away
    patched: bool = False  # the reference is given patches, mask and positions


CASES: dict[str, Case] = {
    "square": Case(),
    "portrait": Case(height=16, width=10),
    "landscape": Case(height=6, width=20),
    "landscape_without_room": Case(height=8, width=32),  # as many patches as there may be
    "longer_padding": Case(height=8, width=12, config=replace(I1_TINY, max_resolution=(24, 24))),
    "patched_by_the_caller": Case(height=12, width=8, patched=True),
    "side_by_side": Case(height=12, width=8, source=True),
    "side_by_side_square": Case(height=16, width=8, source=True),
    "rope_of_half_a_head": Case(height=10, config=replace(I1_TINY, rope_dims=(4, 2, 2))),
    "more_layers": Case(
        config=replace(
            I1_TINY, num_layers=3, num_single_layers=4, llama_layers=(0, 1, 2, 3, 3, 1, 3)
        )
    ),
    "two_streams_only": Case(
        height=10, config=replace(I1_TINY, num_single_layers=0, llama_layers=(1, 0))
    ),
    "top_1": Case(config=replace(I1_TINY, num_active_experts=1)),
    "top_4": Case(config=replace(I1_TINY, num_active_experts=4)),
    "no_experts": Case(height=10, config=replace(I1_TINY, num_experts=0)),
    "an_expert_nobody_picks": Case(change=lambda state: _picked(state, {1: -1.0})),
    "all_to_one": Case(
        height=10,
        config=replace(I1_TINY, num_active_experts=1),
        change=lambda state: _picked(state, {2: 1.0}),
    ),
    "ties": Case(height=10, change=_tied),
    "near_ties": Case(height=10, change=lambda state: _tied(state, 1e-7)),
    "modulations_ahead": Case(height=10, cached=True),
}
GRADIENT_CASES: dict[str, Case] = {
    "gradients": Case(height=10),
    "gradients_top_1": Case(config=replace(I1_TINY, num_active_experts=1)),
}


@dataclass(frozen=True)
class Inputs:
    x_t: Tensor
    sigma: Tensor  # one a row
    features: Features
    source: Tensor | None


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def build(case: Case, generator: torch.Generator) -> tuple[HiDreamImageTransformer2DModel, I1]:
    config = case.config
    state = random_state(config, generator)
    case.change(state)
    theirs = HiDreamImageTransformer2DModel.from_config(config.to_dict())
    theirs.load_state_dict(state, strict=True)
    ours = I1(config)
    ours.load_state_dict(state, strict=True)
    return theirs.eval(), ours.eval()


def draw(case: Case, generator: torch.Generator) -> Inputs:
    """Two rows that differ in everything: picture, noise level and text."""
    config, b = case.config, 2

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (b, config.in_channels, case.height, case.width)
    return Inputs(
        x_t=noise(*latents),
        sigma=torch.rand(b, generator=generator),
        features=Features(
            t5=noise(b, 7, config.t5_size),
            llama=noise(max(config.llama_layers) + 2, b, 5, config.llama_size),
            pooled=noise(b, config.pooled_size),
        ),
        source=noise(*latents) if case.source else None,
    )


def run_theirs(model: HiDreamImageTransformer2DModel, case: Case, inputs: Inputs) -> Tensor:
    """The reference's velocity: its output with the sign turned, of the picture's half."""
    x = inputs.x_t if inputs.source is None else torch.cat([inputs.x_t, inputs.source], dim=-1)
    options: dict[str, Any] = {"hidden_states": x}
    if case.patched:
        patches, mask, sizes, ids = model.patchify(x)
        options = {"hidden_states": patches, "hidden_states_masks": mask}
        options |= {"img_sizes": sizes, "img_ids": ids}
    out = model(
        timesteps=1000 * inputs.sigma,
        encoder_hidden_states_t5=inputs.features.t5,
        encoder_hidden_states_llama3=inputs.features.llama,
        pooled_embeds=inputs.features.pooled,
        return_dict=False,
        **options,
    )[0]
    return -out[..., : case.width]


def run_ours(model: I1, case: Case, inputs: Inputs) -> Tensor:
    size = {"height": case.height, "width": case.width}
    if not case.cached:
        prefix = model.prefill(inputs.features, source=inputs.source, **size)
        return model.velocity(inputs.x_t, inputs.sigma, prefix)
    prefix = model.prefill(inputs.features, source=inputs.source, sigmas=inputs.sigma, **size)
    for module in model.prefill_modules.values():
        empty_out(module, torch.float32)
    rows = [
        model.velocity(inputs.x_t[i : i + 1], inputs.sigma[i], prefix.take([i]))
        for i in range(len(prefix))
    ]
    return torch.cat(rows)


class Places:
    """Where our tokens of a row stand in the reference's sequence of a block.

    Ours are the target's patches, the source's, one for all the padding, the text; the reference
    has the whole grid row by row, all the padding, the text, and the caption that goes.
    """

    def __init__(self, case: Case, num_text: int):
        config, p = case.config, case.config.patch_size
        rows, columns = case.height // p, case.width // p
        across = columns * (1 + case.source)
        padded = rows != across
        self.length = config.max_patches if padded else rows * across
        grid = torch.arange(rows * across).view(rows, across)
        self.target = grid[:, :columns].flatten()
        rest = grid[:, columns:].flatten()
        has_pad = padded and rows * across < config.max_patches
        pad = torch.tensor([rows * across] if has_pad else [], dtype=torch.long)
        self.image = torch.cat([self.target, rest, pad])
        self.sequence = torch.cat([self.image, self.length + torch.arange(num_text)])
        self.num_double, self.last = config.num_layers, config.num_blocks - 1

    def of(self, block: int) -> Tensor:
        if block == self.last:
            return self.target
        return self.image if block < self.num_double else self.sequence


class Routes:
    """Compares our routers' picks with the reference's, and sends tied tokens the same way."""

    def __init__(self, theirs: nn.Module, ours: nn.Module, places: Places, num_blocks: int):
        self.places, self.num_blocks = places, num_blocks
        self.seen: list[Tensor] = []
        self.num_calls = self.num_tokens = self.num_equal = self.num_tied = 0
        self.gap = 0.0
        for module in theirs.modules():
            if isinstance(module, MoEGate):
                module.register_forward_hook(lambda m, i, out: self.seen.append(out[0]))
        for module in ours.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._compare)

    def _compare(self, router: nn.Module, inputs: object, routing: Routing) -> Routing:
        """Our call may be for one row of the batch, row after row."""
        row, block = divmod(self.num_calls, self.num_blocks)
        self.num_calls += 1
        place = self.places.of(block)
        theirs = self.seen[block].view(2, -1, routing.experts.shape[1])[:, place]
        whole = len(routing.experts) == 2 * len(place)
        theirs = (theirs if whole else theirs[row]).flatten(0, -2).sort(dim=-1).values
        ours = routing.experts.sort(dim=-1).values
        differ = (ours != theirs).any(dim=-1)
        self.num_tokens += len(differ)
        self.num_equal += int((~differ).sum())
        p, num_picked = routing.probabilities, routing.experts.shape[1]
        if num_picked < p.shape[1]:
            ranked = p.sort(dim=-1, descending=True).values
            self.num_tied += int((ranked[:, num_picked - 1] - ranked[:, num_picked] < TIE).sum())
        if not differ.any():
            return routing
        gap = p.gather(1, routing.experts).amin(1) - p.gather(1, theirs).amin(1)
        self.gap = max(self.gap, float(gap[differ].abs().max()))
        experts = torch.where(differ[:, None], theirs, routing.experts)
        return Routing(p, experts, p.gather(1, experts))


def run_case(name: str, case: Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = build(case, generator)
    inputs = draw(case, generator)
    num_text = inputs.features.t5.shape[1] + inputs.features.llama.shape[2]
    places = Places(case, num_text)
    routes = Routes(theirs, ours, places, case.config.num_blocks)
    their_blocks, our_blocks = outputs_of(theirs), outputs_of(ours)
    with torch.no_grad():
        want, got = run_theirs(theirs, case, inputs), run_ours(ours, case, inputs)
    line: dict[str, Any] = {"case": name, "output_rel": relative(got, want)}
    if not case.cached:
        errors = []
        for i, (x, y) in enumerate(zip(our_blocks, their_blocks, strict=True)):
            if i < case.config.num_layers:
                if x[1].shape[1]:
                    errors.append(relative(x[1], y[1][:, :num_text]))
                y = y[0]
            errors.append(relative(x[0], y[:, places.of(i)]))
        line["blocks_rel"] = max(errors)
    if case.config.num_experts:
        line["routes_equal"] = routes.num_equal / routes.num_tokens
        line["tie_rel"] = routes.gap
        line["tied"] = routes.num_tied / routes.num_tokens
    return line


def outputs_of(model: nn.Module) -> list[Any]:
    """A list that every block's output is put on."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, DoubleBlock | SingleBlock | HiDreamBlock):
            module.register_forward_hook(lambda m, i, out: found.append(out))
    return found


def dense(self: MOEFeedForwardSwiGLU, x: Tensor) -> Tensor:
    """The oracle's experts: all of them on all tokens. (The reference's have no gradient.)"""
    tokens = x.flatten(0, 1)
    chosen, weights, _ = self.gate(x)
    share = torch.zeros(len(tokens), len(self.experts), dtype=x.dtype).scatter(1, chosen, weights)
    out = sum(share[:, i : i + 1] * expert(tokens) for i, expert in enumerate(self.experts))
    return (out + self.shared_experts(tokens)).view_as(x)


def run_gradients(name: str, case: Case, seed: int) -> dict[str, Any]:
    """The gradient of every tensor, in fp64, of a random projection of the velocity."""
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = build(case, generator)
    inputs = draw(case, generator)
    features = inputs.features
    features = Features(features.t5.double(), features.llama.double(), features.pooled.double())
    inputs = replace(inputs, x_t=inputs.x_t.double(), features=features)
    theirs.double()
    ours.double().train()
    for module in theirs.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.forward = MethodType(dense, module)
    places = Places(case, features.t5.shape[1] + features.llama.shape[2])
    routes = Routes(theirs, ours, places, case.config.num_blocks)
    onto = torch.randn(inputs.x_t.shape, generator=generator, dtype=torch.float64)

    (run_theirs(theirs, case, inputs) * onto).sum().backward()
    (ours(inputs.x_t, inputs.sigma, features).velocity * onto).sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    errors, num_without = {}, 0
    for parameter, tensor in ours.named_parameters():
        want = wanted[parameter]
        if tensor.grad is None or want is None or not want.any():
            num_without += 1
        else:
            errors[parameter] = relative(tensor.grad, want)
    return {
        "case": name,
        "gradients_rel": max(errors.values()),
        "num_tensors": len(wanted),
        "without_gradient": num_without,
        "routes_equal": routes.num_equal / routes.num_tokens,
        "tie_rel": routes.gap,
    }


def run(seed: int) -> Iterator[dict[str, Any]]:
    for number, (name, case) in enumerate(CASES.items()):
        yield run_case(name, case, 1000 * seed + number)
    for number, (name, case) in enumerate(GRADIENT_CASES.items(), len(CASES)):
        yield run_gradients(name, case, 1000 * seed + number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Our I1 against diffusers'.")
    parser.add_argument("--seed", type=int, default=0)
    for line in run(parser.parse_args().seed):
        print(json.dumps(line), flush=True)
