"""Fréchet distance and Inception Score: what they are, from sums over a network's features.

The Fréchet distance of two Gaussians is ‖μ1 − μ2‖² + tr S1 + tr S2 − 2 tr √(S1 S2) (Dowson and
Landau 1982; of Inception's features, FID: Heusel et al. 2017, arXiv 1706.08500). With any factors
S = F Fᵀ, the last trace is the sum of the singular values of F1ᵀ F2: nothing is squared that a root
would have to undo, so the error is that of float64 and not its root, no value is complex and none
is NaN. Features of few pictures, centred, are a factor as they stand.

Everything here is float64 on the CPU.
"""

from __future__ import annotations

import math
import os
import secrets
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hidream.errors import InputError

SEED = 2020  # of torch-fidelity's shuffle before the Inception Score
NUM_SPLITS = 10
LARGEST = 1e100  # of a feature; its square must not overflow


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """What a Fréchet distance asks of a set of features: its mean, the trace of its covariance
    and a factor F of it, F Fᵀ = covariance."""

    mean: Float[Tensor, " d"]
    variance: float
    factor: Float[Tensor, "d r"]


class Stats:
    """Mean and covariance of rows that come in pieces, at most `num_features`² numbers of memory.

    Rows are gathered in blocks of `num_features`, and blocks are combined (Chan, Golub and LeVeque
    1979), so neither the size of the pieces nor a mean far from 0 changes the result. Up to
    `num_features` rows are kept as they are: their covariance has no full rank, and their factor
    is exact without it.
    """

    def __init__(self, num_features: int) -> None:
        if num_features < 1:
            raise ValueError(f"num_features={num_features} is below 1.")
        self.num_features = num_features
        self._block = torch.empty(0, num_features, dtype=torch.float64)
        self._rows = 0  # of the block that are filled
        self._count = 0  # of rows in the three sums below
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter: Tensor | None = None

    @property
    def count(self) -> int:
        return self._count + self._rows

    def add(self, features: Float[Tensor, "n d"]) -> None:
        """Count these rows in. InputError where one is not finite (or beyond 1e100)."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"{list(features.shape)} are no rows of {self.num_features} features.")
        if not _is_finite(features):
            raise InputError(
                "features that are not finite came out of the network.",
                "Check its weights, or run it on another device.",
            )
        if not len(self._block):
            self._block = torch.empty(self.num_features, self.num_features, dtype=torch.float64)
        rows = features.detach().to("cpu", torch.float64)
        while len(rows):
            if self._rows == len(self._block):
                self._count, self._mean, self._scatter = self._totals()
                self._rows = 0
            taken = min(len(rows), len(self._block) - self._rows)
            self._block[self._rows : self._rows + taken] = rows[:taken]
            self._rows += taken
            rows = rows[taken:]

    def merge(self, other: Stats) -> None:
        """Count in what `other` has counted, which stays as it is."""
        if other.num_features != self.num_features:
            raise ValueError(f"{other.num_features} features instead of {self.num_features}.")
        if other._scatter is not None:
            totals = self._totals()
            self._rows = 0
            self._count, self._mean, self._scatter = _combined(
                totals, (other._count, other._mean, other._scatter)
            )
        if other._rows:
            self.add(other._gathered)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        self._check_count(1)
        if not self._rows:
            return self._mean.clone()
        return self._mean + (self._gathered.mean(0) - self._mean) * (self._rows / self.count)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """With divisor count − 1, as numpy's `cov`. InputError for fewer than 2 rows."""
        self._check_count(2)
        return self._totals()[2] / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """For `distance`. InputError for fewer than 2 rows."""
        self._check_count(2)
        if self._scatter is not None:
            return Moments(mean=self.mean, covariance=self.covariance).gaussian()
        factor = (self._gathered - self.mean).T / math.sqrt(self._rows - 1)
        return Gaussian(mean=self.mean, variance=float(factor.square().sum()), factor=factor)

    @property
    def _gathered(self) -> Tensor:
        return self._block[: self._rows]

    def _totals(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean and scatter Σ(x − mean)(x − mean)ᵀ of all rows."""
        d = self.num_features
        scatter = torch.zeros(d, d, dtype=torch.float64) if self._scatter is None else self._scatter
        sums = self._count, self._mean, scatter
        if not self._rows:
            return sums
        mean = self._gathered.mean(0)
        centred = self._gathered - mean
        return _combined(sums, (self._rows, mean, centred.T @ centred))

    def _check_count(self, least: int) -> None:
        if self.count < least:
            raise InputError(
                f"statistics need at least {least} pictures; there are {self.count}.",
                "Name a folder with more.",
            )


def _is_finite(tensor: Tensor) -> bool:
    return bool((tensor.abs() <= LARGEST).all())  # NaN is not


def _combined(
    a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]
) -> tuple[int, Tensor, Tensor]:
    """Count, mean and scatter of two sets together."""
    count = a[0] + b[0]
    step = b[1] - a[1]
    mean = a[1] + step * (b[0] / count)
    return count, mean, a[2] + b[2] + torch.outer(step, step) * (a[0] * b[0] / count)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """A mean and a covariance from elsewhere. `num_pictures` and `features` (which network's) are
    None where nobody said."""

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    num_pictures: int | None = None
    features: str | None = None

    def gaussian(self) -> Gaussian:
        """For `distance`."""
        factor = factor_of(self.covariance)
        return Gaussian(mean=self.mean, variance=float(self.covariance.trace()), factor=factor)


def distance(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance, never below 0 nor NaN."""
    between = float((a.mean - b.mean).square().sum())
    ranks = a.factor.shape[1], b.factor.shape[1]
    overlap = float(torch.linalg.svdvals(a.factor.T @ b.factor).sum()) if min(ranks) else 0.0
    return max(0.0, between + a.variance + b.variance - 2 * overlap)


def frechet_distance(
    mean1: Tensor | np.ndarray,
    covariance1: Tensor | np.ndarray,
    mean2: Tensor | np.ndarray,
    covariance2: Tensor | np.ndarray,
) -> float:
    """The Fréchet distance of two Gaussians, by their means (d) and covariances (d, d).

    Raises InputError where they are of different sizes, not finite or no covariance.
    """
    first, second = moments(mean1, covariance1), moments(mean2, covariance2)
    if len(first.mean) != len(second.mean):
        raise InputError(f"{len(first.mean)} features cannot be compared with {len(second.mean)}.")
    return distance(first.gaussian(), second.gaussian())


def factor_of(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """F with F Fᵀ = `covariance`, r its numerical rank; eigenvalues below 0 count as 0.

    Cholesky's where the rank is full. Where it is not, what rounding left of the eigenvalues that
    are 0 must not enter: their roots would be 10⁸ times as large.
    """
    floor = len(covariance) * torch.finfo(torch.float64).eps * covariance.norm()
    lifted = covariance - floor * torch.eye(len(covariance), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(lifted).info) == 0:
        return torch.linalg.cholesky(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > floor
    return vectors[:, kept] * values[kept].sqrt()


def moments(mean: Any, covariance: Any, *, name: str = "statistics", **known: Any) -> Moments:
    """`mean` (d) and `covariance` (d, d) in float64, checked; `name` is what messages call them.

    Raises InputError: no numbers, of shapes that do not fit, not finite, not symmetric or with
    eigenvalues clearly below 0.
    """
    arrays = []
    for label, value, ndim in (("mu", mean, 1), ("sigma", covariance, 2)):
        kind = np.asarray(value).dtype
        if kind.kind != "f" or np.ndim(value) != ndim:
            raise InputError(
                f"{label} of {name} is an array of {kind} of shape {list(np.shape(value))}, "
                f"not of floats with {ndim} dimension{'s' if ndim > 1 else ''}."
            )
        arrays.append(torch.as_tensor(np.asarray(value, np.float64)))
    mu, sigma = arrays
    if not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"mu of {name} has {len(mu)} values, but sigma is {list(sigma.shape)}.")
    for label, array in (("mu", mu), ("sigma", sigma)):
        if not _is_finite(array):
            raise InputError(f"{label} of {name} holds values that are not finite.")
    scale = float(sigma.abs().max())
    if float((sigma - sigma.T).abs().max()) > 1e-3 * scale:
        raise InputError(f"sigma of {name} is not symmetric: it is no covariance.")
    if float(sigma.diagonal().min()) < -1e-3 * scale:
        raise InputError(f"sigma of {name} has variances below 0: it is no covariance.")
    return Moments(mean=mu, covariance=(sigma + sigma.T) / 2, **known)


def read_stats(path: str | Path) -> Moments:
    """A published or our own .npz: `mu` (d) and `sigma` (d, d), in float64 or float32.

    Other arrays, such as ADM's `mu_s`, `sigma_s` and `arr_0`, are left unread; so is any pickle.

    Raises:
        InputError: missing, no .npz, damaged, without mu or sigma, or these are no statistics.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"the statistics {path} {what}.", "Name an .npz with mu and sigma.")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz.", "Statistics are an .npz with mu and sigma.")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("mu", "sigma") if name not in file.files]
            if missing:
                held = ", ".join(file.files[:6]) or "nothing"
                raise InputError(
                    f"{path} holds {held}, but no {' and no '.join(missing)}.",
                    "Statistics of pictures are made by hidream hidit stats.",
                )
            mu, sigma = file["mu"], file["sigma"]
            features = str(file["features"]) if "features" in file.files else None
            count = int(file["num_pictures"]) if "num_pictures" in file.files else None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):  # numpy's words for an array of objects
            problem = f"{path} holds a pickle, which can run any code and is never loaded."
        else:
            problem = f"{path} is damaged."
        raise InputError(problem, "Download it again: mu and sigma are plain arrays.") from error
    return moments(mu, sigma, name=str(path), num_pictures=count, features=features)


def write_stats(path: Path, stats: Stats, features: str) -> None:
    """Write `mu` and `sigma` in float64, whole or not at all, with the name of the `features`.

    Raises InputError: fewer than 2 pictures, or the file cannot be written.
    """
    mu, sigma = stats.mean.numpy(), stats.covariance.numpy()
    temporary = path.with_name(f".hidream-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, mu=mu, sigma=sigma, num_pictures=stats.count, features=features)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Score:
    """An Inception Score: mean and standard deviation (divisor n) over its parts."""

    mean: float
    std: float


class ScoreSums:
    """The Inception Score of pictures that come in batches, in their order.

    exp(E KL(p(y|x) ‖ p(y))) for each of `num_splits` parts of the set (Salimans et al. 2016, arXiv
    1606.03498). Parts are cut after a shuffle with `seed`, by numpy's RandomState, as
    torch-fidelity does; or in order where it is None, as ADM does. Since a picture's part follows
    from its place and their number, sums are enough.

    Raises InputError for fewer pictures than parts.
    """

    def __init__(
        self, num_pictures: int, *, num_splits: int = NUM_SPLITS, seed: int | None = SEED
    ) -> None:
        if num_pictures < num_splits:
            raise InputError(
                f"an Inception Score of {num_splits} parts needs as many pictures; there are "
                f"{num_pictures}.",
                "Leave it out with --no-isc.",
            )
        place = np.arange(num_pictures)
        order = place if seed is None else np.random.RandomState(seed).permutation(num_pictures)
        edges = [i * num_pictures // num_splits for i in range(num_splits + 1)]
        part = np.empty(num_pictures, np.int64)
        part[order] = np.searchsorted(edges, place, side="right") - 1
        self._part = torch.from_numpy(part)
        self._seen = 0
        self._sizes = torch.bincount(self._part, minlength=num_splits)
        self._neg_entropy = torch.zeros(num_splits, dtype=torch.float64)
        self._marginal: Tensor | None = None

    def add(self, logits: Float[Tensor, "n c"]) -> None:
        """Count in the next pictures; `logits` are logarithms of probabilities up to a constant."""
        part = self._part[self._seen : self._seen + len(logits)]
        if len(part) < len(logits):
            raise ValueError(f"more than {len(self._part)} pictures.")
        self._seen += len(logits)
        log_p = logits.detach().to("cpu", torch.float64).log_softmax(1)
        p = log_p.exp()
        if self._marginal is None:
            self._marginal = torch.zeros(len(self._sizes), p.shape[1], dtype=torch.float64)
        self._marginal.index_add_(0, part, p)
        self._neg_entropy.index_add_(0, part, torch.xlogy(p, p).sum(1))

    def score(self) -> Score:
        if self._seen < len(self._part) or self._marginal is None:
            raise ValueError(f"{self._seen} of {len(self._part)} pictures were counted.")
        marginal = self._marginal / self._sizes[:, None]
        kl = self._neg_entropy / self._sizes - torch.xlogy(marginal, marginal).sum(1)
        parts = kl.clamp(min=0).exp()
        return Score(float(parts.mean()), float(parts.std(correction=0)))


def inception_score(
    logits: Float[Tensor, "n c"], *, num_splits: int = NUM_SPLITS, seed: int | None = SEED
) -> Score:
    """The Inception Score of all pictures at once; see `ScoreSums`."""
    sums = ScoreSums(len(logits), num_splits=num_splits, seed=seed)
    sums.add(logits)
    return sums.score()
