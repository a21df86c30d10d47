"""Muon against torch's own, its singular values, and its work shared by several processes."""

import pytest
import torch

from hidream.models.o1.config import O1_TINY
from hidream.models.o1.model import O1
from hidream.train.config import Optimizer
from hidream.train.distributed import World
from hidream.train.muon import Muon, orthogonal
from hidream.train.optim import build_optimizers


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def steps(optimizer, parameters, count=4):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(*parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 16, 64), (2, 64, 16)])
def test_singular_values_become_nearly_one(shape):
    gradient = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    values = torch.linalg.svdvals(orthogonal(gradient))
    assert values.max() < 1.25
    assert values.median() > 0.65
    along = torch.einsum("nij,nij->n", orthogonal(gradient), u @ v) / min(shape[1:])
    assert (along > 0.7).all()  # 1 for U V^T itself


def test_it_follows_torch():
    """The same rule but for torch's bfloat16 products."""
    ours, theirs = matrices(), matrices()
    start = [p.detach().clone() for p in ours]
    one = Muon(ours, rms=0.2, weight_decay=0.1)
    other = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for group in one.param_groups:
        group["lr"] = 0.01
    steps(one, ours)
    steps(other, theirs)
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - before).norm() > 0.1
        assert (a - b).norm() < 0.02 * (a - before).norm()


def test_processes_share_the_work_and_agree_to_the_bit():
    """Two processes played in turn: the first's share is given to the second, and back."""
    alone = matrices()
    reference = Muon(alone, rms=0.2)
    shares: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Recorder(World):
        def sum_in_place(self, tensor):
            shares[self.rank].append(tensor.clone())

    class Player(World):
        def sum_in_place(self, tensor):
            tensor += shares[1 - self.rank].pop(0)

    for rank in (0, 1):
        together = matrices()
        steps(Muon(together, rms=0.2, world=Recorder(rank=rank, size=2)), together, count=1)
    for group in reference.param_groups:
        group["lr"] = 0.01
    steps(reference, alone, count=1)
    for rank in (0, 1):
        together = matrices()
        optimizer = Muon(together, rms=0.2, world=Player(rank=rank, size=2))
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        steps(optimizer, together, count=1)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_muon_takes_the_matrices_inside_and_adamw_the_rest():
    model = O1(O1_TINY)
    adamw, muon = build_optimizers(model, Optimizer(muon=2.0))
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    outside = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert inside | outside == set(names.values())
    assert not inside & outside
    assert "model.language_model.layers.0.mlp.up_proj.weight" in inside
    assert "model.visual.blocks.0.attn.qkv.weight" in inside
    for name in ("lm_head", "model.language_model.embed_tokens", "model.final_layer2.linear"):
        assert f"{name}.weight" in outside
    assert muon.rms == pytest.approx(0.4)


def test_a_matrix_without_a_gradient_stays():
    first, second = matrices()[:2]
    before = second.detach().clone()
    optimizer = Muon([first, second], rms=0.2, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    first.grad = torch.randn_like(first)
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state
