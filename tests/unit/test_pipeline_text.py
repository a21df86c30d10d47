"""generate_text and describe: each text is its request's own, whatever is written beside it."""

from dataclasses import replace

import pytest
import torch

import hidream
from hidream.errors import InputError, ModelError, UsageError
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.tokens import encode_text
from hidream.pipelines import TextOutput, load
from hidream.pipelines import text as texts
from hidream.pipelines.o1 import O1Pipeline
from hidream.registry import SPECS
from hidream.text_request import DESCRIBE, TextRequest
from tests import tiny


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


def request(prompt="a red cube", **fields):
    return TextRequest(prompt=prompt, **{"max_new_tokens": 8, "seed": 7, **fields})


def test_a_prompt_is_answered(pipe):
    out = pipe.generate_text("a red cube", max_new_tokens=5)
    assert isinstance(out, TextOutput)
    assert (out.num_tokens, out.finish_reason) == (5, "length")
    assert out.text
    assert set(out.timings) == {"encode", "write", "total"}
    assert 0 < out.timings["write"] <= out.timings["total"]
    assert 0 <= out.request.seed < 2**32
    assert out == replace(pipe.generate_text(out.request), timings=out.timings)
    assert hidream.TextRequest is TextRequest


def test_describe_is_a_question_about_a_picture(pipe, tmp_path):
    file = tmp_path / "a.png"
    tiny.picture(0).save(file)
    plain = pipe.describe(file, max_new_tokens=6)
    for same in (
        pipe.describe(tiny.picture(0), DESCRIBE, max_new_tokens=6),
        pipe.generate_text(DESCRIBE, [tiny.picture(0)], max_new_tokens=6),
    ):
        assert same.text == plain.text
    assert pipe.describe(tiny.picture(1), max_new_tokens=6).text != plain.text
    assert pipe.describe(file, "red?", max_new_tokens=6).text != plain.text


def test_texts_are_written_together_as_alone(pipe, monkeypatch):
    calls, write = [], texts.write

    def spy(model, tokens, *arguments, **options):
        calls.append(len(tokens))
        return write(model, tokens, *arguments, **options)

    monkeypatch.setattr(texts, "write", spy)
    requests = [
        request(),
        request("the sphere, all of it, and the cube beside it", temperature=1.3, seed=8),
        request(pictures=[tiny.picture(0)], max_new_tokens=3),
        request(pictures=[tiny.picture(0), tiny.picture(1, 30, 70)], temperature=0.9, top_p=0.8),
        request("", temperature=2.0, top_k=5, max_new_tokens=12),
    ]
    together = pipe.generate_text(requests)
    assert calls == [5]
    for out, asked in zip(together, requests, strict=True):
        alone = pipe.generate_text(asked)
        assert (out.text, out.num_tokens) == (alone.text, alone.num_tokens)
        assert out.request == asked
    monkeypatch.setattr(texts, "MAX_PREFIX", 60)
    calls.clear()
    assert [out.text for out in pipe.generate_text(requests)] == [out.text for out in together]
    assert len(calls) > 1
    assert sum(calls) == 5


def test_batches_hold_sixteen_and_a_limit_of_tokens():
    assert texts._batches([5] * 20) == [list(range(16)), [16, 17, 18, 19]]
    assert texts._batches([9000, 7384, 1, 20_000, 1]) == [[0, 1], [2], [3], [4]]


def test_a_seed_decides_what_is_drawn(pipe):
    warm = {"temperature": 1.5, "max_new_tokens": 12}
    one, other, again = (pipe.generate_text(request(seed=s, **warm)).text for s in (1, 2, 1))
    assert one == again
    assert one != other
    cold = [pipe.generate_text(request(seed=s)).text for s in (1, 2)]
    assert cold[0] == cold[1]
    drawn = [pipe.generate_text(request(seed=s, **warm)) for s in (None, -1)]
    assert drawn[0].request.seed != drawn[1].request.seed
    assert pipe.generate_text(drawn[0].request).text == drawn[0].text


def test_a_text_draws_its_own_numbers_one_a_token(pipe, monkeypatch):
    asked = []

    def spy(seed, index):
        asked.append((seed, index))
        return 0.5

    monkeypatch.setattr(texts, "uniform", spy)
    pipe.generate_text([request(seed=s, temperature=t) for s, t in ((5, 1), (6, 0), (7, 1))])
    assert asked == [(seed, number) for number in range(8) for seed in (5, 7)]


def test_pieces_come_in_order_and_make_the_text(pipe):
    requests = [request(temperature=1.5, seed=seed, max_new_tokens=20 + seed) for seed in (0, 1)]
    told = []
    outs = pipe.generate_text(requests, on_token=lambda *piece: told.append(piece))
    for place, out in enumerate(outs):
        mine = [piece for piece in told if piece[0] == place]
        numbers = [number for _, number, _ in mine]
        assert numbers[: out.num_tokens] == list(range(1, out.num_tokens + 1))
        assert "".join(text for _, _, text in mine) == out.text
    assert [place for place, _, _ in told[:4]] == [0, 1, 0, 1]


def test_characters_are_never_cut(tokenizer):
    """Every byte is a token of the tiny tokenizer."""
    text = "né 猫 🐈!"
    told = []
    speller = texts._Speller(tokenizer, [3], lambda *piece: told.append(piece))
    ids = tokenizer.encode(text)
    for token in ids:
        speller.add(0, token)
    speller.close()
    assert [text for _, _, text in told if text] == list(text)
    assert [number for _, number, _ in told] == list(range(1, len(ids) + 1))
    told.clear()
    for token in tokenizer.encode("猫")[:2]:
        speller.add(0, token)
    assert [text for _, _, text in told] == ["", ""]
    speller.close()
    assert told[-1][2] == "\ufffd"


def test_the_model_ends_its_text(tmp_path, tokenizer):
    """A head that answers this very prompt with the end of the turn, then with nothing else."""
    for name in ("<|im_end|>", "<|endoftext|>"):
        model = tiny.random_o1()
        last = model.prefill([encode_text(tokenizer, O1_TINY, "a red cube")]).last[0]
        model.lm_head.weight[tokenizer.special[name]] = 100 * last
        out = O1Pipeline(SPECS["o1"], model, tokenizer).generate_text(request())
        assert (out.text, out.num_tokens, out.finish_reason) == ("", 0, "stop")


def test_tied_embeddings_write_and_a_missing_head_does_not(tokenizer):
    tied = O1Pipeline(
        SPECS["o1"], tiny.random_o1(replace(O1_TINY, tie_word_embeddings=True)), tokenizer
    )
    assert tied.generate_text(request()).num_tokens == 8
    headless = O1Pipeline(
        SPECS["o1"], tiny.random_o1(replace(O1_TINY, has_lm_head=False)), tokenizer
    )
    with pytest.raises(ModelError, match="no lm_head"):
        headless.generate_text(request())


def test_half_precision(tiny_folder):
    pipe = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    out = pipe.generate_text(request(pictures=[tiny.picture(0)], temperature=1.0))
    assert out.num_tokens == 8


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 32_769}, "32768"),
        ({"max_new_tokens": 1.5}, "whole"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -2}, "seed"),
        ({"seed": (1, 2)}, "one seed"),
        ({"pictures": 5}, "not a list"),
        ({"pictures": [5]}, "picture 1"),
        ({"pictures": ["a.png"] * 12}, "12 pictures"),
    ],
)
def test_refused_fields(fields, word):
    with pytest.raises(UsageError, match=word):
        TextRequest(prompt="x", **fields)


def test_requests_are_cleaned_and_warned_of():
    made = TextRequest(prompt="a\nb", pictures="a.png", top_p=0.5, top_k=3)
    assert made.prompt == "a b"
    assert made.pictures == ("a.png",)
    assert made.warnings == ("top_p and top_k without effect: the temperature is 0.",)
    assert replace(made, temperature=1.0).warnings == ()
    assert TextRequest(prompt="").warnings == ()
    for question in ("", " \n"):
        with pytest.raises(InputError, match="question is empty"):
            TextRequest.about("a.png", question)
    with pytest.raises(InputError, match="control character"):
        TextRequest(prompt="a\x1b")


def test_fields_beside_a_request_are_refused(pipe):
    for extra in ({"seed": 3}, {"pictures": [tiny.picture(0)]}):
        with pytest.raises(UsageError, match="inside"):
            pipe.generate_text(request(), **extra)
    with pytest.raises(InputError, match="does not exist"):
        pipe.describe("/nowhere/a.png")
