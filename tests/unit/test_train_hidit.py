"""Hi-DiT's learner: what a step draws, what it minimises, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hidream.data.latents import cache_latents
from hidream.data.preprocess import preprocess
from hidream.errors import UsageError
from hidream.train.config import HiDiTOptions, Optimizer, Recipe, Stage
from hidream.train.distributed import World
from hidream.train.hidit import HiDiTLearner, statistics_of
from hidream.train.losses import alignment_loss, pixel_loss, weighted_mean
from hidream.train.optim import build_optimizers, set_learning_rate

NUM_PICTURES, BATCH = 24, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("hidit")
    dice = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        place = root / "pictures" / f"c{i % 3}" / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(dice.integers(0, 256, (2, 2, 3)).astype(np.uint8))
        small.resize((16, 16)).save(place)
    preprocess(root / "pictures", root, 16)

    def encode(pictures):
        mean = F.adaptive_avg_pool2d(pictures, 4)[:, [0, 1, 2, 0]]
        return mean, torch.full_like(mean, 0.05)

    cache_latents(root, root, "toy", encode, batch_size=8)
    return root


@pytest.fixture
def recipe(data, tmp_path):
    return Recipe(
        name="tiny",
        model="hidit-SiT-N/1",
        stages=(Stage(size=1, steps=100, batch_size=BATCH, learning_rate=1e-3),),
        out=str(tmp_path / "run"),
        seed=3,
        precision="float32",
        optimizer=Optimizer(weight_decay=0.0),
        hidit=HiDiTOptions(
            data_dir=str(data),
            vae_latents_name="toy",
            latents_dtype="float32",
            enc_type="stand-in",
            encoder_depth=2,
        ),
    )


def options(recipe, **changes):
    return replace(recipe, hidit=replace(recipe.hidit, **changes))


def test_every_epoch_shows_every_picture_once_in_another_order(recipe):
    learner = HiDiTLearner(recipe)
    epochs = [
        [learner._index(epoch * NUM_PICTURES + i) for i in range(NUM_PICTURES)]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(NUM_PICTURES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [learner._index(i) for i in range(NUM_PICTURES)] == epochs[0]  # also afterwards


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_step_without_changing_it(recipe, world):
    recipe = replace(recipe, stages=(replace(recipe.stages[0], batch_size=12),))
    learner = HiDiTLearner(recipe)
    whole = learner.make_batch(5)
    for rank in range(world):
        part = learner.make_batch(5, rank, world)
        for name in ("images", "moments", "drawn", "noise", "sigma", "weight", "labels"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::world]), name
        gated = torch.zeros(12, dtype=torch.bool)
        gated[whole.rows] = True
        assert torch.equal(part.rows, gated[rank::world].nonzero().flatten())
        noise = torch.zeros(12, *whole.pixel_noise.shape[1:])
        noise[whole.rows] = whole.pixel_noise
        assert torch.equal(part.pixel_noise, noise[rank::world][part.rows])


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize(("gate", "size"), [(0.3, 10), (0.3, 8), (0.02, 8), (1.0, 8)])
def test_a_whole_number_of_samples_is_gated_and_nothing_is_biased(recipe, weighting, gate, size):
    """Weighted, the mean of any function of sigma is that of the distribution."""
    learner = HiDiTLearner(options(recipe, weighting=weighting, gate=gate))
    learner.config = replace(learner.config, gate=gate)
    drawn = [learner._levels(size, step) for step in range(2000)]
    assert len({num_gated for _, _, num_gated in drawn}) == 1
    number = drawn[0][2]
    assert number >= 1
    for sigma, weight, _ in drawn[:200]:
        assert (sigma[:number] <= gate).all()
        assert (sigma[number:] > gate).all()
        assert float(weight.sum()) == pytest.approx(size, rel=1e-5)
    sigma, weight = (torch.stack([d[i] for d in drawn]).double() for i in (0, 1))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    exact = u if weighting == "uniform" else torch.special.ndtri(u).sigmoid()
    for function in (lambda s: s, lambda s: s.square(), lambda s: (s <= gate / 2).double()):
        error = (weight * function(sigma)).mean(dim=1)
        expected = float(function(exact).mean())
        deviation = float(error.std()) / len(drawn) ** 0.5
        assert float(error.mean()) == pytest.approx(expected, abs=5 * deviation + 1e-5)


def test_one_label_in_ten_is_none(recipe):
    learner = HiDiTLearner(recipe)
    labels = torch.cat([learner.make_batch(step).labels for step in range(60)])
    share = float((labels == learner.config.num_classes).double().mean())
    assert 0.05 < share < 0.16  # of 600
    kept = HiDiTLearner(options(recipe, cfg_prob=0.0)).make_batch(0)
    assert int(kept.labels.max()) < learner.config.num_classes


def test_alignment_is_the_loop_over_samples_and_patches():
    found, wanted = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    total = 0.0
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            total -= float(a @ b / (a.norm() * b.norm()))
    assert float(alignment_loss(found, wanted)) == pytest.approx(total / 15, abs=1e-6)
    large = (1000 * found).half()  # whose squares fp16 cannot hold
    assert float(alignment_loss(large, wanted)) == pytest.approx(total / 15, rel=1e-2)


def test_errors_of_pixels_are_errors_of_velocity_and_those_without_have_none():
    x0, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.01])
    errors = pixel_loss(x0 + 0.1, x0, sigma, 0.05)
    torch.testing.assert_close(errors, torch.tensor([0.01 / 0.04, 0.01 / 0.0025]))
    mean = weighted_mean(errors, torch.tensor([1.0, 2.0]), 8)
    assert float(mean) == pytest.approx((0.25 + 2 * 4.0) / 8)


@pytest.mark.parametrize("clock", ["shared", "rescaled"])
def test_the_gradient_reaches_what_a_stage_trains(recipe, clock):
    for ldm_only in (True, False):
        learner = HiDiTLearner(options(recipe, ldm_only=ldm_only, pixel_clock=clock))
        model = learner.build()
        dice = torch.Generator().manual_seed(0)
        with torch.no_grad():  # fresh weights hide most of the network behind zeros
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=dice))
        learner.losses(model, learner.make_batch(0), World().start_sums()).total.backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        branch = {n for n, _ in model.named_parameters() if n.startswith("pixel_")}
        assert silent == (branch if ldm_only else set())


def test_a_process_without_pixels_has_gradients_of_their_branch(recipe):
    """All processes' gradients are laid end to end and summed: they must be of the same weights."""
    learner = HiDiTLearner(recipe)
    without = learner.make_batch(0, rank=4, world=5)
    assert len(without.rows) == 0 < len(learner.make_batch(0).rows)
    model = learner.build()
    learner.losses(model, without, World().start_sums()).total.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    branch = [p.grad for name, p in model.named_parameters() if name.startswith("pixel_")]
    assert not any(gradient.any() for gradient in branch)


@pytest.mark.parametrize("name", ["vae-1.5", "vae-1.5.safetensors"])
def test_statistics_beside_the_vae_come_first(recipe, tmp_path, name):
    vae = tmp_path / name
    chosen = replace(recipe.hidit, vae_ckpt=str(vae))
    if vae.suffix == ".safetensors":
        vae.touch()
    else:
        vae.mkdir()
    assert statistics_of(chosen).name == "toy_stats.safetensors"
    beside = tmp_path / "vae-1.5-latents-stats.safetensors"
    beside.touch()
    assert statistics_of(chosen) == beside


def test_it_learns_eight_pictures(recipe):
    stage = replace(recipe.stages[0], batch_size=8)
    recipe = options(replace(recipe, stages=(stage,)), proj_coeff=0.0, cfg_prob=0.0)
    learner = HiDiTLearner(recipe)
    model = learner.build()
    optimizers = build_optimizers(model, recipe.optimizer)
    set_learning_rate(optimizers, 2e-3)
    batch = learner.make_batch(0)
    before = {}
    for step in range(60):
        model.zero_grad(set_to_none=True)
        losses = learner.losses(model, batch, World().start_sums())
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step == 0:
            before = losses.parts
    assert losses.parts["loss_latents"] < 0.7 * before["loss_latents"]
    assert losses.parts["loss_pixels"] < 0.5 * before["loss_pixels"]


def test_unknown_ways_to_draw_levels_are_refused(recipe):
    with pytest.raises(UsageError, match="uniform or lognormal"):
        HiDiTLearner(options(recipe, weighting="cosmap"))
