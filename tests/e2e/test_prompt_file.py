"""Many requests from a file: defaults, names, batches, and what stays of a run that ends early."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hidream.pictures import read_metadata
from hidream.pipelines import Pipeline
from hidream.request import GenerateRequest
from tests import tiny

FEW = ["--steps", "2", "--size", "32x32"]


@pytest.fixture
def calls(monkeypatch):
    """The prompts of every call of the pipeline."""
    found = []
    original = Pipeline.__call__

    def spy(self, requests, **options):
        several = [requests] if isinstance(requests, GenerateRequest) else requests
        found.append([request.prompt for request in several])
        return original(self, requests, **options)

    monkeypatch.setattr(Pipeline, "__call__", spy)
    return found


def write(*lines, name="prompts.txt"):
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    Path(name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return name


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_request_a_line(hidream, calls):
    """Flags are the defaults, a line's JSON wins; pictures of one size are drawn together."""
    file = write(
        "# two cubes",
        "a red cube",
        "",
        {"prompt": "a blue cube", "seed": 9, "guidance_scale": 3},
        {"prompt": "large", "width": 64, "height": 64, "num_images": 2},
        "\t# no request either",
        "  two 猫  ",
        {"prompt": "unguided", "guidance_scale": None, "num_inference_steps": 1},
    )
    code, out, err = hidream("generate", "--prompt-file", file, *FEW, "--seed", 5, "-o", "p/a.png")
    assert code == 0, err
    assert out.split() == [f"p/a-{i}.png" for i in (0, 1, 4, 2, 3, 5)]  # as they are finished
    assert calls == [["a red cube", "a blue cube", "two 猫"], ["large"], ["unguided"]]
    assert "batch 3/3" in err
    requests = [read_metadata(f"p/a-{i}.png")["request"] for i in range(6)]
    assert [r["prompt"] for r in requests] == [
        *("a red cube", "a blue cube", "large", "large", "two 猫", "unguided")
    ]
    assert [r["seed"] for r in requests] == [5, 9, 5, 6, 5, 5]
    assert [r["width"] for r in requests] == [32, 32, 64, 64, 32, 32]
    assert requests[5]["guidance_scale"] == 3.0  # null is the model's own
    assert all(r["num_images"] == 1 for r in requests)
    assert hidream("generate", "a blue cube", *FEW, "--seed", 9, "-o", "alone.png")[0] == 0
    assert np.abs(pixels("alone.png") - pixels("p/a-1.png")).max() <= 1
    assert hidream("generate", "--from", "p/a-3.png", "-o", "again.png", model=False)[0] == 0
    assert np.abs(pixels("again.png") - pixels("p/a-3.png")).max() <= 1


def test_names(hidream):
    file = write("a", "b")
    _, out, _ = hidream("generate", "--prompt-file", file, *FEW, "--seed", 3, "--num-images", 2)
    assert out.split() == ["out-0-3.png", "out-1-4.png", "out-2-3.png", "out-3-4.png"]
    output = ["-o", "{seed}-{index}.webp", "--seed", 7]
    _, out, _ = hidream("generate", "--prompt-file", file, *FEW, *output)
    assert out.split() == ["7-0.webp", "7-1.webp"]
    Path("there").mkdir()
    _, out, _ = hidream("generate", "--prompt-file", file, *FEW, "--seed", 1, "-o", "there")
    assert out.split() == ["there/out-0-1.png", "there/out-1-1.png"]
    one = write("a", name="one.txt")
    _, out, _ = hidream("generate", "--prompt-file", one, *FEW, "-o", "one.png")
    assert out.split() == ["one.png"]


def test_drawn_seeds_are_each_pictures_own(hidream):
    _, out, _ = hidream("generate", "--prompt-file", write("a", "a"), *FEW, "-o", "a.png")
    seeds = [read_metadata(path)["request"]["seed"] for path in out.split()]
    assert len(set(seeds)) == 2


def test_json(hidream):
    file = write("a", {"prompt": "b", "num_images": 2}, {"prompt": "c", "width": 64})
    code, out, err = hidream("generate", "--prompt-file", file, *FEW, "--seed", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(i["path"], i["request"], i["seed"]) for i in found["images"]] == [
        ("out-0-1.png", 0, 1),
        ("out-1-1.png", 1, 1),
        ("out-2-2.png", 1, 2),
        ("out-3-1.png", 2, 1),
    ]
    assert [r["prompt"] for r in found["requests"]] == ["a", "b", "c"]
    assert (found["num_batches"], found["num_forwards"]) == (2, 4)
    assert (found["num_prefills"], found["num_reused"]) == (4, 1)  # three prompts and none
    lines = write(*found["requests"], name="again.txt")  # what was run is a prompt file
    code, _, err = hidream("generate", "--prompt-file", lines, "-o", "again.png", model=False)
    assert code == 0, err
    assert np.abs(pixels("again-3.png") - pixels("out-3-1.png")).max() <= 1


def test_dry_run_touches_nothing(hidream):
    file = write("a", {"prompt": "b", "width": 64})
    arguments = ["--prompt-file", file, *FEW, "--seed", 1, "--dry-run", "-o", "new/a.png"]
    code, out, _ = hidream("generate", *arguments)
    assert code == 0
    assert "new/a-0.png  a\nnew/a-1.png  b\n2 requests, 2 pictures, 2 batches" in out
    _, out, _ = hidream("generate", *arguments, "--json")
    found = json.loads(out)
    assert found["outputs"] == ["new/a-0.png", "new/a-1.png"]
    assert [r["width"] for r in found["requests"]] == [32, 64]
    assert found["estimate"]["memory_bytes"] > 0
    assert os.listdir() == [file]


def test_warnings_name_the_line(hidream):
    file = write({"prompt": "a", "width": 39}, "b", {"prompt": "c", "width": 39})
    _, _, err = hidream("generate", "--prompt-file", file, *FEW, "--snap", "nearest", "--dry-run")
    assert err == "warning: prompts.txt, line 1 (and 1 more): width=39 is snapped to 32.\n"


def test_edits_of_one_picture_and_of_each_lines_own(hidream, calls):
    for number in (1, 2):
        tiny.picture(number, 32, 32).save(f"{number}.png")
    file = write("make it red", {"prompt": "make it blue", "references": ["2.png"]})
    few = ["--steps", 1, "--size", "32x32", "--seed", 4, "--embed-inputs"]
    code, _, err = hidream("edit", "1.png", "--prompt-file", file, *few, "-o", "e{index}.png")
    assert code == 0, err
    assert calls == [["make it red", "make it blue"]]
    notes = [read_metadata(f"e{index}.png") for index in (0, 1)]
    assert [note["request"]["references"] for note in notes] == [["1.png"], ["2.png"]]
    digests = [note["inputs"]["references"][0] for note in notes]
    assert [list(note["embedded"]) for note in notes] == [[digest] for digest in digests]
    assert digests[0] != digests[1]
    hidream("edit", "2.png", "make it blue", *few, "-o", "alone.png")
    assert np.abs(pixels("alone.png") - pixels("e1.png")).max() <= 1
    code, out, err = hidream(
        "subject", "--prompt-file", file, "--ref", "1.png", *few, "-o", "s.png"
    )
    assert (code, out.split()) == (0, ["s-0.png", "s-1.png"]), err
    assert pixels("s-0.png").shape == (32, 32, 3)


def test_deterministic_lines_are_drawn_alone(hidream, calls):
    file = write("a", "b", {"prompt": "c", "deterministic": False}, "d")
    arguments = ["--prompt-file", file, *FEW, "--seed", 1, "--deterministic"]
    previews = ["--preview-every", 1, "-o", "a.png"]
    code, _, err = hidream("generate", *arguments, *previews, "--num-images", 2)
    assert code == 0, err
    assert calls == [["a"], ["a"], ["b"], ["b"], ["c"], ["d"], ["d"]]
    hidream("generate", "b", *FEW, "--seed", 2, "--deterministic", "-o", "alone.png")
    assert (pixels("alone.png") == pixels("a-3.png")).all()
    assert (pixels("a-3-step0001.png") != pixels("a-3.png")).any()


def test_nothing_is_written_over(hidream):
    file = write("a", "b")
    arguments = ["--prompt-file", file, *FEW, "--seed", 1, "-o", "a.png"]
    assert hidream("generate", *arguments)[0] == 0
    os.unlink("a-0.png")
    before = Path("a-1.png").read_bytes()
    code, _, err = hidream("generate", *arguments, "--guidance", 1)
    assert (code, "a-1.png exists" in err) == (3, True)
    assert Path("a-1.png").read_bytes() == before
    assert not Path("a-0.png").exists()
    assert hidream("generate", *arguments, "--guidance", 1, "--overwrite")[0] == 0
    assert Path("a-1.png").read_bytes() != before


def test_what_is_finished_is_kept_when_a_later_one_fails(hidream, monkeypatch):
    tiny.picture(1, 32, 32).save("source.png")
    file = write("a", {"prompt": "b", "references": ["source.png"], "width": 64}, "c")
    original = Pipeline.__call__

    def losing(self, requests, **options):
        made = original(self, requests, **options)
        Path("source.png").unlink()
        return made

    monkeypatch.setattr(Pipeline, "__call__", losing)
    code, out, err = hidream("generate", "--prompt-file", file, *FEW, "--seed", 1, "-o", "a.png")
    assert (code, out.split()) == (3, ["a-0.png", "a-2.png"])
    assert "2 of 3 pictures are finished and kept" in err
    assert "source.png) does not exist" in err
    assert sorted(p.name for p in Path().iterdir()) == ["a-0.png", "a-2.png", file]


def test_ctrl_c_keeps_what_is_finished(tiny_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "a", "num_inference_steps": 1, "width": 32, "height": 32}\nlong')
    command = [sys.executable, "-m", "hidream", "generate", "--prompt-file", str(file)]
    command += ["-m", str(tiny_folder), "--steps", "1000", "--size", "256x256", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen(
        [*command, "-o", str(tmp_path / "a.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for line in running.stderr:
        if "batch 2/2" in line:
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert out.split() == [str(tmp_path / "a-0.png")]
    assert err.count("batch 2/2") <= 2
    assert "1 of 2 pictures are finished and kept.\n" in err
    assert err.endswith("interrupted.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "prompts.txt"]
