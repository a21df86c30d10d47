"""I1's seam: what a prefix keeps, what a step leaves out, and that neither changes a picture.

That the network is the published one is tests/parity's business.
"""

import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hidream.errors import ModelError, UsageError
from hidream.models.i1.config import I1_FULL, I1_TINY, SIZES, I1Config
from hidream.models.i1.model import I1, Prefix
from hidream.models.loading import tensor_shapes
from hidream.models.placement import empty_out
from tests.tiny_i1 import TINIEST, features, latents, random_i1

ROOT = Path(__file__).parents[2]
SIGMAS = torch.tensor([1.0, 0.6, 0.25])


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.fixture(scope="module")
def model():
    return random_i1()


def test_modulations_ahead_are_those_of_the_step_and_free_their_weights():
    model = random_i1()
    x_t, size = latents(12, 8), {"height": 12, "width": 8}
    direct = model.prefill(features(), **size)
    ahead = model.prefill(features(), sigmas=SIGMAS, **size)
    wanted = [model.velocity(x_t, sigma, direct) for sigma in SIGMAS]
    for module in model.prefill_modules.values():
        empty_out(module, torch.float32)
    for sigma, velocity in zip(SIGMAS, wanted, strict=True):
        close(model.velocity(x_t, sigma, ahead), velocity)
    with pytest.raises(ValueError, match="prefill with sigmas"):
        model.velocity(x_t, torch.tensor(0.5), ahead)


def test_what_stays_at_full_size():
    """GB in bf16: 28.2 of 34.2 once captions and modulations are computed."""
    with torch.device("meta"):
        model = I1(I1_FULL)
    names = tuple(name + "." for name in model.prefill_modules)
    shapes = tensor_shapes(model)
    total = sum(map(math.prod, shapes.values()))
    stays = sum(math.prod(s) for name, s in shapes.items() if not name.startswith(names))
    assert total == 17_105_733_184
    assert 28.0e9 < 2 * stays < 28.5e9


def test_captions_are_projected_once(model):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in model.caption_projection
    ]
    prefix = model.prefill(features(), height=8, width=8, sigmas=SIGMAS)
    for sigma in SIGMAS:
        model.velocity(latents(8, 8), sigma, prefix)
    for handle in handles:
        handle.remove()
    assert len(calls) == I1_TINY.num_blocks + 1


def test_nothing_is_computed_of_what_goes(model):
    """Tokens that each kind of layer sees: 16 patches, the text's 7 + 5, a caption's 5."""
    seen = {}

    def note(name):
        return lambda m, inputs, out: seen.setdefault(name, []).append(inputs[0].shape[-2])

    handles = [
        model.get_submodule(name).register_forward_hook(note(name))
        for number in (0, 1)
        for stream, layers in (
            ("double_stream_blocks", ("to_q", "to_q_t", "to_k_t", "to_out_t")),
            ("single_stream_blocks", ("to_q", "to_k", "to_out")),
        )
        for name in [f"{stream}.{number}.block.attn1.{layer}" for layer in layers]
    ]
    prefix = model.prefill(features(batch=1), height=8, width=8)
    model.velocity(latents(8, 8, batch=1), torch.tensor(0.5), prefix)
    for handle in handles:
        handle.remove()
    double, single = "double_stream_blocks.0.block.attn1.", "single_stream_blocks.{}.block.attn1."
    assert [seen[double + n] for n in ("to_q", "to_q_t", "to_k_t", "to_out_t")] == [
        [16],
        [12],
        [17],
        [12],
    ]
    assert [seen[single.format(0) + n] for n in ("to_q", "to_k", "to_out")] == [[28], [33], [28]]
    assert [seen[single.format(1) + n] for n in ("to_q", "to_k", "to_out")] == [[16], [33], [16]]


def test_padding_matters_only_where_there_is_some(model):
    for (height, width), padded in (((8, 8), False), ((8, 12), True), ((8, 32), False)):
        with_pads, without = (
            model.velocity(
                latents(height, width),
                torch.tensor(0.4),
                model.prefill(features(), height=height, width=width, pads=pads),
            )
            for pads in (True, False)
        )
        difference = float((with_pads - without).abs().max() / without.abs().max())
        assert difference > 0.01 if padded else difference == 0


def test_sizes_over_the_limit(model):
    with pytest.raises(UsageError, match="takes 64 unless it is square"):
        model.prefill(features(), height=18, width=16)
    model.prefill(features(), height=18, width=18)
    model.prefill(features(), height=18, width=16, pads=False)
    with pytest.raises(ValueError, match="whole patches"):
        model.prefill(features(), height=9, width=8)
    prefix = model.prefill(features(), height=8, width=8)
    with pytest.raises(ValueError, match="not what the prefix was made for"):
        model.velocity(latents(8, 10), torch.tensor(0.5), prefix)


@pytest.mark.parametrize("sigmas", [None, SIGMAS])
def test_rows_of_a_batch_are_as_if_alone(model, sigmas):
    options = {"height": 6, "width": 8, "sigmas": sigmas}
    x_t, sigma = latents(6, 8, batch=3), torch.tensor(0.6)
    alone = [model.prefill(features(batch=1, seed=seed), **options) for seed in (3, 4)]
    both = Prefix.join(alone).take([1, 0, 1])
    assert len(both) == 3
    out = model.velocity(x_t, sigma, both)
    for row, prefix in enumerate((alone[1], alone[0], alone[1])):
        close(out[row : row + 1], model.velocity(x_t[row : row + 1], sigma, prefix))
    with pytest.raises(ValueError, match="cannot be joined"):
        Prefix.join([alone[0], model.prefill(features(batch=1), height=8, width=8)])


def test_training_sees_what_drawing_sees(model):
    """A source, a sigma for each row; and the experts' use, for the balance loss."""
    x_t, source = latents(6, 8), latents(6, 8, seed=9)
    sigma = torch.tensor([0.3, 0.9])
    made = model(x_t, sigma, features(), source=source)
    prefix = model.prefill(features(), height=6, width=8, source=source)
    close(made.velocity, model.velocity(x_t, sigma, prefix))
    assert made.expert_loads.shape == (4, 4)
    torch.testing.assert_close(made.expert_loads.sum(1), torch.ones(4))
    assert made.balance_loss >= 0.9
    other = model.prefill(features(), height=6, width=8, source=source.flip(0))
    assert (model.velocity(x_t, sigma, other) - made.velocity).abs().max() > 0.01


def test_the_balance_loss_reaches_the_gates():
    model = random_i1(TINIEST).requires_grad_(True)
    loss = model(latents(8, 8), torch.tensor([0.1, 0.8]), features(TINIEST)).balance_loss
    loss.backward()
    assert all(b.ff_i.gate.weight.grad.any() for b in model.blocks)


def test_fresh_weights_begin_at_zero():
    model = I1(TINIEST)
    model.init_weights(torch.Generator().manual_seed(0))
    made = model(latents(8, 6), torch.tensor([0.1, 0.8]), features(TINIEST))
    assert not made.velocity.any()
    assert made.expert_loads.max() < 0.7
    made.velocity.sum().backward()
    assert model.final_layer.linear.bias.grad.any()


@pytest.mark.slow
def test_a_step_is_one_graph():
    """Of a picture with padding; in a process of its own, whose annotations nobody checks."""
    code = """
        import torch
        from tests.tiny_i1 import TINIEST, features, latents, random_i1

        model, x_t, sigma = random_i1(TINIEST), latents(12, 8), torch.tensor(0.6)
        prefix = model.prefill(features(), sigmas=sigma[None], height=12, width=8)
        step = torch.compile(model.step, fullgraph=True, backend="eager")
        with torch.no_grad():
            found, _ = step(x_t, model.modulations_at(sigma, prefix), prefix)
            torch.testing.assert_close(found, model.velocity(x_t, sigma, prefix))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_bf16_is_near_fp32(model):
    """To rounding: a twentieth, most of it from tokens that were sent another way."""
    half = random_i1().bfloat16()
    pair = [
        network.velocity(
            latents(8, 12), torch.tensor(0.7), network.prefill(features(), height=8, width=12)
        )
        for network in (model, half)
    ]
    assert all(v.dtype == torch.float32 for v in pair)
    assert (pair[1] - pair[0]).norm() < 0.05 * pair[0].norm()


def test_work_can_be_ended_within_a_step(model):
    prefix, calls = model.prefill(features(), height=8, width=8), []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.velocity(latents(8, 8), torch.tensor(0.5), prefix, stop)
    assert len(calls) == 3


@pytest.mark.parametrize("name", SIZES)
def test_a_config_survives_its_file(name):
    assert I1Config.from_dict(SIZES[name].to_dict()) == SIZES[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 3}, "llama_layers has 4 entries for 5 blocks"),
        ({"axes_dims_rope": [8, 8, 8]}, "head_dim=16"),
        ({"num_activated_experts": 5}, "num_active_experts=5"),
        ({"caption_channels": 4096}, "TypeError"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_configs_that_contradict_themselves(change, said, unchecked):
    with pytest.raises(ModelError, match=said):
        I1Config.from_dict({**I1_TINY.to_dict(), **change})
    with pytest.raises(ModelError, match="KeyError: 'num_layers'"):
        I1Config.from_dict({})
    assert replace(I1_TINY, num_experts=0).num_blocks == 4
