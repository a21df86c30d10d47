"""LoRAs applied: the numbers of a merged model, one request at a time, and nothing left behind."""

import copy
import os

import pytest
import torch

from hidream.errors import InputError
from hidream.lora_file import linear_layers, read_lora
from hidream.models import loras
from hidream.models.loading import tensor_shapes
from hidream.models.loras import LoraWeights, with_loras
from hidream.models.o1.tokens import encode
from hidream.nn.lora import Branch, adapted
from hidream.pipelines import load
from hidream.request import GenerateRequest
from hidream.sampling import picture_noise
from tests import lora_files, tiny

Q = "model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    """Two LoRAs of every layer, of ranks 3 and 2; the second has alpha 1."""
    folder = tmp_path_factory.mktemp("loras")
    one, two = (lora_files.matrices(pipe.model, seed, rank) for seed, rank in ((1, 3), (2, 2)))
    return (
        (lora_files.write(folder / "one.safetensors", one), one),
        (lora_files.write(folder / "two.safetensors", two, "musubi", alpha=1), two),
    )


def request(prompt="a red cube", **fields):
    return GenerateRequest(prompt=prompt, **{"seed": 7, "num_inference_steps": 2, **fields})


def applied(model, *pairs):
    layers = linear_layers(tensor_shapes(model))
    return with_loras(
        model, [(read_lora(path, layers, "o1"), scale) for path, scale in pairs], LoraWeights()
    )


def merged(model, *parts):
    """A copy whose weights are W + factor · up · down, added by hand in double precision."""
    model = copy.deepcopy(model)
    for lora, factor in parts:
        for name, (down, up) in lora.items():
            weight = model.get_parameter(f"{name}.weight")
            change = factor * (up.double() @ down.double())
            weight.copy_((weight.double() + change.view_as(weight)).to(weight.dtype))
    return model


@torch.inference_mode()
def answer(model, tokenizer):
    """The network's picture for a prompt and a reference: every layer of it takes part."""
    pictures = [tiny.picture(1)]
    tokens = encode(
        tokenizer, model.config, "a red cube", width=64, height=64, references=pictures, layout=()
    )
    x_t = picture_noise(5, 0, (1, 16, model.config.patch_dim))
    return model.predict_x0(x_t, torch.tensor(0.7), model.prefill([tokens]))


def error(one, other):
    return float((one - other).abs().max() / other.abs().max())


def same(one, other):
    return tiny.levels(one.images[0], other.images[0]) == 0


# -- numbers ---------------------------------------------------------------------------------------


def test_a_lora_is_the_merged_model(tiny_model, tokenizer, files):
    (path, lora), _ = files
    plain = answer(tiny_model, tokenizer)
    for scale in (1.0, 0.4, -0.5):
        by_hand = answer(merged(tiny_model, (lora, scale)), tokenizer)
        assert error(answer(applied(tiny_model, (path, scale)), tokenizer), by_hand) < 1e-5
        assert error(plain, by_hand) > 0.05


def test_loras_add_up(tiny_model, tokenizer, files):
    (one, first), (two, second) = files
    by_hand = answer(merged(tiny_model, (first, 0.6), (second, -0.8 * 1 / 2)), tokenizer)
    together = answer(applied(tiny_model, (one, 0.6), (two, -0.8)), tokenizer)
    assert error(together, by_hand) < 1e-5
    assert error(answer(applied(tiny_model, (two, -0.8), (one, 0.6)), tokenizer), by_hand) < 1e-5
    assert error(answer(applied(tiny_model, (one, 0.6)), tokenizer), by_hand) > 0.05


@pytest.mark.parametrize("layer", ["model.visual.patch_embed.proj", "model.t_embedder1.mlp.0"])
def test_each_kind_of_layer_counts(tiny_model, tokenizer, tmp_path, layer):
    lora = lora_files.matrices(tiny_model, layers=[layer])
    path = lora_files.write(tmp_path / "a.safetensors", lora)
    by_hand = answer(merged(tiny_model, (lora, 2.0)), tokenizer)
    assert error(answer(applied(tiny_model, (path, 2.0)), tokenizer), by_hand) < 1e-5
    assert error(answer(tiny_model, tokenizer), by_hand) > 1e-3


def test_a_convolutions_lora_may_have_its_shape(tiny_model, tokenizer, tmp_path):
    """musubi trains the vision tower's first layer as a convolution."""
    name = "model.visual.patch_embed.proj"
    lora = lora_files.matrices(tiny_model, layers=[name])
    flat = lora_files.write(tmp_path / "flat.safetensors", lora)
    down, up = lora[name]
    kernel = tiny_model.get_parameter(f"{name}.weight").shape[1:]
    shaped = {name: (down.view(-1, *kernel), up[:, :, None, None, None])}
    conv = lora_files.write(tmp_path / "conv.safetensors", shaped, "musubi")
    one, other = (answer(applied(tiny_model, (path, 1.0)), tokenizer) for path in (flat, conv))
    assert torch.equal(one, other)


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector"])
def test_dora(tiny_model, tokenizer, tmp_path, key):
    lora = lora_files.matrices(tiny_model, seed=3)
    extra, tuned = {}, copy.deepcopy(tiny_model)
    for stream, (name, (down, up)) in enumerate(lora.items()):
        magnitude = 1 + 0.3 * picture_noise(4, stream, (len(up),))
        extra[f"{name}.{key}"] = magnitude[:, None] if key == "dora_scale" else magnitude
        weight = tuned.get_parameter(f"{name}.weight")
        moved = weight.flatten(1).double() + up.double() @ down.double()
        moved *= magnitude.double()[:, None] / moved.norm(dim=1, keepdim=True)
        weight.copy_(moved.view_as(weight).float())
    path = lora_files.write(tmp_path / "dora.safetensors", lora, extra=extra)
    assert (
        error(answer(applied(tiny_model, (path, 1.0)), tokenizer), answer(tuned, tokenizer)) < 1e-5
    )
    half = copy.deepcopy(tiny_model)  # a scale goes that share of the way to the tuned weights
    for weight, target in zip(half.parameters(), tuned.parameters(), strict=True):
        weight.copy_((weight + target) / 2)
    found = answer(applied(tiny_model, (path, 0.5)), tokenizer)
    assert error(found, answer(half, tokenizer)) < 1e-5


def test_bf16(tiny_folder, tokenizer, files, tiny_model):
    (path, lora), _ = files
    model = load(tiny_folder, device="cpu", dtype="bf16").model
    found = answer(applied(model, (path, 0.5)), tokenizer)
    exact = answer(merged(tiny_model, (lora, 0.5)), tokenizer)
    assert error(found, exact) < 2 * error(answer(model, tokenizer), answer(tiny_model, tokenizer))


def test_branches_can_be_trained(tiny_model, tokenizer):
    down, up = lora_files.matrices(tiny_model, layers=[Q])[Q]
    branch = Branch(torch.nn.Parameter(down), torch.nn.Parameter(torch.zeros_like(up)))
    model = adapted(tiny_model, {Q: branch})
    assert dict(model.named_parameters())[f"{Q}.lora_B"] is branch.up
    x0 = answer.__wrapped__(model, tokenizer)
    assert torch.equal(x0.detach(), answer(tiny_model, tokenizer))
    x0.square().sum().backward()
    assert branch.up.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in tiny_model.parameters())


def test_a_view_shares_the_model(tiny_model, files):
    before = {name: (weight, weight.clone()) for name, weight in tiny_model.named_parameters()}
    view = applied(tiny_model, (files[0][0], 1.0))
    assert type(view) is type(tiny_model)
    assert view.get_submodule(Q).base is tiny_model.get_submodule(Q)
    for name, weight in tiny_model.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])
    assert applied(tiny_model, (files[0][0], 0.0)) is tiny_model


# -- pictures --------------------------------------------------------------------------------------


def test_every_style_makes_the_same_picture(pipe, files, tmp_path):
    (path, lora), _ = files
    plain, wanted = pipe(request()), pipe(request(loras=[(path, 0.5)]))
    assert not same(plain, wanted)
    for number, style in enumerate(lora_files.STYLES):
        other = lora_files.write(tmp_path / f"{number}.safetensors", lora, style)
        assert same(pipe(request(loras=[(other, 0.5)])), wanted), style


def test_nothing_is_left_behind(pipe, files):
    paths = [path for path, _ in files]
    plain = pipe(request())
    first = pipe(request(loras=[(paths[0], 0.5)]))
    second = pipe(request(loras=[(paths[1], 0.5)]))
    assert not same(first, second)
    assert same(pipe(request()), plain)
    assert same(pipe(request(loras=[(paths[0], 0.5)])), first)
    with pytest.raises(RuntimeError, match="stop"):
        pipe(request(loras=[(paths[1], 0.5)]), on_step=stop)
    assert same(pipe(request()), plain)


def stop(step, num_steps, preview):
    raise RuntimeError("stop")


@pytest.mark.parametrize("fields", [{}, {"references": (tiny.picture(1),), "width": 64}])
def test_requests_with_different_loras_in_one_call(pipe, files, fields):
    paths = [path for path, _ in files]
    choices = [(), [(paths[0], 0.5)], [(paths[1], 0.5)], [(paths[0], -0.5)], (), [(paths[0], 0.5)]]
    requests = [
        request(loras=choice, seed=seed, height=64, **fields) for seed, choice in enumerate(choices)
    ]
    together = pipe(requests)
    assert len({out.images[0].tobytes() for out in together}) == len(choices)
    for asked, out in zip(requests, together, strict=True):
        assert tiny.levels(pipe(asked).images[0], out.images[0]) <= 1
        assert out.request.loras == asked.loras
    alone = pipe([request(loras=choice, deterministic=True, **fields) for choice in choices])
    for choice, out in zip(choices, alone, strict=True):
        assert same(pipe(request(loras=choice, deterministic=True, **fields)), out)


def test_a_picture_can_be_made_again(pipe, files):
    out = pipe(request(loras=[(path, 0.5) for path, _ in files]))
    again = GenerateRequest.from_dict(out.request.to_dict())
    assert again == out.request
    assert same(pipe(again), out)


def test_what_did_not_fit_is_in_the_warnings(pipe, files, tmp_path):
    _, lora = files[0]
    extra = {"other.lora_A.weight": torch.zeros(2, 3), "other.lora_B.weight": torch.zeros(3, 2)}
    path = lora_files.write(tmp_path / "a.safetensors", lora, extra=extra)
    (warning,) = pipe(request(loras=[(path, 1)])).warnings
    assert f"{len(lora)} of {len(lora) + 1} layers" in warning


def test_every_lora_is_found_before_anything_is_drawn(pipe, files, monkeypatch):
    monkeypatch.setattr(pipe.model, "velocity", None)
    with pytest.raises(InputError, match=r"nowhere\.safetensors does not exist"):
        pipe([request(), request(loras=["nowhere.safetensors"])])


# -- files in memory -------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    found, read = [], loras._read

    def spy(file):
        found.append(file.path.name)
        return read(file)

    monkeypatch.setattr(loras, "_read", spy)
    return found


def test_files_are_read_once_until_they_change(tiny_folder, files, tmp_path, reads):
    pipe = load(tiny_folder, device="cpu")
    path = lora_files.write(tmp_path / "a.safetensors", files[0][1])
    one = pipe(request(loras=[(path, 0.5)]))
    pipe(request())
    pipe(request(loras=[(path, 1), (path, -0.5)]))
    assert reads == ["a.safetensors"]
    lora_files.write(tmp_path / "a.safetensors", lora_files.matrices(pipe.model, seed=9))
    os.utime(path, ns=(1, 1))
    assert not same(pipe(request(loras=[(path, 0.5)])), one)
    assert len(reads) == 2


def test_memory_is_bounded(tiny_model, files, reads):
    layers = linear_layers(tensor_shapes(tiny_model))
    one, two = (read_lora(path, layers, "o1") for path, _ in files)
    size = sum(tensor.numel() * 4 for pair in files[0][1].values() for tensor in pair)
    weights = LoraWeights(max_kept=size)
    weights.get(one)
    assert weights.num_bytes == size
    weights.get(one)
    weights.get(two)
    assert 0 < weights.num_bytes <= size
    weights.get(one)
    assert reads == ["one.safetensors", "two.safetensors", "one.safetensors"]
    nothing = LoraWeights(max_kept=10)
    assert len(nothing.get(one)) == 2 * len(files[0][1])
    assert nothing.num_bytes == 0


def test_a_file_that_changed_since_it_was_matched(tiny_model, files, tmp_path):
    path = lora_files.write(tmp_path / "a.safetensors", files[0][1])
    found = read_lora(path, linear_layers(tensor_shapes(tiny_model)), "o1")
    lora_files.write(tmp_path / "a.safetensors", files[1][1])
    with pytest.raises(InputError, match="changed or removed"):
        LoraWeights().get(found)


def test_values_that_are_not_finite(pipe, files, tmp_path):
    lora = {Q: tuple(tensor.clone() for tensor in files[0][1][Q])}
    lora[Q][1][0, 0] = torch.inf
    path = lora_files.write(tmp_path / "a.safetensors", lora)
    with pytest.raises(InputError, match="not finite"):
        pipe(request(loras=[(path, 1)]))
