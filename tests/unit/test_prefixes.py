"""What was read once is not read again, and nobody can tell from the numbers."""

import os
import threading

import pytest
import torch

from hidream.errors import UsageError
from hidream.pipelines import load
from hidream.pipelines.prefixes import Counter
from hidream.request import GenerateRequest
from tests import lora_files, tiny

PICTURE, OTHER = tiny.picture(1), tiny.picture(2)


@pytest.fixture
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def forgetful(tiny_folder):
    return load(tiny_folder, device="cpu", prefix_bytes=0)


@pytest.fixture
def towers(pipe, monkeypatch):
    """How many pictures each call of the vision tower sees."""
    calls = []
    forward = type(pipe.model.model.visual).forward

    def counted(self, patches, grids):
        calls.append(len(grids))
        return forward(self, patches, grids)

    monkeypatch.setattr(type(pipe.model.model.visual), "forward", counted)
    return calls


def request(prompt="a red cube", **fields):
    return GenerateRequest(prompt=prompt, **{"seed": 7, "num_inference_steps": 1, **fields})


def counts(out):
    return out.num_prefills, out.num_reused


def same(one, other):
    return all(tiny.levels(*pair) == 0 for pair in zip(one.images, other.images, strict=True))


def test_a_prompt_is_read_once(pipe):
    """The unconditional branch is shared by all; sizes and seeds do not matter."""
    assert counts(pipe(request(num_images=4))) == (2, 0)
    assert counts(pipe(request(seed=1, width=32, num_inference_steps=2))) == (0, 2)
    assert counts(pipe(request("a blue cube"))) == (1, 1)
    assert counts(pipe(request("a blue cube", guidance_scale=1))) == (0, 1)
    assert counts(pipe(request("a blue cube", negative_prompt="red"))) == (1, 1)


def test_within_a_call_too(pipe, forgetful):
    together = [request("a"), request("b", num_images=2), request("a", seed=9)]
    assert [counts(out) for out in pipe(together)] == [(3, 0)] * 3
    assert [counts(out) for out in forgetful(together)] == [(3, 0)] * 3
    apart = [request("c", deterministic=True, seed=seed) for seed in (1, 2)]
    assert [counts(out) for out in pipe(apart)] == [(1, 1), (0, 2)]
    assert [counts(out) for out in forgetful(apart)] == [(2, 0), (2, 0)]
    large, small = pipe([request("d"), request("d", width=32)])
    assert counts(large) == (1, 1)
    assert counts(small) == (0, 2)


def test_pictures_are_known_by_their_pixels(pipe, towers):
    edit = {"width": 64, "height": 64}
    assert counts(pipe(request("make it red", references=(PICTURE,), **edit))) == (2, 0)
    assert towers == [1]  # both branches
    copied = request("make it blue", references=(PICTURE.copy(),), **edit)
    assert counts(pipe(copied)) == (1, 1)
    assert towers == [1]
    assert counts(pipe(request("make it blue", references=(OTHER,), **edit))) == (2, 0)
    assert counts(pipe(request("make it blue", references=(PICTURE, OTHER), **edit))) == (2, 0)
    assert counts(pipe(request("make it blue", references=(OTHER, PICTURE), **edit))) == (2, 0)
    assert counts(pipe(request("make it blue", **edit))) == (2, 0)
    assert towers == [1, 1, 2, 2]
    pipe.prefixes.clear()
    assert counts(pipe(copied)) == (2, 0)


MIXED = [
    request("a red cube"),
    request("make it red", references=(PICTURE,), width=64, height=64),
    request("all", references=tuple(tiny.pictures(3)), negative_prompt="blue"),
    request("a red cube", seed=3, guidance_scale=1),
    request("make it blue", references=(PICTURE,), width=64, height=64, num_images=2),
]


def test_reuse_changes_no_bit(pipe, forgetful):
    """Of pictures, in company that was other when the prefixes were read."""
    pipe([MIXED[i] for i in (4, 0, 2)])
    for order in ((0, 1, 2, 3, 4), (3, 2, 1), (4,), (1, 0)):
        items = [MIXED[i] for i in order]
        for kept, fresh in zip(pipe(items), forgetful(items), strict=True):
            assert fresh.num_reused < kept.num_reused
            assert same(kept, fresh)


def test_prefixes_are_the_same_to_the_bit(pipe, forgetful, monkeypatch):
    """Keys, values, references and angles: whatever was read with them, or before."""
    found = {}

    def watch(pipe, name):
        velocity = pipe.model.velocity

        def spy(x_t, sigma, prefix):
            found[name] = prefix
            return velocity(x_t, sigma, prefix)

        monkeypatch.setattr(pipe.model, "velocity", spy)

    watch(pipe, "kept")
    watch(forgetful, "fresh")
    pipe([MIXED[2], MIXED[1]])
    pipe(MIXED[1])
    forgetful(MIXED[1])
    for name in ("keys", "values", "references", "ropes"):
        rows = (getattr(found[which], name) for which in ("kept", "fresh"))
        for one, other in zip(*rows, strict=True):
            one, other = (torch.cat(list(t)) if isinstance(t, tuple) else t for t in (one, other))
            assert torch.equal(one, other), name


def test_a_lora_never_meets_a_prefix_of_other_weights(pipe, forgetful, tmp_path):
    files = []
    for seed in (1, 2):
        matrices = lora_files.matrices(pipe.model, seed)
        files.append(lora_files.write(tmp_path / f"{seed}.safetensors", matrices))
    one, two = files
    ways = [(), ((one, 1.0),), ((one, 0.5),), ((two, 1.0),), ((one, 1.0), (two, 1.0)), ()]
    edit = {"references": (PICTURE,), "width": 64, "height": 64}
    for number, loras in enumerate(ways):
        out = pipe(request("make it red", loras=loras, **edit))
        assert counts(out) == ((0, 2) if number == 5 else (2, 0)), loras
        assert same(out, forgetful(request("make it red", loras=loras, **edit))), loras
    assert counts(pipe(request("make it red", loras=((one, 1.0),), **edit))) == (0, 2)
    lora_files.write(tmp_path / "1.safetensors", lora_files.matrices(pipe.model, 3))
    os.utime(one, ns=(1, 1))  # a file that changed in place, however coarse the clock is
    out = pipe(request("make it red", loras=((one, 1.0),), **edit))
    assert counts(out) == (2, 0)
    assert same(out, forgetful(request("make it red", loras=((one, 1.0),), **edit)))


def test_changed_weights_read_anew(pipe):
    """In place, under no_grad or inference mode, replaced, or cast."""

    def in_place():
        with torch.no_grad():
            pipe.model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)

    def in_inference_mode():
        with torch.inference_mode():
            pipe.model.model.visual.pos_embed.weight.add_(1)

    def loaded():
        state = {name: 2 * weight for name, weight in pipe.model.state_dict().items()}
        pipe.model.load_state_dict(state, assign=True)

    def cast():
        pipe.model.to(torch.bfloat16)

    def threads():
        torch.set_num_threads(torch.get_num_threads() + 1)

    before = torch.get_num_threads()
    try:
        for change in (in_place, in_inference_mode, loaded, cast, threads):
            pipe(request())
            assert counts(pipe(request())) == (0, 2)
            change()
            assert counts(pipe(request())) == (2, 0), change
    finally:
        torch.set_num_threads(before)


def test_weights_whose_changes_cannot_be_seen_are_read_anew(tiny_folder):
    with torch.inference_mode():
        pipe = load(tiny_folder, device="cpu")
    assert counts(pipe(request())) == (2, 0)
    assert counts(pipe(request())) == (2, 0)


def test_memory_is_bounded(pipe):
    """The longest unused go first; what is larger than the limit is not kept at all."""
    pipe(request("a", guidance_scale=1))
    one = pipe.prefixes.num_bytes
    text, num_tokens = pipe.model.config.text, len(pipe.tokenizer.chat("a")[0]) + 1
    expected = num_tokens * text.num_layers * 2 * text.num_kv_heads * text.head_dim
    assert one == 4 * (expected + text.hidden_size)
    pipe.prefixes.max_bytes = 3 * one
    for prompt in ("a", "b", "c", "a", "d"):
        pipe(request(prompt, guidance_scale=1))
        assert pipe.prefixes.num_bytes <= 3 * one
    reused = [pipe(request(prompt, guidance_scale=1)).num_reused for prompt in ("a", "c", "d", "b")]
    assert reused == [1, 1, 1, 0]
    pipe.prefixes.max_bytes = one
    assert pipe.prefixes.num_bytes == one
    pipe(request("a much longer prompt", guidance_scale=1))
    assert counts(pipe(request("b", guidance_scale=1))) == (0, 1)
    pipe.prefixes.max_bytes = 0
    assert pipe.prefixes.num_bytes == 0
    assert counts(pipe(request("b", guidance_scale=1))) == (1, 0)


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_a_limit_is_a_number_of_bytes(tiny_folder, unchecked, value):
    with pytest.raises(UsageError, match="prefix_bytes"):
        load(tiny_folder, device="cpu", prefix_bytes=value)


def test_threads_share_them(pipe, forgetful):
    """Four threads draw the same prompts in different orders."""
    prompts = ["a", "b", "c", "d"]
    pipe.prefixes.max_bytes = 40_000  # some are dropped meanwhile
    made, problems = {}, []

    def work(first):
        try:
            for prompt in (*prompts[first:], *prompts[:first]):
                made[first, prompt] = pipe(request(prompt))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    for prompt in prompts:
        fresh = forgetful(request(prompt))
        assert all(same(made[first, prompt], fresh) for first in range(4))


def test_counters_add_up():
    total = Counter(1, 2, 3)
    total.add(Counter(10, 20, 30))
    assert total == Counter(11, 22, 33)
