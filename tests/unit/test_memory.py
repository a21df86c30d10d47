"""Memory policies: the same pictures from less memory, and as much of it as was counted."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hidream import memory
from hidream.cli import main
from hidream.errors import MemoryExceeded, ModelError, UsageError
from hidream.memory import AUTO, POLICIES, Policy, find_policy
from hidream.models import machine, quantise
from hidream.models.loading import Reader, tensor_shapes
from hidream.models.o1 import placing, weights
from hidream.models.o1.config import O1_8B, O1_TINY
from hidream.models.o1.memory import (
    BLOCKS,
    EMBEDDINGS,
    weight_bytes,
)
from hidream.models.o1.tokens import Tokenizer
from hidream.models.o1.weights import save_o1
from hidream.models.placement import stream_ahead
from hidream.models.quantise import num_bytes, quantised_bytes
from hidream.pipelines import load
from hidream.pipelines import o1 as pipelines
from hidream.pipelines.devices import told_when_full
from tests import lora_files, tiny
from tests.streams import Gpu

EXACT = [policy.name for policy in POLICIES.values() if policy.exact and policy != AUTO]
FEW = {"seed": 7, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module", params=EXACT)
def frugal(request, tiny_folder):
    return load(tiny_folder, device="cpu", memory=request.param)


def same(one, other):
    return all(tiny.levels(a, b) == 0 for a, b in zip(one.images, other.images, strict=True))


def absent(module):
    """Whether none of a module's weights is there; never only some."""
    places = {weight.is_meta for weight in module.parameters()}
    assert len(places) == 1
    return places.pop()


# -- policies --------------------------------------------------------------------------------------


def test_names():
    assert find_policy("auto") is AUTO
    assert find_policy("STREAM").streamed == 1
    with pytest.raises(UsageError, match='unknown memory policy "lwo"; did you mean "low"'):
        find_policy("lwo")


def test_every_policy_has_a_way_down():
    """Following `smaller`, each step needs less of the device, and the last is `stream`."""
    for policy in POLICIES.values():
        while policy.smaller is not None:
            smaller = POLICIES[policy.smaller]
            most, less = (
                weight_bytes(O1_8B, p, width=2, device="cuda").always for p in (policy, smaller)
            )
            assert less < most
            policy = smaller
        assert policy.name == "stream"


@pytest.mark.parametrize("num_blocks", [1, 4, 8, 36])
def test_streamed_blocks_are_spread(num_blocks):
    assert AUTO.streamed_blocks(num_blocks) == ()
    assert POLICIES["stream"].streamed_blocks(num_blocks) == tuple(range(num_blocks))
    half = POLICIES["12gb"].streamed_blocks(num_blocks)
    assert len(half) == math.ceil(num_blocks / 2)
    assert all(b - a == 2 for a, b in pairwise(half))
    assert max(half) == num_blocks - 1


def test_torchao_is_asked_for_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs torchao.*pip install "hidream\[quant\]"'):
        load("/nowhere", device="cpu", memory="int8")


# -- the same pictures -----------------------------------------------------------------------------


def test_pictures_are_the_same(pipe, frugal):
    assert frugal.memory.name in EXACT
    assert same(frugal("a red cube", **FEW), pipe("a red cube", **FEW))
    fields = {"references": tuple(tiny.pictures(2)), "num_images": 2, **FEW}
    assert same(frugal("a red cube", **fields), pipe("a red cube", **fields))


def test_pictures_are_the_same_in_another_dtype(tiny_folder):
    made = [
        load(tiny_folder, device="cpu", dtype="bf16", memory=name)("a red cube", **FEW)
        for name in ("auto", "stream")
    ]
    assert same(*made)


def test_pictures_with_loras_are_the_same(pipe, frugal, tiny_model, tmp_path):
    plain, dora = tmp_path / "plain.safetensors", tmp_path / "dora.safetensors"
    matrices = lora_files.matrices(tiny_model, 0)
    lora_files.write(plain, matrices)
    lora_files.write(dora, matrices)
    tensors = load_file(dora)
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        rows = len(tensors[name])
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector.weight")
        tensors[magnitude] = torch.linspace(0.5, 1.5, rows)
    save_file(tensors, dora)
    loras = [(str(plain), 0.7), (str(dora), 0.4)]
    fields = {"references": (tiny.picture(0),), "loras": loras, **FEW}
    changed = frugal("a red cube", **fields)
    assert same(changed, pipe("a red cube", **fields))
    fields["loras"] = []
    assert not same(changed, pipe("a red cube", **fields))
    assert same(frugal("a red cube", **fields), pipe("a red cube", **fields))


def test_texts_are_the_same(pipe, frugal):
    picture = tiny.picture(1)
    ours, theirs = (
        p.describe(picture, temperature=1.0, seed=3, max_new_tokens=8) for p in (frugal, pipe)
    )
    assert ours.text == theirs.text


def test_tied_embeddings(tmp_path):
    """The head is the table: rows are looked up in CPU memory, and the whole is lent to write."""
    tiny.write_tokenizer(tmp_path)
    model = tiny.random_o1(replace(O1_TINY, tie_word_embeddings=True))
    save_o1(model, tmp_path, tokenizer=Tokenizer(tmp_path), settings=tiny.SETTINGS)
    pipes = [load(tmp_path, device="cpu", memory=name) for name in ("auto", "low")]
    texts = [p.generate_text("red", max_new_tokens=6).text for p in pipes]
    assert texts[0] == texts[1]
    assert tensor_shapes(pipes[0].model) == tensor_shapes(pipes[1].model)


# -- what is there when ----------------------------------------------------------------------------


def test_the_tower_comes_with_references_only(tiny_folder, monkeypatch):
    reads = []
    read = Reader.read

    def spy(self, name, **options):
        reads.append(name)
        return read(self, name, **options)

    monkeypatch.setattr(Reader, "read", spy)
    pipe = load(tiny_folder, device="cpu", memory="low")
    tower, head = pipe.model.model.visual, pipe.model.lm_head
    assert reads == [EMBEDDINGS]
    there = []
    pipe("a red cube", **FEW, on_step=lambda *_: there.append(not absent(tower)))
    assert there == [False, False]
    assert reads == [EMBEDDINGS]
    pipe("red", references=(tiny.picture(0),), **FEW)
    assert sum(name.startswith("model.visual.") for name in reads) == len(list(tower.parameters()))
    assert absent(tower)
    assert absent(head)
    pipe.generate_text("red", max_new_tokens=3, on_token=lambda *_: there.append(absent(head)))
    assert there[2:] == [False] * len(there[2:])
    assert reads.count("lm_head.weight") == 1
    assert absent(head)


def test_blocks_leave_when_a_picture_is_cancelled(tiny_folder):
    pipe = load(tiny_folder, device="cpu", memory="stream")
    blocks = pipe.model.model.language_model.layers

    def fail(*_):
        raise ValueError("in the middle of a block")

    handle = blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        pipe("red", **FEW)
    handle.remove()
    assert all(absent(block) for block in blocks)
    assert same(pipe("red", **FEW), load(tiny_folder, device="cpu")("red", **FEW))


def test_threads_share_a_pipeline(tiny_folder, pipe):
    """Blocks come and go for one call at a time."""
    frugal = load(tiny_folder, device="cpu", memory="stream")
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda seed: frugal("red", **{**FEW, "seed": seed}), range(3)))
    for seed, output in enumerate(made):
        assert same(output, pipe("red", **{**FEW, "seed": seed}))


def test_a_frugal_pipeline_stays_on_its_device(frugal, monkeypatch):
    assert frugal.to("cpu") is frugal
    monkeypatch.setattr("hidream.pipelines.base.find_device", torch.device)
    with pytest.raises(UsageError, match=r'stays on its device, cpu.*device="cuda"'):
        frugal.to("cuda")


def test_what_is_read_late_is_checked_too(tmp_path):
    tiny.write_folder(tmp_path)
    file = tmp_path / weights.WEIGHTS
    tensors = load_file(file)
    name = f"{BLOCKS}.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    pipe = load(tmp_path, device="cpu", memory="stream")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        pipe("red", **FEW)


# -- when it does not fit --------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_before_it_is_read(tiny_folder, monkeypatch):
    always = {
        name: weight_bytes(O1_TINY, POLICIES[name], width=4, device="cpu").always
        for name in ("auto", "low", "12gb", "stream")
    }
    monkeypatch.setattr(weights, "load_weights", None)
    monkeypatch.setattr(weights, "load_placed", None)
    monkeypatch.setattr(machine, "total_memory", lambda device: always["12gb"])
    with pytest.raises(MemoryExceeded, match=r"--memory auto needs .* Use --memory 12gb") as caught:
        load(tiny_folder, device="cpu")
    assert caught.value.exit_code == 5
    monkeypatch.setattr(machine, "total_memory", lambda device: always["stream"] - 1)
    with pytest.raises(MemoryExceeded, match="Use a smaller model"):
        load(tiny_folder, device="cpu", memory="low")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_full_device_names_the_next_smaller_policy(tiny_folder, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(pipelines, "denoise_batch", full)
    for name, said in (("low", ", or use --memory 16gb"), ("stream", r"fewer pictures\.$")):
        with pytest.raises(MemoryExceeded, match=f"under --memory {name}.*{said}") as caught:
            load(tiny_folder, device="cpu", memory=name)("red", **FEW)
        assert caught.value.exit_code == 5
    with pytest.raises(RuntimeError, match="other"), told_when_full(torch.device("cpu"), AUTO, "x"):
        raise RuntimeError("other")


# -- one ahead -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_blocks_come_one_ahead(tiny_folder, tiny_model, pipe, share, monkeypatch):
    """1 to 4 of the 4 blocks, by the code for GPUs: the same picture, two blocks at a time, and
    every copy waits for the computation from its buffers, every computation for its copy."""
    gpu, kept = Gpu(monkeypatch), []
    policy = Policy(name="some", what="", lends=False, piecewise=False, streamed=share)
    whole = placing.attach

    def attach(model, policy, source, like):
        monkeypatch.setattr(placing, "stream_all", lambda *args: kept.append(stream_ahead(*args)))
        whole(model, policy, source, like)

    monkeypatch.setattr(placing, "attach", attach)
    model, tokenizer = weights.load_o1(tiny_folder, memory=policy)
    frugal = pipelines.O1Pipeline(pipe.spec, model, tokenizer)
    assert same(frugal("a red cube", **FEW), pipe("a red cube", **FEW))
    (ahead,) = kept
    counted = weight_bytes(O1_TINY, policy, width=4, device="cuda")
    assert sum(buffer.nbytes for buffer in ahead.buffers) == counted.streaming
    copied, computed = (list(map(id, events)) for events in (ahead.copied, ahead.computed))
    copies = [i for i, entry in enumerate(gpu.log) if entry[:2] == ("record", "side")]
    if len(ahead.blocks) > 2:
        assert len(copies) == 4 * len(ahead.blocks) + 1  # two prompts, two steps, one ahead
    for number, i in enumerate(copies):
        slot = copied.index(gpu.log[i][2])
        assert gpu.log[i - 1] == ("wait", "side", computed[slot])
        before = [entry[2] for entry in gpu.log[:i] if entry[:2] == ("record", "main")]
        assert before.count(computed[slot]) == number // 2  # its last reader is on record


# -- 8 bits ----------------------------------------------------------------------------------------


@pytest.fixture
def rounding(monkeypatch):
    """A stand-in for torchao: rounds to 8 bits a row; returns what it was asked for."""
    asked = []

    class Int8WeightOnlyConfig:
        pass

    class Float8WeightOnlyConfig:
        pass

    def quantize_(model, config):
        (layer,) = model
        assert isinstance(layer, nn.Linear)
        asked.append((type(config).__name__, layer.weight.shape))
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        layer.weight = nn.Parameter((layer.weight / scale).round() * scale, requires_grad=False)

    torchao, quantization = ModuleType("torchao"), ModuleType("torchao.quantization")
    for part in (Int8WeightOnlyConfig, Float8WeightOnlyConfig, quantize_):
        setattr(quantization, part.__name__, part)
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setattr(memory, "available", lambda policy: True)
    return asked


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_blocks_are_rounded_as_they_are_read(tiny_folder, pipe, rounding, monkeypatch, name):
    """One layer at a time, nothing but the blocks' products; the picture changes, a little."""
    alive = []
    quantised = quantise.quantised
    monkeypatch.setattr(
        placing, "quantised", lambda weight, to: alive.append(weight.shape) or quantised(weight, to)
    )
    rounded = load(tiny_folder, device="cpu", memory=name)
    config = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[name]
    assert {asked for asked, _ in rounding} == {config}
    assert len(rounding) == len(alive) == 7 * O1_TINY.text.num_layers
    plain, changed = pipe("red", **FEW), rounded("red", **FEW)
    assert 0 < tiny.levels(plain.images[0], changed.images[0]) < 40


def test_a_rounded_picture_is_made_again_rounded(tiny_folder, rounding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--steps", "2", "-m", str(tiny_folder)]
    assert main(["generate", "red", *common, "--memory", "int8", "-o", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "-m", str(tiny_folder), "-o", "b.png"]) == 0
    assert main(["generate", "--from", "a.png", *common, "--memory", "low", "-o", "c.png"]) == 0
    one, again, exact = (Image.open(name).convert("RGB") for name in ("a.png", "b.png", "c.png"))
    assert tiny.levels(one, again) == 0
    assert tiny.levels(one, exact) > 0
    monkeypatch.setattr(memory, "available", lambda policy: policy.exact)
    assert main(["generate", "--from", "a.png", "-m", str(tiny_folder), "-o", "d.png"]) == 2


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_torchao(tiny_folder, name):
    """The error of torchao's 8 bits against bf16: of the pixels, 8-bit levels."""
    whole, rounded = (
        load(tiny_folder, device="cpu", dtype="bf16", memory=policy) for policy in ("auto", name)
    )
    picture, changed = (p("a red cube", **FEW).images[0] for p in (whole, rounded))
    error = (torch.tensor(list(picture.tobytes())) - torch.tensor(list(changed.tobytes()))).abs()
    assert 0 < error.float().mean() < (12 if name != "int4" else 40)
    names = dict(rounded.model.named_parameters())
    layer = names[f"{BLOCKS}.0.mlp.up_proj.weight"]
    assert layer.dtype == torch.bfloat16
    assert type(layer.data) is not torch.Tensor
    shape = [*layer.shape]
    assert num_bytes(layer) <= quantised_bytes(shape, name, width=2, device="cpu")
