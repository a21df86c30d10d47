"""The samples of a step: a pure function, whatever the number of processes."""

import numpy as np
import pytest
import torch

from hidream.errors import ModelError
from hidream.models.o1.tokens import Tokenizer
from hidream.train.config import parse_recipe
from hidream.train.data import encode_sample, make_batch
from hidream.train.draws import draw_task
from hidream.train.o1 import model_config
from hidream.train.prefetch import Prefetcher
from hidream.world import tasks
from tests import tiny

TASKS = tasks.TASKS


def recipe_of(**changes):
    stage = {"size": 32, "steps": 50, "batch_size": 12, "learning_rate": 1e-3}
    stage["tasks"] = dict.fromkeys(changes.pop("tasks", TASKS), 1.0)
    plain = {"name": "tiny", "model": "o1-tiny", "seed": 3, "stages": [stage]}
    return parse_recipe(plain | changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from hidream.train.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, num_texts=500)
    return Tokenizer(folder)


def batch_of(recipe, tokenizer, step, rank=0, world=1):
    return make_batch(recipe, model_config(recipe), tokenizer, step, rank, world)


def assert_same(a, b):
    """Every tensor of two batches is equal."""
    for x, y in ((a.x0, b.x0), (a.noise, b.noise), (a.sigma, b.sigma)):
        assert torch.equal(x, y)
    for name, value in vars(a.batch).items():
        if name != "packing":
            other = getattr(b.batch, name)
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, name
    assert a.tasks == b.tasks
    assert all(torch.equal(a.said[name], b.said[name]) for name in a.said)


def samples_of(batch):
    """One by one: task, ids, labelled tokens, and what is drawn."""
    texts = batch.batch.input_ids.split([n.text for n in batch.batch.lengths])
    pictures = iter(
        zip(
            batch.x0.split(batch.batch.targets),
            batch.noise.split(batch.batch.targets),
            batch.sigma,
            batch.grids,
            strict=True,
        )
    )
    found = []
    for task, text, n in zip(batch.tasks, texts, batch.batch.lengths, strict=True):
        assert bool(n.target) == (task not in ("language", "understanding"))
        picture = next(pictures) if n.target else ()
        found.append((task, text, *picture))
    assert next(pictures, None) is None
    return found


def test_a_batch_is_a_function_of_its_step(tokenizer):
    recipe = recipe_of()
    first = batch_of(recipe, tokenizer, 4)
    assert len(set(first.tasks)) > 2  # of several tasks at once
    assert sum(first.shares.values()) == pytest.approx(1)
    assert_same(first, batch_of(recipe, tokenizer, 4))
    other = batch_of(recipe, tokenizer, 5)
    assert other.tasks != first.tasks
    assert not torch.equal(first.batch.input_ids[:60], other.batch.input_ids[:60])


@pytest.mark.parametrize("tasks", [TASKS, ("language",), ("text_to_image", "edit")])
def test_processes_share_the_samples_of_one(tokenizer, tasks):
    recipe = recipe_of(tasks=tasks)
    whole = batch_of(recipe, tokenizer, 2)
    shares = [batch_of(recipe, tokenizer, 2, rank, 2) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert (share.shares, share.may_see) == (whole.shares, whole.may_see)
        assert torch.equal(share.levels, whole.levels)
        for one, other in zip(samples_of(share), samples_of(whole)[rank::2], strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    counts = zip(*(share.counts for share in shares), strict=True)
    assert [sum(pair) for pair in counts] == whole.counts


def test_nothing_is_padded(tokenizer):
    """The decoder computes the samples' tokens and no others."""
    batch, model, seen = batch_of(recipe_of(), tokenizer, 3), tiny.random_o1(), []
    model.model.language_model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(batch.batch, batch.x0, batch.sigma)
    totals = [n.total for n in batch.batch.lengths]
    assert seen[0].shape[:-1] == (sum(totals),)
    assert len(set(totals)) > 4


def test_moving_a_batch_moves_all_of_it(tokenizer):
    moved = batch_of(recipe_of(), tokenizer, 0).to("meta")
    rows = moved.batch.packing.rows
    assert any(row.mask is not None for row in rows)
    parts = [
        vars(moved),
        moved.said,
        vars(moved.batch),
        vars(moved.batch.packing),
        *map(vars, rows),
    ]
    tensors = [value for part in parts for value in part.values() if torch.is_tensor(value)]
    assert len(tensors) > 14
    assert all(tensor.is_meta for tensor in tensors)


def test_tasks_come_in_the_proportions_of_the_recipe():
    stage = {"size": 32, "steps": 1, "batch_size": 3000, "learning_rate": 1e-3}
    weights = {"text_to_image": 6, "edit": 3, "language": 1}
    recipe = parse_recipe({"name": "x", "model": "o1-tiny", "stages": [stage | {"tasks": weights}]})
    drawn = [draw_task(recipe, recipe.stages[0], index) for index in range(3000)]
    for task, weight in weights.items():
        assert drawn.count(task) / 3000 == pytest.approx(weight / 10, abs=0.03)


def test_samples_longer_than_max_text_are_replaced_and_counted(tokenizer):
    recipe = recipe_of(tasks=["text_to_image"], max_text=8)
    batches = [batch_of(recipe, tokenizer, step) for step in range(4)]
    assert sum(batch.redrawn for batch in batches) > 0
    for batch in batches:
        assert batch.counts[0] <= (8 + 1) * len(batch.tasks)
    assert batch_of(recipe_of(max_text=300), tokenizer, 0).redrawn == 0
    with pytest.raises(ModelError, match="at most max_text = 1 tokens"):
        batch_of(recipe_of(tasks=["edit"], max_text=1), tokenizer, 0)


def test_captions_and_answers_are_labelled_with_their_own_tokens(tokenizer):
    end = tokenizer.special["<|im_end|>"]
    recipe = recipe_of(objective={"caption_dropout": 0.0})
    batch = batch_of(recipe, tokenizer, 1)
    ends = np.cumsum([n.text for n in batch.batch.lengths])
    owner = {
        name: np.searchsorted(ends, positions.numpy(), side="right")
        for name, positions in batch.said.items()
    }
    assert [len(positions) for positions in batch.said.values()] == batch.counts
    for i, task in enumerate(batch.tasks):
        name = task if task in ("language", "understanding") else "caption"
        assert not any((owner[other] == i).any() for other in owner if other != name)
        following = batch.batch.input_ids[batch.said[name][owner[name] == i] + 1].tolist()
        assert following[-1] == end
        assert tokenizer.decode(following).strip()


@pytest.mark.parametrize("task", ["language", "understanding"])
def test_an_answer_follows_what_a_user_would_ask(tokenizer, task):
    """The sequence before the answer is that of `generate_text`, pictures and positions too."""
    from PIL import Image

    from hidream.models.o1.tokens import encode_text

    recipe = recipe_of(tasks=[task])
    config, size, sample = model_config(recipe), (32, 32), tasks.sample(task, 3, 5)
    tokens, answer = encode_sample(recipe, config, tokenizer, size, sample, 5)
    pictures = [Image.fromarray(p) for p in sample.reference_pictures(*size)]
    asked = encode_text(tokenizer, config, sample.prompt, pictures)
    assert len(pictures) == (task == "understanding")
    assert torch.equal(tokens.input_ids[: answer.start], asked.input_ids)
    positions = tokens.position_ids[:, : answer.start + 1]
    assert torch.equal(positions, asked.position_ids)
    assert torch.equal(tokens.pixel_values, asked.pixel_values)
    assert tokenizer.decode(tokens.input_ids[answer].tolist()) == sample.answer
    assert tokens.input_ids[answer][-1] == tokenizer.special["<|im_end|>"]


def test_a_dropped_caption_is_the_unconditional_one_and_carries_no_loss(tokenizer):
    from hidream.models.o1.tokens import encode

    recipe = recipe_of(tasks=["edit"], objective={"caption_dropout": 1.0, "reference_dropout": 0.0})
    batch = batch_of(recipe, tokenizer, 0)
    assert batch.counts == [0, 0, 0]
    assert all(n.references for n in batch.batch.lengths)  # references stay
    recipe = recipe_of(tasks=["edit"], objective={"caption_dropout": 1.0, "reference_dropout": 1.0})
    batch = batch_of(recipe, tokenizer, 0)
    assert not any(n.references for n in batch.batch.lengths)
    assert batch.may_see
    plain = encode(tokenizer, model_config(recipe), " ", width=32, height=32).input_ids
    assert torch.equal(batch.batch.input_ids[: len(plain)], plain)


def test_prefetching_keeps_the_order_and_hands_on_errors(tokenizer):
    recipe = recipe_of(tasks=["text_to_image"])
    batches = Prefetcher(lambda step: batch_of(recipe, tokenizer, step), range(3, 6))
    for step, batch in zip(range(3, 6), batches, strict=True):
        assert_same(batch, batch_of(recipe, tokenizer, step))
    batches.close()
    broken = Prefetcher(lambda step: batch_of(recipe, None, step), range(3))
    with pytest.raises(AttributeError):
        next(iter(broken))
    broken.close()


def test_the_tokenizer_knows_the_words_of_the_world_and_spells_signs(tokenizer, tmp_path):
    from hidream.train.tokenizer import build_tokenizer

    build_tokenizer(tmp_path, num_texts=500)
    again = (tmp_path / "tokenizer.json").read_bytes()
    assert again == (tokenizer.folder / "tokenizer.json").read_bytes()
    text = 'a red cube left of a sign that says "HELLO"'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(" red")) == len(tokenizer.encode(" cube")) == 1
    assert len(tokenizer.encode("HELLO")) == 5
    assert len(tokenizer.chat("x")[0]) == 9
    assert tokenizer.decode(tokenizer.encode("青い空 🎈")) == "青い空 🎈"
