"""The samples of a step: a pure function, whatever the number of processes."""

import numpy as np
import pytest
import torch

from hidream.models.o1.batch import IGNORE
from hidream.models.o1.tokens import Tokenizer
from hidream.train.config import parse_recipe
from hidream.train.data import (
    _num_words,
    encode_sample,
    make_batch,
)
from hidream.train.draws import task_of
from hidream.train.o1 import model_config
from hidream.train.prefetch import Prefetcher
from hidream.world import tasks

TASKS = tasks.TASKS


def recipe_of(**changes):
    stage = {"size": 32, "steps": 50, "batch_size": 6, "learning_rate": 1e-3}
    stage["tasks"] = dict.fromkeys(changes.pop("tasks", TASKS), 1.0)
    plain = {"name": "tiny", "model": "o1-tiny", "seed": 3, "stages": [stage]}
    plain["buckets"] = {"text_to_image": [8, 40], "edit": [8, 40]}
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
        other = getattr(b.batch, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_a_function_of_its_step(tokenizer, task):
    recipe = recipe_of(tasks=[task])
    first = batch_of(recipe, tokenizer, 4)
    assert first.task == task
    assert_same(first, batch_of(recipe, tokenizer, 4))
    assert not torch.equal(
        first.batch.input_ids[0, :30], batch_of(recipe, tokenizer, 5).batch.input_ids[0, :30]
    )


@pytest.mark.parametrize("task", TASKS)
def test_processes_share_the_samples_of_one(tokenizer, task):
    recipe = recipe_of(tasks=[task])
    whole = batch_of(recipe, tokenizer, 2)
    shares = [batch_of(recipe, tokenizer, 2, rank, 2) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.batch.input_ids, whole.batch.input_ids[rank::2])
        assert torch.equal(share.x0, whole.x0[rank::2])
        assert torch.equal(share.noise, whole.noise[rank::2])
        assert torch.equal(share.sigma, whole.sigma[rank::2])
    assert sum(share.num_labels for share in shares) == whole.num_labels


def test_tasks_come_in_the_proportions_of_the_recipe():
    stage = {"size": 32, "steps": 3000, "batch_size": 1, "learning_rate": 1e-3}
    weights = {"text_to_image": 6, "edit": 3, "language": 1}
    recipe = parse_recipe({"name": "x", "model": "o1-tiny", "stages": [stage | {"tasks": weights}]})
    drawn = [task_of(recipe, step) for step in range(3000)]
    for task, weight in weights.items():
        assert drawn.count(task) / 3000 == pytest.approx(weight / 10, abs=0.03)


def test_padding_to_buckets_leaves_the_lengths_as_they_are_in_the_world(tokenizer):
    recipe = recipe_of(tasks=["text_to_image"], buckets={"text_to_image": [6, 10, 40]})
    plain = [_num_words(tokenizer, tasks.sample("text_to_image", 3, i)) for i in range(300)]
    labels = []
    for step in range(50):
        batch = batch_of(recipe, tokenizer, step).batch
        labels += [int(n) - 1 for n in (batch.labels != IGNORE).sum(dim=1) if n]
    assert np.mean(labels) == pytest.approx(np.mean(plain), rel=0.15)


def test_captions_and_answers_are_labelled_with_their_own_tokens(tokenizer):
    end = tokenizer.special["<|im_end|>"]
    for task in ("text_to_image", "language", "understanding"):
        recipe = recipe_of(tasks=[task], objective={"caption_dropout": 0.0})
        batch = batch_of(recipe, tokenizer, 1).batch
        for row in batch.labels:
            said = row[row != IGNORE].tolist()
            assert said[-1] == end
            assert tokenizer.decode(said).strip()


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
    batch = batch_of(recipe, tokenizer, 0).batch
    assert (batch.labels == IGNORE).all()
    assert batch.reference_mask.any(dim=1).all()  # references stay
    recipe = recipe_of(tasks=["edit"], objective={"caption_dropout": 1.0, "reference_dropout": 1.0})
    batch = batch_of(recipe, tokenizer, 0).batch
    assert not batch.reference_mask.any()
    plain = encode(tokenizer, model_config(recipe), " ", width=32, height=32).input_ids
    assert torch.equal(batch.input_ids[0, : len(plain)], plain)


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
