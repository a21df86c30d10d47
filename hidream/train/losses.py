"""The training objective: flow matching through a prediction of the clean picture, plus text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def velocity_weight(sigma: Float[Tensor, " b"], delta: float) -> Float[Tensor, " b"]:
    """w = 1 / max(sigma, delta)^2, which turns an x0 error into a velocity error.

    With v = (x_t - x0) / max(sigma, delta) for target and prediction alike, the difference of the
    velocities is (x0_predicted - x0) / max(sigma, delta), whatever the noise scale: x_t cancels.
    """
    return sigma.clamp(min=delta).pow(-2)


def picture_losses(
    predicted: Float[Tensor, "n p"],
    x0: Float[Tensor, "n p"],
    lengths: Sequence[int],
    sigma: Float[Tensor, " s"],
    delta: float,
    t_power: float = 0.0,
) -> Float[Tensor, " s"]:
    """Each picture's mean over its patches and values of w t^t_power (x0_predicted - x0)^2, fp32.

    `lengths`: how many of the patches are each picture's. With `t_power` 0 it equals the mean
    squared error of the velocity for sigma >= delta. In much noise most of that error cannot be
    foretold and falls about as 1/t^2: its gradients, as long as its root, drown those of less
    noise. 1 makes them about equally long. References have no part in it.
    """
    errors = (predicted.float() - x0.float()).square().mean(dim=1)  # (n,)
    means = [of_one.mean() for of_one in errors.split(list(lengths))] if len(sigma) else []
    error = torch.stack(means) if means else errors
    weight = velocity_weight(sigma.float(), delta) * (1 - sigma.float()).pow(t_power)
    return weight * error


def text_loss(
    logits: Float[Tensor, "m v"], following: Int[Tensor, " m"], num_labels: float
) -> Float[Tensor, ""]:
    """Cross-entropy in nats per label: the sum over these positions, over `num_labels`.

    `num_labels` is the count over *all* processes divided by their number, so that the mean of the
    processes' gradients is the gradient of the mean over every label of the step.
    """
    total = F.cross_entropy(logits.float(), following, reduction="sum")
    return total / max(num_labels, 1e-6)


def velocity_loss(
    predicted: Float[Tensor, "b c h w"],
    velocity: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    t_power: float = 0.0,
    weight: Float[Tensor, "b 1 h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over samples and latents of t^t_power weight (predicted - velocity)^2, in fp32."""
    error = (predicted.float() - velocity.float()).square().mean(dim=1, keepdim=True)
    if weight is not None:
        error = weight * error
    t = 1 - sigma.float()
    return (t.pow(t_power) * error.mean(dim=(1, 2, 3))).mean()


def weight_of_changes(
    target: Float[Tensor, "b c h w"], source: Float[Tensor, "b c h w"], threshold: float = 0.5
) -> Float[Tensor, "b 1 h w"]:
    """How much each latent of an edit counts: more where source and target differ; mean 1.

    1 + log2(1 / share of changed latents), where the root mean square of the difference exceeds
    `threshold`, 1 elsewhere, blurred over 3×3 latents: HiDream-E1 weighs so in words (arXiv
    2505.22705), the numbers are UniWorld's (arXiv 2506.03147).
    """
    changed = ((target - source).square().mean(dim=1, keepdim=True).sqrt() > threshold).float()
    share = changed.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1 / changed[0].numel())
    blurred = F.avg_pool2d(changed, 3, stride=1, padding=1, count_include_pad=False)
    weight = 1 - blurred * share.log() / math.log(2)
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def weighted_mean(
    errors: Float[Tensor, " n"], weight: Float[Tensor, " n"], count: int | None = None
) -> Float[Tensor, ""]:
    """Sum of weight · error over `count` samples, of which those not given have none."""
    return (weight * errors).sum() / (len(errors) if count is None else count)


def pixel_loss(
    predicted: Float[Tensor, "g 3 height width"],
    x0: Float[Tensor, "g 3 height width"],
    sigma: Float[Tensor, " g"],
    delta: float,
) -> Float[Tensor, " g"]:
    """Each picture's mean squared error of x0 as one of velocity (`velocity_weight`), in fp32."""
    error = (predicted.float() - x0.float()).square().mean(dim=(1, 2, 3))
    return velocity_weight(sigma.float(), delta) * error


def alignment_loss(
    found: Float[Tensor, "b l z"], wanted: Float[Tensor, "b l z"]
) -> Float[Tensor, ""]:
    """REPA's (arXiv 2410.06940, equation 8): minus the mean cosine of two sets of patch features.

    In fp32: the square of an fp16 feature overflows.
    """
    return -F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean()
