"""LoRAs in training: what is trained, what is written, and that both draw the same picture."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open

from hidream.errors import UsageError
from hidream.lora_file import linear_layers, read_lora
from hidream.models.loading import tensor_shapes
from hidream.models.loras import LoraWeights, with_loras
from hidream.nn.lora import Adapter
from hidream.sampling import picture_noise
from hidream.train.config import parse_recipe
from hidream.train.distributed import World
from hidream.train.learner import learner_of
from hidream.train.lora import Adapters, save_lora
from tests import tiny_i1
from tests.unit.test_lora import answer, error

Q = "model.language_model.layers.1.self_attn.q_proj"


def recipe_of(folder, model="o1-tiny", **lora):
    stage = {"size": 64, "steps": 5, "batch_size": 2, "learning_rate": 1e-3}
    stage["tasks"] = {"edit" if model.startswith("e1") else "text_to_image": 1.0}
    plain = {"name": "tiny", "model": model, "seed": 3, "stages": [stage], "init": str(folder)}
    return parse_recipe(plain | {"precision": "float32", "lora": {"rank": 3, **lora}})


def trained(model, layers, **options):
    """Adapters that are no longer as they began, as after many steps."""
    made = {}
    for stream, name in enumerate(layers):
        adapter = Adapter(model.get_parameter(f"{name}.weight"), 3, 6.0, **options)
        with torch.no_grad():
            adapter.lora_B.copy_(0.1 * picture_noise(1, stream, adapter.lora_B.shape))
            if adapter.lora_magnitude_vector is not None:
                noise = picture_noise(2, stream, adapter.lora_magnitude_vector.shape)
                adapter.lora_magnitude_vector.mul_(1 + 0.2 * noise)
        made[name] = adapter
    return Adapters(model, made)


@torch.no_grad()
def merged(model, adapters):
    """By hand, in double precision: V = W + alpha/rank · B A, a DoRA's rows at their lengths."""
    model = copy.deepcopy(model)
    for name, adapter in adapters.layers.items():
        weight = model.get_parameter(f"{name}.weight")
        moved = weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()
        if adapter.lora_magnitude_vector is not None:
            lengths = adapter.lora_magnitude_vector.double()
            moved *= (lengths / moved.norm(dim=1))[:, None]
        weight.copy_(moved.float())
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_trained_written_and_merged_are_one(
    tiny_model, tiny_folder, tokenizer, tmp_path, dora, style
):
    layers = [name for name in linear_layers(tensor_shapes(tiny_model)) if "self_attn" in name]
    adapters = trained(tiny_model, layers, dora=dora)
    file = tmp_path / "lora.safetensors"
    save_lora(adapters, file, recipe_of(tiny_folder, alpha=6.0, dora=dora), style=style)
    shapes = linear_layers(tensor_shapes(tiny_model))
    found = read_lora(str(file), shapes, "o1-tiny")
    assert not found.warnings
    assert {layer.layer for layer in found.layers} == set(layers)
    read = answer(with_loras(tiny_model, [(found, 1.0)], LoraWeights()), tokenizer)
    unmerged = answer(adapters.network, tokenizer)
    assert torch.equal(read, unmerged)
    assert error(unmerged, answer(merged(tiny_model, adapters), tokenizer)) < 1e-5
    assert error(unmerged, answer(tiny_model, tokenizer)) > 0.01
    with safe_open(file, framework="pt") as opened:
        names, header = set(opened.keys()), opened.metadata()
    start = {"diffusers": "transformer.", "comfyui": "diffusion_model."}[style] + Q
    assert {f"{start}.lora_A.weight", f"{start}.lora_B.weight"} <= names
    lengths = {"diffusers": "lora_magnitude_vector", "comfyui": "dora_scale"}  # theirs alone
    for other, name in lengths.items():
        assert (f"{start}.{name}" in names) == (dora and other == style)
    assert (f"{start}.alpha" in names) == (style == "comfyui")
    assert '"transformer.lora_alpha": 6.0' in header["lora_adapter_metadata"]
    assert '"base"' in header["hidream_training"]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_begin_as_no_change_and_alone_are_trained(tiny_folder, tokenizer, dora):
    learner = learner_of(recipe_of(tiny_folder, dora=dora, targets=["q_proj", "proj2"]))
    adapters = learner.build()
    names = {name for name, _ in adapters.named_parameters()}
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")[: 2 + dora]
    assert {f"{Q}.{kind}" for kind in kinds} <= names
    assert {name.rpartition(".")[2] for name in names} == set(kinds)
    assert adapters.state_dict().keys() == names
    frozen = adapters.network.get_submodule(Q).base.weight
    base = learner.inner.build()
    assert error(answer(adapters.network, tokenizer), answer(base, tokenizer)) < 1e-5
    batch = learner.make_batch(0)
    learner.losses(adapters, batch, World().start_sums(*batch.counts)).total.backward()
    for name, parameter in adapters.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert moved == (not name.endswith("lora_A")), name  # B is 0, so A has no gradient yet
    assert not frozen.requires_grad
    assert frozen.grad is None


def test_frozen_weights_in_half_precision_train_nearly_the_same(tiny_folder):
    found = {}
    for frozen in ("float32", "bfloat16"):
        plain = recipe_of(tiny_folder).to_dict() | {"precision": "bfloat16"}
        plain["lora"] = plain["lora"] | {"frozen_dtype": frozen}
        learner = learner_of(parse_recipe(plain))
        adapters = learner.build()
        assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
        base = adapters.network.get_submodule(Q).base.weight
        assert base.dtype is getattr(torch, frozen)
        batch = learner.make_batch(0)
        loss = learner.losses(adapters, batch, World().start_sums(*batch.counts)).total
        loss.backward()
        assert adapters.layers[Q].lora_B.grad.abs().max() > 0
        found[frozen] = loss.item()
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)


def test_a_copy_has_adapters_of_its_own_on_the_same_model(tiny_model):
    adapters = trained(tiny_model, [Q])
    average = copy.deepcopy(adapters)
    layer, other = (a.network.get_submodule(Q) for a in (adapters, average))
    assert layer.base is other.base is tiny_model.get_submodule(Q)
    assert layer.adapter is not other.adapter
    with torch.no_grad():
        adapters.layers[Q].lora_B.zero_()
    assert average.layers[Q].lora_B.abs().max() > 0
    assert other.adapter is average.layers[Q]
    assert adapters.to(torch.float64).network.get_submodule(Q).adapter.lora_A.dtype == torch.float64
    tiny_model.float()


def test_dropout_is_the_steps_own(tiny_folder):
    learner = learner_of(recipe_of(tiny_folder, dropout=0.5))
    adapters = trained(learner.inner.build(), learner.targets, dropout=0.5)

    def loss(step):
        batch = learner.make_batch(step)
        labels = World().start_sums(*batch.counts)
        return learner.losses(adapters, batch, labels).total.item()

    before = torch.get_rng_state()
    first = loss(0)
    assert loss(0) == first
    adapters.eval()
    assert loss(0) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_are_reached_and_gates_are_not():
    from hidream.train.i1 import I1Learner

    layers = linear_layers(tensor_shapes(tiny_i1.random_i1(tiny_i1.TINIEST)))
    wanted = [n for n in layers if any(f".{n}".endswith(f".{t}") for t in I1Learner.lora_targets)]
    assert any(".experts.3.w2" in name for name in wanted)
    assert any("to_out_t" in name for name in wanted)
    assert not any(name.endswith((".gate", "adaLN_modulation.1")) for name in wanted)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"targets": ["q_porj"]}, 'no layer of .* ends in "q_porj"'),
        ({"rank": -1}, "must not be negative"),
        ({"dropout": 1.0}, "must lie in 0"),
        ({"keys": "kohya"}, "must be one of diffusers, comfyui"),
        ({"dtype": "int8"}, "must be one of float32"),
    ],
)
def test_options_that_cannot_be(tiny_folder, changes, problem):
    with pytest.raises(UsageError, match=problem):
        learner_of(recipe_of(tiny_folder, **changes))


def test_what_a_lora_needs(tiny_folder):
    plain = recipe_of(tiny_folder).to_dict()
    for change, problem in (
        ({"init": ""}, r"lora\.rank needs the model"),
        ({"parallel": {"shard": 2}}, "replicate alone"),
        ({"data": {"world": 1.0}}, r"data\.world = 1\.0 must be at least 0"),
        ({"optimizer": {"muon": 2.0}}, r"optimizer\.muon = 2\.0 goes with whole matrices"),
    ):
        with pytest.raises(UsageError, match=problem):
            parse_recipe(plain | change)
    with pytest.raises(UsageError, match="vae has no LoRAs"):
        learner_of(parse_recipe(plain | {"model": "vae"}))
    with pytest.raises(UsageError, match=r"vae does not learn from data\.path"):
        type(learner_of(parse_recipe(plain | {"model": "vae", "lora": {}}))).open_data(
            parse_recipe(plain | {"data": {"path": "x"}, "model": "vae"})
        )
