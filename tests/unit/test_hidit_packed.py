"""The packed arrays: what the h5 files hold, paired by name, made once, safe in many processes."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import threading

import h5py
import numpy as np
import pytest

from hidream.cli import main
from hidream.data import h5, packed
from hidream.data.packed import Packed, check_pairs, open_packed, pack
from hidream.errors import InputError, UsageError

NUM, SIZE = 11, 8


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(packed, "CHUNK", 4)


def write_h5(folder, stem, items, labels):
    """An h5 file as the published scripts write it, by h5py's own plain calls."""
    with h5py.File(folder / f"{stem}.h5", "w") as file:
        for name, value in items.items():
            file[name] = value
        pairs = [[name, int(label)] for name, label in zip(items, labels, strict=True)]
        file["dataset.json"] = np.array(json.dumps({"labels": pairs}).encode(), dtype="S")
    (folder / f"{stem}_h5.json").write_text(json.dumps([*items, "dataset.json"]))


def make_data(folder, seed=0, images=range(NUM), latents=range(NUM), shift=0):
    from PIL import Image

    from hidream.data.preprocess import png_bytes

    folder.mkdir(parents=True, exist_ok=True)
    pixels = {i: np.random.default_rng([seed, i]).integers(0, 256, (SIZE, SIZE, 3)) for i in images}
    pictures = {
        h5.image_name(i): np.array(png_bytes(Image.fromarray(one.astype(np.uint8))), dtype="S")
        for i, one in pixels.items()
    }
    moments = {
        h5.latents_name(h5.image_name(i)): np.random.default_rng([seed, i, 1])
        .standard_normal((4, 2, 3))
        .astype(np.float32)
        for i in latents
    }
    write_h5(folder, "images", pictures, [i % 3 for i in images])
    write_h5(folder, "vae", moments, [(i + shift) % 3 for i in latents])
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


def expected(data):
    with h5py.File(data / "images.h5") as file:
        images = np.stack([h5.read_image(file, h5.image_name(i)) for i in range(NUM)])
    with h5py.File(data / "vae.h5") as file:
        names = [h5.latents_name(h5.image_name(i)) for i in range(NUM)]
        moments = np.stack([file[name][()] for name in names])
    return images, moments


def test_it_holds_what_the_h5_files_hold(data):
    found = open_packed(data, "vae")
    images, moments = expected(data)
    indices = np.array([10, 0, 3, 3])
    assert (len(found), found.resolution, found.num_classes) == (NUM, SIZE, 3)
    assert found.moments_shape == (NUM, 4, 2, 3)
    assert np.array_equal(found.images(indices), images[indices])
    assert found.images(indices).dtype == np.uint8
    assert np.array_equal(found.moments(indices), moments[indices].astype(np.float16))
    assert found.moments(indices).dtype == np.float32
    assert found.labels.tolist() == [i % 3 for i in range(NUM)]
    assert found.images([]).shape == (0, 3, SIZE, SIZE)
    for index in (NUM, -1):
        with pytest.raises(IndexError, match=f"item {index} of {NUM}"):
            found.images([index])
    exact = open_packed(data, "vae", dtype="float32")
    assert np.array_equal(exact.moments(indices), moments[indices])


def test_pictures_alone(data):
    found = open_packed(data, None)
    assert found.folder == data / "packed"
    assert np.array_equal(found.images([4]), expected(data)[0][[4]])
    with pytest.raises(UsageError, match="no latents"):
        found.moments([0])


def test_workers_make_the_same(data, tmp_path):
    files = ("images.uint8", "moments.fp16", "labels.int64", "meta.json")
    one = pack(data, "vae").folder.rename(tmp_path / "one")
    two = pack(data, "vae", num_workers=2).folder
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert sorted(path.name for path in two.iterdir()) == sorted(files)


def state(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_it_is_made_once_and_again_when_stale(data, monkeypatch, caplog):
    folder = open_packed(data, "vae").folder
    assert "packing 11 items" in caplog.text
    first = state(folder)
    open_packed(data, "vae")
    assert state(folder) == first
    frozen = pickle.dumps(Packed(folder))
    os.utime(data / "vae.h5")  # the same bytes, copied or touched
    with monkeypatch.context() as patch:
        open_packed(data, "vae")
        patch.setattr(h5, "fingerprint", lambda _: 1 / 0)  # one closer look was enough
        open_packed(data, "vae")
    del first["meta.json"]
    assert state(folder).items() >= first.items()
    pickle.loads(frozen)
    make_data(data, seed=1)
    before = Packed(folder).images([0])
    found = open_packed(data, "vae")
    assert "has changed since" in caplog.text
    assert not state(folder).items() & first.items()
    assert np.array_equal(found.images(range(NUM)), expected(data)[0])
    assert not np.array_equal(found.images([0]), before)
    (folder / "meta.json").write_text("{")  # damaged: as if it were not there
    assert np.array_equal(open_packed(data, "vae").images([0]), found.images([0]))
    assert open_packed(data, "vae", dtype="float32").meta["dtype"] == "float32"


def test_the_h5_files_may_go_once_all_is_packed(data):
    open_packed(data, "vae")
    for name in ("images.h5", "vae.h5"):
        (data / name).unlink()
    assert len(open_packed(data, "vae")) == NUM
    with pytest.raises(InputError, match="does not exist"):
        open_packed(data, "other")


def test_pictures_are_shared_between_latents(data):
    first = open_packed(data, "vae").folder
    for name in ("vae.h5", "vae_h5.json"):
        (data / name.replace("vae", "other")).write_bytes((data / name).read_bytes())
    second = open_packed(data, "other").folder
    assert os.path.samefile(first / "images.uint8", second / "images.uint8")
    make_data(data, seed=1)
    open_packed(data, "vae")
    assert not os.path.samefile(first / "images.uint8", second / "images.uint8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latents": range(NUM - 2)},
            r"2 latents are missing \(first .*img-mean-std-00000009\.npy",
        ),
        ({"images": range(1, NUM)}, r"1 have no picture \(first .*img-mean-std-00000000\.npy"),
        (
            {"images": [*range(5), *range(6, NUM)], "latents": range(NUM - 1)},
            r"1 latents are missing \(first .*10\.npy\); 1 have no picture \(first .*05\.npy\)",
        ),
        ({"shift": 1}, r"disagree on 11 classes, first on that of 00000/img00000000\.png"),
    ],
)
def test_pairs_are_made_by_name(tmp_path, changes, message):
    """The third has as many pictures as latents, which reading by position would not notice."""
    data = make_data(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        open_packed(data, "vae")
    assert not list(data.glob("packed*"))
    assert not list(data.glob(".*draft*"))
    images = h5.read_listing(data, "images")
    with pytest.raises(InputError, match="cache-latents"):
        check_pairs(images, h5.read_listing(data, "vae"))


def test_latents_of_other_pictures_are_refused(data):
    with h5py.File(data / "vae.h5", "r+") as file:
        file.attrs["hidream"] = np.bytes_(json.dumps({"images": "of others"}).encode())
    with pytest.raises(InputError, match=r"made from another images\.h5"):
        open_packed(data, "vae")
    listing = h5.read_listing(data, "images")
    with h5py.File(data / "vae.h5", "r+") as file:
        note = json.dumps({"images": h5.fingerprint(listing)})
        file.attrs["hidream"] = np.bytes_(note.encode())
    assert len(open_packed(data, "vae")) == NUM


def test_damage_is_told(data):
    folder = open_packed(data, "vae").folder
    with open(folder / "images.uint8", "r+b") as file:
        file.truncate(3 * SIZE * SIZE * 5)
    found = Packed(folder)
    assert found.images([4]).shape == (1, 3, SIZE, SIZE)
    with pytest.raises(InputError, match="cut off"):
        found.images([5])
    with pytest.raises(InputError, match="no packed folder"):
        Packed(data)
    with h5py.File(data / "vae.h5", "r+") as file:
        name = h5.latents_name(h5.image_name(6))
        file[name][0, 0, 0] = 1e6
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=f"{name} holds values that float16 has no room for"):
        open_packed(data, "vae")
    assert open_packed(data, "vae", dtype="float32").moments([6])[0, 0, 0, 0] == 1e6
    with h5py.File(data / "vae.h5", "r+") as file:
        del file[name]
    with pytest.raises(InputError, match=f"does not hold {name}"):
        open_packed(data, "vae")
    with pytest.raises(UsageError, match="dtype"):
        open_packed(data, "vae", dtype="int8")


def test_a_full_disk_leaves_nothing(data, monkeypatch):
    before = sorted(path.name for path in data.iterdir())
    pwrite, calls = os.pwrite, []

    def full(*arguments):
        calls.append(None)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packed.os, "pwrite", full)
        with pytest.raises(InputError, match="No space left on device"):
            open_packed(data, "vae")
    assert sorted(path.name for path in data.iterdir()) == [".packed-vae.lock", *before]
    (data / ".packed-vae.draft-of-a-killed-run").mkdir()
    assert len(open_packed(data, "vae")) == NUM
    assert not list(data.glob("*draft*"))


def read_some(given):
    found, indices = given
    return os.getpid(), found.images(indices), found.moments(indices)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(data, method):
    found = open_packed(data, "vae")
    found.images([0])  # its files are open before the fork
    tasks = [(found, np.array([i, (3 * i) % NUM])) for i in range(NUM)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        for (_, indices), (process, images, moments) in zip(
            tasks, pool.imap(read_some, tasks), strict=True
        ):
            assert process != os.getpid()
            assert np.array_equal(images, found.images(indices))
            assert np.array_equal(moments, found.moments(indices))


def test_a_pickle_notices_another_folder(data):
    found = open_packed(data, "vae")
    frozen = pickle.dumps(found)
    assert len(frozen) < 2000  # no pictures in it
    assert np.array_equal(pickle.loads(frozen).labels, found.labels)
    make_data(data, seed=1)
    open_packed(data, "vae")
    with pytest.raises(InputError, match="packed anew"):
        pickle.loads(frozen)


def test_two_at_once_do_no_harm(data, monkeypatch):
    begun, built, errors = threading.Barrier(3), [], []
    build = packed._build
    monkeypatch.setattr(packed, "_build", lambda *given: (built.append(1), build(*given)))

    def run():
        begun.wait()
        try:
            assert np.array_equal(open_packed(data, "vae").images([3]), expected(data)[0][[3]])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(built) == 1  # the others waited, and took what it made


def test_who_reads_keeps_what_is_replaced(data):
    found = open_packed(data, "vae")
    before = found.images(range(NUM))
    make_data(data, seed=1)
    open_packed(data, "vae")
    assert np.array_equal(found.images(range(NUM)), before)


def test_the_command(data, capsys):
    flags = ["hidit", "pack", "--data-dir", str(data), "--vae-latents-name", "vae"]
    flags += ["--num-workers", "1"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(data / "packed-vae")
    assert "11/11 items" in err
    assert main([*flags, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["moments_shape"] == [NUM, 4, 2, 3]
    assert "items" not in err
    assert main([*flags, "--dtype", "float8"]) == 2
    assert main(["hidit", "pack", "--data-dir", str(data / "none")]) == 3
