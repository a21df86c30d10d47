"""Fréchet distance and Inception Score: closed forms, the peers' formulae, statistics files."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from hidream.errors import InputError
from hidream.eval.fid import (
    Moments,
    ScoreSums,
    Stats,
    distance,
    factor_of,
    frechet_distance,
    inception_score,
    read_stats,
    write_stats,
)


def rows(num, d, seed=0, shift=0.0, scale=1.0):
    """Correlated features with a falling spectrum, a little like Inception's."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.exp(-np.arange(d) / (d / 3))
    return torch.from_numpy(scale * rng.standard_normal((num, d)) @ mixing.T + shift)


def counted(features, chunk=None):
    stats = Stats(features.shape[1])
    for start in range(0, len(features), chunk or len(features)):
        stats.add(features[start : start + (chunk or len(features))])
    return stats


def moments_of(features):
    x = features.double().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


def by_torch_fidelity(mu1, sigma1, mu2, sigma2):
    """torch-fidelity: real parts of the roots of the eigenvalues of the product."""
    roots = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex))
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * roots.real.sum()


def by_pytorch_fid(mu1, sigma1, mu2, sigma2):
    """pytorch-fid: a matrix square root of the product, with 1e-6 added where it has none."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(root).all():
        lift = 1e-6 * np.eye(len(mu1))
        root = scipy.linalg.sqrtm((sigma1 + lift) @ (sigma2 + lift))
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real)


def by_svd(a, b):
    """The distance of two small sets from their centred features alone."""
    a, b = a.double().numpy(), b.double().numpy()
    f, g = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    overlap = np.linalg.svd(f @ g.T, compute_uv=False).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return apart + (f**2).sum() + (g**2).sum() - 2 * overlap


@pytest.mark.parametrize(("m", "s", "n", "t"), [(0, 1, 0, 1), (1, 2, -2, 0.5), (3, 0, 0, 4)])
def test_one_dimension(m, s, n, t):
    found = frechet_distance(
        np.array([m / 1]), np.array([[s**2 / 1]]), np.array([n / 1]), [[t**2.0]]
    )
    assert found == pytest.approx((m - n) ** 2 + (s - t) ** 2, abs=1e-12)


def test_commuting_covariances():
    """Same axes, variances a and b: the sum of (√a − √b)²."""
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    a, b = rng.uniform(0, 3, 20), rng.uniform(0, 3, 20)
    mu1, mu2 = rng.standard_normal((2, 20))
    found = frechet_distance(mu1, axes * a @ axes.T, mu2, axes * b @ axes.T)
    closed = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert found == pytest.approx(closed, rel=1e-12)


def test_two_dimensions():
    """tr √P = √(tr P + 2 √det P) for the 2×2 product P, whose covariances do not commute."""
    s, t = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 1.5]])
    product = s @ t
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    found = frechet_distance(np.zeros(2), s, np.zeros(2), t)
    assert found == pytest.approx(np.trace(s + t) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("shape", [(500, 400, 48), (2000, 300, 96)])
def test_the_peers_formulae(shape):
    num1, num2, d = shape
    a, b = rows(num1, d, 1), rows(num2, d, 2, shift=0.2, scale=1.2)
    found = distance(counted(a).gaussian(), counted(b).gaussian())
    for peer in (by_torch_fidelity, by_pytorch_fid):
        assert found == pytest.approx(peer(*moments_of(a), *moments_of(b)), rel=1e-9)
    assert found == pytest.approx(frechet_distance(*moments_of(a), *moments_of(b)), rel=1e-10)


@pytest.mark.parametrize(("num1", "num2"), [(40, 40), (40, 300), (2, 30), (96, 97), (300, 60)])
def test_fewer_pictures_than_features(num1, num2):
    d = 96
    a, b = rows(num1, d, 3), rows(num2, d, 4, shift=0.1)
    expected = by_svd(a, b)
    found = distance(counted(a).gaussian(), counted(b).gaussian())
    assert found == pytest.approx(expected, rel=1e-10)
    # also where only a covariance is left of the set, as in a file
    from_file = Moments(mean=counted(a).mean, covariance=counted(a).covariance).gaussian()
    assert distance(from_file, counted(b).gaussian()) == pytest.approx(expected, rel=1e-6)
    peer = by_torch_fidelity(*moments_of(a), *moments_of(b))
    assert found == pytest.approx(peer, rel=1e-5)  # the peer's roots of rounded zeros


@pytest.mark.parametrize("num", [3, 64, 65, 500])
def test_identical_sets_are_at_zero(num):
    features = 10 * rows(num, 64, 5, shift=3.0)
    stats = counted(features)
    assert distance(stats.gaussian(), stats.gaussian()) <= 1e-6
    mu, sigma = moments_of(features)
    assert frechet_distance(mu, sigma, mu, sigma) <= 1e-6
    assert (
        distance(stats.gaussian(), Moments(mean=stats.mean, covariance=stats.covariance).gaussian())
        <= 1e-6
    )


def test_order_does_not_matter():
    a, b = rows(300, 40, 6), rows(30, 40, 7)
    value = distance(counted(a).gaussian(), counted(b).gaussian())
    for seed in range(3):
        order = np.random.default_rng(seed).permutation
        mixed = counted(a[order(300)]).gaussian(), counted(b[order(30)]).gaussian()
        assert distance(*mixed) == pytest.approx(value, rel=1e-12)
    # and the order of the features neither
    turn = np.random.default_rng(9).permutation(40)
    turned = counted(a[:, turn]).gaussian(), counted(b[:, turn]).gaussian()
    assert distance(*turned) == pytest.approx(value, rel=1e-11)


def test_distance_is_symmetric_and_sees_the_mean_exactly():
    a, b = counted(rows(200, 30, 8)), counted(rows(20, 30, 9))
    there = distance(a.gaussian(), b.gaussian())
    assert there == pytest.approx(distance(b.gaussian(), a.gaussian()), rel=1e-12)
    moved = counted(rows(200, 30, 8) + 2.0)
    assert distance(a.gaussian(), moved.gaussian()) == pytest.approx(30 * 4.0, rel=1e-9)


@pytest.mark.parametrize("num", [10, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 150])
def test_any_pieces_are_one_pass(num, chunk):
    features = rows(num, 32, num) + 5.0
    whole, pieces = counted(features), counted(features, chunk)
    assert pieces.count == num
    assert torch.equal(pieces.mean, whole.mean)
    assert torch.equal(pieces.covariance, whole.covariance)
    mu, sigma = moments_of(features)
    np.testing.assert_allclose(pieces.mean, mu, rtol=1e-12)
    np.testing.assert_allclose(pieces.covariance, sigma, rtol=1e-10, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits():
    features = rows(5000, 8, 1)
    far = counted(features + 1e6, chunk=100)
    np.testing.assert_allclose(far.covariance, moments_of(features)[1], rtol=1e-8)


@pytest.mark.parametrize(("first", "second"), [(10, 12), (10, 90), (90, 10), (90, 130), (32, 32)])
def test_merge_of_two_ranks(first, second):
    features = rows(first + second, 32, 11, shift=2.0)
    one, other = counted(features[:first]), counted(features[first:], chunk=9)
    before = other.covariance
    one.merge(other)
    whole = counted(features)
    assert one.count == whole.count
    np.testing.assert_allclose(one.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(one.covariance, whole.covariance, rtol=1e-10, atol=1e-13)
    b = counted(rows(50, 32, 12)).gaussian()
    assert distance(one.gaussian(), b) == pytest.approx(distance(whole.gaussian(), b), rel=1e-10)
    assert torch.equal(other.covariance, before)
    empty = Stats(32)
    empty.merge(other)
    empty.merge(Stats(32))
    np.testing.assert_allclose(empty.covariance, before, rtol=1e-12)


def test_float32_features_count_in_float64():
    features = rows(500, 16, 2).float()
    expected = moments_of(features)
    stats = counted(features, 33)
    np.testing.assert_allclose(stats.covariance, expected[1], rtol=1e-12)
    assert stats.covariance.dtype == torch.float64


def test_never_nan():
    same = torch.ones(30, 12)
    flat, other = counted(same), counted(rows(30, 12))
    assert distance(flat.gaussian(), flat.gaussian()) == 0
    assert distance(flat.gaussian(), other.gaussian()) == pytest.approx(by_svd(same, rows(30, 12)))
    # what rounding to float32 makes of a covariance without full rank: eigenvalues below 0
    mu, sigma = moments_of(rows(10, 64, 3))
    rounded = sigma.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(float)).min() < 0
    found = frechet_distance(mu.astype(np.float32), rounded, mu, sigma)
    assert 0 <= found < 1e-3 * np.trace(sigma)
    # a spectrum over 60 orders of magnitude
    wide = np.diag(10.0 ** -np.arange(0, 60, 2))
    assert frechet_distance(np.zeros(30), wide, np.zeros(30), 4 * wide) == pytest.approx(
        np.trace(wide), rel=1e-6
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    features = rows(5, 4)
    features[2, 1] = value
    with pytest.raises(InputError, match="not finite"):
        Stats(4).add(features)
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(np.array([0.0, value]), np.eye(2), np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, value], [value, 1]]))


def test_too_few_pictures():
    stats = Stats(4)
    for read in (lambda: stats.mean, lambda: stats.covariance, stats.gaussian):
        with pytest.raises(InputError, match="at least"):
            read()
    stats.add(torch.ones(1, 4))
    assert stats.mean.tolist() == [1] * 4
    with pytest.raises(InputError, match="at least 2 pictures; there are 1"):
        stats.gaussian()


def test_a_factor_is_of_the_numerical_rank():
    just_not_whole = [(48, 47, seed) for seed in range(8)]  # some of them Cholesky takes as whole
    for num, rank, seed in [(20, 19, 0), (64, 48, 0), (500, 48, 0), *just_not_whole]:
        sigma = counted(rows(num, 48, seed)).covariance
        factor = factor_of(sigma)
        assert factor.shape == (48, rank)
        np.testing.assert_allclose(factor @ factor.T, sigma, atol=1e-12 * float(sigma.norm()))


# Statistics files.


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_statistics_come_back(tmp_path):
    stats = counted(rows(100, 8))
    write_stats(tmp_path / "s.npz", stats, "some network")
    found = read_stats(tmp_path / "s.npz")
    assert torch.equal(found.mean, stats.mean)
    np.testing.assert_allclose(found.covariance, stats.covariance, rtol=1e-15)
    assert (found.num_pictures, found.features) == (100, "some network")
    assert [file.name for file in tmp_path.iterdir()] == ["s.npz"]


def test_statistics_in_float32_are_cast(tmp_path):
    mu, sigma = moments_of(rows(100, 8))
    found = read_stats(save(tmp_path / "s.npz", mu=mu.astype("f4"), sigma=sigma.astype("f4")))
    assert found.covariance.dtype == found.mean.dtype == torch.float64
    assert frechet_distance(mu, sigma, found.mean, found.covariance) < 1e-6
    assert (found.num_pictures, found.features) == (None, None)


def test_what_else_is_in_a_file_is_left(tmp_path):
    """ADM's also hold mu_s, sigma_s and the pictures; not even a pickle among them is read."""
    mu, sigma = moments_of(rows(100, 8))
    others = {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.array([{}], object)}
    assert len(read_stats(save(tmp_path / "s.npz", mu=mu, sigma=sigma, **others)).mean) == 8


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.array([Bomb()], object), "sigma": np.eye(1)}, "holds a pickle"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds arr_0, but no mu and no sigma"),
        ({"mu": np.zeros(3)}, "no sigma"),
        ({}, "holds nothing"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"3 values, but sigma is \[4, 4\]"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"mu .* shape \[3, 1\]"),
        ({"mu": np.zeros(3), "sigma": np.ones(3)}, r"sigma .* shape \[3\]"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * 1j}, "complex128"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "0 values"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, math.nan], [0, 1]])}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0, 1]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "below 0"),
    ],
)
def test_no_statistics(tmp_path, arrays, says):
    path = save(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError, match=says) as caught:
        read_stats(path)
    assert "\n" not in str(caught.value)


def test_no_file_of_statistics(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.txt").write_text("mu sigma")
    whole = save(tmp_path / "s.npz", mu=np.zeros(9), sigma=np.eye(9)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(
        whole.replace(b"\0\0\0\0\0\0\xf0?", b"\0\0\0\0\0\0\xf1?")
    )
    for name, says in {
        "none.npz": "does not exist",
        ".": "is a folder",
        "a.npy": "is no .npz",
        "a.txt": "is no .npz",
        "cut.npz": "is no .npz",
        "flipped.npz": "is damaged",
    }.items():
        with pytest.raises(InputError, match=says):
            read_stats(tmp_path / name)


# The Inception Score.


def score_by_torch_fidelity(logits, num_splits=10, seed=2020):
    """Shuffled by numpy's RandomState, cut, exp of the mean divergence from each part's mean."""
    shuffled = logits[np.random.RandomState(seed).permutation(len(logits))].double()
    scores = []
    for i in range(num_splits):
        part = shuffled[i * len(logits) // num_splits : (i + 1) * len(logits) // num_splits]
        p, log_p = part.softmax(1), part.log_softmax(1)
        scores.append(math.exp((p * (log_p - p.mean(0).log())).sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("num", [10, 57, 1000])
def test_score_is_torch_fidelitys(num):
    logits = 3 * torch.randn(num, 30, generator=torch.Generator().manual_seed(num))
    mean, std = score_by_torch_fidelity(logits)
    found = inception_score(logits)
    assert (found.mean, found.std) == pytest.approx((mean, std), rel=1e-12)
    sums = ScoreSums(num)
    for start in range(0, num, 8):
        sums.add(logits[start : start + 8])
    assert sums.score().mean == pytest.approx(mean, rel=1e-12)


def test_score_depends_on_the_order_of_pictures():
    logits = 3 * torch.randn(57, 30, generator=torch.Generator().manual_seed(57))
    found, turned = inception_score(logits), inception_score(logits.flip(0))
    assert turned.mean != pytest.approx(found.mean, rel=1e-9)


def test_score_in_order_without_a_seed():
    """ADM's parts are those of the file: each of one class alone has a score of 1."""
    logits = torch.eye(10).repeat_interleave(20, 0) * 1e4
    assert inception_score(logits, seed=None).mean == pytest.approx(1)
    assert inception_score(logits).mean > 5


def test_uniform_predictions_score_1():
    found = inception_score(torch.zeros(100, 1008))
    assert (found.mean, found.std) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("k", [2, 10, 100])
def test_sure_and_balanced_predictions_score_their_number(k):
    logits = torch.eye(k, 1008).repeat(7, 1) * 1e4
    assert inception_score(logits, num_splits=1).mean == pytest.approx(k, rel=1e-12)


def test_too_few_pictures_for_a_score():
    with pytest.raises(InputError, match="--no-isc"):
        inception_score(torch.zeros(9, 4))
