"""Many requests at once: bit-identity in deterministic mode, and calls that are cancelled."""

import threading
from dataclasses import replace
from itertools import permutations

import pytest
from PIL import Image

import hidream
from hidream.cancel import CancelToken
from hidream.errors import Cancelled, HidreamError
from hidream.models.o1.model import O1
from hidream.pipelines import load
from hidream.request import GenerateRequest
from tests import tiny


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


def request(prompt="a red cube", **fields):
    return GenerateRequest(prompt=prompt, **{"seed": 7, "num_inference_steps": 2, **fields})


# -- deterministic ---------------------------------------------------------------------------------

SOURCE = tiny.picture(2, 64, 64)
MASK = Image.linear_gradient("L").resize((64, 64))
SIZE = {"width": 64, "height": 64}
TASKS = [
    request("a red cube", seed=1),
    request("the sphere left of a blue cube, and much more to read than elsewhere", seed=2),
    request("make it blue", seed=3, references=(SOURCE,), **SIZE),
    request("all of them", seed=4, references=tuple(tiny.pictures(3)), negative_prompt="red"),
    request("make it red", seed=5, references=(SOURCE,), mask=MASK, **SIZE),
    request("a cube", seed=6, init_image=SOURCE, strength=0.5, sampler="euler", **SIZE),
    request("a cube", seed=7, sampler="flash", noise_clip_std=2.0, num_inference_steps=3),
]


def every(guidance_scale):
    return [replace(t, deterministic=True, guidance_scale=guidance_scale) for t in TASKS]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_deterministic_picture_is_the_same_alone_and_in_company(
    tiny_folder, pipe, guidance_scale
):
    """To the bit: with 1, 2 or 4 others, in any order, of any task, read before or not."""
    items = every(guidance_scale)
    fresh = load(tiny_folder, device="cpu", prefix_bytes=0)
    alone = [fresh(item).images[0].tobytes() for item in items]
    assert len(set(alone)) == len(alone)
    companies = [(0,), (6,), *permutations((1, 2)), (2, 2), (4, 5), (5, 4)]
    companies += [(0, 1, 2, 3), (3, 2, 1, 0), (6, 4, 2, 0), (1, 3, 5, 4)]
    for company in companies:
        for out, i in zip(pipe([items[i] for i in company]), company, strict=True):
            assert out.images[0].tobytes() == alone[i], (company, i)
    several = pipe(replace(items[0], num_images=3)).images
    assert several[0].tobytes() == alone[0]
    beside = [request("a blue cube", guidance_scale=guidance_scale), items[1]]
    assert pipe(beside)[1].images[0].tobytes() == alone[1]  # others need not be deterministic


# -- cancelled -------------------------------------------------------------------------------------


@pytest.fixture
def forwards(pipe, monkeypatch):
    """The number of layers that each call of the network ran."""
    calls = []
    original = O1.predict_x0

    def counted(self, x_t, sigma, prefix, on_layer=None):
        calls.append(0)

        def count():
            if on_layer is not None:
                on_layer()
            calls[-1] += 1

        return original(self, x_t, sigma, prefix, count)

    monkeypatch.setattr(O1, "predict_x0", counted)
    return calls


def test_a_token_ends_a_call_before_the_next_step(pipe, forwards):
    token = CancelToken()

    def stop(step, num_steps, preview):
        if step == 2:
            token.cancel()

    with pytest.raises(Cancelled, match="was cancelled") as caught:
        pipe(request(num_inference_steps=9), on_step=stop, cancel=token)
    assert isinstance(caught.value, HidreamError)
    assert caught.value.exit_code == 130
    layers = pipe.model.config.text.num_layers
    assert forwards == [layers, layers, 0]
    assert pipe(request()).images  # and the next call is as ever


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "flash"])
def test_within_a_step_from_another_thread(pipe, forwards, sampler):
    """Another thread cancels in the first layer; the second is never run."""
    token, inside, cancelled = CancelToken(), threading.Event(), threading.Event()
    check = token.check

    def seen():
        if len(forwards) == 2 and forwards[-1] == 1:
            inside.set()
            assert cancelled.wait(30)
        check()

    token.check = seen
    other = threading.Thread(target=lambda: (inside.wait(30), token.cancel(), cancelled.set()))
    other.start()
    with pytest.raises(Cancelled):
        pipe(request(num_inference_steps=9, sampler=sampler), cancel=token)
    other.join()
    assert forwards == [pipe.model.config.text.num_layers, 1]


def test_a_cancelled_token_lets_nothing_begin(pipe, forwards, monkeypatch):
    token = CancelToken()
    assert not token.cancelled
    token.cancel()
    assert token.cancelled
    monkeypatch.setattr(pipe, "_plan", None)
    for _ in range(2):
        with pytest.raises(Cancelled):
            pipe([request(), request(width=32)], cancel=token)
    assert forwards == []


def test_a_later_batch_is_cancelled_too(pipe, forwards):
    token, steps = CancelToken(), []

    def stop(step, num_steps, preview):
        steps.append(step)
        if len(steps) == 3:
            token.cancel()

    with pytest.raises(Cancelled):
        pipe([request(), request(width=32)], on_step=stop, cancel=token)
    assert steps == [1, 2, 1]


def test_after_the_last_step_no_picture_is_given(pipe):
    token = CancelToken()
    with pytest.raises(Cancelled):
        pipe(request(), on_step=lambda step, n, _: step == n and token.cancel(), cancel=token)


def test_reading_is_cancelled(pipe, monkeypatch):
    """Between the two branches' prefixes; what was read whole is kept, and right."""
    token = CancelToken()
    expected = pipe(request("a green cube")).images[0]
    pipe.prefixes.clear()
    prefill = pipe.model.prefill

    def cancelling(*arguments):
        token.cancel()
        return prefill(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.model, "prefill", cancelling)
        with pytest.raises(Cancelled):
            pipe(request("a green cube"), cancel=token)
    out = pipe(request("a green cube"))
    assert (out.num_prefills, out.num_reused) == (1, 1)
    assert tiny.levels(out.images[0], expected) == 0


def test_it_is_public():
    assert hidream.CancelToken is CancelToken
