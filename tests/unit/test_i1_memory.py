"""I1 under every memory policy: the same velocities, from as much memory as was counted."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from hidream.cli import speed
from hidream.cli.estimate import estimate
from hidream.errors import MemoryExceeded
from hidream.memory import AUTO, POLICIES, Policy
from hidream.models import machine, placement
from hidream.models.i1 import placing, weights
from hidream.models.i1.config import E1_1, I1_FULL, I1_TINY
from hidream.models.i1.memory import (
    BatchSize,
    encoder_sizes,
    is_quantised,
    need,
    part_of,
    streamed_blocks,
    weight_bytes,
)
from hidream.models.i1.model import I1
from hidream.models.i1.weights import load_i1, save_i1
from hidream.models.loading import Reader, tensor_shapes
from hidream.models.placement import layer_by_layer, place, stream_ahead
from hidream.models.quantise import num_bytes, quantised_bytes
from hidream.nn.moe import side_by_side
from hidream.pipelines import load
from hidream.registry import SPECS
from hidream.request import GenerateRequest, resolve
from tests import tiny
from tests.lora_files import matrices, write
from tests.streams import Gpu
from tests.tiny_i1 import features, latents, make_tiny_i1, random_i1

SIGMAS = torch.tensor([0.9, 0.4])
EXACT = [policy.name for policy in POLICIES.values() if policy.exact and policy != AUTO]
QUANTISED = [policy.name for policy in POLICIES.values() if not policy.exact]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i1") / "transformer"
    save_i1(random_i1(), folder)
    return folder


@torch.inference_mode()
def answer(model, height=12):
    """A padded picture, twice; the last step's sigma is not one that was foretold."""
    prefix = model.prefill(features(), height=height, width=8, sigmas=SIGMAS)
    sigmas = (*SIGMAS, torch.tensor(0.2))
    return torch.stack([model.velocity(latents(height, 8), sigma, prefix) for sigma in sigmas])


def there(model):
    """Bytes of a model's weights that are somewhere."""
    return sum(num_bytes(weight) for weight in model.parameters() if not weight.is_meta)


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_velocities_are_the_same_and_no_more_is_there_than_counted(folder, name):
    policy = POLICIES[name]
    frugal, plain = load_i1(folder, memory=policy), random_i1()
    counted = weight_bytes(I1_TINY, policy, width=4, device="cpu")
    peaks = {"prefill": 0, "step": 0}

    def look(stage):
        return lambda *_: peaks.update({stage: max(peaks[stage], there(frugal))})

    for module_name, module in frugal.named_modules():
        if isinstance(module, nn.Linear):
            before_steps = part_of(f"{module_name}.weight", policy, I1_TINY) == "prefill"
            module.register_forward_pre_hook(look("prefill" if before_steps else "step"))
    assert there(frugal) == counted.resident
    for _ in range(2):
        assert torch.equal(answer(frugal), answer(plain))
        assert there(frugal) == counted.resident
    assert torch.equal(answer(frugal, height=8), answer(plain, height=8))
    assert peaks["step"] == counted.transformer
    assert peaks["prefill"] == counted.resident + counted.prefill
    assert (counted.streaming > 0) == (policy.streamed_i1 > 0)


def test_everything_leaves_when_a_step_fails(folder):
    frugal = load_i1(folder, memory=POLICIES["stream"])
    resident, wanted = there(frugal), answer(frugal)

    def fail(*_):
        raise ValueError("in the middle")

    layer = frugal.single_stream_blocks[1].block.ff_i.experts[0].w2
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        answer(frugal)
    handle.remove()
    assert there(frugal) == resident
    assert torch.equal(answer(frugal), wanted)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_both_kinds_of_block_come_one_ahead(folder, monkeypatch, share):
    """By the code for GPUs: two buffers of the larger kind, experts side by side in them."""
    Gpu(monkeypatch)
    kept, packed = [], []
    monkeypatch.setattr(placing, "stream_all", lambda *args: kept.append(stream_ahead(*args)))
    policy = Policy(name="some", what="", streamed_i1=share)
    frugal = load_i1(folder, memory=policy)
    last = streamed_blocks(policy, I1_TINY)[-1]
    experts = frugal.blocks[last].ff_i.experts

    def look(*_):
        ws = [expert.w1.weight for expert in experts]
        packed.append(side_by_side(ws).data_ptr() == ws[0].data_ptr())

    frugal.blocks[last].ff_i.register_forward_pre_hook(look)
    assert torch.equal(answer(frugal), answer(random_i1()))
    (ahead,) = kept
    counted = weight_bytes(I1_TINY, policy, width=4, device="cuda")
    assert sum(buffer.nbytes for buffer in ahead.buffers) == counted.streaming
    assert sum(block.values.nbytes for block in ahead.blocks) == counted.blocks
    assert packed
    assert all(packed)


# -- fewer bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_in_fewer_bits(folder, name):
    policy = POLICIES[name]
    rounded = load_i1(folder, memory=policy, dtype=torch.bfloat16)
    shapes = tensor_shapes(I1(I1_TINY))
    changed = [n for n, shape in shapes.items() if is_quantised(n, shape, policy)]
    assert len(changed) == 2 * 8 + 2 * 4 + 4 * 5 * 3 + 2 * 3  # attention, experts, text's ff
    for tensor, shape in shapes.items():
        weight = rounded.get_parameter(tensor)
        assert (type(weight) is not nn.Parameter) == (tensor in changed), tensor
        if tensor in changed:
            most = quantised_bytes(shape, policy.weights, width=2, device="cpu")
            assert most - 8 * shape[0] < num_bytes(weight) <= most < 2 * math.prod(shape)
    assert there(rounded) <= weight_bytes(I1_TINY, policy, width=2, device="cpu").resident
    plain = answer(random_i1())
    error = (answer(rounded) - plain).norm() / plain.norm()
    assert 0 < error < (0.5 if name == "int4" else 0.2)


# -- at full size ----------------------------------------------------------------------------------


class Shapes(Reader):
    """A checkpoint of shapes alone: tensors that take no memory, on devices that are not here."""

    def __init__(self, shapes):
        self.shapes = shapes

    def read(self, name, *, device="cpu", dtype=torch.bfloat16):
        return torch.empty(self.shapes[name], dtype=dtype, device=device)


@pytest.mark.parametrize("name", ["auto", "balanced", "16gb", "stream", "int8", "int4"])
def test_i1_holds_what_was_counted(name, monkeypatch):
    """Built on meta; what its policy puts on a GPU becomes tensors without storage there."""
    policy, waiting = POLICIES[name], {}
    monkeypatch.setattr(placement, "stream_ahead", lambda blocks, *_: waiting.update(blocks))
    with torch.device("meta"):
        model = I1(I1_FULL).requires_grad_(False)
    shapes = tensor_shapes(model)
    counted = weight_bytes(I1_FULL, policy, width=2, device="cuda")
    with FakeTensorMode():
        resident = {}
        for tensor, shape in shapes.items():
            if part_of(tensor, policy, I1_FULL) == "resident":
                resident[tensor] = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                if is_quantised(tensor, shape, policy):
                    size = quantised_bytes(shape, policy.weights, width=2, device="cuda")
                    resident[tensor] = torch.empty(size, dtype=torch.int8, device="cuda")
        place(model, resident)
        like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        if policy != AUTO:
            placing.attach(model, policy, Shapes(shapes), like)
        on_device = sum(w.nbytes for w in model.parameters() if w.is_cuda)
        assert on_device == counted.resident
        lent = model.elsewhere.lent.values() if policy.lends else ()
        largest = 0
        for module in lent:
            with module:
                largest = max(largest, sum(w.nbytes for w in module.module.parameters()))
        assert largest == counted.prefill
        flat = [
            placement.Flat({n: block.get_parameter(n).shape for n in names}, torch.bfloat16)
            for block, names in waiting.values()
        ]
        assert sum(block.values.nbytes for block in flat) == counted.blocks
        two = min(2, len(flat)) * max((block.values.nbytes for block in flat), default=0)
        assert counted.streaming == two
    assert len(waiting) == len(streamed_blocks(policy, I1_FULL))


def test_the_transformer_after_its_prefill_is_28_gb():
    """The issue's bar, and that nothing of the whole model is forgotten."""
    shapes = weights.shapes_of(I1_FULL)
    balanced, low = (
        weight_bytes(I1_FULL, POLICIES[name], width=2, device="cuda")
        for name in ("balanced", "low")
    )
    assert 28.0e9 < balanced.transformer <= 28.5e9
    assert balanced.transformer == low.transformer
    whole = weight_bytes(I1_FULL, AUTO, width=2, device="cuda")
    assert whole.transformer == 2 * 17_105_733_184
    lent = [n for n in shapes if part_of(n, POLICIES["low"], I1_FULL) == "prefill"]
    assert whole.transformer - low.transformer == 2 * sum(math.prod(shapes[n]) for n in lent)
    assert whole.always > 60e9


GUIDED = BatchSize(
    num_pictures=1, num_branches=2, num_patches=64 * 64, num_steps=50, num_pixels=1024**2
)
EDIT = replace(GUIDED, num_branches=3, num_patches=2 * 64 * 64, num_steps=28)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        *[("balanced", 48), ("low", 32), ("16gb", 16), ("12gb", 12), ("stream", 8)],
        *[("int8", 24), ("fp8", 24), ("int4", 16)],
    ],
)
def test_cards(name, card):
    """A guided picture of 1024², and an edit of that size by E1.1, leave a gigabyte of the card."""
    for config, batch in ((I1_FULL, GUIDED), (E1_1, EDIT)):
        needed = need(config, POLICIES[name], batch, width=2, device="cuda")
        assert needed.total < card * 2**30 - 1e9


def test_every_step_down_needs_less():
    for policy in POLICIES.values():
        if policy.smaller is None:
            continue
        more, less = (
            need(I1_FULL, p, GUIDED, width=2, device="cuda").total
            for p in (policy, POLICIES[policy.smaller])
        )
        assert less < more


def test_what_cannot_fit_is_refused_before_it_is_read(folder, monkeypatch):
    least = weight_bytes(I1_TINY, POLICIES["12gb"], width=4, device="cpu").transformer
    monkeypatch.setattr(machine, "total_memory", lambda device: least)
    monkeypatch.setattr(weights, "load_weights", None)
    with pytest.raises(MemoryExceeded, match=r"--memory auto needs .* Use --memory 12gb"):
        load_i1(folder)


# -- text encoders ---------------------------------------------------------------------------------


def tiny_encoder(name):
    import transformers

    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
        return transformers.LlamaModel(config).eval()
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


@pytest.mark.parametrize("name", ["llama", "t5"])
@torch.inference_mode()
def test_an_encoder_comes_layer_by_layer(name, monkeypatch):
    """Never two layers at a time, never the table; and what it says is the same."""
    torch.manual_seed(0)
    module, ids = tiny_encoder(name), torch.tensor([[3, 7, 1]])
    wanted = module(ids)[0]
    moved, most = [], []

    def to(tensors, device):
        made = {name: tensor.clone() for name, tensor in tensors.items()}
        moved.extend(weakref.ref(tensor) for tensor in made.values())
        most.append(sum(t.numel() for ref in moved if (t := ref()) is not None))
        return made

    layers = module.layers if name == "llama" else module.encoder.block
    largest = max(sum(w.numel() for w in layer.parameters()) for layer in layers)
    monkeypatch.setattr(placement, "_moved", to)
    layer_by_layer(module, torch.device("cpu"))
    rest = most[-1]
    table = 50 * 16
    everything = sum(weight.numel() for weight in module.parameters())
    assert rest < everything - table - 2 * largest
    assert torch.equal(module(ids)[0], wanted)
    assert max(most) <= rest + 2 * largest  # the last one goes when the next has come


def test_the_published_encoders_are_what_is_counted_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HIDREAM_LLAMA", str(tmp_path))
    sizes = encoder_sizes(tmp_path)
    assert 13.08e9 < sum(size.whole for size in sizes.values()) < 13.09e9
    assert sizes["text_encoder_4"].layer == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 8192


# -- the whole pipeline ----------------------------------------------------------------------------


def test_pictures_are_the_same_and_nothing_stays(tmp_path):
    folder = make_tiny_i1(tmp_path / "tiny", llama_inside=True)
    frugal, plain = (load(folder, device="cpu", memory=name) for name in ("12gb", "auto"))
    asked = {"num_inference_steps": 2, "seed": 7, "width": 48, "height": 64, "guidance_scale": 3}
    lora = write(tmp_path / "a.safetensors", matrices(plain.model), "ai-toolkit")
    for loras in ([], [(lora, 0.5)], []):
        one, other = (pipe("a red cube", loras=loras, **asked) for pipe in (frugal, plain))
        assert tiny.levels(one.images[0], other.images[0]) == 0
    assert frugal.memory is POLICIES["12gb"]
    assert frugal.encoders.in_memory == ()
    assert frugal.encoders.piecewise
    assert not frugal.codec.keep
    assert len(plain.encoders.in_memory) == 4
    assert frugal.to("cpu") is frugal


# -- before anything is loaded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "teraflops"),
    [("i1-full", 2 * 75.9), ("i1-dev", 75.9), ("e1-1", 489.0)],
)
def test_an_estimate_needs_no_weights(model, teraflops, monkeypatch):
    """Of one call at 1024²; the issue's arithmetic without what a step leaves out."""
    monkeypatch.setattr(speed, "flops_a_second", lambda *_: 1e14)
    monkeypatch.setattr(speed, "seconds_a_layer", lambda *_: 1e-5)
    monkeypatch.setattr(speed, "bytes_a_second", lambda *_: 1e10)
    spec = SPECS[model]
    request = resolve(
        GenerateRequest(prompt="a cube", width=1024, height=1024, seed=0), spec.defaults, 16
    )
    found = estimate(request, None, spec, device="cpu", dtype="bf16", memory="16gb")
    assert found["flops"] / request.num_inference_steps == pytest.approx(teraflops * 1e12, rel=0.03)
    assert [row["name"] for row in found["policies"]] == list(POLICIES)
    rows = {row["name"]: row for row in found["policies"]}
    assert rows["auto"]["memory_bytes"] > 60e9
    assert found["memory_bytes"] == rows["16gb"]["memory_bytes"] < rows["balanced"]["memory_bytes"]
    assert rows["stream"]["seconds"] > rows["low"]["seconds"]
    edits = spec.family == "e1"
    assert found["num_tokens"]["picture"] == 4096 * (2 if edits else 1)


def test_a_refiner_is_a_second_network():
    twice = replace(EDIT, num_networks=2)
    for name in ("low", "stream"):
        one, two = (need(E1_1, POLICIES[name], b, width=2, device="cuda") for b in (EDIT, twice))
        counted = weight_bytes(E1_1, POLICIES[name], width=2, device="cuda")
        assert two.total - one.total == counted.transformer
        assert two.cpu - one.cpu == counted.blocks


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 1), (3.0, 3)])
def test_the_estimate_counts_an_edits_rows(scale, rows):
    from hidream.cli.estimate import latent_batch
    from hidream.registry import find
    from hidream.request import GenerateRequest

    asked = GenerateRequest(prompt="x", references=("a.png",), guidance_scale=scale)
    assert latent_batch(8192, asked, find("e1-1"), 1).num_branches == rows
