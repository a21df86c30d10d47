"""Several processes train as one does, however they share the work; layouts; what is computed anew.

`tests/train_processes.py` is what each process runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hidream.errors import UsageError
from hidream.models.i1.model import I1
from hidream.train import checkpoint
from hidream.train.activations import recompute
from hidream.train.config import load_recipe, parse_recipe
from hidream.train.distributed import World
from hidream.train.layout import Layout, Parallel, check_batches, check_heads, layout_of
from hidream.train.tokenizer import build_tokenizer
from hidream.world import sprites
from tests import tiny_i1
from tests.train_processes import (
    CASES,
    HALF,
    NUM_STEPS,
    draw_coarsely,
    i1_recipe,
    parts_of,
    recipe_of,
    steps,
    trainee_of,
)

ROOT = Path(__file__).parents[2]
CLOSE = {"loss": 1e-6, "grad_norm": 5e-6}  # relative, at every step, in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_i1_folder):
    root = tmp_path_factory.mktemp("processes")
    (root / "i1").symlink_to(tiny_i1_folder)
    build_tokenizer(root / "tokenizer", num_texts=200)
    return root


@pytest.fixture(autouse=True, scope="module")
def as_in_the_processes():
    threads, size = torch.get_num_threads(), sprites.M
    torch.set_num_threads(1)
    draw_coarsely()
    yield
    torch.set_num_threads(threads)
    draw_coarsely(size)


def started(size, folder):
    command = [sys.executable, "-m", "tests.train_processes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    rest = (str(size), str(folder / f"store-{size}"), str(folder))
    return [
        subprocess.Popen([*command, str(rank), *rest], env=environment, cwd=ROOT)
        for rank in range(size)
    ]


def found(size, folder, processes):
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
    return json.loads((folder / f"found-{size}.json").read_text())


def trained(folder, first=0, last=NUM_STEPS, **changes):
    """One process's losses, and its trainee."""
    trainee = trainee_of(recipe_of(folder / "one", **changes), World())
    trainee.begin(False)
    return steps(trainee, first, last), trainee


@pytest.fixture(scope="module")
def pair(folder):
    """What two processes find, and meanwhile one."""
    processes = started(2, folder)
    alone, _ = trained(folder)
    return found(2, folder, processes), alone


def assert_as_one(steps, alone):
    assert len(steps) == len(alone)
    for number, (ours, one) in enumerate(zip(steps, alone, strict=True)):
        for name, tolerance in CLOSE.items():
            assert ours[name] == pytest.approx(one[name], rel=tolerance), f"{name}, step {number}"


@pytest.mark.parametrize("name", [*CASES[2], "fsdp"])
def test_two_processes_are_one(pair, name):
    both, alone = pair
    assert alone[0] != alone[-1]
    assert_as_one(both[name], alone)


def test_an_i1_in_shards_is_one(pair, folder):
    both, _ = pair
    trainee = trainee_of(i1_recipe(folder, "i1"), World())
    trainee.begin(False)
    assert_as_one(both["i1, fsdp"], steps(trainee, 0, 2))


def test_weights_in_shards_are_gathered_in_the_runs_precision(pair, folder):
    both, exact = pair
    assert both["gathered"] == ["torch.bfloat16"] * 4
    alone, _ = trained(folder, 0, 4, precision="bfloat16")
    for ours, one, in_fp32 in zip(both["fsdp, bf16"], alone, exact, strict=False):
        assert ours["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert abs(ours["loss"] - one["loss"]) < abs(ours["loss"] - in_fp32["loss"])


def test_a_step_in_parts_is_the_step(pair, folder):
    _, alone = pair
    for parts in (2, 4):
        in_parts, _ = trained(folder, 0, 5, accumulate=parts)
        assert_as_one(in_parts, alone[:5])


@pytest.mark.parametrize("name", ["fsdp of whole", "tp of shards"])
def test_two_processes_go_on_from_any_checkpoint(pair, name):
    both, alone = pair
    assert_as_one(both[name], alone[HALF:])
    if name == "fsdp of whole":
        assert both[name] == both["fsdp"][HALF:]  # the same processes: to the bit


def test_one_process_goes_on_from_the_shards_of_two(pair, folder):
    sharded, whole = (checkpoint.folder_of(folder / name, HALF) for name in ("fsdp", "whole"))
    assert len(list(sharded.glob("shard-*.safetensors"))) == 2
    assert not list(sharded.glob("model.safetensors"))
    assert checkpoint.latest(folder / "fsdp") == sharded
    found = []
    for start in (sharded, whole):
        _, trainee = trained(folder, HALF, HALF, start=str(start))
        found.append(checkpoint.contents(trainee.model, trainee.ema, trainee.optimizers))
    for file, tensors in found[0].items():
        assert tensors.keys() == found[1][file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found[1][file][name]), name
    checkpoint.load_ema(sharded, trainee.model)
    for name, tensor in trainee.model.state_dict().items():
        assert torch.equal(tensor, found[1]["ema.safetensors"][name]), name
    losses, _ = trained(folder, HALF, start=str(sharded))
    assert_as_one(losses, pair[1][HALF:])


def test_a_damaged_shard_is_told(pair, folder, tmp_path, caplog):
    import shutil

    for step in (HALF, HALF + 1):
        there = checkpoint.folder_of(tmp_path, step)
        shutil.copytree(checkpoint.folder_of(folder / "fsdp", HALF), there)
    (tmp_path / "checkpoints" / "latest").write_text(there.name)
    shard = max(there.glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert checkpoint.latest(tmp_path).name == f"step-{HALF:08d}"
    assert f"{shard.name} is not what was written" in caplog.text


@pytest.mark.parametrize("name", ["tp", "sp"])
def test_a_model_in_parts_draws_as_the_whole_one(pair, name):
    assert pair[0]["drawn"][name] < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES[4])
def test_four_processes_are_one(folder, name, request):
    if not (folder / "found-4.json").exists():
        found(4, folder, started(4, folder))
    both = json.loads((folder / "found-4.json").read_text())
    alone = request.getfixturevalue("pair")[1]
    assert_as_one(both[name], alone)


@pytest.mark.slow
def test_weights_divided_twice_are_written_and_read(folder):
    if not (folder / "found-4.json").exists():
        found(4, folder, started(4, folder))
    kept = json.loads((folder / "found-4.json").read_text())["kept"]
    assert kept == {"kept in shards": 0, "kept whole": 0}


# -- activations -----------------------------------------------------------------------------------


def flops_and_gradients(folder, how):
    trainee = trainee_of(
        recipe_of(folder / how, parallel={"activation_checkpointing": how}), World()
    )
    trainee.begin(False)
    with FlopCounterMode(display=False) as counter:
        losses = trainee.backward(parts_of(trainee, 0, 1, 0))
    return counter.get_total_flops(), losses, [p.grad for p in trainee.parameters]


def test_what_is_computed_anew_has_the_same_bits(folder):
    none, selective, full = (
        flops_and_gradients(folder, how) for how in ("none", "selective", "full")
    )
    assert none[0] == selective[0]  # matrix products are kept
    assert full[0] > 1.1 * none[0]
    for other in (selective, full):
        assert other[1] == none[1]
        for ours, plain in zip(other[2], none[2], strict=True):
            assert (ours is None and plain is None) or torch.equal(ours, plain)


def test_the_balance_of_experts_counts_once():
    def gradients(how):
        model = I1(tiny_i1.TINIEST)
        model.init_weights(torch.Generator().manual_seed(0))
        for parameter in model.parameters():  # no gate of a block is 0
            torch.nn.init.normal_(
                parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel())
            )
        recompute(model.blocks, how)
        x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        features = tiny_i1.features(batch=4)
        prediction = model(x_t, torch.tensor([0.2, 0.4, 0.6, 0.8]), features)
        (prediction.velocity.square().mean() + prediction.balance_loss).backward()
        return prediction.balance_loss, {n: p.grad for n, p in model.named_parameters()}

    plain, selective, full = (gradients(how) for how in ("none", "selective", "full"))
    gate = next(name for name in plain[1] if name.endswith("gate.weight"))
    assert plain[1][gate].abs().max() > 0
    for other in (selective, full):
        assert torch.equal(other[0], plain[0])
        for name, gradient in plain[1].items():
            assert gradient is None or torch.equal(gradient, other[1][name]), name


# -- layouts ---------------------------------------------------------------------------------------


def test_the_numbers_come_out_at_the_processes():
    assert layout_of(Parallel(), 4) == Layout(replicate=4)
    assert layout_of(Parallel.named("fsdp"), 4) == Layout(shard=4)
    assert layout_of(Parallel(replicate=0, shard=2), 8) == Layout(replicate=4, shard=2)
    assert layout_of(Parallel(shard=0, replicate=2, tp=2), 8) == Layout(replicate=2, shard=2, tp=2)
    assert layout_of(Parallel(sp=2, tp=2), 4) == Layout(sp=2, tp=2)
    assert [
        str(layout_of(p, 4)) for p in (Parallel(), Parallel(shard=0), Parallel(sp=2, tp=2))
    ] == [
        "ddp",
        "fsdp",
        "sp 2 × tp 2",
    ]
    with pytest.raises(UsageError, match=r"for 2 processes \(.*tp 2\), and there are 3"):
        layout_of(Parallel(tp=2), 3)
    with pytest.raises(UsageError, match="for 4 processes"):
        layout_of(Parallel(replicate=2, shard=2), 8)


def test_those_that_share_tokens_or_matrices_read_the_same_samples():
    layout = Layout(replicate=2, shard=2, sp=2, tp=2)
    assert [layout.reader(rank) for rank in range(16)] == [r for r in range(4) for _ in range(4)]
    with pytest.raises(UsageError, match="batch_size = 6 must be a multiple of 4: 4 processes"):
        check_batches(layout, {"stages.0.batch_size": 6})
    with pytest.raises(UsageError, match=r"batch_size = 4 must be a multiple of 8: .* in 2 parts"):
        check_batches(layout, {"stages.0.batch_size": 4}, 2)


def test_heads_must_be_divisible():
    check_heads(Layout(tp=8, sp=4), 32, 8, 12288)  # each key head goes to four processes
    for layout, message in (
        (Layout(tp=16), "tp = 16 does not divide the model's 8 key heads"),
        (Layout(tp=3), "tp = 3 does not divide the model's 32 heads"),
        (Layout(sp=64), "sp = 64 does not divide"),
        (Layout(sp=3), "sp = 3 does not divide"),
    ):
        with pytest.raises(UsageError, match=message):
            check_heads(layout, 32, 8, 12288)


def test_a_word_is_short_for_a_table():
    plain = recipe_of(Path("x")).to_dict()
    for word, table in (("ddp", {}), ("fsdp", {"shard": 0})):
        recipe = parse_recipe(plain | {"parallel": word})
        assert recipe == parse_recipe(plain | {"parallel": table})
        assert parse_recipe(recipe.to_dict()) == recipe
    load_recipe(ROOT / "recipes" / "o1_nano.toml", ["optimizer.muon=0", "parallel.shard=2"])
    del plain["parallel"]  # as in a checkpoint of before
    assert parse_recipe(plain).parallel == Parallel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel=fsdp2", '"fsdp2" must be one of ddp, fsdp'),
        ("parallel.tp=0", "parallel.tp = 0 must be at least 1"),
        ("parallel.shard=-1", "parallel.shard = -1 must be at least 0"),
        ("parallel.activation_checkpointing=some", '"some" must be one of none, selective, full'),
        ("parallel.checkpoint=pickle", '"pickle" must be one of sharded, whole'),
        ("parallel.shard=0", "go with optimizer.muon = 0"),
        ("parallel.tp=4", "is for 4 processes"),
        ("parallel.tpp=4", 'unknown key "parallel.tpp"'),
    ],
)
def test_what_is_wrong_is_named(change, message):
    changes = ["optimizer.muon=0"] if "tp=4" in change else []
    with pytest.raises(UsageError) as caught:
        load_recipe(ROOT / "recipes" / "o1_nano.toml", [*changes, change])
    assert message in str(caught.value)


def test_only_o1_can_be_divided():
    from hidream.train.parallel import check_divisible

    class Other:
        recipe = recipe_of(Path("x"), model="i1-nano")

        def decoder_sizes(self):
            return None

    with pytest.raises(UsageError, match="i1-nano has no decoder"):
        check_divisible(Layout(tp=2), Other())
    check_divisible(Layout(shard=2), Other())
