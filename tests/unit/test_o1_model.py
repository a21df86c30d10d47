"""O1's network: prefix and step equal the whole sequence, rows read whom they may, nobody else."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hidream.models.o1.batch import collate
from hidream.models.o1.config import O1_8B, O1_NANO, O1_PRO, O1_TINY
from hidream.models.o1.model import O1, Prefix, _place
from hidream.models.o1.patches import cosine_basis
from hidream.models.o1.tokens import encode, with_prompt
from hidream.sampling import dev_sigmas, full_sigmas, shift_sigma
from hidream.sampling.schedules import DEV_TIMESTEPS
from tests import tiny

SIGMA = torch.tensor(0.625)
CLOSE = 2e-5  # of the largest value: fp32 rounding through four layers


@pytest.fixture(scope="module")
def make(tokenizer):
    """A request's tokens: prompt, number of references, size."""

    def tokens(
        prompt="a red cube", num_references=0, width=64, height=48, layout=(), pictures=None
    ):
        references = tiny.pictures(num_references) if pictures is None else pictures
        return encode(
            tokenizer,
            O1_TINY,
            prompt,
            width=width,
            height=height,
            references=references,
            layout=layout,
        )

    return tokens


def noise(tokens, count=1, seed=0):
    size = (count, tokens.num_target, O1_TINY.patch_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def whole(model, batch, x_t, sigma=SIGMA):
    """What `forward` predicts, pictures one by one."""
    made = model(batch, x_t.flatten(0, 1), sigma.expand(len(x_t)))
    return SimpleNamespace(x0=made.x0.view_as(x_t), logits=made.logits)


def assert_close(ours, theirs, tolerance=CLOSE):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


def differ(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-3


# -- a prefix and a step are the whole sequence ----------------------------------------------------


@pytest.mark.parametrize("num_references", [0, 1, 2, 3, 5, 9, 11])
def test_prefix_and_step_equal_the_whole_sequence(tiny_model, make, num_references):
    tokens = make(num_references=num_references)
    x_t = noise(tokens)
    step = tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([tokens]))
    assert_close(step, whole(tiny_model, collate([tokens]), x_t).x0)


def test_a_reference_of_one_token(tiny_model, make):
    tokens = make(num_references=9, width=32, height=32, pictures=[tiny.picture(1, 50, 50)] * 9)
    assert len(tokens.references) == 9  # one patch each
    assert len(tokens.image_grids) == 9
    assert int(tokens.image_slots.sum()) == 9  # and one vision token each
    x_t = noise(tokens)
    step = tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([tokens]))
    assert_close(step, whole(tiny_model, collate([tokens]), x_t).x0)
    other = make(num_references=9, width=32, height=32, pictures=[tiny.picture(2, 50, 50)] * 9)
    assert differ(tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([other])), step)


def test_with_a_layout(tiny_model, make):
    tokens = make(num_references=2, layout=[(0.1, 0.5, 0.1, 0.9), (0.5, 0.9, 0.2, 0.6)])
    x_t = noise(tokens)
    step = tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([tokens]))
    assert_close(step, whole(tiny_model, collate([tokens]), x_t).x0)


def test_requests_of_any_lengths_are_one_batch(tiny_model, make):
    """Different prompts, prefix lengths and numbers of references: each result is its own."""
    requests = [
        make("a"),
        make("the red cube left of the blue sphere, in the rain", 3),
        make("make it red", 1),
        make("a red sphere, “tall”, 红色", 0),
    ]
    x_t = noise(requests[0], count=4)
    prefix = tiny_model.prefill(requests)
    assert len(prefix) == 4
    together = tiny_model.predict_x0(x_t, SIGMA, prefix)
    for i, tokens in enumerate(requests):
        alone = tiny_model.predict_x0(x_t[i : i + 1], SIGMA, tiny_model.prefill([tokens]))
        assert_close(together[i : i + 1], alone)
        assert_close(together[i : i + 1], whole(tiny_model, collate([tokens]), x_t[i : i + 1]).x0)


def test_take_selects_orders_and_repeats(tiny_model, make):
    requests = [make("a", 1), make("the blue sphere", 2), make("red")]
    prefix = tiny_model.prefill(requests)
    rows = [2, 0, 0, 1]
    taken = prefix.take(rows)
    x_t = noise(requests[0], count=4)
    together = tiny_model.predict_x0(x_t, SIGMA, taken)
    for i, row in enumerate(rows):
        alone = tiny_model.predict_x0(x_t[i : i + 1], SIGMA, tiny_model.prefill([requests[row]]))
        assert_close(together[i : i + 1], alone)
    assert taken.keys[0][1] is taken.keys[0][2]  # a repeated row is not copied


def test_prefix_holds_the_causal_tokens_alone(tiny_model, make):
    requests = [make("a"), make("the red cube", 2)]
    prefix = tiny_model.prefill(requests)
    assert isinstance(prefix, Prefix)
    assert len(prefix.keys) == len(prefix.values) == O1_TINY.text.num_layers
    for row, tokens in enumerate(requests):
        shape = (len(tokens.input_ids), O1_TINY.text.num_kv_heads, O1_TINY.text.head_dim)
        assert all(layer[row].shape == shape for layer in (*prefix.keys, *prefix.values))
        assert len(prefix.ropes[row][0]) == tokens.num_generated
        assert len(prefix.references[row]) == len(tokens.references)


# -- who reads whom --------------------------------------------------------------------------------


def test_text_depends_on_no_later_token_and_on_no_noise(tiny_model, make):
    """To the bit: what the prefix holds cannot change while a picture is made."""
    tokens = make("a red cube", 2)
    batch, x_t = collate([tokens]), noise(tokens)
    logits = whole(tiny_model, batch, x_t).logits

    for other in (
        whole(tiny_model, batch, noise(tokens, seed=1)).logits,
        whole(tiny_model, batch, x_t, torch.tensor(0.1)).logits,
        whole(tiny_model, replace(batch, references=-batch.references), x_t).logits,
    ):
        assert torch.equal(other, logits)
    alone = tiny_model(collate([tiny.text_alone(tokens)])).logits
    assert_close(alone, logits)
    asked = torch.tensor([3, 5])
    few = tiny_model(batch, x_t[0], SIGMA.expand(1), asked).logits
    assert_close(few, logits[asked])

    place = len(tokens.input_ids) - 4
    changed = batch.input_ids.clone()
    changed[place] = 65
    later = whole(tiny_model, replace(batch, input_ids=changed), x_t).logits
    assert torch.equal(later[:place], logits[:place])
    assert differ(later[place:], logits[place:])


def test_generated_rows_read_everything(tiny_model, make):
    tokens = make("a red cube", 1)
    x_t = noise(tokens)
    x0 = tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([tokens]))

    def changed(tokens=tokens, x_t=x_t, sigma=SIGMA):
        return tiny_model.predict_x0(x_t, sigma, tiny_model.prefill([tokens]))

    first_word, last = (tokens.input_ids.clone() for _ in range(2))
    first_word[1] = 65
    last[-1] = 65
    assert differ(changed(replace(tokens, input_ids=first_word)), x0)
    assert differ(changed(replace(tokens, input_ids=last)), x0)
    assert differ(changed(replace(tokens, pixel_values=-tokens.pixel_values)), x0)
    references = tokens.references.clone()
    references[-1] = 0.5
    assert differ(changed(replace(tokens, references=references)), x0)
    assert differ(changed(sigma=torch.tensor(0.6)), x0)
    for patch, reader in ((0, -1), (-1, 0)):
        other = x_t.clone()
        other[:, patch] = 0
        assert differ(changed(x_t=other)[:, reader], x0[:, reader])


def test_references_read_the_target(tiny_model, make):
    """They are generated rows too: their answers change with the noise, layer by layer."""
    tokens = make("a red cube", 1)
    seen = []
    hook = tiny_model.model.language_model.register_forward_hook(
        lambda module, inputs, output: seen.append(output[-len(tokens.references) :])
    )
    for seed in (0, 1):
        whole(tiny_model, collate([tokens]), noise(tokens, seed=seed))
    hook.remove()
    assert differ(seen[0], seen[1])


def test_positions_count(tiny_model, make):
    """The same patches in a grid turned on its side are another picture."""
    wide, tall = make(width=64, height=32), make(width=32, height=64)
    x_t = noise(wide)
    assert x_t.shape == noise(tall).shape
    one, other = (
        tiny_model.predict_x0(x_t, SIGMA, tiny_model.prefill([tokens])) for tokens in (wide, tall)
    )
    assert differ(one, other)


# -- the vision tower's tokens ---------------------------------------------------------------------


def test_vision_tokens_take_the_placeholders(tiny_model, make):
    """Also where some requests of the batch have pictures and others have none."""
    requests = [make("red"), make("the cube", 2), make("a", 1)]
    ids = torch.cat([t.input_ids for t in requests])
    embedded = tiny_model.model.language_model.embed_tokens(ids)
    slots = torch.cat([t.image_slots for t in requests]).nonzero()[:, 0]
    hidden, deepstack = _place(embedded, slots, tiny_model.see(requests))
    assert len(deepstack) == len(O1_TINY.vision.deepstack_layers)
    start = 0
    for tokens in requests:
        end = start + len(tokens.input_ids)
        slots = tokens.image_slots
        embedded = tiny_model.model.language_model.embed_tokens(tokens.input_ids)
        assert torch.equal(hidden[start:end][~slots], embedded[~slots])
        for stack in deepstack:
            assert not stack[start:end][~slots].any()
        if tokens.image_grids:
            seen = tiny_model.model.visual(tokens.pixel_values, list(tokens.image_grids))
            assert_close(hidden[start:end][slots], seen.tokens)
            for stack, expected in zip(deepstack, seen.deepstack, strict=True):
                assert_close(stack[start:end][slots], expected)
        start = end


def test_each_picture_reads_only_itself(tiny_model, make):
    tokens = make("a", pictures=[tiny.picture(0), tiny.picture(1, 30, 60), tiny.picture(2, 90, 20)])
    sizes = [rows * columns for rows, columns in tokens.image_grids]
    merged = O1_TINY.vision.merge_size**2
    together = tiny_model.model.visual(tokens.pixel_values, list(tokens.image_grids))
    parts = together.tokens.split([size // merged for size in sizes])
    stacks = [d.split([size // merged for size in sizes]) for d in together.deepstack]
    assert len(set(sizes)) > 1
    for i, pixels in enumerate(tokens.pixel_values.split(sizes)):
        alone = tiny_model.model.visual(pixels, [tokens.image_grids[i]])
        assert_close(parts[i], alone.tokens)
        for stack, expected in zip(stacks, alone.deepstack, strict=True):
            assert_close(stack[i], expected)


def test_equal_pictures_are_one_batch(tiny_model, make):
    tokens = make("a", 3, pictures=[tiny.picture(i) for i in range(3)])
    assert len(set(tokens.image_grids)) == 1
    size = len(tokens.pixel_values) // 3
    together = tiny_model.model.visual(tokens.pixel_values, list(tokens.image_grids)).tokens
    for i, part in enumerate(together.chunk(3)):
        pixels = tokens.pixel_values[i * size : (i + 1) * size]
        assert_close(part, tiny_model.model.visual(pixels, [tokens.image_grids[i]]).tokens)


def test_deepstack_is_added_after_the_first_blocks(tiny_model, make):
    """What leaves block i and what enters block i + 1 differ by deepstack[i], and only there."""
    tokens = make("a", 1)
    decoder = tiny_model.model.language_model
    entered, left = {}, {}
    hooks = []
    for i, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(lambda m, a, i=i: entered.update({i: a[0]})))
        hooks.append(layer.register_forward_hook(lambda m, a, out, i=i: left.update({i: out})))
    tiny_model.prefill([tokens])
    for hook in hooks:
        hook.remove()
    seen = tiny_model.model.visual(tokens.pixel_values, list(tokens.image_grids))
    slots = tokens.image_slots
    for i in range(len(decoder.layers) - 1):
        added = entered[i + 1] - left[i]
        assert not added[~slots].any()
        if i < len(seen.deepstack):
            assert_close(added[slots], seen.deepstack[i], 1e-4)
        else:
            assert not added.any()


# -- batches for training --------------------------------------------------------------------------


def test_what_is_packed_together_changes_nothing(tiny_model, make):
    """Tasks, sizes and lengths are mixed; some samples are long enough never to be padded."""
    requests = [
        make("a"),
        make("the red cube of the sphere", 2),
        tiny.text_alone(make("what is in the picture?", 1)),
        make("make it blue", 1, width=32, height=96),
        make("a", width=384, height=384),
        make("a red", width=384, height=384),
        make("a", 1, width=384, height=384),
        make("the cube"),
    ]
    drawn = [tokens for tokens in requests if tokens.num_target]
    x_t = [noise(tokens, seed=i)[0] for i, tokens in enumerate(drawn)]
    sigma = torch.linspace(0.95, 0.1, len(drawn))
    batch = collate(requests)
    assert {rows.mask is None for rows in batch.packing.rows} == {True, False}
    together = tiny_model(batch, torch.cat(x_t), sigma)
    pictures = iter(zip(together.x0.split(batch.targets), x_t, sigma, strict=True))
    texts = together.logits.split([n.text for n in batch.lengths])
    for tokens, text in zip(requests, texts, strict=True):
        if tokens.num_target:
            x0, x, level = next(pictures)
            alone = tiny_model(collate([tokens]), x, level[None])
            assert_close(x0, alone.x0)
        else:
            alone = tiny_model(collate([tokens]))
        assert_close(text, alone.logits)


def test_a_process_may_have_nothing_to_draw(tiny_model, make):
    batch = collate([tiny.text_alone(make("what?", 1))])
    none = tiny_model(batch, torch.zeros(0, O1_TINY.patch_dim), torch.zeros(0))
    assert none.x0.shape == (0, O1_TINY.patch_dim)
    assert_close(none.logits, tiny_model(batch).logits)


def test_every_parameter_learns(tokenizer, make):
    """From pictures and text together; from pictures alone all but lm_head."""
    for losses, without in (("both", set()), ("picture", {"lm_head.weight"})):
        model = tiny.random_o1().requires_grad_(True)
        tokens = make("the red cube", 2)
        batch = collate([tokens])
        prediction = whole(model, batch, noise(tokens))
        loss = prediction.x0.square().mean()
        if losses == "both":
            following = batch.input_ids[1:]
            loss = loss + torch.nn.functional.cross_entropy(prediction.logits[:-1], following)
        loss.backward()
        idle = {
            name
            for name, weight in model.named_parameters()
            if weight.grad is None or not weight.grad.any()
        }
        assert idle == without


def test_fresh_weights():
    """The same from the same generator; every layer in a sane range."""
    models = []
    for seed in (0, 0, 1):
        model = O1(O1_TINY)
        model.init_weights(torch.Generator().manual_seed(seed))
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])
    for name, weight in models[0].items():
        assert weight.isfinite().all(), name
        assert weight.abs().max() <= 5, name
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            assert torch.equal(weight, torch.ones_like(weight)), name


def test_backends_agree(tiny_model, make):
    other = O1(O1_TINY, attention_backend="math")
    other.load_state_dict(tiny_model.state_dict())
    other.requires_grad_(False)
    tokens = make("a red cube", 2)
    x_t = noise(tokens)
    for mode in (
        lambda model: whole(model, collate([tokens]), x_t).x0,
        lambda model: model.predict_x0(x_t, SIGMA, model.prefill([tokens])),
    ):
        assert_close(mode(other), mode(tiny_model))


# -- the door: sigma, velocity, dtypes -------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "seen"), [(0.987, 0.987), (0.9869999, 0.986), (0.98749, 0.987), (1.0, 1.0)]
)
def test_velocity_shows_the_network_whole_thousandths(tiny_model, make, sigma, seen):
    tokens = make()
    prefix, x_t = tiny_model.prefill([tokens]), noise(tokens)
    velocity = tiny_model.velocity(x_t, torch.tensor(sigma), prefix)
    x0 = tiny_model.predict_x0(x_t, torch.tensor(seen), prefix)
    torch.testing.assert_close(velocity, (x_t - x0) / seen)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shift", [1.0, 1.5, 2.0, 3.0])
def test_the_thousandths_are_those_of_the_published_schedules(tiny_model, monkeypatch, shift):
    """They were cut from float64; ours are cut from the same sigmas in fp32."""
    shown = []
    monkeypatch.setattr(O1, "predict_x0", lambda self, x_t, sigma, *_: shown.append(sigma) or 0)
    first = float(shift_sigma(torch.tensor(0.999), shift))
    for num_steps in (4, 6, 10, 27, 34, 37, 41, 45, 49, 50, 97):
        shown.clear()
        for sigma in full_sigmas(num_steps, shift)[:-1]:
            tiny_model.velocity(torch.zeros(1, 1, 1), sigma, prefix=None)
        evenly = np.linspace(first, 0, num_steps + 1)[:-1]
        exactly = 1000 * shift_sigma(evenly, shift)
        assert [round(1000 * float(tau)) for tau in shown] == [int(t) for t in exactly]
    shown.clear()
    for sigma in dev_sigmas()[:-1]:
        tiny_model.velocity(torch.zeros(1, 1, 1), sigma, prefix=None)
    assert [round(1000 * float(tau)) for tau in shown] == list(DEV_TIMESTEPS)


@pytest.mark.parametrize("sigma", [0.0009, 0.0])
def test_velocity_near_data_is_finite(tiny_model, make, sigma):
    tokens = make()
    prefix, x_t = tiny_model.prefill([tokens]), noise(tokens)
    velocity = tiny_model.velocity(x_t, torch.tensor(sigma), prefix)
    x0 = tiny_model.predict_x0(x_t, torch.tensor(0.0), prefix)
    torch.testing.assert_close(velocity, (x_t - x0) / 1e-3)


def test_half_precision(tiny_model, make):
    """bf16 weights, fp32 outside: answers are fp32 and near those of fp32."""
    half = O1(O1_TINY).to(torch.bfloat16).requires_grad_(False)
    half.load_state_dict(tiny_model.state_dict())
    tokens = make("a red cube", 1)
    x_t = noise(tokens)
    ours, exactly = (m.velocity(x_t, SIGMA, m.prefill([tokens])) for m in (half, tiny_model))
    assert ours.dtype == torch.float32
    assert 1e-4 < float((ours - exactly).abs().mean() / exactly.abs().mean()) < 0.05


def test_time_needs_its_picture(tiny_model, make):
    tokens = make()
    for given in ((noise(tokens)[0],), ()):
        with pytest.raises(ValueError, match="needs x_t and its sigma"):
            tiny_model(collate([tokens]), *given)


# -- sizes -----------------------------------------------------------------------------------------


def num_params(config):
    with torch.device("meta"):
        return sum(weight.numel() for weight in O1(config).parameters())


def test_sizes():
    """Built on meta: nothing of it is in memory."""
    assert num_params(O1_8B) == 8_804_887_792
    assert num_params(O1_PRO) > 200e9
    assert num_params(O1_NANO) * 2 <= 64e6  # what ships, in bf16


def test_tied_embeddings_are_one_tensor():
    model = O1(replace(O1_TINY, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert O1(replace(O1_TINY, has_lm_head=False)).lm_head is None


def test_both_branches_of_a_request_see_its_pictures_once(tiny_model, tokenizer, make, monkeypatch):
    """The vision tower runs once for prompts that share pictures, with the same result."""
    conditional = make("the cube on a table", 2)
    shared = with_prompt(conditional, tokenizer, tiny_model.config, " ")
    apart = make(" ", 2)
    for name in ("input_ids", "position_ids", "image_slots", "references", "pixel_values"):
        assert torch.equal(getattr(shared, name), getattr(apart, name)), name
    seen = []
    tower = tiny_model.model.visual
    monkeypatch.setattr(type(tower), "forward", _counting(type(tower).forward, seen), raising=True)
    once = tiny_model.prefill([conditional, shared])
    assert seen == [2]
    twice = tiny_model.prefill([conditional, apart])
    assert seen == [2, 4]
    for one, other in zip(once.keys, twice.keys, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def _counting(forward, seen):
    def counted(self, patches, grids):
        seen.append(len(grids))
        return forward(self, patches, grids)

    return counted


@pytest.mark.parametrize("count", [1, 16, 256, 768])
def test_the_cosine_basis_is_orthonormal_and_smooth(count):
    basis = cosine_basis(16, count)
    assert basis.shape == (count, 768)
    assert torch.allclose(basis @ basis.T, torch.eye(count), atol=1e-5)
    flat = torch.ones(768) / 768**0.5
    assert abs(float(basis[0] @ flat)) == pytest.approx(1, abs=1e-5)


def test_fresh_weights_start_as_a_low_pass_filter(make):
    """Before the blocks say anything, what leaves follows the smooth part of what came in."""
    model = O1(O1_TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    basis = cosine_basis(O1_TINY.patch_size, O1_TINY.bottleneck_dim)
    patches = torch.randn(1, 5, O1_TINY.patch_dim, generator=torch.Generator().manual_seed(1))
    through = model.model.final_layer2(model.model.x_embedder(patches))
    finest, constant = 0.5 * basis[-1], 1.25 * len(basis) ** 0.5
    expected = 0.5 * patches @ basis.T @ basis + constant * finest
    assert torch.allclose(through, expected, atol=1e-5)
