"""How well a picture is drawn, whatever it shows: noise, blur, and what no object explains."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from hidream.judges.templates import Array

LEFT_OVER = 0.24  # distance in colour (sum over channels) beyond which a pixel is unexplained


def noise_of(pixels: Array) -> float:
    """Standard deviation of the noise, from second differences (smooth shading leaves none)."""
    second = pixels[:, :-2] - 2 * pixels[:, 1:-1] + pixels[:, 2:]
    return float(1.4826 * np.median(np.abs(second)) / 6**0.5)


def _energy(pixels: Array, where: Array) -> float:
    dx = np.square(np.diff(pixels, axis=1)[:-1]).sum(-1)
    dy = np.square(np.diff(pixels, axis=0)[:, :-1]).sum(-1)
    return float((dx + dy)[where[:-1, :-1]].sum())


def edges_of(pixels: Array, canvas: Array, ground: Array, noise: float) -> float:
    """Gradient energy around the objects against that of the clean drawing."""
    where = _spread(np.abs(canvas - ground).sum(-1) > 0.15, 2)
    if where.sum() < 20:
        return 1.0
    clean = _energy(canvas, where) - _energy(ground, where)
    there = _energy(pixels, where) - _energy(ground, where) - 12 * noise**2 * where.sum()
    return there / max(clean, 1e-3)


def _spread(mask: Array, reach: int) -> Array:
    padded = np.pad(mask, reach)
    size = 2 * reach + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))
    return np.asarray(windows.any(axis=(2, 3)))


def _extremes(x: Array, reach: int) -> tuple[Array, Array]:
    """Least and greatest value within `reach` pixels."""
    image = Image.fromarray((np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8))
    size = 2 * reach + 1
    low, high = image.filter(ImageFilter.MinFilter(size)), image.filter(ImageFilter.MaxFilter(size))
    return np.asarray(low, np.float32) / 255, np.asarray(high, np.float32) / 255


def left_over_of(pixels: Array, canvas: Array, reach: int) -> float:
    """Share of the pixels that lie outside the colours the drawing has within `reach` pixels."""
    low, high = _extremes(canvas, reach)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    smooth = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
    excess = np.maximum(np.maximum(smooth - high, low - smooth), 0).sum(-1)
    return float((excess > LEFT_OVER).mean())
