"""A picture is made again from itself, whatever it was made from."""

import base64
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from hidream.pictures import read_metadata, read_texts
from tests import tiny

FEW = ["--steps", "1", "--size", "32x32", "--seed", "3"]


def again(hidream, command, picture, *arguments, output="again.png"):
    return hidream(command, "--from", picture, "-o", output, *arguments, model=None)


def same(one, other):
    return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def edited(hidream, *arguments):
    """a.png, made from source.png within mask.png."""
    tiny.picture(1, 32, 32).save("source.png")
    Image.linear_gradient("L").resize((32, 32)).save("mask.png")
    code, _, err = hidream(
        "edit", "source.png", "paint it", "--mask", "mask.png", *FEW, "-o", "a.png", *arguments
    )
    assert code == 0, err


def with_note(change, source="a.png", target="b.png"):
    """The picture again, with its note changed."""
    note = read_metadata(source)
    change(note)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("hidream", json.dumps(note))
    Image.open(source).save(target, pnginfo=chunks)
    return target


def test_an_edit_is_made_again(hidream):
    edited(hidream)
    code, _, err = again(hidream, "edit", "a.png")
    assert (code, "warning" in err) == (0, False), err
    assert same("again.png", "a.png")
    assert read_metadata("again.png") == read_metadata("a.png")
    assert "embedded" not in read_metadata("a.png")


@pytest.mark.parametrize("name", ["source.png", "mask.png"])
def test_what_it_was_made_from_must_be_the_same(hidream, name):
    edited(hidream)
    tiny.picture(2, 32, 32).save(name)
    code, _, err = again(hidream, "edit", "a.png")
    assert code == 3
    assert f"({name}) is not the file" in err
    os.unlink(name)
    code, _, err = again(hidream, "edit", "a.png")
    assert code == 3
    assert f"({name}) does not exist" in err
    assert not os.path.exists("again.png")


def test_only_new_warnings_are_told(hidream):
    hidream("generate", "a", *FEW[2:], "--sigmas", 0.9, "-n", "b", "-o", "a.png")
    assert "warning" not in again(hidream, "generate", "a.png", "--dry-run")[2]
    err = again(hidream, "generate", "a.png", "--dry-run", "--sigmas", 0.5, "--guidance", 1)[2]
    assert "negative prompt has no effect" in err


def test_flags_win(hidream):
    edited(hidream)
    os.unlink("source.png")
    tiny.picture(2, 32, 32).save("other.png")
    code, _, err = again(hidream, "edit", "a.png", "other.png", "paint it red", "--seed", 4)
    assert code == 0, err
    before, after = read_metadata("a.png"), read_metadata("again.png")
    changed = {name for name, value in after["request"].items() if before["request"][name] != value}
    assert changed == {"prompt", "references", "seed"}
    assert before["inputs"]["mask"] == after["inputs"]["mask"]
    assert before["inputs"]["references"] != after["inputs"]["references"]


def test_another_source_has_its_own_aspect(hidream):
    tiny.picture(1, 64, 32).save("wide.png")
    tiny.picture(1, 32, 64).save("tall.png")
    hidream("edit", "wide.png", "x", "--steps", 1, "-o", "a.png")
    assert again(hidream, "edit", "a.png", "tall.png")[0] == 0
    assert Image.open("again.png").size == Image.open("a.png").size[::-1]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_inputs_carried_inside(hidream, kind):
    edited(hidream, "--embed-inputs")
    tiny.picture(0, 60, 44).save("one.jpg", quality=90)
    tiny.picture(1, 44, 60).save("two.webp")
    references = ["--ref", "one.jpg", "--ref", "two.webp", "--ref", "one.jpg"]
    carried = ["--embed-inputs", *FEW, "-o", f"s.{kind}"]
    assert hidream("subject", "all of them", *references, *carried)[0] == 0
    note = read_metadata(f"s.{kind}")
    assert note["request"]["references"] == ["one.jpg", "two.webp", "one.jpg"]
    assert len(note["embedded"]) == 2
    for name in ("source.png", "mask.png", "one.jpg", "two.webp"):
        os.unlink(name)
    code, _, err = again(hidream, "subject", f"s.{kind}", "--embed-inputs", output=f"again.{kind}")
    assert code == 0, err
    assert same(f"again.{kind}", f"s.{kind}")
    assert read_metadata(f"again.{kind}") == note
    assert again(hidream, "edit", "a.png", output="edited.png")[0] == 0
    assert same("edited.png", "a.png")
    assert read_metadata("edited.png")["request"] == read_metadata("a.png")["request"]
    code, out, _ = hidream("info", f"s.{kind}", "--json", model=None)
    sizes = json.loads(out)["metadata"]["embedded"]
    assert sizes == {key: len(data) for key, data in note["embedded"].items()}
    assert "2 pictures" in hidream("info", f"s.{kind}", model=None)[1]


def test_what_is_carried_inside_is_not_trusted(hidream, tmp_path):
    edited(hidream, "--embed-inputs")

    def other_picture(note):
        key = note["inputs"]["references"][0]
        note["embedded"][key] = base64.b64encode(Path("mask.png").read_bytes()).decode()

    def no_base64(note):
        note["embedded"] = dict.fromkeys(note["embedded"], "!")

    def no_digests(note):
        del note["inputs"]

    for change, word in [
        (other_picture, "damaged"),
        (no_base64, "does not say"),
        (no_digests, "does not say"),
    ]:
        code, _, err = again(hidream, "edit", with_note(change, target=f"{change.__name__}.png"))
        assert (code, word in err) == (3, True), err


def test_a_bomb_that_is_carried_inside_is_refused(hidream):
    from hidream.digest import of_bytes
    from tests.e2e.test_cli_refusals import bomb

    edited(hidream, "--embed-inputs")
    bomb(Path("bomb.png"), 60_000, 60_000)
    data = Path("bomb.png").read_bytes()

    def change(note):
        note["inputs"]["references"] = [of_bytes(data)]
        note["embedded"][of_bytes(data)] = base64.b64encode(data).decode()

    code, _, err = again(hidream, "edit", with_note(change))
    assert (code, "8192x8192" in err) == (3, True), err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("prompt", "\x1b[2J"),
        ("width", 1e300),
        ("seed", [[1]]),
        ("loras", 5),
        ("references", [3]),
        ("references", "/etc/passwd"),
        ("mask", {"a": 1}),
        ("sampler", []),
        ("unheard_of", 1),
        ("sigmas", {"a": 1}),
        ("init_image", "~nobody-of-this-name/x.png"),
        ("init_image", "memory:3x3"),
        ("init_image", "/dev/zero"),
        ("init_image", "https://example.com/x.png"),
    ],
)
def test_settings_that_somebody_made_up_are_refused(hidream, field, value):
    hidream("generate", "a", *FEW, "-o", "a.png")

    def change(note):
        note["request"][field] = value
        note["inputs"] = {"references": ["0" * 64], "init_image": ["0" * 64], "mask": ["0" * 64]}

    code, _, err = again(hidream, "generate", with_note(change))
    assert (code, err.count("\n") <= 2) == (3, True), err
    assert "\x1b" not in err
    assert not os.path.exists("again.png")


def test_notes_that_cannot_be_followed(hidream):
    hidream("generate", "a", *FEW, "-o", "a.png")
    for change, word in [
        (lambda note: note.update(hidream=2), "newer"),
        (lambda note: note.update(hidream="x"), "no settings"),
        (lambda note: note.update(request=[]), "no settings"),
    ]:
        Path("b.png").unlink(missing_ok=True)
        code, _, err = again(hidream, "generate", with_note(change))
        assert (code, word in err) == (3, True), err
    for command, word in [("edit", "IMAGE"), ("subject", "--ref")]:
        code, _, err = again(hidream, command, "a.png")
        assert (code, word in err) == (2, True), err


def test_a_changed_model_is_told(hidream, tmp_path):
    model = tmp_path / "model"
    tiny.write_folder(model)
    hidream("generate", "a", *FEW, "-o", "a.png", model=model)
    digest = read_metadata("a.png")["model"]["digest"]
    assert len(digest) == 64
    assert "warning" not in again(hidream, "generate", "a.png")[2]
    tiny.write_folder(model, seed=1)
    code, out, err = again(hidream, "generate", "a.png", "--json", output="other.png")
    assert code == 0
    assert "digest differs" in err
    assert any("digest differs" in text for text in json.loads(out)["warnings"])
    assert read_metadata("other.png")["model"]["digest"] != digest


def test_the_same_arithmetic_unless_flags_say_otherwise(hidream, tiny_folder):
    hidream("generate", "a", *FEW, "--dtype", "bf16", "-o", "a.png")
    assert again(hidream, "generate", "a.png")[0] == 0
    assert read_metadata("again.png")["dtype"] == "bfloat16"
    assert same("again.png", "a.png")
    again(hidream, "generate", "a.png", "--dtype", "fp32", output="b.png")
    assert read_metadata("b.png")["dtype"] == "float32"
    other = with_note(lambda note: note["versions"].update(torch="1.0"), target="c.png")
    assert "torch 1.0" in again(hidream, "generate", other, output="d.png")[2]


def test_no_metadata_leaves_no_trace(hidream):
    edited(hidream, "--no-metadata", "--overwrite")
    texts = read_texts("a.png")
    assert set(vars(texts).values()) == {None}
    assert set(Image.open("a.png").info) == set()


def test_inputs_that_are_too_large_to_be_carried(hidream, monkeypatch):
    from hidream.cli import recording

    monkeypatch.setattr(recording, "MAX_EMBEDDED", 100)
    tiny.picture(1, 32, 32).save("source.png")
    code, _, err = hidream("edit", "source.png", "x", "--embed-inputs", "-o", "a.png")
    assert (code, "--embed-inputs" in err) == (3, True)


def test_info_of_other_programs(hidream):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a \x1b[31mfox\nSteps: 3, Seed: 4, Size: 8x8")
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=chunks)
    code, out, _ = hidream("info", "a.png", model=None)
    assert (code, "a  [31mfox" in out, "A1111" in out) == (0, True, True)
    assert again(hidream, "generate", "a.png")[0] == 3
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", "{")
    Image.new("RGB", (8, 8)).save("b.png", pnginfo=chunks)
    code, out, _ = hidream("info", "b.png", "--json", model=None)
    assert code == 0
    assert json.loads(out)["other"] == {
        "program": "ComfyUI",
        "problem": "its prompt is not readable JSON.",
    }


WORDS = [
    "red",
    "blue",
    "cube",
    "the",
    "猫",
    "\U0001f408",
    "é",
    "<|im_end|>",
    '"',
    "\\",
    "a,b:",
    "&<",
]


def random_picture(dice, name, mode="RGB", size=None):
    size = size or (dice.randrange(16, 70), dice.randrange(16, 70))
    exif = Image.Exif()
    exif[274] = dice.choice([1, 1, 3])
    made = tiny.picture(dice.randrange(9), *size).convert(mode)
    made.save(name, **({"exif": exif} if mode == "RGB" else {}))
    return name


def random_request(dice):
    """A command and valid arguments of it, and the files that they name."""

    def maybe(*arguments, chance=0.3):
        return list(arguments) if dice.random() < chance else []

    def text():
        return "a " + " ".join(dice.choices(WORDS, k=dice.randrange(8)))

    sides = [dice.randrange(16, 65, 16) for _ in range(2)]
    arguments = [*maybe("-n", text()), *maybe("--seed", dice.randrange(2**63), chance=0.7)]
    arguments += maybe("--size", f"{sides[0]}x{sides[1]}", chance=0.6)
    arguments += maybe("--guidance", dice.choice([0, 1, 1.3, 2.71828, 7]))
    arguments += maybe("--guidance-interval", dice.random() / 2, 0.5 + dice.random() / 2)
    arguments += maybe("--shift", 0.5 + 3 * dice.random())
    arguments += maybe("--sampler", dice.choice(["euler", "heun", "unipc", "flash"]), chance=0.7)
    arguments += maybe("--noise-scale", 1 + dice.random())
    arguments += maybe("--noise-clip-std", 1 + dice.random())
    arguments += maybe("--deterministic")
    if dice.random() < 0.3:
        sigmas = sorted({dice.random() + 1e-3 for _ in range(dice.randrange(1, 4))}, reverse=True)
        arguments += ["--sigmas", *(min(1, sigma) for sigma in sigmas)]
    else:
        arguments += ["--steps", dice.randrange(1, 4)]
    command = dice.choice(["generate", "generate", "edit", "subject"])
    kinds = ["png", "jpg", "webp"]
    if command == "edit":
        size = (dice.randrange(16, 70), dice.randrange(16, 70))
        files = [random_picture(dice, "source.png", dice.choice(["RGB", "L", "P", "RGBA"]), size)]
        arguments = [files[0], text(), *arguments]
        if dice.random() < 0.5 and Image.open(files[0]).mode != "RGB":
            files.append(random_picture(dice, "mask.png", "L", size))
            arguments += ["--mask", "mask.png"]
    elif command == "subject":
        files = [
            random_picture(dice, f"{i}.{dice.choice(kinds)}") for i in range(dice.choice([1, 2, 3]))
        ]
        arguments = [text(), *arguments, *(part for file in files for part in ("--ref", file))]
        if dice.random() < 0.5:
            arguments += ["--box", "0.1,0.6,0.25,0.9"] * len(files)
    else:
        files = [random_picture(dice, "start.png")] if dice.random() < 0.4 else []
        arguments = [text(), *arguments]
        if files:
            arguments += ["--init", files[0], *maybe("--strength", 0.2 + 0.7 * dice.random())]
    return command, arguments, files


def check_random_request(hidream, number):
    """generate → info → --from: the same request, the same note, the same pixels."""
    dice = random.Random(number)
    command, arguments, files = random_request(dice)
    name = f"a.{dice.choice(['png', 'png', 'jpg', 'webp'])}"
    embed = ["--embed-inputs"] if dice.random() < 0.4 else []
    code, out, err = hidream(command, *arguments, *embed, "--json", "-o", name)
    assert code == 0, (command, arguments, err)
    asked = json.loads(out)["request"]
    told = json.loads(hidream("info", name, "--json", model=None)[1])["metadata"]["request"]
    assert told == asked, (command, arguments)
    for file in files if embed else ():
        os.unlink(file)
    code, _, err = again(hidream, command, name, *embed, output=f"again-{name}")
    assert (code, "warning" in err) == (0, False), (command, arguments, err)
    assert same(f"again-{name}", name), (command, arguments)
    assert read_metadata(f"again-{name}") == read_metadata(name), (command, arguments)


@pytest.mark.parametrize("number", range(12))
def test_random_requests(hidream, number):
    check_random_request(hidream, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1000, 1200))
def test_two_hundred_random_requests(hidream, number):
    check_random_request(hidream, number)


def test_one_of_several_is_made_again_to_the_bit(hidream):
    several = ["--num-images", 2, "--deterministic"]
    hidream("generate", "a", *FEW, *several, "-o", "{index}.png")
    assert again(hidream, "generate", "1.png")[0] == 0
    assert same("again.png", "1.png")


def test_a_preview_says_what_it_is_and_makes_the_whole_picture(hidream):
    """It is marked as AI's, carries no files, and does not pass for the finished picture."""
    tiny.picture(1, 32, 32).save("source.png")
    few = ["--steps", 3, "--size", "32x32", "--seed", 3, "--preview-every", 2]
    hidream("edit", "source.png", "paint it", *few, "--embed-inputs", "-o", "a.png")
    note, preview = read_metadata("a.png"), read_metadata("a-step0002.png")
    assert preview.pop("preview") == {"step": 2, "num_steps": 3}
    assert note.pop("embedded")
    assert preview == note
    assert read_texts("a-step0002.png").source_type == "trainedAlgorithmicMedia"
    _, out, _ = hidream("info", "a-step0002.png", model=None)
    assert "of step 2 of 3" in out
    code, _, err = again(hidream, "edit", "a-step0002.png")
    assert code == 0
    assert "a-step0002.png is a preview: the whole picture is made" in err
    assert same("again.png", "a.png")
    assert not same("a-step0002.png", "a.png")
    hidream("edit", "source.png", "paint it", *few, "--no-metadata", "-o", "b.jpg")
    assert read_metadata("b-step0002.jpg") is None
    os.unlink("b.jpg")
    code, _, err = hidream("edit", "source.png", "paint it", *few, "-o", "b.jpg")
    assert (code, "b-step0002.jpg exists" in err) == (3, True)
    assert not os.path.exists("b.jpg")
    assert hidream("edit", "source.png", "x", *few, "-o", "b.jpg", "--overwrite")[0] == 0
