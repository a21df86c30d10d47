"""Experts: every way to compute them is the formula; loads and loss say how they are used."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hidream.nn.moe import MixtureOfExperts, Routing, balance_loss, expert_loads, pack, side_by_side

SIZE, NUM_EXPERTS = 16, 4


@pytest.fixture
def mixture(request):
    torch.manual_seed(0)
    top_k = getattr(request, "param", 2)
    layer = MixtureOfExperts(
        SIZE, num_experts=NUM_EXPERTS, top_k=top_k, expert_size=24, shared_size=8
    )
    torch.nn.init.normal_(layer.gate.weight)
    return layer


def tokens():
    return torch.randn(2, 7, SIZE, generator=torch.Generator().manual_seed(1))


def written_out(layer, x):
    """One token at a time."""
    rows = []
    for token in x.flatten(0, 1):
        p = (layer.gate.weight @ token).softmax(0)
        best = sorted(range(len(p)), key=lambda e: -float(p[e].detach()))[: layer.gate.top_k]
        rows.append(sum(p[e] * layer.experts[e](token) for e in best) + layer.shared_experts(token))
    return torch.stack(rows).view_as(x)


def gradients(layer, out):
    layer.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("mixture", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("way", ["grouped", "one by one", "all"])
@pytest.mark.parametrize("unused", [False, True])
def test_it_is_the_formula_and_so_are_its_gradients(mixture, way, unused, monkeypatch):
    monkeypatch.setattr(mixture, "_way", lambda tokens: way)
    x = tokens()
    if unused and mixture.gate.top_k < NUM_EXPERTS:
        x = x.abs()
        with torch.no_grad():
            mixture.gate.weight[1] = -9
    out, routing = mixture(x)
    expected = written_out(mixture, x)
    torch.testing.assert_close(out, expected)
    assert routing.weights.shape == (14, mixture.gate.top_k)
    ours = gradients(mixture, out)
    for name, wanted in gradients(mixture, written_out(mixture, x)).items() if not unused else ():
        torch.testing.assert_close(ours[name], wanted)
    if unused and mixture.gate.top_k < NUM_EXPERTS:
        assert expert_loads(routing)[1] == 0
        assert not ours["experts.1.w2.weight"].any()


@pytest.mark.parametrize(("way", "asks"), [("grouped", 0), ("all", 0), ("one by one", 1)])
def test_what_a_graph_may_hold_asks_the_host_for_nothing(mixture, monkeypatch, way, asks):
    """A tensor without values cannot be asked for one: a sync or a graph's break would raise."""
    monkeypatch.setattr(mixture, "_way", lambda tokens: way)
    mixture.bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x = fake.from_tensor(tokens().bfloat16())
        refused = pytest.raises(DataDependentOutputException) if asks else nullcontext()
        with refused:
            assert mixture(x)[0].shape == x.shape


@pytest.mark.parametrize(
    ("device", "dtype", "changed", "traced", "way"),
    [
        ("cpu", torch.bfloat16, False, False, "one by one"),
        ("cpu", torch.bfloat16, False, True, "grouped"),
        ("cpu", torch.float32, False, True, "all"),
        ("cuda", torch.bfloat16, False, False, "grouped"),
        ("cuda", torch.float16, False, False, "one by one"),
        ("cuda", torch.bfloat16, True, False, "one by one"),  # a LoRA is more than a weight
        ("cuda", torch.bfloat16, True, True, "all"),
    ],
)
def test_the_way_that_is_chosen(mixture, monkeypatch, device, dtype, changed, traced, way):
    if changed:
        mixture.experts[3].w1 = torch.nn.Sequential(mixture.experts[3].w1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    with FakeTensorMode():
        x = torch.empty(2, SIZE, device=device, dtype=dtype)
    assert mixture._way(x) == way


def test_packed_experts_are_not_copied(mixture):
    x = tokens()
    before = mixture.requires_grad_(False)(x)[0]
    weights = [expert.w1.weight for expert in mixture.experts]
    assert side_by_side(weights).data_ptr() != weights[0].data_ptr()
    pack(mixture)
    weights = [expert.w1.weight for expert in mixture.experts]
    together = side_by_side(weights)
    assert together.data_ptr() == weights[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(together, weights, strict=True))
    assert torch.equal(mixture(x)[0], before)
    mixture.experts[2].w1.weight = torch.nn.Parameter(torch.ones(24, SIZE), requires_grad=False)
    weights = [expert.w1.weight for expert in mixture.experts]
    assert (side_by_side(weights)[2] == 1).all()


def test_packed_layers_that_are_to_be_trained_keep_their_gradients(mixture, monkeypatch):
    pack(mixture)
    mixture.requires_grad_(True)
    monkeypatch.setattr(mixture, "_way", lambda tokens: "grouped")
    out, _ = mixture(tokens())
    assert all(g.any() for g in gradients(mixture, out).values())


def routing_of(probabilities, k=2):
    weights, experts = probabilities.topk(k, dim=-1)
    return Routing(probabilities, experts, weights)


def test_loads_and_loss_tell_even_from_skewed():
    even = torch.eye(4).repeat(5, 1) * 0.9 + 0.025
    loads = expert_loads(routing_of(even, k=1))
    torch.testing.assert_close(loads, torch.full((4,), 0.25))
    torch.testing.assert_close(balance_loss(routing_of(even, k=1)), torch.tensor(1.0))
    skewed = torch.tensor([[1.0, 0, 0, 0]]).repeat(20, 1)
    assert balance_loss(routing_of(skewed, k=1)) == 4


def test_the_loss_takes_from_the_busy_expert(mixture):
    with torch.no_grad():
        mixture.gate.weight.mul_(0.1)[2] += 0.1
    x = tokens().abs()
    before = mixture(x)[1]
    assert expert_loads(before).argmax() == 2
    balance_loss(before).backward()
    with torch.no_grad():
        mixture.gate.weight -= 0.1 * mixture.gate.weight.grad
    after = mixture(x)[1]
    assert after.probabilities[:, 2].mean() < before.probabilities[:, 2].mean()
    assert balance_loss(after) < balance_loss(before)
