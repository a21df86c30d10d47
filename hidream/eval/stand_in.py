"""A fixed random network in Inception's place, for tests and toys: what it measures is no FID."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from hidream import digest
from hidream.eval.inception import Seen
from hidream.sampling.noise import picture_noise

SEED = 20151205
CHANNELS = (3, 32, 64, 128)
NUM_CLASSES = 10


class StandIn(nn.Module):
    """Three random convolutions; features are the means of their outputs over a picture.

    The first sees pixels beside each other, the others half and a quarter of the size, so that
    fine grain and coarse layout both move the features. Weights are counter-based noise: the same
    bits on every machine.
    """

    name = "stand-in, not FID"
    num_features = sum(CHANNELS[1:])

    def __init__(self) -> None:
        super().__init__()
        for layer, (before, after) in enumerate(pairwise(CHANNELS)):
            weight = picture_noise(SEED, layer, (after, before, 3, 3)) * math.sqrt(2 / (9 * before))
            self.register_buffer(f"conv_{layer}", weight)
            self.register_buffer(f"shift_{layer}", 0.2 * picture_noise(SEED, 10 + layer, (after,)))
        self.head: Tensor
        self.register_buffer("head", picture_noise(SEED, 20, (NUM_CLASSES, self.num_features)))

    def forward(self, pictures: UInt8[Tensor, "b 3 height width"]) -> Seen:
        x = (pictures.to(self.head.dtype) - 128) / 128
        means = []
        for layer in range(len(CHANNELS) - 1):
            weight, shift = self.get_buffer(f"conv_{layer}"), self.get_buffer(f"shift_{layer}")
            x = F.conv2d(x, weight, shift, stride=1 if layer == 0 else 2, padding=1)
            x = F.leaky_relu(x, 0.2)  # none of its outputs is always 0
            means.append(x.mean((2, 3)))
        features = torch.cat(means, 1)  # (b, 224)
        return Seen(features=features, logits=features @ self.head.T)

    def digest(self) -> str:
        """The SHA-256 of its weights."""
        return digest.of_bytes(b"".join(b.cpu().numpy().tobytes() for b in self.buffers()))
