"""Text, a token a step: the cache changes nothing, company changes nothing."""

from dataclasses import replace

import pytest
import torch

from hidream.errors import ModelError
from hidream.models.o1.config import O1_NANO, O1_TINY, VISION_PIXELS, O1Config
from hidream.models.o1.text import Cache, next_logits, write
from hidream.models.o1.tokens import Tokens, encode_text
from tests import tiny

PROMPTS = ("red", "the cube of the red sphere, all of it", "", "a blue")


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def greedy(row, number, logits):
    return int(logits.argmax())


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Prompts of different lengths, about none, one or two pictures."""
    shown = ([], [tiny.picture(0)], [tiny.picture(1, 90, 30), tiny.picture(2, 20, 50)], [])
    return [
        encode_text(tokenizer, O1_TINY, prompt, pictures)
        for prompt, pictures in zip(PROMPTS, shown, strict=True)
    ]


def longer(tokens: Tokens, ids: list[int]) -> Tokens:
    """The same request with more text at its end."""
    end = int(tokens.position_ids[0, -1])
    after = torch.arange(end + 1, end + 1 + len(ids)).expand(3, -1)
    return replace(
        tokens,
        input_ids=torch.cat([tokens.input_ids, torch.tensor(ids, dtype=torch.long)]),
        image_slots=torch.cat([tokens.image_slots, torch.zeros(len(ids), dtype=torch.bool)]),
        position_ids=torch.cat([tokens.position_ids, after], dim=1),
    )


def test_a_step_is_the_whole_text_computed_again(tiny_model, requests):
    """More steps than a cache's first room holds; the logits of each are those without a cache."""
    said = [list(range(300 + row, 370 + row)) for row in range(len(requests))]
    prefix = tiny_model.prefill(requests)
    caches = [Cache.after(prefix, row, tokens) for row, tokens in enumerate(requests)]
    for step in range(70):
        logits = next_logits(tiny_model, torch.tensor([ids[step] for ids in said]), caches)
        if step in (0, 1, 40, 69):
            whole = [longer(t, ids[: step + 1]) for t, ids in zip(requests, said, strict=True)]
            expected = tiny_model.logits(tiny_model.prefill(whole).last)
            assert relative(logits, expected) <= 1e-5
    for cache, tokens in zip(caches, requests, strict=True):
        assert cache.length == len(tokens.input_ids) + 70
        assert len(cache.layers) == O1_TINY.text.num_layers


def test_written_tokens_are_those_of_a_model_without_a_cache(tiny_model, requests):
    written = write(tiny_model, requests, greedy, limits=[8] * 4, stop=())
    for tokens, ids in zip(requests, written, strict=True):
        assert len(ids) == 8
        for number, token in enumerate(ids):
            last = tiny_model.prefill([longer(tokens, ids[:number])]).last
            assert int(tiny_model.logits(last)[0].argmax()) == token


def test_a_request_is_written_as_if_alone(tiny_model, requests):
    together = write(tiny_model, requests, greedy, limits=[20, 3, 11, 20], stop=())
    assert [len(ids) for ids in together] == [20, 3, 11, 20]
    for row, tokens in enumerate(requests):
        (alone,) = write(tiny_model, [tokens], greedy, limits=[20], stop=())
        assert together[row] == alone[: len(together[row])]
    assert len({tuple(ids) for ids in together}) == 4


def test_a_stop_token_ends_its_own_text_alone(tiny_model, requests):
    whole = write(tiny_model, requests, greedy, limits=[12] * 4, stop=())
    stop = next(token for token in whole[1] if token != whole[1][0])
    cut = write(tiny_model, requests, greedy, limits=[12] * 4, stop={stop})
    for full, ids in zip(whole, cut, strict=True):
        assert ids == full[: full.index(stop) if stop in full else None]
    assert 0 < len(cut[1]) < 12
    first = {ids[0] for ids in whole}
    assert write(tiny_model, requests, greedy, limits=[12] * 4, stop=first) == [[]] * 4


def test_tokens_are_told_step_by_step_in_the_requests_order(tiny_model, requests):
    told, asked = [], []

    def choose(row, number, logits):
        asked.append((row, number))
        return greedy(row, number, logits)

    written = write(
        tiny_model,
        requests,
        choose,
        limits=[3, 1, 2, 3],
        stop=(),
        on_token=lambda row, token: told.append((row, token)),
    )
    order = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1), (0, 2), (3, 2)]
    assert asked == order
    assert told == [(row, written[row][number]) for row, number in order]


def test_what_the_callback_raises_ends_the_work(tiny_model, requests):
    def refuse(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny_model, requests, greedy, limits=[9] * 4, stop=(), on_token=refuse)


def test_room_grows_and_keeps_what_is_there():
    keys, values = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    cache = Cache([keys], [values], 5)
    more = torch.randn(200, 2, 2, 4)
    for key, value in more:
        found = cache.add(0, key, value)
        cache.advance()
    assert torch.equal(found[0], torch.cat([keys, more[:, 0]]))
    assert torch.equal(found[1], torch.cat([values, more[:, 1]]))
    assert (cache.length, cache.position) == (205, 205)


def test_without_a_language_head(requests):
    model = tiny.random_o1(replace(O1_TINY, has_lm_head=False))
    with pytest.raises(ModelError, match="can draw, but not write"):
        write(model, requests, greedy, limits=[1] * 4, stop=())


# -- the sequence ----------------------------------------------------------------------------------


def test_the_sequence_is_the_chat_and_nothing_after_it(tokenizer):
    tokens = encode_text(tokenizer, O1_TINY, "red cube", [tiny.picture(0)] * 2)
    text = tokenizer._text.decode(tokens.input_ids.tolist(), skip_special_tokens=False)
    seen = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"  # nano's 64×64 for two
    assert O1_TINY.budgets.vision_side(2) == 64
    rows, columns = tokens.image_grids[0]
    seen = seen.replace("<|image_pad|>" * 4, "<|image_pad|>" * (rows * columns // 4))
    assert text == (f"<|im_start|>user\n{seen}{seen}red cube<|im_end|>\n<|im_start|>assistant\n")
    assert tokens.position_ids.shape == (3, len(tokens.input_ids) + 1)
    end = tokens.position_ids[:, -1]
    assert (end == end[0]).all()
    assert int(end[0]) == int(tokens.position_ids[:, :-1].max()) + 1


def test_an_answer_is_text_even_where_it_spells_a_picture(tokenizer):
    pad = tokenizer.special["<|image_pad|>"]
    tokens = encode_text(tokenizer, O1_TINY, "red", [tiny.picture(0)], [pad, pad])
    plain = encode_text(tokenizer, O1_TINY, "red", [tiny.picture(0)])
    assert tokens.image_slots.sum() == plain.image_slots.sum()
    assert int(tokens.position_ids[0, -1]) == int(plain.position_ids[0, -1]) + 2


def test_pictures_are_seen_within_the_models_bounds(tokenizer):
    config = replace(O1_TINY, vision_pixels=(64 * 64, 128 * 128))
    for size, grid in (
        ((64, 96), (6, 4)),  # as it is
        ((70, 100), (6, 4)),  # each side at its nearest multiple
        ((16, 16), (4, 4)),  # enlarged to the least
        ((3000, 1000), (4, 12)),  # scaled to the most
        ((1, 60), (32, 2)),
    ):
        tokens = encode_text(tokenizer, config, "", [tiny.picture(0, *size)])
        assert tokens.image_grids == (grid,), size


def test_what_a_folder_says_of_pictures(tiny_folder, tmp_path, tokenizer):
    """Its own hidream.json, else its preprocessor's bounds, else those that Qwen publishes."""
    from hidream.folder import Folder
    from hidream.models.o1.weights import config_of

    config = O1_TINY.to_dict(tokenizer.special)
    folder = Folder(path=tmp_path, config=config, settings={}, tensors={})
    assert config_of(folder).vision_pixels == VISION_PIXELS == (65_536, 16_777_216)
    preprocessor = {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
    folder = replace(folder, preprocessor=preprocessor)
    assert config_of(folder).vision_pixels == (1024, 4096)
    folder = replace(folder, settings={"vision_pixels": [2048, 2048]})
    assert config_of(folder).vision_pixels == (2048, 2048)
    own = {"reference_budgets": O1_NANO.to_settings()["reference_budgets"]}
    assert config_of(replace(folder, settings=own)).vision_pixels is None  # as nano's folder
    for wrong in ([0, 5], [5, 4], ["1", 2], [1.5, 2]):
        with pytest.raises(ModelError, match="vision_pixels"):
            O1Config.from_dict(config, {"vision_pixels": wrong})
