"""`hidream hidit evaluate` and `stats`: results, files, refusals, the name of what is no FID."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hidream.cli.main import main
from hidream.eval.fid import distance, frechet_distance, inception_score, read_stats
from hidream.eval.inception import CONVERTED, Inception, Seen
from hidream.eval.picture_set import PictureSet, batches, measure, open_pictures
from hidream.eval.stand_in import StandIn


def pixels(num, side=16, seed=0, shift=0):
    noise = np.random.default_rng(seed).integers(0, 200, (num, side, side, 3))
    return (noise + shift).astype(np.uint8)


def write(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A stage on words; returns exit code, stdout and stderr. Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIDREAM_TRACEBACK", "1")  # no bug may pass for a refusal

    def call(*words):
        code = main(["hidit", *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def made(run, tmp_path):
    """Folders `real` and `fake` of pictures, and the stand-in's statistics of `real`."""
    write(tmp_path / "real", pixels(30))
    write(tmp_path / "fake", pixels(20, seed=1, shift=20))
    assert (
        run("stats", "--input-dir", "real", "--output", "s.npz", "--inception", "stand-in")[0] == 0
    )
    return tmp_path


EVALUATE = ("evaluate", "--input-dir", "fake", "--fid-stats", "s.npz")
STAND_IN = ("--inception", "stand-in")


def test_a_result_in_full(run, made):
    code, out, err = run(*EVALUATE, *STAND_IN, "--output-json", "new/folder/r.json", "--json")
    found = json.loads(out)
    assert code == 0
    assert json.loads((made / "new/folder/r.json").read_text()) == found
    assert [file.name for file in (made / "new/folder").iterdir()] == ["r.json"]
    assert found["num_images"] == 20
    assert found["seconds"] > 0
    assert found["fid_stats"]["sha256"] == hashlib.sha256((made / "s.npz").read_bytes()).hexdigest()
    assert found["inception"] == {"file": "stand-in", "sha256": StandIn().digest()}
    # the numbers, from the pictures by hand
    real, fake = (
        StandIn()(torch.from_numpy(array).permute(0, 3, 1, 2))
        for array in (pixels(30), pixels(20, seed=1, shift=20))
    )
    a, b = (seen.features.double().numpy() for seen in (real, fake))
    expected = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert found["stand_in"]["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert found["stand_in"]["score"]["mean"] == pytest.approx(inception_score(fake.logits).mean)
    # and the words around them
    assert "looking at 20 pictures" in err
    assert "few" in err or "too high" in err


def test_the_stand_in_is_never_called_fid(run, made):
    _, out, err = run(*EVALUATE, *STAND_IN, "--output-json", "r.json")
    found = json.loads((made / "r.json").read_text())
    assert found["fid"] is None
    assert found["inception_score"] is None
    assert found["features"] == "stand-in, not FID"
    assert str(np.load(made / "s.npz")["features"]) == "stand-in, not FID"
    lines = out.splitlines()
    assert [line.rsplit(" ", line.count("±") * 2 + 1)[0] for line in lines] == [
        "Fréchet distance of the stand-in (not FID)",
        "score of the stand-in (not IS)",
    ]
    assert "no FID" in err


def test_the_same_pictures_are_at_zero(run, made):
    _, out, _ = run(*EVALUATE[:2], "real", *EVALUATE[3:], *STAND_IN, "--no-isc", "--json")
    found = json.loads(out)["stand_in"]
    assert found["frechet_distance"] <= 1e-6
    assert found["score"] is None


def test_batches_do_not_change_the_result(run, made):
    results = [
        json.loads(run(*EVALUATE, *STAND_IN, "--json", "--batch-size", size)[1])["stand_in"]
        for size in (1, 7, 20, 64)
    ]
    for result in results[1:]:
        assert result["frechet_distance"] == pytest.approx(results[0]["frechet_distance"], rel=1e-5)
        assert result["score"]["mean"] == pytest.approx(results[0]["score"]["mean"], rel=1e-6)


class Small(torch.nn.Module):
    """In Inception's place, with 64 features, so that its path through the CLI is quick."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(64, 3, generator=generator)

    name, num_features = "inception-v3 2015-12-05", 64

    def forward(self, pictures):
        features = pictures.float().mean((2, 3)) @ self.weight.T / 255
        return Seen(features, features)


def test_inception_is_called_fid(run, made, monkeypatch):
    """With weights of Inception's names and shapes beside the statistics: found, hashed, named."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Inception().state_dict().items()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, made / CONVERTED)
    monkeypatch.setattr("hidream.eval.inception.NUM_FEATURES", 64)
    monkeypatch.setattr("hidream.eval.inception.load_inception", lambda folder, device: Small())
    assert run("stats", "--input-dir", "real", "--output", "i.npz")[0] == 0
    code, out, err = run(*EVALUATE[:3], "--fid-stats", "i.npz", "--output-json", "r.json")
    found = json.loads((made / "r.json").read_text())
    assert code == 0
    assert out.splitlines()[0] == f"FID {found['fid']:.4f}"
    assert out.splitlines()[1].startswith(
        f"Inception Score {found['inception_score']['mean']:.4f} ± "
    )
    assert "stand" not in out + err + json.dumps(found)
    digest = hashlib.sha256((made / CONVERTED).read_bytes()).hexdigest()
    assert found["inception"] == {"file": CONVERTED, "sha256": digest}
    assert found["features"] == "inception-v3 2015-12-05"
    # statistics of one network are not compared with pictures seen by another
    code, _, err = run(*EVALUATE)
    assert code == 3
    assert 'the features of s.npz are "stand-in, not FID"' in err
    code, _, err = run(*EVALUATE[:3], "--fid-stats", "i.npz", *STAND_IN)
    assert code == 3
    # a published file does not say whose it is; its size does
    np.savez(made / "t.npz", mu=np.zeros(32), sigma=np.eye(32))
    code, _, err = run(*EVALUATE[:3], "--fid-stats", "t.npz")
    assert code == 3
    assert "t.npz is of 32 features; inception-v3 2015-12-05 has 64" in err


def refused(result, code, says):
    """Exit code, no result, and a problem in one line, with or without a remedy in another."""
    found, out, err = result
    assert (found, out) == (code, "")
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "       "))]
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert says in err
    return err


def test_weights_that_are_missing(run, made):
    err = refused(run(*EVALUATE), 4, "there are no Inception weights")
    assert "weights-inception-2015-12-05-6726825d.pth" in err
    assert "hidream models convert" in err
    refused(run(*EVALUATE, "--inception", "none.safetensors"), 4, "none.safetensors do not exist")
    (made / "w.pth").write_bytes(b"")
    refused(run(*EVALUATE, "--inception", "w.pth"), 4, "hidream models convert w.pth")


def spoil(folder, flaw):
    path = folder / "000012.png"
    image = Image.open(path)
    if flaw == "size":
        image.resize((16, 17)).save(path)
    elif flaw in ("L", "RGBA", "P"):
        image.convert(flaw).save(path)
    elif flaw == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif flaw == "no picture":
        path.write_bytes(b"hello")
    elif flaw == "empty":
        path.write_bytes(b"")
    elif flaw == "folder":
        path.unlink()
        path.mkdir()
    elif flaw == "text":
        (folder / "notes.txt").write_text("not a picture")


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ("size", "several sizes: 000012.png is 16x17, 000000.png 16x16"),
        ("L", "mode L"),
        ("RGBA", "mode RGBA"),
        ("P", "mode P"),
        ("cut", "damaged"),
        ("no picture", "000012.png"),
        ("empty", "000012.png"),
    ],
)
def test_pictures_that_cannot_be_counted(run, made, flaw, says):
    spoil(made / "fake", flaw)
    err = refused(run(*EVALUATE, *STAND_IN, "--output-json", "r.json"), 3, says)
    assert "000012.png" in err
    assert ("looking at" in err) == (flaw == "cut")  # a header tells before any weight is read
    assert not (made / "r.json").exists()
    words = ("stats", "--input-dir", "fake", "--output", "new.npz", *STAND_IN)
    refused(run(*words), 3, says)
    assert {file.name for file in made.iterdir()} == {"real", "fake", "s.npz"}


@pytest.mark.parametrize("flaw", ["folder", "text"])
def test_what_is_no_picture_is_passed_over(run, made, flaw):
    spoil(made / "fake", flaw)
    code, out, _ = run(*EVALUATE, *STAND_IN, "--json")
    assert code == 0
    assert json.loads(out)["num_images"] == (19 if flaw == "folder" else 20)


def test_pictures_that_are_too_few(run, made):
    (made / "none").mkdir()
    refused(run("evaluate", "--input-dir", "none", *EVALUATE[3:], *STAND_IN), 3, "holds no PNG")
    refused(run("evaluate", "--input-dir", "miss", *EVALUATE[3:], *STAND_IN), 3, "does not exist")
    refused(run("evaluate", "--input-dir", "s.npz", *EVALUATE[3:], *STAND_IN), 3, "is no folder")
    write(made / "one", pixels(1))
    for isc in ([], ["--no-isc"]):
        words = ("evaluate", "--input-dir", "one", *EVALUATE[3:], *STAND_IN, *isc)
        refused(run(*words), 3, "at least 2")
    refused(run("stats", "--input-dir", "one", "--output", "o.npz", *STAND_IN), 3, "at least 2")
    write(made / "nine", pixels(9))
    words = ("evaluate", "--input-dir", "nine", *EVALUATE[3:], *STAND_IN)
    refused(run(*words), 3, "--no-isc")
    assert run(*words, "--no-isc")[0] == 0


def test_statistics_that_are_none(run, made):
    (made / "bad.npz").write_bytes(b"PK")
    np.savez(made / "samples.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    for name, says in {
        "none.npz": "does not exist",
        "bad.npz": "is no .npz",
        "samples.npz": "holds arr_0, but no mu and no sigma",
    }.items():
        refused(run(*EVALUATE[:4], name, *STAND_IN), 3, says)


def test_flags_and_outputs_that_cannot_be(run, made):
    refused(run("evaluate", "--fid-stats", "s.npz"), 2, "--input-dir")
    refused(run(*EVALUATE, *STAND_IN, "--batch-size", "0"), 2, "--batch-size 0")
    refused(run(*EVALUATE, *STAND_IN, "--device", "cuba"), 2, "cuda")
    refused(run(*EVALUATE, *STAND_IN, "--output-json", "real"), 3, "real is a folder")
    refused(run(*EVALUATE, *STAND_IN, "--output-json", "s.npz/r.json"), 3, "cannot write")
    stats = ("stats", "--output", "s.npz", *STAND_IN)
    refused(run(*stats, "--input-dir", "real"), 3, "--overwrite")
    refused(run(*stats), 2, "one of --input-dir and --data-dir")
    refused(run(*stats, "--input-dir", "real", "--data-dir", "real"), 2, "one of")
    refused(
        run("stats", "--output", "s.txt", "--input-dir", "real", *STAND_IN), 3, "End it in .npz"
    )
    before = (made / "s.npz").read_bytes()
    assert run(*stats, "--input-dir", "fake", "--overwrite")[0] == 0
    assert (made / "s.npz").read_bytes() != before
    # a result is replaced: it is made again by the same command
    for _ in range(2):
        assert run(*EVALUATE, *STAND_IN, "--output-json", "r.json")[0] == 0


def test_stats_says_what_it_made(run, made):
    words = ("stats", "--input-dir", "fake", "--output", "sub/f.npz", *STAND_IN)
    code, out, _ = run(*words, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["path"] == "sub/f.npz"
    assert found["sha256"] == hashlib.sha256((made / "sub/f.npz").read_bytes()).hexdigest()
    assert (found["num_images"], found["features"]) == (20, "stand-in, not FID")
    assert run(*words, "--overwrite")[1] == "sub/f.npz\n"
    assert read_stats(made / "sub/f.npz").num_pictures == 20


def test_pictures_in_h5_are_the_same(run, made):
    """`--data-dir`: the bytes of the same PNG files, in the layout that preprocess writes."""
    pytest.importorskip("hidream.data.h5")
    h5py = pytest.importorskip("h5py")
    (made / "data").mkdir()
    names = []
    with h5py.File(made / "data/images.h5", "w") as file:
        for number, path in enumerate(sorted((made / "real").iterdir())):
            names.append(f"{number // 1000:05d}/img{number:08d}.png")
            file[names[-1]] = np.bytes_(path.read_bytes())
        labels = json.dumps({"labels": [[name, 0] for name in names]})
        file["dataset.json"] = np.bytes_(labels.encode())
    (made / "data/images_h5.json").write_text(json.dumps(["00000", *names, "dataset.json"]))
    assert run("stats", "--data-dir", "data", "--output", "h.npz", *STAND_IN)[0] == 0
    a, b = read_stats(made / "s.npz"), read_stats(made / "h.npz")
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.covariance, b.covariance)
    refused(run("stats", "--data-dir", "real", "--output", "x.npz", *STAND_IN), 3, "images")


def test_pictures_come_in_order_and_reading_stops_with_the_reader(tmp_path):
    arrays = pixels(50, side=4)
    pictures = open_pictures(write(tmp_path / "p", arrays))
    read = torch.cat(list(batches(pictures, 7)))
    assert torch.equal(read, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    opened = []

    def reading(name):
        opened.append(name)
        return pictures.read(name)

    stream = batches(PictureSet(pictures.place, pictures.names, reading), 2)
    next(stream)
    stream.close()
    assert len(opened) <= 8


def test_measure_and_distance_as_a_library(tmp_path):
    pictures = open_pictures(write(tmp_path / "p", pixels(12, side=8)))
    seen = []
    measured = measure(pictures, StandIn(), batch_size=5, on_batch=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert measured.stats.count == 12
    assert measured.score is not None
    again = measure(pictures, StandIn(), with_score=False)
    assert again.score is None
    assert distance(measured.stats.gaussian(), again.stats.gaussian()) < 1e-6
