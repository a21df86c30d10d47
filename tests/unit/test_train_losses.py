"""The objective against its closed forms, and that its gradient reaches every parameter."""

import math
from dataclasses import replace

import pytest
import torch

from hidream.sampling import add_noise, to_velocity
from hidream.train.config import parse_recipe
from hidream.train.losses import picture_losses, text_loss, velocity_weight
from hidream.world.tasks import TASKS

DELTA = 0.05


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    x0, noise, predicted = (torch.randn(6, 4, 12, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.06, 0.2, 0.5, 0.7, 0.9, 1.0])
    return x0, noise, predicted, sigma


def loss_of(predicted, x0, sigma, *power):
    """The mean over pictures of four patches each."""
    flat = predicted.flatten(0, 1), x0.flatten(0, 1)
    return picture_losses(*flat, [4] * len(sigma), sigma, DELTA, *power).mean()


@pytest.mark.parametrize("noise_scale", [1.0, 8.0])
def test_picture_losses_are_the_mean_squared_error_of_the_velocity(draws, noise_scale):
    x0, noise, predicted, sigma = draws
    x_t = add_noise(x0, noise, sigma, noise_scale)
    error = to_velocity(x_t, predicted, sigma) - (noise_scale * noise - x0)
    expected = error.double().square().mean()
    assert loss_of(predicted, x0, sigma).item() == pytest.approx(expected.item(), rel=1e-4)


def test_pictures_of_all_sizes_weigh_alike(draws):
    x0, _, predicted, _ = draws
    sizes, level = [1, 4, 2], torch.full((3,), 0.5)
    x0, predicted = x0.flatten(0, 1)[:7], predicted.flatten(0, 1)[:7]
    losses = picture_losses(predicted, x0, sizes, level, DELTA)
    squares = 4 * (predicted - x0).square().mean(dim=1)
    expected = torch.stack([squares[:1].mean(), squares[1:5].mean(), squares[5:].mean()])
    torch.testing.assert_close(losses, expected)
    assert picture_losses(predicted[:0], x0[:0], [], level[:0], DELTA).shape == (0,)


def test_errors_of_much_noise_weigh_less_with_a_power_of_t(draws):
    x0, _, predicted, sigma = draws
    parts = [loss_of(predicted[i, None], x0[i, None], sigma[i, None]) for i in range(6)]
    expected = (torch.stack(parts) * (1 - sigma) ** 2).mean()
    torch.testing.assert_close(loss_of(predicted, x0, sigma, 2.0), expected)


def test_the_weight_is_bounded_near_data():
    weight = velocity_weight(torch.tensor([0.0, 0.01, DELTA, 0.5]), DELTA)
    torch.testing.assert_close(weight, torch.tensor([400.0, 400.0, 400.0, 4.0]))


def test_picture_losses_are_fp32_whatever_comes_in(draws):
    x0, _, predicted, sigma = draws
    assert loss_of(predicted.bfloat16(), x0, sigma).dtype == torch.float32


def test_text_loss_of_uniform_logits_is_the_logarithm_of_the_vocabulary():
    loss = text_loss(torch.zeros(3, 7), torch.tensor([1, 3, 0]), 3)
    assert loss.item() == pytest.approx(math.log(7))


def test_unequal_shares_average_to_the_loss_of_the_whole_batch():
    generator = torch.Generator().manual_seed(1)
    logits, following = torch.randn(4, 7, generator=generator), torch.tensor([1, 2, 3, 0])
    whole = text_loss(logits, following, 4)
    shares = [text_loss(logits[part], following[part], 4 / 2) for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_without_labels_text_has_no_loss_and_no_nan():
    assert text_loss(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), 0).item() == 0


def test_the_gradient_reaches_every_parameter(nano_tokenizer):
    from hidream.train.distributed import World
    from hidream.train.learner import learner_of

    tasks = ("text_to_image", "edit", "language", "understanding")
    stage = {"size": 32, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    missing = None
    for task in tasks:
        recipe = parse_recipe(
            {
                "name": "tiny",
                "model": "o1-tiny",
                "tokenizer": nano_tokenizer,
                "precision": "float32",
                "stages": [stage | {"tasks": {task: 1.0}}],
                "objective": {"caption_dropout": 0.0},
            }
        )
        learner = learner_of(recipe)
        model = learner.build()
        torch.nn.init.normal_(model.model.final_layer2.linear.weight)  # it starts at zero
        batch = learner.make_batch(0)
        learner.losses(model, batch, World().start_sums(*batch.counts)).total.backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        if task == "edit":  # a picture with a reference uses every part of the model
            assert not silent
        missing = silent if missing is None else missing & silent
    assert not missing


def test_gradients_of_shares_average_to_those_of_the_whole(nano_tokenizer):
    """Whoever has which sample: text alone, pictures with references and without, dropped ones."""
    from hidream.train.distributed import World
    from hidream.train.learner import learner_of

    stage = {"size": 32, "steps": 9, "batch_size": 8, "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "name": "tiny",
            "model": "o1-tiny",
            "tokenizer": nano_tokenizer,
            "precision": "float32",
            "stages": [stage | {"tasks": dict.fromkeys(TASKS, 1.0)}],
            "objective": {"caption_dropout": 0.5, "reference_dropout": 0.4, "dino_weight": 1.0},
            "perceptual": {"network": "stand-in"},
        }
    )
    learner = learner_of(recipe)
    model = learner.build()
    torch.nn.init.normal_(model.model.final_layer2.linear.weight, std=0.02)

    def gradients(num_shares):
        shares = [learner.make_batch(2, rank, num_shares) for rank in range(num_shares)]
        counts = [sum(of_one) for of_one in zip(*(s.counts for s in shares), strict=True)]
        sums = replace(World().start_sums(*counts), num_processes=num_shares)
        model.zero_grad()
        missing = []
        for share in shares:
            total = learner.losses(model, share, sums).total / num_shares
            found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
            missing.append({i for i, g in enumerate(found) if g is None})
            for parameter, g in zip(model.parameters(), found, strict=True):
                if g is not None:
                    parameter.grad = g if parameter.grad is None else parameter.grad + g
        assert all(of_one == missing[0] for of_one in missing)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradients(1)
    for num_shares in (2, 8):
        assert (gradients(num_shares) - whole).norm() < 1e-5 * whole.norm()


def test_the_gradient_of_a_perceptual_loss_reaches_the_model(nano_tokenizer):
    from hidream.train.distributed import World
    from hidream.train.learner import learner_of

    stage = {"size": 48, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    plain = {
        "name": "tiny",
        "model": "o1-tiny",
        "tokenizer": nano_tokenizer,
        "precision": "float32",
        "stages": [stage | {"tasks": {"text_to_image": 1.0}}],
        "perceptual": {"network": "stand-in", "crop": 32},
    }
    gradients = []
    for weight in (0.0, 1.0):
        weights = {"lpips_weight": weight, "dino_weight": weight, "timesteps": "uniform"}
        learner = learner_of(parse_recipe(plain | {"objective": weights}))
        model = learner.build()
        batch = learner.make_batch(0)
        losses = learner.losses(model, batch, World().start_sums(*batch.counts))
        losses.total.backward()
        gradients.append(model.model.x_embedder.proj1.weight.grad)
        assert ("loss_dino_stand_in" in losses.parts) == (weight > 0)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


@pytest.fixture(scope="session")
def nano_tokenizer(tmp_path_factory):
    from hidream.train.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, num_texts=500)
    return str(folder)
