"""`hidream hidit sample`: one folder, whoever draws it and however often that is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from hidream.cli.hidit import sample
from hidream.cli.main import main
from hidream.errors import InputError
from hidream.models.hidit.config import HIDIT_TINY
from hidream.models.hidit.vae import VaeConfig, new_vae
from hidream.pipelines import hidit_folder
from hidream.pipelines.hidit import labels_for
from hidream.pipelines.hidit_folder import Writer, batches_to_draw, folder_name, prepare

NAME = "stage2_0000020_cfg1.0-0.0-1.0-labelsampling-equal"


class Stub:
    """A network of sums and products alone: its bits hang on no batch."""

    config = HIDIT_TINY

    def denormalise(self, latents):
        return latents

    def __call__(self, x_t, sigma, labels, pixels=None, *, rows=None, pixel_sigma=None):
        label = labels[:, None, None, None].to(x_t)
        velocity = x_t * (0.25 + 0.0625 * label)
        x0 = None if pixels is None else 0.5 * pixels + 0.125 * label - 0.25
        return SimpleNamespace(velocity=velocity, pixels=x0)


def decode(latents):
    """(b, 4, 4, 4) to (b, 3, 32, 32)."""
    return 0.5 * latents[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.fixture
def exp(tmp_path):
    """A run as `hidream hidit train` leaves it; its weights are told apart, and not read."""
    return write_run(tmp_path / "exps" / "stage2")


def write_vae(file, seed=0, channels=4):
    """A real VAE, of 8x8 pixels a latent."""
    config = VaeConfig(channels=channels, width=8, multipliers=(1,) * 4, num_blocks=1, num_groups=8)
    save_tensors(new_vae(config, torch.Generator().manual_seed(seed)).state_dict(), file)
    return file


def write_run(folder, **args):
    folder.mkdir(parents=True)
    vae = write_vae(folder / "vae.safetensors")
    (folder / "config.json").write_text(json.dumps(HIDIT_TINY.to_dict()))
    args = {"ldm_only": False, "vae": "f16d32", "vae_ckpt": str(vae), **args}
    (folder / "args.json").write_text(json.dumps(args))
    for step in (10, 20):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        tensors = {"x": np.full(1, step, np.float32), "pixel_x": np.zeros(1, np.float32)}
        save_file(tensors, checkpoint / "ema.safetensors")
    return folder


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The stub instead of the run's network; counts how often one was loaded."""
    found = []

    def load(source, *_):
        found.append(source)
        return Stub(), decode

    monkeypatch.setattr(sample, "_load", load)
    return found


def arguments(exp, out, *more, num=10):
    flags = {"--exp-path": exp, "--sample-dir": out, "--num-fid-samples": num}
    flags |= {"--num-steps": 4, "--pproc-batch-size": 4}
    return [str(text) for pair in flags.items() for text in pair] + ["--skip-npz", *map(str, more)]


def draw(exp, out, *more, num=10):
    """Run the command; the pictures' bytes by name."""
    assert sample.run(arguments(exp, out, *more, num=num)) == 0
    (options,) = Path(out).glob("*/options.json")
    return contents(options.parent)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def refused(argv, capsys):
    """Exit code and what was said, through the whole command line."""
    code = main(["hidit", "sample", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unexpected" not in captured.err
    return code, captured.err


# What it writes


def test_names_pictures_and_folder_as_published(exp, tmp_path, capsys):
    pictures = draw(exp, tmp_path / "samples")
    assert list(pictures) == [f"{i:06d}.png" for i in range(10)]
    assert capsys.readouterr().out == f"{tmp_path / 'samples' / NAME}\n"
    with Image.open(tmp_path / "samples" / NAME / "000003.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (32, 32))
    assert len(set(pictures.values())) == 10


def test_the_readmes_folder_name():
    name = folder_name("hidit-imagenet256-stage2-pixel", 450_000, 2.4, 0, 1, "equal")
    assert name == "hidit-imagenet256-stage2-pixel_0450000_cfg2.4-0.0-1.0-labelsampling-equal"
    assert folder_name("x", 4_020_000, 2, 0.25, 0.73, "random") == (
        "x_4020000_cfg2.0-0.25-0.73-labelsampling-random"
    )


def test_takes_every_flag_of_the_readme(exp, tmp_path, capsys):
    flags = "--mode sde --num-steps 4 --cfg-scale 2.4 --guidance-low 0.0 --guidance-high 1.0"
    flags += " --label-sampling equal --train-steps 10 --pproc-batch-size 32 --skip-npz"
    draw(exp, tmp_path / "samples", *flags.split())
    name = "stage2_0000010_cfg2.4-0.0-1.0-labelsampling-equal"
    assert capsys.readouterr().out == f"{tmp_path / 'samples' / name}\n"


def test_json_says_what_was_done(exp, tmp_path, capsys):
    draw(exp, tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "folder": str(tmp_path / NAME),
        "npz": None,
        "num_samples": 10,
        "num_drawn": 10,
        "step": 20,
    }


def test_the_npz_holds_the_pictures(exp, tmp_path):
    argv = [flag for flag in arguments(exp, tmp_path) if flag != "--skip-npz"]
    assert sample.run(argv) == 0
    file = tmp_path / f"{NAME}.npz"
    with np.load(file) as archive:
        assert list(archive) == ["arr_0"]
        found = archive["arr_0"]
    assert (found.dtype, found.shape) == (np.uint8, (10, 32, 32, 3))
    for index, picture in enumerate(found):
        with Image.open(tmp_path / NAME / f"{index:06d}.png") as image:
            assert np.array_equal(np.asarray(image), picture)
    before = file.stat().st_mtime_ns
    assert sample.run(argv) == 0
    assert file.stat().st_mtime_ns == before, "whole, so not written again"
    (tmp_path / NAME / "000002.png").unlink()
    assert sample.run(argv) == 0
    assert file.stat().st_mtime_ns > before
    assert not list(tmp_path.rglob("*.tmp"))


# The same pictures, whoever draws them


def run_world(monkeypatch, size, argv):
    """The command in `size` threads that meet at real barriers, each a process's part."""
    here, barrier = threading.local(), threading.Barrier(size)
    failures = []

    @contextmanager
    def launched(device):
        yield SimpleNamespace(
            rank=here.rank,
            size=size,
            device=device,
            main=here.rank == 0,
            barrier=lambda: barrier.wait(timeout=60),
        )

    def one(rank):
        here.rank = rank
        try:
            assert sample.run(argv) == 0
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    def late(folder, look=hidit_folder.drawn):
        time.sleep(0.1 * (here.rank == 1))  # long enough for others to draw meanwhile
        return look(folder)

    monkeypatch.setattr("hidream.train.distributed.launched", launched)
    monkeypatch.setattr(hidit_folder, "drawn", late)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("size", [2, 8])
def test_any_number_of_processes_draws_the_same_bytes(exp, tmp_path, monkeypatch, size, capsys):
    alone = draw(exp, tmp_path / "alone", "--cfg-scale", 2, num=37)
    capsys.readouterr()
    run_world(monkeypatch, size, arguments(exp, tmp_path / "many", "--cfg-scale", 2, num=37))
    (folder,) = (tmp_path / "many").iterdir()
    assert contents(folder) == alone
    assert len(alone) == 37
    assert capsys.readouterr().out == f"{folder}\n", "one process speaks"


def test_any_batch_size_draws_the_same_bytes(exp, tmp_path):
    """Of this network. A real one may round batches of another size in another way."""
    by_four = draw(exp, tmp_path / "a")
    assert draw(exp, tmp_path / "b", "--pproc-batch-size", 1) == by_four
    assert draw(exp, tmp_path / "c", "--pproc-batch-size", 32) == by_four
    assert draw(exp, tmp_path / "d", "--seed", 1) != by_four


def test_batches_are_cut_in_one_way_and_shared_out_whole():
    there = {0, 1, 2, 3, 5, 11}
    alone = batches_to_draw(14, 4, there)
    assert alone == [range(4, 8), range(8, 12), range(12, 14)]
    shares = [batches_to_draw(14, 4, there, rank, 2) for rank in range(2)]
    assert shares == [[range(4, 8), range(12, 14)], [range(8, 12)]]
    assert batches_to_draw(14, 4, set(range(14))) == []


@pytest.mark.parametrize("world", [1, 2, 8])
def test_fifty_of_each_class_for_any_number_of_processes(world):
    """The published number: 50,000 pictures of 1000 classes."""
    labels = labels_for(50_000, 1000, "equal", 0)
    shares = [batches_to_draw(50_000, 32, set(), rank, world) for rank in range(world)]
    shown = np.concatenate([labels[b.start : b.stop] for share in shares for b in share])
    assert np.bincount(shown, minlength=1000).tolist() == [50] * 1000
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_number_that_is_no_multiple_of_the_classes_is_told_and_drawn(exp, tmp_path, capsys):
    assert len(draw(exp, tmp_path, num=7)) == 7
    assert "warning: 7 pictures are no multiple of the 5 classes" in capsys.readouterr().err
    draw(exp, tmp_path / "random", "--label-sampling", "random", num=7)
    assert "multiple" not in capsys.readouterr().err


# Stopped and gone on with


def test_only_what_is_missing_is_written(exp, tmp_path, loaded, capsys):
    whole = draw(exp, tmp_path)
    folder = tmp_path / NAME
    (folder / "000001.png").unlink()
    (folder / "000009.png").write_bytes(b"")  # what a crash of the machine may leave
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    capsys.readouterr()
    assert draw(exp, tmp_path) == whole
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert {name for name in after if after[name] != before.get(name)} == {
        "000001.png",
        "000009.png",
    }
    assert "8 of 10 pictures are there already." in capsys.readouterr().err
    draw(exp, tmp_path)
    assert len(loaded) == 2, "a whole folder needs no network"


def test_more_pictures_go_on_from_fewer(exp, tmp_path, capsys):
    few = draw(exp, tmp_path, num=5)
    many = draw(exp, tmp_path, num=15)
    assert many.items() >= few.items()
    assert draw(exp, tmp_path / "b", num=15) == many
    draw(exp, tmp_path, num=5)
    assert f"{NAME} holds 10 pictures beyond these" in capsys.readouterr().err


KILLED = """
import sys
sys.path[:0] = {paths}
from tests.unit import test_hidit_sample_cli as t
import time
class Slow(t.Stub):
    def __call__(self, *a, **k):
        time.sleep(0.02)
        return super().__call__(*a, **k)
t.sample._load = lambda *_: (Slow(), t.decode)
t.sample.run({argv})
"""


def test_after_a_kill_it_goes_on(exp, tmp_path):
    expected = draw(exp, tmp_path / "whole", num=40)
    out = tmp_path / "killed"
    argv = arguments(exp, out, num=40)
    code = KILLED.format(paths=[str(Path(__file__).parents[2])], argv=argv)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*/*.png"))) < 5 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = contents(out / NAME)
    assert 5 <= len(left) < 40
    assert left.items() <= expected.items(), "what has its name is whole"
    assert draw(exp, out, num=40) == expected


def test_half_written_files_are_removed_once_they_are_old(tmp_path):
    new, old = tmp_path / ".hidream-new.tmp", tmp_path / ".hidream-old.tmp"
    for file in (new, old):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    prepare(tmp_path, {})
    assert new.exists(), "another process may be writing it"
    assert not old.exists()


# Folders are not mixed


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--num-steps", "5"], "num-steps 4, not 5"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--mode", "ode"], "mode sde, not ode"),
        (["--output", "vae"], "output pixels, not vae"),
        (["--pixel-cfg-scale", "1.5"], "pixel-cfg-scale None, not 1.5"),
        (["--dtype", "bf16"], "dtype float32, not bfloat16"),
        (["--num-steps", "5", "--seed", "1"], "seed 0, not 1, num-steps 4, not 5"),
    ],
)
def test_other_options_are_refused_by_name(exp, tmp_path, more, difference, loaded, capsys):
    draw(exp, tmp_path)
    capsys.readouterr()
    code, said = refused(arguments(exp, tmp_path, *more), capsys)
    assert code == 3
    assert f"error: the pictures in {tmp_path / NAME} were drawn with {difference}" in said
    assert len(loaded) == 1, "found before any weight is read"


def test_other_weights_or_vae_are_refused(exp, tmp_path, capsys):
    draw(exp, tmp_path)
    capsys.readouterr()
    vae = write_vae(exp / "vae.safetensors", seed=1)
    assert re.search(
        r"drawn with vae \w{16}, not \w{16}\.", refused(arguments(exp, tmp_path), capsys)[1]
    )
    write_vae(vae)
    weights = exp / "checkpoints" / "step-00000020" / "ema.safetensors"
    save_file({"x": np.ones(1, np.float32), "pixel_x": np.zeros(1, np.float32)}, weights)
    assert "drawn with weights" in refused(arguments(exp, tmp_path), capsys)[1]


def test_pictures_of_unknown_origin_are_left_alone(exp, tmp_path, capsys):
    for text in (None, "[", "[]"):
        draw(exp, tmp_path)
        options = tmp_path / NAME / "options.json"
        options.unlink() if text is None else options.write_text(text)
        capsys.readouterr()
        code, said = refused(arguments(exp, tmp_path), capsys)
        assert code == 3
        assert "holds pictures, but no options.json that says how they were drawn" in said
        for file in (tmp_path / NAME).iterdir():
            file.unlink()


def test_a_folder_without_pictures_may_change_its_mind(exp, tmp_path, monkeypatch):
    """As after a run that found its VAE broken."""
    monkeypatch.setattr(sample, "_load", lambda *_: (_ for _ in ()).throw(InputError("broken")))
    with pytest.raises(InputError):
        sample.run(arguments(exp, tmp_path))
    monkeypatch.setattr(sample, "_load", lambda *_: (Stub(), decode))
    draw(exp, tmp_path, "--num-steps", 5)


# What it draws with


def test_a_missing_step_names_those_there_are(exp, tmp_path, capsys):
    code, said = refused(arguments(exp, tmp_path, "--train-steps", 450_000), capsys)
    assert code == 4
    assert f"{exp} has no checkpoint of step 450000; it has 10, 20." in said
    for step in range(30, 200, 10):
        folder = exp / "checkpoints" / f"step-{step:08d}"
        folder.mkdir()
        (folder / "ema.safetensors").write_bytes(b"")
    said = refused(arguments(exp, tmp_path, "--train-steps", 450_000), capsys)[1]
    assert "it has 10, 20, 30, …, 160, 170, 180, 190." in said


def test_a_checkpoint_being_written_is_none(exp, tmp_path, capsys):
    (exp / "checkpoints" / "step-00000030").mkdir()
    (exp / "checkpoints" / ".step-00000040.77").mkdir()
    draw(exp, tmp_path)
    assert NAME in capsys.readouterr().out


def test_a_saved_model_is_drawn_from_too(exp, tmp_path, capsys):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text((exp / "config.json").read_text())
    save_file({"pixel_x": np.zeros(1, np.float32)}, saved / "model.safetensors")
    code, said = refused(arguments(saved, tmp_path / "out"), capsys)
    assert code == 2
    assert "saved does not say which VAE it was trained with" in said
    draw(saved, tmp_path / "out", "--vae", exp / "vae.safetensors", "--train-steps", 7)
    assert "saved_0000007_cfg" in capsys.readouterr().out


def test_a_run_of_stage_one_draws_what_its_latents_decode_to(tmp_path, capsys):
    exp = write_run(tmp_path / "stage1", ldm_only=True)
    draw(exp, tmp_path / "out")
    said = capsys.readouterr().err
    assert "stage1 was trained with --ldm-only: what its latents decode to is drawn" in said
    options = next((tmp_path / "out").glob("*/options.json"))
    assert json.loads(options.read_text())["output"] == "vae"
    code, said = refused(arguments(exp, tmp_path / "out", "--output", "pixels"), capsys)
    assert code == 2
    assert "was trained with --ldm-only." in said


def test_weights_without_a_pixel_branch_draw_latents_too(exp, tmp_path, capsys):
    weights = exp / "checkpoints" / "step-00000020" / "ema.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, weights)
    draw(exp, tmp_path)
    assert "stage2 has no weights of a pixel branch" in capsys.readouterr().err


def test_the_rescaled_clock_needs_no_vae(exp, tmp_path):
    config = {**HIDIT_TINY.to_dict(), "pixel_clock": "rescaled"}
    (exp / "config.json").write_text(json.dumps(config))
    (exp / "vae.safetensors").unlink()
    draw(exp, tmp_path)
    options = json.loads((tmp_path / NAME / "options.json").read_text())
    assert options["vae"] is None


def break_config(exp):
    (exp / "config.json").write_text("{}")


def break_args(exp):
    (exp / "args.json").write_text("{")


def break_weights(exp):
    (exp / "checkpoints" / "step-00000020" / "ema.safetensors").write_bytes(b"no tensors")


def remove_vae(exp):
    (exp / "vae.safetensors").unlink()


def other_vae(exp):
    write_vae(exp / "vae.safetensors", channels=8)


def break_vae(exp):
    save_file({"x": np.zeros(1, np.float32)}, exp / "vae.safetensors")


def raw_vae(exp):
    (exp / "vae.pt").write_bytes(b"a pickle")
    (exp / "args.json").write_text(json.dumps({"vae_ckpt": str(exp / "vae.pt")}))


def remove_config(exp):
    (exp / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_config, "config.json is not a Hi-DiT configuration"),
        (remove_config, "config.json cannot be read: No such file"),
        (break_args, "args.json cannot be read: it is not a JSON object"),
        (break_weights, "ema.safetensors is not a safetensors file"),
        (remove_vae, "vae.safetensors does not exist"),
        (other_vae, "latents of 8 channels, one for 8 pixels; the network's have 4, one for 8."),
        (break_vae, "are not those of a VAE"),
        (raw_vae, "hidream models convert"),
    ],
)
def test_what_is_not_whole_is_told_before_anything_is_written(exp, tmp_path, capsys, harm, message):
    harm(exp)
    code, said = refused(arguments(exp, tmp_path / "out"), capsys)
    assert code == 4
    assert message in said
    assert len(said.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--exp-path", "nowhere"], 4, "nowhere is not a folder"),
        (["--exp-path", "."], 4, "holds neither checkpoints/step-N/ema.safetensors nor"),
        (["--mode", "sed"], 2, 'unknown mode "sed"; did you mean "sde"'),
        (["--label-sampling", "equall"], 2, 'did you mean "equal"'),
        (["--output", "vea"], 2, 'did you mean "vae"'),
        (["--num-fid-samples", "0"], 2, "--num-fid-samples 0 is not between 1"),
        (["--pproc-batch-size", "-1"], 2, "--pproc-batch-size -1 is not between 1"),
        (["--seed", str(2**31)], 2, "is not between 0 and 2147483647"),
        (["--cfg-scale", "nan"], 2, "cfg-scale nan is not between"),
        (["--guidance-low", "0.9", "--guidance-high", "0.1"], 2, "no interval in [0, 1]"),
        (["--mode", "ode", "--num-steps", "2"], 2, "never meets the gate of the pixels, 0.3"),
        (["--heun"], 2, "heun is a way to solve the ODE"),
        (["--device", "gpu"], 2, 'unknown device "gpu"'),
        (["--num-step", "4"], 2, 'did you mean "--num-steps"'),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    exp, tmp_path, capsys, monkeypatch, more, code, message
):
    monkeypatch.chdir(tmp_path)
    found, said = refused(arguments(exp, tmp_path / "out", *more), capsys)
    assert (found, message in said) == (code, True), said
    assert not (tmp_path / "out").exists()


# Writing


def test_an_error_of_a_writer_is_told_in_one_line(exp, tmp_path, monkeypatch, capsys):
    def full(image, path, *, overwrite):
        raise InputError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr(hidit_folder, "write_picture", full)
    code, said = refused(arguments(exp, tmp_path), capsys)
    assert code == 3
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]


def test_a_folder_that_cannot_be_written_to_is_told(exp, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, said = refused(arguments(exp, tmp_path / "file"), capsys)
    assert code == 3
    assert "Not a directory" in said


PICTURE = np.zeros((8, 8, 3), np.uint8)


def put_many(writer, folder, put):
    with writer:
        for index in range(100):
            writer.put(folder / f"{index}.png", PICTURE)
            put.append(index)


def test_an_error_stops_the_next_put(tmp_path):
    put = []
    with pytest.raises(InputError, match="cannot write"):
        put_many(Writer(num_threads=1, most_waiting=1), tmp_path / "nowhere", put)
    assert put[-1] < 5


def test_an_error_of_the_last_picture_is_raised_at_the_end(tmp_path):
    with pytest.raises(InputError, match="cannot write"), Writer() as writer:
        writer.put(tmp_path / "nowhere" / "0.png", PICTURE)


def test_no_more_pictures_wait_than_allowed(tmp_path, monkeypatch):
    begun, go_on = [], threading.Event()

    def slow(image, path, *, overwrite):
        begun.append(path)
        go_on.wait(30)

    monkeypatch.setattr(hidit_folder, "write_picture", slow)
    put = []
    with Writer(num_threads=2, most_waiting=5) as writer:

        def fill():
            for index in range(9):
                writer.put(tmp_path / f"{index}.png", PICTURE)
                put.append(index)

        thread = threading.Thread(target=fill)
        thread.start()
        deadline = time.monotonic() + 30
        while len(put) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(put) == 5, "the sixth waits"
        assert len(begun) == 2
        go_on.set()
        thread.join()
    assert len(begun) == 9


def test_help_needs_no_torch():
    code = (
        "import sys; from hidream.cli.main import main; main(['hidit', 'sample', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for flag in ("--exp-path", "--train-steps", "--sample-dir", "--num-fid-samples", "--skip-npz"):
        assert flag in found.stdout
