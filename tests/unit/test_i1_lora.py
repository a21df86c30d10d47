"""LoRAs on I1 and E1: every style and layer, packed experts, E1-Full's file on I1-Full."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hidream import lora_file
from hidream.errors import InputError
from hidream.lora_file import linear_layers, read_lora
from hidream.memory import POLICIES
from hidream.models.i1.config import E1_FULL, I1_FULL, I1_TINY
from hidream.models.i1.weights import edits, load_i1, save_i1, shapes_of
from hidream.models.loading import tensor_shapes
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.o1.config import O1_8B
from hidream.models.o1.weights import shapes_of as o1_shapes
from hidream.nn.lora import LoraLinear
from hidream.nn.moe import pack
from tests import lora_files
from tests.tiny_i1 import features, latents, random_i1

SIGMAS = torch.tensor([0.9, 0.4])
GATE = "single_stream_blocks.1.block.ff_i.gate"
EXPERT = "double_stream_blocks.0.block.ff_i.experts.3.w2"
Q = "double_stream_blocks.1.block.attn1.to_q_t"
NORM = "single_stream_blocks.0.block.attn1.q_rms_norm.weight"
BIAS = "single_stream_blocks.0.block.attn1.to_out.bias"
# What E1's published training adapts (the names of diffusers' modules).
E1_TARGETS = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")
E1_TARGETS += ("w1", "w2", "w3", "final_layer.linear")


@pytest.fixture(scope="module")
def model():
    return random_i1()


def read(path, model):
    shapes = tensor_shapes(model)
    return read_lora(path, linear_layers(shapes), "i1-full", shapes=shapes)


def applied(model, path, scale=1.0):
    return with_loras(model, [(read(path, model), scale)], LoraWeights(), model.elsewhere)


@torch.inference_mode()
def answer(model):
    prefix = model.prefill(features(), height=12, width=8, sigmas=SIGMAS)
    return torch.stack([model.velocity(latents(12, 8), sigma, prefix) for sigma in SIGMAS])


def merged(model, lora, factor=1.0, whole=None):
    model = copy.deepcopy(model)
    for name, tensor in (whole or {}).items():
        model.get_parameter(name).copy_(tensor)
    for name, (down, up) in lora.items():
        model.get_parameter(f"{name}.weight").add_(factor * (up.double() @ down.double()).float())
    return model


def error(one, other):
    return float((one - other).abs().max() / other.abs().max())


def write_e1(file, model):
    """As its published training saves it: PEFT's names, some tensors whole."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n in layers if n.endswith(E1_TARGETS) and "gate" not in n]
    lora = lora_files.matrices(model, seed=5, rank=4, layers=names)
    generator = torch.Generator().manual_seed(8)
    whole = {
        name: model.get_parameter(name) + 0.3 * torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(model).items()
        if name in (NORM, BIAS) or name.startswith("x_embedder")
    }
    keys = {name: name.replace("to_out.", "to_out.base_layer.") for name in whole}
    extra = {keys[name]: tensor for name, tensor in whole.items()}
    return lora_files.write(file, lora, "diffsynth", extra=extra), lora, whole


@pytest.fixture(scope="module")
def e1(model, tmp_path_factory):
    return write_e1(tmp_path_factory.mktemp("e1") / "HiDream-E1-Full.safetensors", model)


@pytest.mark.parametrize("style", lora_files.STYLES)
def test_every_style_names_every_layer(model, tmp_path, style):
    lora = lora_files.matrices(model)
    assert {GATE, EXPERT, Q, "final_layer.linear", "caption_projection.4.linear"} < set(lora)
    found = read(lora_files.write(tmp_path / "a.safetensors", lora, style), model)
    assert found.warnings == ()
    assert {layer.layer for layer in found.layers} == set(lora)
    assert not found.whole


def test_no_two_layers_of_the_published_model_share_a_name():
    names = lora_file._names(linear_layers(shapes_of(I1_FULL)))
    assert [owners for owners in names.values() if len(owners) > 1] == []


@pytest.mark.parametrize("layer", [None, GATE, EXPERT, "p_embedder.pooled_embedder.linear_1"])
def test_a_lora_is_the_merged_model_packed_or_not(model, tmp_path, layer):
    lora = lora_files.matrices(model, layers=[layer] if layer else ())
    path = lora_files.write(tmp_path / "a.safetensors", lora, "diffusers")
    by_hand, plain = answer(merged(model, lora, 0.6)), answer(model)
    found = answer(applied(model, path, 0.6))
    assert error(found, by_hand) < 1e-5
    assert error(plain, by_hand) > 1e-3
    packed = random_i1()
    pack(packed)
    assert torch.equal(answer(applied(packed, path, 0.6)), found)


@pytest.mark.parametrize("way", ["one by one", "all"])
def test_experts_that_a_lora_changes_are_not_grouped(model, tmp_path, way, monkeypatch):
    path = lora_files.write(tmp_path / "a.safetensors", lora_files.matrices(model, layers=[EXPERT]))
    mixture = applied(model, path).get_submodule(EXPERT.split(".experts")[0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: way == "all")
    assert mixture._way(torch.empty(1, 64, dtype=torch.bfloat16)) == way
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    there = mixture.experts[3].w2
    with torch.no_grad():
        by_hand = copy.deepcopy(model).get_submodule(EXPERT.split(".experts")[0])
        by_hand.experts[3].w2.weight.add_(there.lora_B @ there.lora_A)
        torch.testing.assert_close(mixture(x)[0], by_hand(x)[0])


def test_e1s_file_makes_e1_of_i1(model, e1):
    path, lora, whole = e1
    found = read(path, model)
    assert found.warnings == ()
    assert set(found.whole) == set(whole)
    assert BIAS in whole
    assert len(found.layers) == len(lora)
    plain = answer(model)
    by_hand = answer(merged(model, lora, whole=whole))
    assert error(answer(applied(model, path)), by_hand) < 1e-5
    assert error(answer(applied(model, path)), answer(merged(model, lora))) > 1e-3
    assert torch.equal(answer(model), plain)


def test_e1_is_a_view(model, e1):
    """Nothing is copied but what the file brings, and the limit is E1's."""
    path, _, whole = e1
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    view = edits(model, read(path, model), LoraWeights())
    layer = view.get_submodule(BIAS.removesuffix(".bias"))
    assert isinstance(layer, LoraLinear)
    assert torch.equal(layer.bias, whole[BIAS])
    assert layer.weight is before[BIAS.replace("bias", "weight")][0]
    assert torch.equal(view.get_parameter(NORM), whole[NORM])
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert view.config.max_resolution == E1_FULL.max_resolution
    assert model.config == I1_TINY


def test_a_scale_goes_a_share_of_the_way(model, e1, tmp_path):
    path, lora, whole = e1
    half = {name: (model.get_parameter(name) + tensor) / 2 for name, tensor in whole.items()}
    by_hand = answer(merged(model, lora, 0.5, half))
    assert error(answer(applied(model, path, 0.5)), by_hand) < 1e-5
    twice = [(read(path, model), 0.25), (read(path, model), 0.25)]
    assert error(answer(with_loras(model, twice, LoraWeights())), by_hand) < 1e-5
    assert applied(model, path, 0.0) is model


@pytest.mark.parametrize("name", ["balanced", "stream"])
def test_e1_out_of_weights_that_come_and_go(model, e1, tmp_path, name):
    path, _, _ = e1
    save_i1(model, tmp_path / "transformer")
    frugal = load_i1(tmp_path, memory=POLICIES[name])
    for scale in (1.0, 0.5):
        assert torch.equal(
            answer(applied(frugal, path, scale)), answer(applied(model, path, scale))
        )
    assert torch.equal(answer(frugal), answer(model))


def test_a_lora_of_another_model(tmp_path):
    i1, o1 = shapes_of(I1_FULL), o1_shapes(O1_8B)
    for shapes, name, layer in (
        (i1, "i1-full", "model.language_model.layers.0.self_attn.q_proj"),
        (o1, "o1", "double_stream_blocks.0.block.attn1.to_q"),
    ):
        file = tmp_path / f"{name}.safetensors"
        pair = {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(8, 2)}
        save_file({f"transformer.{layer}.{k}.weight": t for k, t in pair.items()}, file)
        with pytest.raises(InputError, match=f"none of the 1 layers .* fits {name}"):
            read_lora(str(file), linear_layers(shapes), name, shapes=shapes)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({NORM: torch.ones(3)}, "for a model of another size.*here"),
        ({NORM: torch.ones(64), f"transformer.{NORM}": torch.ones(64)}, "twice"),
        ({BIAS: torch.ones(64, dtype=torch.int32)}, "is I32; it must be a float"),
        (
            {
                f"{Q}.weight": torch.ones(64, 64),
                f"{Q}.dora_scale": torch.ones(64),
            },
            "whole and as a DoRA",
        ),
    ],
)
def test_whole_tensors_that_do_not_fit(model, tmp_path, extra, said):
    lora = lora_files.matrices(model, layers=[Q])
    path = lora_files.write(tmp_path / "a.safetensors", lora, extra=extra)
    with pytest.raises(InputError, match=said):
        read(path, model)
    alone = tmp_path / "whole.safetensors"
    save_file({NORM: torch.ones(64)}, alone)
    with pytest.raises(InputError, match="is no LoRA"):
        read(str(alone), model)
