"""Attention: every backend equals the formula written out in float64."""

import math

import pytest
import torch

from hidream.nn.attention import attention

BACKENDS = ("auto", "sdpa", "math")


def heads(b=2, l=5, s=7, h=6, g=2, d=4, dtype=torch.float32):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    sizes = ((b, l, h, d), (b, s, g, d), (b, s, g, d))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def written_out(q, k, v, may_read):
    """One query, one head at a time; `may_read[b][i][j]`."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = [j for j in range(k.shape[1]) if may_read(b, i, j)]
        scores = [float(q[b, i, h] @ k[b, j, h // group]) / math.sqrt(q.shape[3]) for j in keys]
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        out[b, i, h] = weights @ v[b, keys, h // group].double()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_everyone_reads_everyone(backend, groups):
    q, k, v = heads(g=groups)
    expected = written_out(q, k, v, lambda b, i, j: True)
    assert (attention(q, k, v, backend=backend) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend):
    q, k, v = heads(l=7)
    expected = written_out(q, k, v, lambda b, i, j: j <= i)
    assert (attention(q, k, v, causal=True, backend=backend) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 5, 7), (2, 1, 7), (1, 1, 7)])
def test_masks(backend, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    q, k, v = heads()
    full = mask.expand(2, 5, 7)
    expected = written_out(q, k, v, lambda b, i, j: bool(full[b, i, j]))
    assert (attention(q, k, v, mask=mask, backend=backend) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_with_a_log_count_stands_for_many(backend):
    q, k, v = heads()
    many = [torch.cat([t, t[:, 2:3].expand(-1, 4, -1, -1)], dim=1) for t in (k, v)]
    bias = torch.tensor([0, 0, math.log(5), 0, 0, 0, 0])
    collapsed = attention(q, k, v, bias=bias, backend=backend)
    assert (collapsed - attention(q, *many)).abs().max() < 1e-6


def test_backends_have_the_same_gradients():
    grads = []
    for backend in ("sdpa", "math"):
        inputs = [t.requires_grad_() for t in heads(l=7)]
        attention(*inputs, causal=True, backend=backend).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_stays(backend):
    q, k, v = heads(dtype=torch.bfloat16)
    out = attention(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = written_out(q.float(), k.float(), v.float(), lambda b, i, j: True)
    assert (out - expected).abs().max() < 2e-2


@pytest.mark.usefixtures("unchecked")
def test_refused():
    q, k, v = heads(l=7)
    with pytest.raises(ValueError, match="one of mask, bias and causal"):
        attention(q, k, v, mask=torch.ones(1, 7, 7, dtype=torch.bool), causal=True)
    with pytest.raises(ValueError, match="auto, sdpa or math"):
        attention(q, k, v, backend="flash")
