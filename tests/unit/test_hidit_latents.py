"""Cached latents: the same file whoever made it, and never of other pictures than it says."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from hidream.cli import main
from hidream.data import h5, part
from hidream.data.latents import cache_latents, stats_file
from hidream.data.preprocess import preprocess
from hidream.errors import InputError, UsageError
from hidream.train.distributed import launched

NUM, SIZE, BATCH = 22, 16, 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test switches the power off
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


def make_data(folder, seed=0, num=NUM, resolution=SIZE):
    """images.h5 of `num` made-up pictures; one file is damaged, so that a number is missing."""
    source = folder / "source"
    for index in range(num):
        picture = np.random.default_rng([seed, index]).integers(0, 256, (16, 16, 3), np.uint8)
        file = source / f"c{index % 3}" / f"i{index:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    (source / "c1" / "i001.png").write_bytes(b"")
    preprocess(source, folder / "data", resolution)
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def encode(pictures):
    """A stand-in for a VAE: 16 pixels' mean and deviation, as 3 channels a quarter as large."""
    assert pictures.dtype == torch.float32
    assert -1 <= pictures.min() < pictures.max() <= 1
    blocks = pictures.unflatten(3, (-1, 4)).unflatten(2, (-1, 4))
    return blocks.mean((3, 5)), blocks.std((3, 5))


def cache(data, out, name="vae", world=1, late=0.0, **options):
    """`cache_latents` by `world` threads that stand for processes, all but the first `late`."""
    barrier = threading.Barrier(world)
    found, errors = {}, []

    def wait(rank):
        barrier.wait()
        time.sleep(late if rank else 0)

    def run(rank):
        try:
            found[rank] = cache_latents(
                data,
                out,
                name,
                options.get("encode", encode),
                batch_size=BATCH,
                rank=rank,
                world=world,
                barrier=lambda: wait(rank),
                **{key: value for key, value in options.items() if key != "encode"},
            )
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    assert len({str(one) for one in found.values()}) == 1
    return found[0]


def content(folder, name="vae"):
    files = (f"{name}.h5", f"{name}_h5.json", f"{name}_stats.safetensors")
    return {file: (folder / file).read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    cache(data, folder)
    return folder


def test_the_file_is_of_the_published_format(data, whole):
    names = json.loads((whole / "vae_h5.json").read_text())
    pictures = [n for n in json.loads((data / "images_h5.json").read_text()) if n.endswith(".png")]
    assert len(pictures) == NUM - 1
    keys = [n.replace("img", "img-mean-std-").replace(".png", ".npy") for n in pictures]
    assert names == [*keys, "dataset.json"]
    with h5py.File(whole / "vae.h5") as file, h5py.File(data / "images.h5") as images:
        visited = []
        file.visit(visited.append)
        assert set(visited) == {*names, "00000"}
        labels = json.loads(np.array(file["dataset.json"]).tobytes())["labels"]
        theirs = json.loads(np.array(images["dataset.json"]).tobytes())["labels"]
        assert labels == [[key, label] for key, (_, label) in zip(keys, theirs, strict=True)]
        for picture, key in zip(pictures, keys, strict=True):
            pixels = h5.read_image(images, picture)
            mean, std = encode(torch.tensor(pixels[None]) / 127.5 - 1)
            assert (file[key].dtype, file[key].shape) == (np.float32, (6, 4, 4))
            assert np.allclose(file[key][()], torch.cat([mean, std], 1)[0], atol=1e-6)


def test_who_comes_late_still_takes_its_share(data, whole, tmp_path):
    """What is left is looked up before anybody makes it less."""
    cache(data, tmp_path, world=3, late=0.3)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_is_not_seen(data, whole, tmp_path, world):
    found = cache(data, tmp_path, world=world)
    assert (found.num_latents, found.shape, found.was_there) == (NUM - 1, (6, 4, 4), False)
    assert content(tmp_path) == content(whole)
    assert not list(tmp_path.glob(".*"))


def in_processes(size, work):
    """Run `work(world)` in `size` forks of this process, as torchrun starts them; exit codes."""

    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with launched() as world:
            work(world)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def cache_here(data, out, world, on_progress=None):
    cache_latents(
        data,
        out,
        "vae",
        encode,
        batch_size=BATCH,
        rank=world.rank,
        world=world.size,
        barrier=world.barrier,
        on_progress=on_progress,
    )


def test_processes_of_a_launcher(data, whole, tmp_path):
    assert in_processes(2, lambda world: cache_here(data, tmp_path, world)) == [0, 0]
    assert content(tmp_path) == content(whole)


def test_a_killed_run_is_continued_by_more_processes(data, whole, tmp_path):
    def kill(num_done, _):
        if num_done == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    codes = in_processes(1, lambda world: cache_here(data, tmp_path, world, kill))
    assert codes == [-signal.SIGKILL]
    assert not list(tmp_path.glob("vae*"))
    log = tmp_path / ".vae-part" / "done-0.jsonl"
    with log.open("ab") as file:
        file.write(b'{"first": 8, "su')  # and killed while it noted a third batch
    seen = []
    cache(data, tmp_path, world=2, on_progress=lambda *done: seen.append(done))
    assert sorted(seen) == [(4, 5), (4, 8), (5, 5), (8, 8)]  # 13 of 21, by two
    assert content(tmp_path) == content(whole)


def interrupt(data, out, **options):
    """Leave a cache half done."""
    calls = []

    def encode_some(pictures):
        calls.append(None)
        if len(calls) > 3:
            raise KeyError("stop")
        return encode(pictures)

    with pytest.raises(KeyError, match="stop"):
        cache(data, out, encode=encode_some, **options)
    assert len(list(part.records(out / ".vae-part"))) == 2


@pytest.mark.parametrize("changed", ["images", "made_by"])
def test_what_was_begun_from_another_source_starts_anew(data, whole, tmp_path, caplog, changed):
    other = make_data(tmp_path, seed=1) if changed == "images" else data
    interrupt(other, tmp_path / "out", made_by="" if changed == "images" else "another")
    cache(data, tmp_path / "out")
    assert f"another {changed}" in caplog.text
    assert content(tmp_path / "out") == content(whole)


def test_a_finished_file_is_left_alone_or_refused(data, whole, tmp_path):
    other = make_data(tmp_path, seed=1)
    cache(data, tmp_path, made_by="a")
    before = (tmp_path / "vae.h5").stat().st_mtime_ns
    assert cache(data, tmp_path, made_by="a", world=2).was_there
    assert (tmp_path / "vae.h5").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"made from another images\.h5"):
        cache(other, tmp_path, made_by="a")
    with pytest.raises(InputError, match="another VAE"):
        cache(data, tmp_path, made_by="b")
    assert not cache(other, tmp_path, overwrite=True, world=2).was_there
    assert content(tmp_path) != content(whole)
    with h5py.File(tmp_path / "vae.h5", "r+") as file:
        del file.attrs["hidream"]
    with pytest.raises(InputError, match="of another make"):
        cache(data, tmp_path)


def test_a_copy_of_the_pictures_is_the_same(data, tmp_path):
    cache(data, tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("images.h5", "images_h5.json"):
        (copy / name).write_bytes((data / name).read_bytes())
    assert cache(copy, tmp_path).was_there
    assert h5.fingerprint(h5.read_listing(copy, "images")) == h5.fingerprint(
        h5.read_listing(data, "images")
    )


def test_a_fingerprint_of_another_make_sees_the_pictures(data, tmp_path):
    (tmp_path / "images_h5.json").write_bytes((data / "images_h5.json").read_bytes())
    found = set()
    for change in (0, 1):
        (tmp_path / "images.h5").write_bytes((data / "images.h5").read_bytes())
        with h5py.File(tmp_path / "images.h5", "r+") as file:
            del file.attrs["hidream"]
            item = file["00000/img00000003.png"]
            place = item.id.get_offset() + 200
        with open(tmp_path / "images.h5", "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ change]))
        found.add(h5.fingerprint(h5.read_listing(tmp_path, "images")))
    assert len(found) == 2


def test_statistics_are_those_of_samples(whole):
    with h5py.File(whole / "vae.h5") as file:
        names = json.loads((whole / "vae_h5.json").read_text())[:-1]
        moments = np.stack([file[name][()] for name in names]).astype(np.float64)
    mean, std = np.split(moments, 2, axis=1)
    noise = np.random.default_rng(0).standard_normal((200, *mean.shape))
    samples = np.moveaxis(mean + std * noise, 2, 0).reshape(3, -1)
    found = load_file(stats_file(whole, "vae"))
    assert {name: value.shape for name, value in found.items()} == {
        "latents_bias": (1, 3, 1, 1),
        "latents_scale": (1, 3, 1, 1),
    }
    assert np.allclose(found["latents_bias"].ravel(), mean.mean((0, 2, 3)), atol=1e-7)
    assert np.allclose(found["latents_scale"].ravel(), 1 / samples.std(1), rtol=5e-3)
    assert not np.allclose(found["latents_scale"].ravel(), 1 / mean.std((0, 2, 3)), rtol=0.1)


def test_latents_that_are_not_finite_are_named(data, tmp_path):
    calls = []

    def overflow(pictures):
        calls.append(None)
        mean, std = encode(pictures)
        if len(calls) == 3:
            mean[2, 0, 0, 0] = float("nan")
        return mean, std

    with pytest.raises(InputError, match=r"img00000006\.png are not finite"):
        cache(data, tmp_path, encode=overflow)
    assert not list(tmp_path.glob("vae*"))


def test_a_full_disk_leaves_no_half_file(data, whole, tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def full(*arguments):
        calls.append(None)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(part.os, "pwrite", full)
        with pytest.raises(InputError, match="No space left on device"):
            cache(data, tmp_path)
    assert not list(tmp_path.glob("vae*"))
    cache(data, tmp_path)
    assert content(tmp_path) == content(whole)


def test_refusals(data, tmp_path):
    for name in ("", "images", "a/b", "..", ".hidden"):
        with pytest.raises(UsageError, match="no name for latents"):
            cache(data, tmp_path, name=name)
    with pytest.raises(UsageError, match="batch_size"):
        cache_latents(data, tmp_path, "vae", encode, batch_size=0)
    with pytest.raises(InputError, match=r"images\.h5 does not exist"):
        cache(tmp_path, tmp_path)
    (tmp_path / "images.h5").write_bytes(b"no h5")
    with pytest.raises(InputError, match="no whole h5 file"):
        cache(tmp_path, tmp_path)
    (tmp_path / "images.h5").unlink()
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["00000/img00000000.png"] = np.array(b"png", dtype="S")
    with pytest.raises(InputError, match="never finished"):
        cache(tmp_path, tmp_path)
    with h5py.File(tmp_path / "images.h5", "r+") as file:
        file["dataset.json"] = np.array(b'{"labels": []}', dtype="S")
    with pytest.raises(InputError, match=r"no images_h5\.json"):
        cache(tmp_path, tmp_path)
    (tmp_path / "images_h5.json").write_text('["00000/img00000000.png", "00000/img00000001.png"]')
    with pytest.raises(InputError, match=r"does not hold 00000/img00000001\.png"):
        cache(tmp_path, tmp_path)
    (tmp_path / "images_h5.json").write_text('["00000/img00000000.png"]')
    with pytest.raises(InputError, match="no whole PNG"):
        cache(tmp_path, tmp_path)


def test_the_command(data, tmp_path, capsys, monkeypatch):
    vae = SimpleNamespace(moments=encode)
    asked = []
    stub = SimpleNamespace(load_vae=lambda *given: (asked.append(given), vae)[1])
    monkeypatch.setitem(sys.modules, "hidream.models.hidit.vae", stub)
    weights = tmp_path / "vae.safetensors"
    weights.write_bytes(b"weights")
    flags = ["--data-dir", str(data), "--output-dir", str(tmp_path), "--vae-arch", "f8d4"]
    flags += ["--vae-ckpt-path", str(weights), "--vae-latents-name", "small"]
    flags += ["--pproc-batch-size", "4", "--device", "cpu"]
    assert main(["hidit", "cache-latents", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "small.h5")
    assert f"{NUM - 1}/{NUM - 1} pictures" in err
    assert asked == [(weights, "f8d4", torch.device("cpu"), torch.float32)]
    assert main(["hidit", "cache-latents", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_there"] is True
    weights.write_bytes(b"other weights")
    assert main(["hidit", "cache-latents", *flags]) == 3
    assert "another VAE" in capsys.readouterr().err
