"""images.h5: the published format from any folder of pictures, whatever happens on the way."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from PIL import Image, ImageCms

from hidream.cli import main
from hidream.data import h5, part
from hidream.data import preprocess as module
from hidream.data.crop import center_crop
from hidream.data.preprocess import preprocess
from hidream.errors import HidreamError, InputError, UsageError

SIZE = 16
ROTATED = 6  # EXIF: the picture's top is on its right


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test switches the power off
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


def pixels(seed, height=20, width=30, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_pictures(root, num=20):
    """`num` plain pictures in three classes, whose names sort otherwise as paths than as parts."""
    for index in range(num):
        folder = root / ("n1", "n1-x", "n2")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(index)).save(folder / f"i{index:03}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One of everything that was ever found in such a folder."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("a", "b", "ü ñ/deeper/still"):
        (root / name).mkdir(parents=True)
    Image.fromarray(pixels(1)).save(root / "ü ñ/deeper/still/é 1.jpg", quality=95)
    Image.fromarray(pixels(2, channels=1)).save(root / "a/grey.jpg")
    Image.fromarray(pixels(3, channels=4), "CMYK").save(root / "a/cmyk.jpeg")
    Image.fromarray(pixels(4, channels=4), "RGBA").save(root / "a/alpha.png")
    palette = Image.fromarray(pixels(5)).quantize(16)
    palette.save(root / "a/palette.png", transparency=3)
    Image.fromarray(pixels(6, channels=1).astype(np.uint16) * 257).save(root / "a/deep.png")
    exif = Image.Exif()
    exif[274] = ROTATED
    Image.fromarray(pixels(7)).save(root / "b/turned.jpg", quality=95, exif=exif)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels(8)).save(root / "b/profile.png", icc_profile=profile)
    Image.fromarray(pixels(9)).save(root / "b/really a.JPEG", "PNG")
    Image.fromarray(pixels(10)).save(root / "b/other.bmp")
    whole = io.BytesIO()
    Image.fromarray(pixels(11, 200, 200)).save(whole, "JPEG")
    (root / "b/truncated.jpg").write_bytes(whole.getvalue()[:-4000])
    (root / "b/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (root / "b/empty.jpg").write_bytes(b"")
    (root / "b/text.jpg").write_text("no picture")
    (root / "notes.txt").write_text("no picture either")
    (root / "b/.DS_Store").write_bytes(b"\0")
    Image.fromarray(pixels(12)).save(root / "beside.png")
    (root / "b/up").symlink_to(root)
    return root


BAD = {"b/other.bmp", "b/truncated.jpg", "b/damaged.png", "b/empty.jpg", "b/text.jpg", "beside.png"}


def as_published_reads(folder):
    """Pictures and classes by the published way: names by suffix, bytes by np.array."""
    names = [n for n in json.loads((folder / "images_h5.json").read_text()) if n.endswith(".png")]
    with h5py.File(folder / "images.h5") as file:
        text = np.array(file["dataset.json"]).tobytes().decode()
        labels = dict(json.loads(text)["labels"])
        found = {n: np.array(Image.open(io.BytesIO(np.array(file[n])))) for n in sorted(names)}
    return found, [labels[name] for name in found]


def content(folder):
    files = ("images.h5", "images_h5.json", "images_report.json")
    return {name: (folder / name).read_bytes() for name in files}


def test_the_file_is_of_the_published_format(plain, tmp_path):
    report = preprocess(plain, tmp_path, SIZE)
    files = sorted(path.relative_to(plain).as_posix() for path in plain.rglob("*.JPEG"))
    assert files[0].startswith("n1-x/")  # "-" is before "/": paths are sorted as text
    found, labels = as_published_reads(tmp_path)
    assert list(found) == [f"00000/img{index:08d}.png" for index in range(20)]
    assert labels == [["n1", "n1-x", "n2"].index(name.split("/")[0]) for name in files]
    for name, picture in zip(files, found.values(), strict=True):
        assert np.array_equal(picture, np.asarray(center_crop(Image.open(plain / name), SIZE)))
    with h5py.File(tmp_path / "images.h5") as file:
        visited = []
        file.visit(visited.append)
        assert visited == json.loads((tmp_path / "images_h5.json").read_text())
        for name, picture in found.items():
            packed = io.BytesIO()
            Image.fromarray(picture).save(packed, "PNG", compress_level=0)
            expected = np.array(packed.getvalue(), dtype="S")
            assert (file[name].dtype, file[name].shape) == (expected.dtype, ())
            assert np.array(file[name]).tobytes() == packed.getvalue()
        labels_item = file["dataset.json"]
        assert labels_item.dtype.kind == "S"
        assert labels_item.shape == ()
        assert set(json.loads(labels_item[()])) == {"labels"}
    assert report.written == report.num_files == 20
    assert report.classes == ("n1", "n1-x", "n2")


def test_a_group_holds_1000():
    assert h5.image_name(1_281_166) == "01281/img01281166.png"
    assert h5.latents_name("01281/img01281166.png") == "01281/img-mean-std-01281166.npy"


def test_zero_bytes_at_an_items_end_survive(tmp_path):
    data = b"\0a\0\0"
    folder = tmp_path / "part"
    folder.mkdir()
    part.begin(folder, {}, ["g/a", "g/b"], np.dtype("S4"), ())
    with part.Part(folder) as items:
        items.write(0, data)
        with pytest.raises(ValueError, match="5 bytes, not 4"):
            items.write(0, data + b"!")  # would be the neighbour's
    part.finish(folder, tmp_path / "x.h5", ["g/a", "g/b"], [("g/a", 0)], {})
    with h5.opened(tmp_path / "x.h5") as file:
        assert h5.read_bytes(file, "g/a") == data
        assert file["g/a"][()] == b"\0a"  # the trap
        assert list(file["g"]) == ["a"]


def test_odd_files_are_read_or_reported(odd, tmp_path):
    report = preprocess(odd, tmp_path, SIZE)
    assert {one.file for one in report.skipped} == BAD
    reasons = {one.file: one.reason for one in report.skipped}
    assert reasons["b/empty.jpg"] == "is empty."
    assert reasons["b/truncated.jpg"].startswith("is truncated or damaged: ")
    assert reasons["beside.png"].startswith("lies beside")
    assert report.classes == ("a", "b", "ü ñ")
    assert report.ignored == {"": 1, ".txt": 1}
    assert report.turned == 1
    assert report.written == report.num_files - len(BAD) == 9
    files = sorted(
        str(path.relative_to(odd)) for path in odd.rglob("*.*") if path.suffix in module.SUFFIXES
    )
    files = sorted({*files, "b/really a.JPEG"})
    assert report.num_files == len(files)
    found, labels = as_published_reads(tmp_path)
    numbers = {name: files.index(name) for name in files}
    kept = [name for name in files if name not in BAD]
    assert list(found) == [h5.image_name(numbers[name]) for name in kept]  # numbers stay
    assert labels == [report.classes.index(name.split("/")[0]) for name in kept]
    saved = json.loads((tmp_path / "images_report.json").read_text())
    assert saved["skipped"] == [vars(one) for one in report.skipped]
    grey = found[h5.image_name(numbers["a/grey.jpg"])]
    assert grey.shape == (SIZE, SIZE, 3)
    assert (grey == grey[..., :1]).all()
    deep = np.asarray(center_crop(Image.fromarray(pixels(6, channels=1)).convert("RGB"), SIZE))
    assert np.array_equal(found[h5.image_name(numbers["a/deep.png"])], deep)


def test_upright_unless_as_published(odd, tmp_path):
    files = {"b/turned.jpg", "a/alpha.png"}
    stored = Image.open(odd / "b/turned.jpg").convert("RGB")
    layers = Image.open(odd / "a/alpha.png")
    over_white = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    expected = {
        False: (stored.transpose(Image.Transpose.ROTATE_270), over_white.convert("RGB")),
        True: (stored, layers.convert("RGB")),
    }
    for as_published, images in expected.items():
        out = tmp_path / str(as_published)
        report = preprocess(odd, out, SIZE, as_published=as_published)
        skipped = {one.file for one in report.skipped}
        assert skipped == BAD
        assert not files & skipped
        found, _ = as_published_reads(out)
        for image in images:
            picture = np.asarray(center_crop(image, SIZE))
            assert any(np.array_equal(picture, other) for other in found.values())
        assert report.turned == (0 if as_published else 1)


def test_crop():
    exact = pixels(0, 20, 33)
    middle = center_crop(Image.fromarray(exact), 20)  # nothing to scale: a cut, the left one
    assert np.array_equal(np.asarray(middle), exact[:, 6:26])
    for height, width in ((64, 64), (97, 41), (33, 130), (7, 5), (16, 400)):
        assert center_crop(Image.fromarray(pixels(1, height, width)), 16).size == (16, 16)
    upright = center_crop(Image.fromarray(exact.swapaxes(0, 1)), 20)
    assert np.array_equal(np.asarray(upright), exact.swapaxes(0, 1)[6:26])
    twice = Image.fromarray(pixels(4, 32, 32))
    assert center_crop(twice, 16) == twice.resize((16, 16), Image.Resampling.BOX)
    tall = Image.fromarray(pixels(2, 97, 41))  # 41 is halved once, to 20; then 20 becomes 16
    steps = tall.resize((20, 48), Image.Resampling.BOX).resize((16, 38), Image.Resampling.BICUBIC)
    assert center_crop(tall, 16) == steps.crop((0, 11, 16, 27))
    large = Image.fromarray(pixels(3, 96, 160))
    scaled = large.reduce(4).resize((27, 16), Image.Resampling.BICUBIC)  # rounded less often
    found = np.asarray(center_crop(large, 16)).astype(int)
    assert np.abs(found - np.asarray(scaled)[:, 5:21]).max() <= 2


def test_the_number_of_workers_is_not_seen(odd, tmp_path):
    preprocess(odd, tmp_path / "one", SIZE)
    preprocess(odd, tmp_path / "two", SIZE, num_workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_killed_run_is_continued(plain, tmp_path):
    preprocess(plain, tmp_path / "whole", SIZE)
    script = f"""
        import os, signal
        from hidream.data import preprocess as module
        module.CHUNK = 8
        def kill(num_done, num_all):
            if num_done == 8:
                return
            os.kill(os.getpid(), signal.SIGKILL)
        module.preprocess({str(plain)!r}, {str(tmp_path / "killed")!r}, {SIZE}, on_progress=kill)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("images*"))
    seen = []
    preprocess(plain, tmp_path / "killed", SIZE, on_progress=lambda done, _: seen.append(done))
    assert seen == [20]  # 16 were done
    assert content(tmp_path / "whole") == content(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize("moment", ["tables", "replace", "remove"])
def test_an_end_that_is_broken_off_is_made_again(odd, tmp_path, monkeypatch, moment):
    preprocess(odd, tmp_path / "whole", SIZE)
    out = tmp_path / "broken"

    class Killed(BaseException):
        pass

    def kill(*_arguments, **_options):
        raise Killed

    with monkeypatch.context() as patch:
        if moment != "remove":
            patch.setattr(part.os, "replace", replace_but(part.os.replace, "images.h5", kill))
        else:
            patch.setattr(part, "remove", kill)
        with pytest.raises(Killed):
            preprocess(odd, out, SIZE)
    assert (out / "images.h5").exists() == (moment == "remove")
    items = out / ".images-part" / "items.h5"
    if moment == "tables":  # HDF5 was killed while it wrote them
        places = np.load(items.with_name("places.npy"))
        dropped = json.loads(items.with_name("closing").read_text())
        assert len(dropped) == len(BAD)
        with open(items, "r+b") as file:
            file.write(b"\xff" * 512)
            for index in dropped:  # whose room it may take
                file.seek(places[index])
                file.write(b"\xff" * 100)
    preprocess(odd, out, SIZE)
    assert content(tmp_path / "whole") == content(out)
    assert not (out / ".images-part").exists()


def replace_but(replace, name, otherwise):
    return lambda old, new: otherwise() if os.path.basename(new) == name else replace(old, new)


def test_a_full_disk_leaves_no_half_file(plain, tmp_path, monkeypatch):
    preprocess(plain, tmp_path / "whole", SIZE)
    pwrite, out = os.pwrite, tmp_path / "full"
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 11:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(part.os, "pwrite", full)
        with pytest.raises(InputError, match="No space left on device"):
            preprocess(plain, out, SIZE)
    assert not list(out.glob("images*"))
    preprocess(plain, out, SIZE)
    assert content(tmp_path / "whole") == content(out)


def test_too_little_room_is_told_before_the_work(plain, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**4})
    monkeypatch.setattr(part.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="too full"):
        preprocess(plain, tmp_path, SIZE)


def test_a_mended_file_is_taken_by_the_next_run(tmp_path, monkeypatch):
    source = make_pictures(tmp_path / "source")
    whole = source / "n1/i000.JPEG"
    data = whole.read_bytes()
    preprocess(source, tmp_path / "whole", SIZE)
    whole.write_bytes(data[:100])
    with monkeypatch.context() as patch:
        patch.setattr(part, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(source, tmp_path / "mended", SIZE)
    whole.write_bytes(data)
    assert preprocess(source, tmp_path / "mended", SIZE).skipped == ()
    assert content(tmp_path / "whole") == content(tmp_path / "mended")


def test_another_plan_starts_anew_and_says_so(plain, tmp_path, monkeypatch, caplog):
    preprocess(plain, tmp_path / "whole", SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(part, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(plain, tmp_path / "other", SIZE + 1)
    preprocess(plain, tmp_path / "other", SIZE)
    assert "another resolution, png_bytes" in caplog.text
    assert content(tmp_path / "whole") == content(tmp_path / "other")


def test_a_finished_file_is_left_alone(plain, tmp_path):
    report = preprocess(plain, tmp_path, SIZE)
    before = (tmp_path / "images.h5").stat().st_mtime_ns
    assert preprocess(plain, tmp_path, SIZE) == report
    assert (tmp_path / "images.h5").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"images\.h5 exists"):
        preprocess(plain, tmp_path, SIZE + 1)
    assert preprocess(plain, tmp_path, SIZE + 1, overwrite=True).resolution == SIZE + 1
    (tmp_path / "images.h5").unlink()
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["dataset.json"] = np.array(b"{}", dtype="S")
    with pytest.raises(InputError, match=r"images\.h5 exists"):
        preprocess(plain, tmp_path, SIZE)


def test_two_runs_at_once_are_refused(plain, tmp_path):
    with (
        part.lock(tmp_path / ".images-part" / "lock", wait=False),
        pytest.raises(InputError, match="another process"),
    ):
        preprocess(plain, tmp_path, SIZE)


def test_nothing_usable_is_an_error(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(InputError, match="no folder"):
        preprocess(source, out, SIZE)
    source.mkdir()
    (source / "a.txt").write_text("")
    with pytest.raises(InputError, match="holds no pictures"):
        preprocess(source, out, SIZE)
    for name in "abc":
        (source / f"{name}.jpg").write_text(name)
    with pytest.raises(InputError, match=r"not one of 3 pictures .* a\.jpg, which is not a PNG"):
        preprocess(source, out, SIZE)
    assert not list(out.iterdir())


def test_classes(plain, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        Image.fromarray(pixels(0)).save(source / f"{name}.png")
    report = preprocess(source, tmp_path / "flat", SIZE)
    assert as_published_reads(tmp_path / "flat")[1] == [0, 0, 0]
    assert report.num_classes == 1

    labels = {"labels": [["a.png", 7], ["c.png", 2], ["gone.png", 3]]}
    (source / "dataset.json").write_text(json.dumps(labels))
    report = preprocess(source, tmp_path / "named", SIZE)
    assert as_published_reads(tmp_path / "named")[1] == [7, 2]
    assert (report.num_classes, report.absent) == (8, 1)
    assert [vars(one) for one in report.skipped] == [
        {"file": "b.png", "reason": "has no class in dataset.json."}
    ]
    for broken in ("[]", '{"labels": [["a.png"]]}', "{", '{"labels": [["a.png", "cat"]]}'):
        (source / "dataset.json").write_text(broken)
        with pytest.raises(InputError, match=r"dataset\.json"):
            preprocess(source, tmp_path / "broken", SIZE)
    (source / "dataset.json").write_text('{"labels": null}')
    assert preprocess(source, tmp_path / "null", SIZE).num_classes == 1

    first = preprocess(plain, tmp_path / "first", SIZE, max_images=9)
    found, labels = as_published_reads(tmp_path / "first")
    assert first.num_files == len(found) == 9
    assert labels == [1] * 7 + [0] * 2  # of all the folders


@pytest.mark.parametrize(
    "options", [{"resolution": 0}, {"num_workers": 0}, {"max_images": 0}, {"resolution": 10**6}]
)
def test_numbers_out_of_range(plain, tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        preprocess(plain, tmp_path, **{"resolution": SIZE, **options})


def test_without_h5py_the_extra_is_named(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"hidream\[data\]"):
        preprocess(plain, tmp_path, SIZE)


def test_a_killed_worker_is_an_error(tmp_path):
    from hidream.data.workers import run_tasks

    with pytest.raises(HidreamError, match="worker"):
        list(run_tasks(os._exit, [1, 1], 2))


def test_the_command(odd, tmp_path, capsys):
    flags = ["--imagenet-path", str(odd), "--output-path", str(tmp_path / "out")]
    flags += ["--resolution", str(SIZE), "--num-workers", "1"]
    assert main(["hidit", "preprocess", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "out" / "images.h5")
    assert "6 of 15 files are left out" in err
    assert all(name in err for name in BAD)
    assert main(["hidit", "preprocess", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 9
    assert main(["hidit", "preprocess", *flags, "--max-images", "0"]) == 2
    flags[1] = str(tmp_path / "nowhere")
    assert main(["hidit", "preprocess", *flags]) == 3
    assert "nowhere is no folder" in capsys.readouterr().err
