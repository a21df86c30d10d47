"""Hi-DiT from a folder of pictures to a figure: all stages in miniature, by their commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hidream.cli.main import main
from hidream.data.latents import save_statistics
from hidream.models.hidit.vae import LdmVae, VaeConfig, save_vae

ROOT = Path(__file__).parents[2]
VAE = VaeConfig(channels=4, width=8, multipliers=(1, 1, 2), num_blocks=1, num_groups=4)
NUM_CLASSES, NUM_PICTURES = 4, 200


def draw_class(label, dice):
    """A picture of a class: stripes of one of four directions, in any two colours."""
    y, x = np.mgrid[:48, :48]
    along = (x, y, x + y, x - y)[label] + dice.integers(0, 8)
    colors = dice.integers(0, 256, (2, 3))
    return Image.fromarray(colors[(along // 4) % 2].astype(np.uint8))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of pictures, one a class, and a VAE of random weights."""
    root = tmp_path_factory.mktemp("hidit")
    dice = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        folder = root / "pictures" / f"n{i % NUM_CLASSES:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        draw_class(i % NUM_CLASSES, dice).save(folder / f"{i:05d}.jpg", quality=95)
    vae = LdmVae(VAE)
    vae.init_weights(torch.Generator().manual_seed(0))
    save_vae(vae, root / "vae")
    return root


def hidit(*words):
    return main(["hidit", *map(str, words)])


def train_flags(root, name, steps, *more):
    return (
        *("--data-dir", root / "data", "--vae-latents-name", "tiny", "--vae-ckpt", root / "vae"),
        *("--output-dir", root / "exps", "--exp-name", name, "--max-train-steps", steps),
        *("--model", "SiT-N/1", "--enc-type", "stand-in", "--encoder-depth", 2),
        *("--batch-size", 8, "--log-every", 1, "--checkpointing-steps", 4, "--sampling-steps", 0),
        *("--learning-rate", 1e-3, "--device", "cpu"),
        *more,
    )


@pytest.fixture(scope="module")
def data(world):
    assert hidit(
        *("preprocess", "--imagenet-path", world / "pictures", "--output-path", world / "data"),
        *("--resolution", 32, "--num-workers", 2),
    ) == 0  # fmt: skip
    assert hidit(
        *("cache-latents", "--data-dir", world / "data", "--output-dir", world / "data"),
        *("--vae-ckpt-path", world / "vae", "--vae-latents-name", "tiny"),
        *("--pproc-batch-size", 32, "--device", "cpu"),
    ) == 0  # fmt: skip
    return world


@pytest.fixture(scope="module")
def stage1(data):
    assert hidit("train", "--ldm-only", *train_flags(data, "stage1", 6)) == 0
    return data / "exps" / "stage1"


@pytest.fixture(scope="module")
def stage2(data, stage1):
    start = ("--resume-step", 6, "--continue-train-exp-dir", stage1)
    assert hidit("train", *train_flags(data, "stage2", 10, *start)) == 0
    return data / "exps" / "stage2"


def checkpoint(run, step, name="model"):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def records(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "message" not in r]


def test_the_last_step_is_saved_though_no_multiple_of_the_interval(stage1):
    names = sorted(p.name for p in (stage1 / "checkpoints").glob("step-*"))
    assert names == ["step-00000004", "step-00000006"]
    assert json.loads((stage1 / "args.json").read_text())["vae_latents_name"] == "tiny"
    assert [r["step"] for r in records(stage1)] == [1, 2, 3, 4, 5, 6]
    assert {"loss_latents", "loss_alignment"} <= records(stage1)[0].keys()


def test_stage_1_leaves_the_pixel_branch_alone_and_stage_2_trains_it(stage1, stage2):
    first, second = checkpoint(stage1, 4), checkpoint(stage1, 6)
    later = checkpoint(stage2, 10)
    branch = [name for name in first if name.startswith("pixel_")]
    assert branch
    assert all(torch.equal(first[name], second[name]) for name in branch)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], second["blocks.0.attn.qkv.weight"])
    moved = [name for name in branch if not torch.equal(second[name], later[name])]
    assert any("head" in name for name in moved)
    assert any("embedder" in name for name in moved)


def test_stage_2_goes_on_where_stage_1_ended(stage1, stage2):
    assert [r["step"] for r in records(stage2)] == [7, 8, 9, 10]
    assert all(r["loss_pixels"] > 0 for r in records(stage2))
    last, first = records(stage1)[-1], records(stage2)[0]
    assert first["loss_latents"] == pytest.approx(last["loss_latents"], rel=0.2)
    steps = checkpoint(stage2, 10, "optimizer")
    assert float(steps["blocks.0.attn.qkv.weight/step"]) == 10
    assert float(steps["pixel_embedder.proj.weight/step"]) == 4


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_stopped_and_resumed_is_uninterrupted(data, stage1, stage, tmp_path):
    start = ("--ldm-only",) if stage == "stage1" else (
        *("--resume-step", 6, "--continue-train-exp-dir", stage1),
    )  # fmt: skip
    steps = 5 if stage == "stage1" else 9
    out = ("--output-dir", tmp_path, "--checkpointing-steps", steps - 2)
    assert hidit("train", *train_flags(data, "whole", steps, *start, *out)) == 0
    assert hidit("train", *train_flags(data, "parts", steps - 2, *start, *out)) == 0
    own = ("--ldm-only",) if stage == "stage1" else ()
    assert hidit("train", *train_flags(data, "parts", steps, *own, *out, "--resume")) == 0
    for name in ("model", "ema", "optimizer"):
        whole, parts = (checkpoint(tmp_path / run, steps, name) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert not [key for key in whole if not torch.equal(whole[key], parts[key])]


def test_fp16_keeps_its_scale_over_a_resume(data, tmp_path):
    out = ("--output-dir", tmp_path, "--mixed-precision", "fp16", "--ldm-only", "--batch-size", 1)
    assert hidit("train", *train_flags(data, "whole", 2, *out)) == 0
    assert hidit("train", *train_flags(data, "parts", 1, *out)) == 0
    assert hidit("train", *train_flags(data, "parts", 2, *out, "--resume")) == 0
    states = [
        json.loads((tmp_path / run / "checkpoints/step-00000002/state.json").read_text())["scaler"]
        for run in ("whole", "parts")
    ]
    assert states[0] == states[1]
    assert states[0]["_growth_tracker"] == 2
    whole, parts = (checkpoint(tmp_path / run, 2) for run in ("whole", "parts"))
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]


@pytest.mark.parametrize("launcher", ["torchrun", "torchrun, fsdp", "accelerate"])
def test_two_processes_are_one(data, stage1, launcher, tmp_path):
    """A run of two processes is that of one. accelerate starts one on CPUs, as torchrun on GPUs."""
    launcher, _, parallel = launcher.partition(", ")
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            *("accelerate.commands.launch", "--cpu", "--num_machines", "1"),
            *("--num_processes", "1", "--main_process_port", "0", "--dynamo_backend", "no"),
        ],
    }[launcher]
    flags = train_flags(data, "two", 10, "--resume-step", 6, "--continue-train-exp-dir", stage1)
    flags = [*map(str, flags), "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", *start, "-m", "hidream", "hidit", "train", *flags]
    command += ["--parallel", parallel or "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True, timeout=120)
    assert hidit("train", *flags, "--exp-name", "one") == 0
    said = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[0])["message"]
    assert f"{2 if launcher == 'torchrun' else 1} process(es) ({parallel or 'ddp'})" in said
    two, one = (records(tmp_path / run) for run in ("two", "one"))
    assert [r["step"] for r in two] == [r["step"] for r in one] == [7, 8, 9, 10]
    for a, b in zip(two, one, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for name in ("model", "ema", "optimizer"):  # whole, whoever wrote them
        a, b = (checkpoint(tmp_path / run, 10, name) for run in ("two", "one"))
        assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    own = train_flags(data, "two", 11, "--resume", "--output-dir", tmp_path)
    assert hidit("train", *own) == 0  # by one process again
    assert records(tmp_path / "two")[-1]["step"] == 11


def test_a_killed_run_goes_on(data, tmp_path):
    flags = train_flags(data, "killed", 400, "--ldm-only", "--output-dir", tmp_path)
    command = [sys.executable, "-m", "hidream", "hidit", "train", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=ROOT)
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    for _ in range(600):
        if latest.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    step = int(latest.read_text().removeprefix("step-"))
    assert 4 <= step < 400
    more = ("--max-train-steps", step + 1, "--resume")
    assert hidit("train", *flags, *more) == 0
    assert latest.read_text() == f"step-{step + 1:08d}"


def test_samples_and_their_figure(data, stage2, capsys):
    assert hidit(
        *("sample", "--exp-path", stage2, "--train-steps", 10, "--sample-dir", data / "samples"),
        *("--num-fid-samples", 12, "--pproc-batch-size", 4, "--mode", "sde", "--num-steps", 4),
        *("--cfg-scale", 2.4, "--label-sampling", "equal", "--skip-npz", "--device", "cpu"),
    ) == 0  # fmt: skip
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert folder.name == "stage2_0000010_cfg2.4-0.0-1.0-labelsampling-equal"
    pictures = sorted(p.name for p in folder.glob("*.png"))
    assert pictures == [f"{i:06d}.png" for i in range(12)]
    with Image.open(folder / pictures[0]) as picture:
        assert picture.size == (32, 32)

    stats = data / "stats.npz"
    common = ("--inception", "stand-in", "--device", "cpu")
    assert hidit("stats", "--data-dir", data / "data", "--output", stats, *common) == 0
    capsys.readouterr()
    out = data / "results" / "metrics.json"
    assert hidit(
        *("evaluate", "--input-dir", folder, "--fid-stats", stats, "--output-json", out, *common),
    ) == 0  # fmt: skip
    found = json.loads(out.read_text())
    assert found["num_images"] == 12
    assert "stand-in" in json.dumps(found)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("--model", "SiT-XXL/1"), 2, "did you mean"),
        (("--batch-size", 0), 2, "--batch-size"),
        (("--exp-name", "../away"), 2, "not the name of a folder"),
        (("--data-dir", "nowhere"), 3, "not a folder"),
        (("--vae-latents-name", "other"), 3, "other"),
        (("--vae-ckpt", "no.safetensors"), 4, "no.safetensors"),
        (("--enc-type", "dinov3"), 2, "dinov3"),
        (("--path-type", "cosine"), 2, "cosine"),
        (("--resume",), 4, "no checkpoint"),
        (("--resume-step", 5), 4, "no checkpoint of step 5; there are: none"),
        (("--continue-train-exp-dir", "x"), 2, "--resume-step"),
        (("--report-to", "mlflow"), 2, "mlflow"),
        (("--gate", 0), 2, "--gate 0 is out of range"),
        (("--adam-beta1", 1), 2, "--adam-beta1 1 is out of range"),
        (("--encoder-depth", 9), 2, "SiT-N/1 has 6 blocks"),
        (("--vae", "f32", "--vae-ckpt", ""), 2, "f32"),
        (("--output-dir", __file__), 3, "takes no files"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(data, tmp_path, capsys, change, code, message):
    flags = train_flags(data, "new", 6, "--ldm-only", "--output-dir", tmp_path, *change)
    assert hidit("train", *flags) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_vae_or_statistics_of_other_latents_are_refused_before_the_first_step(
    data, tmp_path, capsys
):
    other = VaeConfig(channels=8, width=8, multipliers=(1, 1, 2), num_blocks=1, num_groups=4)
    vae = LdmVae(other)
    vae.init_weights(torch.Generator().manual_seed(0))
    save_vae(vae, tmp_path / "other")
    flags = train_flags(data, "new", 6, "--ldm-only", "--output-dir", tmp_path / "exps")
    assert hidit("train", *flags, "--vae-ckpt", tmp_path / "other") == 4
    assert "latents of 8 channels" in capsys.readouterr().err
    (tmp_path / "vae").symlink_to(data / "vae")
    stats = tmp_path / "vae-latents-stats.safetensors"
    save_statistics(stats, np.zeros(8), np.ones(8), "nothing")
    assert hidit("train", *flags, "--vae-ckpt", tmp_path / "vae") == 4
    assert "of 8 channels; the latents have 4" in capsys.readouterr().err
    assert not (tmp_path / "exps").exists()


def test_latents_of_another_vae_or_name_are_told(data, stage1, tmp_path, capsys):
    vae = LdmVae(VAE)
    vae.init_weights(torch.Generator().manual_seed(1))
    save_vae(vae, tmp_path / "other")
    for name in ("tiny.h5", "tiny_h5.json", "tiny_stats.safetensors"):
        (data / "data" / name.replace("tiny", "same")).write_bytes(
            (data / "data" / name).read_bytes()
        )
    start = ("--resume-step", 6, "--continue-train-exp-dir", stage1, "--output-dir", tmp_path)
    assert hidit("train", *train_flags(data, "own", 6, *start)) == 0
    assert "warning" not in capsys.readouterr().err
    more = ("--vae-ckpt", tmp_path / "other", "--vae-latents-name", "same")
    assert hidit("train", *train_flags(data, "other", 6, *start, *more)) == 0
    error = capsys.readouterr().err
    assert "was made with other files than --vae-ckpt" in error
    assert "was trained on the latents tiny" in error


def test_a_mistake_in_a_resume_leaves_the_run_as_it_was(data, stage1, capsys):
    before = {file.name: file.read_bytes() for file in stage1.iterdir() if file.is_file()}
    flags = train_flags(data, "stage1", 5, "--ldm-only", "--resume", "--gate", 0.5)
    assert hidit("train", *flags) == 2
    assert "6 steps behind it" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in stage1.iterdir() if file.is_file()}


def test_a_pickled_vae_names_the_command_that_converts_it(data, tmp_path, capsys):
    (tmp_path / "vae.pt").write_bytes(b"anything")
    flags = train_flags(data, "new", 6, "--output-dir", tmp_path, "--vae-ckpt", tmp_path / "vae.pt")
    assert hidit("train", *flags) == 4
    assert "hidream models convert" in capsys.readouterr().err


def test_a_run_is_not_written_over(data, stage1, capsys):
    assert hidit("train", "--ldm-only", *train_flags(data, "stage1", 6)) == 2
    assert "already holds a run" in capsys.readouterr().err
