"""I1 and E1 from the command line, on tiny folders in the published layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hidream.cli import embed
from hidream.cli.main import main
from hidream.errors import UsageError
from hidream.memory import POLICIES
from hidream.models.i1.config import I1_TINY
from hidream.models.i1.text import TextEncoders
from hidream.pipelines import load
from tests import tiny_i1

FEW = ("--steps", "2", "--seed", "7")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILE = f"./i1/transformer/{WEIGHTS}"
SUBJECT = ("--subject-mask", "mask.png", "--background", "a.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """i1, e1 and one without Llama; a picture and a mask beside them."""
    root = tmp_path_factory.mktemp("i1")
    tiny_i1.make_tiny_i1(root / "i1", llama_inside=True)
    tiny_i1.make_tiny_i1(root / "gated")
    wide = replace(I1_TINY, max_resolution=(16, 32))
    tiny_i1.make_tiny_i1(root / "e1", config=wide, llama_inside=True, seed=40)
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    mask.save(root / "mask.png")
    return root


@pytest.fixture
def place(folders, tmp_path, monkeypatch):
    for name in ("i1", "e1", "gated", "a.png", "mask.png"):
        (tmp_path / name).symlink_to(folders / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HIDREAM_LLAMA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path), int)


def test_a_picture_says_how_to_make_it_again(place, capsys):
    assert main(["generate", "a tree", "-m", "./i1", *FEW, "-n", "blur", "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "-o", "two.png"]) == 0
    assert (pixels("one.png") == pixels("two.png")).all()
    capsys.readouterr()
    assert main(["info", "one.png", "--json"]) == 0
    note = json.loads(capsys.readouterr().out)
    text = json.dumps(note)
    assert '"negative_prompt": "blur"' in text
    assert '"sampler": "unipc"' in text


@pytest.mark.parametrize(
    "flags",
    [
        ("edit", "a.png", "a tree", "-m", "./i1", "--mask", "mask.png"),
        ("edit", "a.png", "more", "-m", "./i1", "--size", "128x128", "--mask", "mask.png"),
        ("edit", "a.png", "more", "-m", "./i1", "--expand", "0,0,32,0"),
        ("edit", "a.png", "more", "-m", "./e1", "--expand", "0,0,32,0"),
        ("generate", "a tree", "-m", "./i1", "--init", "a.png", "--strength", "0.5"),
        ("generate", "a tree", "-m", "./i1", "--init", "a.png", "--size", "160x128"),
        ("generate", "a tree", "-m", "./i1", "--tile"),
        ("edit", "a.png", "redden", "-m", "./e1"),
        ("edit", "a.png", "redden", "-m", "./e1", "--no-clip-cfg-norm"),
        ("edit", "a.png", "redden", "-m", "./e1", "--refine-strength", "0.5", "--refiner", "./i1"),
        ("composite", "a.png", "a tree", "-m", "./i1", *SUBJECT, "--place", "0.3,0.6"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_verb(place, flags, capsys):
    assert main([*flags, *FEW, "-o", "out.png", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [image["path"] for image in shown["images"]] == ["out.png"]
    made = pixels("out.png")
    assert made.std() > 0
    if "mask.png" in flags and flags[0] == "edit":
        kept = pixels("mask.png") == 0
        assert (made[kept] == pixels("a.png")[kept]).all()
    if "--expand" in flags:
        assert (made[:, :128] == pixels("a.png")).all()
        assert made.shape == (128, 160, 3)


def test_embeddings_stand_for_the_encoders(place, capsys):
    """Also in a folder whose Llama is not there."""
    assert main(["embed", "a tree", "-n", "blur", "-m", "./i1", "-o", "tree.safetensors"]) == 0
    assert main(["generate", "a tree", "-n", "blur", "-m", "./i1", *FEW, "-o", "one.png"]) == 0
    for folder in ("./i1", "./gated"):
        flags = ["--embeddings", "tree.safetensors", "-m", folder, *FEW, "--overwrite"]
        assert main(["generate", *flags, "-o", "two.png"]) == 0
        assert (pixels("one.png") == pixels("two.png")).all()
    assert main(["generate", "a house", *flags, "-o", "two.png"]) == 3
    assert 'made of another prompt: "a tree"' in capsys.readouterr().err


def test_embed_keeps_the_memory_policy(place, monkeypatch, capsys):
    opened, made = TextEncoders.open, []

    def spy(*args, **options):
        made.append(opened(*args, **options))
        return made[-1]

    monkeypatch.setattr(TextEncoders, "open", spy)
    flags = ["embed", "a tree", "-m", "./i1", "--overwrite", "-o", "tree.safetensors"]
    for policy, piecewise in (("auto", False), ("balanced", False), ("low", True), ("16GB", True)):
        assert main([*flags, "--memory", policy]) == 0
        assert made[-1].piecewise == piecewise
    capsys.readouterr()
    assert main([*flags, "--memory", "nosuch"]) == 2
    assert 'unknown memory policy "nosuch"' in capsys.readouterr().err


def test_embeds_advice_where_memory_ends_is_what_it_can_do(place, monkeypatch, capsys):
    def full(self, *args, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TextEncoders, "encode", full)
    assert main(["embed", "a tree", "-m", "./i1", "-o", "tree.safetensors"]) == 5
    told = capsys.readouterr().err
    assert "the text encoders do not fit" in told
    assert "--dtype bf16" in told
    assert "size" not in told
    assert "--dry-run" not in told
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert "--memory low" in embed._less_memory(cuda, half, POLICIES["balanced"])
    assert "--memory" not in embed._less_memory(cuda, half, POLICIES["low"])
    assert "--dtype" not in embed._less_memory(torch.device("cpu"), half, POLICIES["low"])


def test_an_edit_takes_its_instruction_from_embeddings(place, capsys):
    assert main(["embed", "redden", "-n", "blur", "-m", "./e1", "-o", "t.safetensors"]) == 0
    assert main(["edit", "a.png", "redden", "-n", "blur", "-m", "./e1", *FEW, "-o", "1.png"]) == 0
    embedded = ["--embeddings", "t.safetensors", "-m", "./e1", *FEW]
    assert main(["edit", "a.png", *embedded, "-o", "2.png"]) == 0
    assert (pixels("1.png") == pixels("2.png")).all()
    capsys.readouterr()
    assert main(["edit", *embedded]) == 2
    assert "there is no reference picture" in capsys.readouterr().err


def test_nobody_is_told_of_an_embedding_files_negative_prompt(place, capsys):
    assert main(["embed", "a tree", "-n", "blur", "-m", "./i1", "-o", "t.safetensors"]) == 0
    (place / "lines.txt").write_text(json.dumps({"embeddings": "t.safetensors"}))
    fast = ["-m", "./i1", "--variant", "fast", "--dry-run"]
    for what in (("--embeddings", "t.safetensors"), ("--prompt-file", "lines.txt")):
        for flags, told in (((), False), (("-n", "other"), True)):
            capsys.readouterr()
            assert main(["generate", *what, *fast, *flags]) == 0
            assert ("negative prompt has no effect" in capsys.readouterr().err) == told


def test_embeddings_are_checked_before_anything_is_loaded(place, folders, capsys):
    assert main(["embed", "a tree", "-n", " blur ", "-m", "./i1", "-o", "tree.safetensors"]) == 0
    other = replace(I1_TINY, llama_size=48)
    tiny_i1.save_i1(tiny_i1.random_i1(other), place / "other" / "transformer")
    for flags, said in (
        (["-n", "other"], 'holds the negative prompt "blur"'),
        (["--shot", "close-up"], "another prompt"),
        (["--encoder-prompt", "llama", "x"], "another prompt"),
        (["-m", "./other"], "is for another model"),
    ):
        capsys.readouterr()
        assert main(["generate", "--embeddings", "tree.safetensors", "-m", "./i1", *flags]) == 3
        told = capsys.readouterr().err
        assert said in told
        assert "loading" not in told


def test_embeddings_in_a_prompt_file_and_made_again(place, capsys):
    for name in ("tree", "cube"):
        assert main(["embed", f"a {name}", "-m", "./i1", "-o", f"{name}.safetensors"]) == 0
    lines = [json.dumps({"embeddings": f"{name}.safetensors"}) for name in ("tree", "cube")]
    (place / "lines.txt").write_text("\n".join(lines))
    many = ["--prompt-file", "lines.txt", "-m", "./gated", *FEW, "-o", "{index}.png"]
    assert main(["generate", *many]) == 0
    for number, name in (("0", "tree"), ("1", "cube")):
        assert main(["generate", f"a {name}", "-m", "./i1", *FEW, "-o", f"{name}.png"]) == 0
        assert (pixels(f"{name}.png") == pixels(f"{number}.png")).all()
    # A new prompt is not that of the file, and a new file not that of the prompt.
    assert main(["generate", "a cube", "--from", "0.png", "-m", "./i1", "-o", "new.png"]) == 0
    assert (pixels("new.png") == pixels("1.png")).all()
    new = ["--embeddings", "cube.safetensors", "--overwrite", "-o", "new.png"]
    assert main(["generate", "--from", "0.png", *new]) == 0
    assert (pixels("new.png") == pixels("1.png")).all()


def test_a_variant_is_made_again(place):
    flags = ["-m", "./i1", "--variant", "fast", *FEW]
    assert main(["generate", "x", *flags, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "-o", "two.png"]) == 0
    assert (pixels("one.png") == pixels("two.png")).all()


def test_the_variant_is_the_flags_or_the_folders(place, folders, capsys):
    """Of a name that is not here, and of a folder whose scheduler tells it."""
    (place / "fast").mkdir()
    for part in (folders / "i1").iterdir():
        (place / "fast" / part.name).symlink_to(part)
    (place / "fast" / "scheduler").unlink()
    scheduler = {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0}
    tiny_i1.write_json(place / "fast" / "scheduler" / "scheduler_config.json", scheduler)
    for flags, steps, guidance in (
        (["-m", "i1-full"], 50, 5.0),
        (["-m", "i1-full", "--variant", "dev"], 28, 0.0),
        (["-m", "./fast"], 16, 0.0),
        (["-m", "./fast", "--variant", "full"], 50, 5.0),
    ):
        assert main(["generate", "x", *flags, "--dry-run", "--json"]) == 0
        shown = capsys.readouterr()
        request = json.loads(shown.out)["request"]
        assert (request["num_inference_steps"], request["guidance_scale"]) == (steps, guidance)
        assert "is assumed" not in shown.err


def test_a_composite_is_both_pictures_but_for_the_edge(place):
    """Away from the outline the subject's and the background's pixels stay to the bit."""
    other = np.random.default_rng(2).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(other).save("b.png")
    flags = ["--subject-mask", "mask.png", "--background", "b.png", "--place", "0.4,0.6"]
    assert main(["composite", "a.png", "x", "-m", "./i1", *flags, *FEW, "-o", "out.png"]) == 0
    made, band = pixels("out.png"), 16
    top, left = round(0.6 * 128) - 32, round(0.4 * 128) - 32  # the subject is 64x64
    inside = np.s_[top + band : top + 64 - band, left + band : left + 64 - band]
    moved = np.s_[32 + band : 96 - band, 32 + band : 96 - band]
    assert (made[inside] == pixels("a.png")[moved]).all()
    far = np.ones((128, 128), bool)
    far[top - band : top + 64 + band, left - band : left + 64 + band] = False
    assert (made[far] == other[far]).all()
    edge = pixels("out-edge.png")[..., 0] == 255
    changed = (made != pixels("out-composite.png")).any(axis=2)
    assert changed[edge].mean() > 0.9


@pytest.mark.parametrize("model", [["-m", "./i1"], []], ids=["i1", "o1-nano"])
def test_a_background_of_a_prompt_is_what_generate_draws(place, model, capsys):
    flags = [*model, *FEW, "--json"]
    assert main(["generate", "a tree", *flags, "-o", "b.png"]) == 0
    subject = ["composite", "a.png", "a cube", "--subject-mask", "mask.png", *flags]
    assert main([*subject, "--background", "b.png", "-o", "one.png"]) == 0
    capsys.readouterr()
    assert main([*subject, "--background-prompt", "a tree", "-o", "two.png"]) == 0
    out, told = capsys.readouterr()
    assert [image["path"] for image in json.loads(out)["images"]] == ["two.png"]
    assert told.count("loading") == 1
    assert (pixels("b.png") == pixels("two-background.png")).all()
    assert (pixels("one.png") == pixels("two.png")).all()
    assert main(["generate", "--from", "two-background.png", "-o", "again.png"]) == 0
    assert (pixels("b.png") == pixels("again.png")).all()


def test_a_background_is_drawn_with_the_first_seed(place, capsys):
    subject = ["composite", "a.png", "x", "--subject-mask", "mask.png", "--steps", "2"]
    drawn = [*subject, "--background-prompt", "a tree", "-o", "{index}.png", "--json"]
    for seeds in (["--seed", "-1", "5"], ["--num-images", "2"]):
        capsys.readouterr()
        assert main([*drawn, *seeds, "--overwrite"]) == 0
        first = json.loads(capsys.readouterr().out)["images"][0]["seed"]
        flags = ["--steps", "2", "--seed", str(first), "-o", "b.png", "--overwrite"]
        assert main(["generate", "a tree", *flags]) == 0
        assert (pixels("b.png") == pixels("out-background.png")).all()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--dry-run"], 0, "the background comes first: 128x128"),
        (["-m", "./e1"], 2, "edits one picture; there are 0"),
        (["-m", "./gated"], 4, "which is gated"),
        (["--place", "9,9"], 3, "the subject is outside the background"),
        (["--lora", "none.safetensors", "1"], 3, "none.safetensors"),
        (["--background", "a.png"], 2, "not allowed with"),
        (["--refiner", "x"], 2, "has no refiner"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_found_before_a_background_is_drawn(place, flags, code, said, capsys):
    before = set(place.iterdir())
    asked = ["composite", "a.png", "x", "--subject-mask", "mask.png", "-m", "./i1"]
    assert main([*asked, "--background-prompt", "a tree", *flags]) == code
    told = capsys.readouterr().err
    assert said in told
    assert "loading" not in told
    assert set(place.iterdir()) == before


@pytest.mark.parametrize("flags", [["--dry-run"], ["-m", "./e1"]], ids=" ".join)
def test_a_composite_that_is_not_drawn_leaves_nothing(place, flags):
    before = set(place.iterdir())
    main(["composite", "a.png", "x", "-m", "./i1", *SUBJECT, *flags])
    assert set(place.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("generate", "x", "-m", "./gated"), 4, "Llama-3.1-8B-Instruct, which is gated"),
        (("generate", "x", "-m", "./i1", "--size", "256x128"), 2, "more than ./i1 draws at once"),
        (("edit", "a.png", "x", "-m", "./i1"), 2, "reads no reference pictures"),
        (("generate", "x", "-m", "./e1"), 2, "edits one picture; there are 0"),
        (("edit", "a.png", "x", "-m", "./e1", "--refine-strength", "0.5"), 4, "models pull"),
        (("generate", "x", "--image-guidance-scale", "2"), 2, "is for E1's editing"),
        (("generate", "x", "-m", "./i1", "--encoder-prompt", "bert", "y"), 2, "unknown text enc"),
        (("generate", "x", "-m", "./i1", "--embeddings", "a.png"), 3, "safetensors"),
        (("describe", "a.png", "-m", "./i1"), 2, "draws, but cannot write"),
        (("subject", "x", "--ref", "a.png", "--ref", "a.png", "-m", "./i1"), 2, "no reference"),
        (("generate", "x", "-m", "i1-full"), 4, "hidream models pull"),
        (("embed", "x", "-m", "o1-nano", "-o", "x.safetensors"), 2, "has no text encoders"),
        (("embed", "x", "-m", "./i1", "-o", "x.txt"), 3, "End it in .safetensors"),
        (
            ("edit", "a.png", "x", "-m", "./e1", "--variant", "dev"),
            2,
            "--variant dev: ./e1 is full; an E1",
        ),
        (("generate", "x", "-m", "o1-nano", "--variant", "fast"), 2, "o1-nano is full; an O1"),
        (
            ("edit", "a.png", "x", "-m", "e1-1", "--variant", "dev"),
            2,
            "--variant dev: e1-1 is full",
        ),
        (("generate", "x", "-m", "./i1", "--components", "./i1"), 2, "is for a single file"),
        (("generate", "x", "-m", FILE), 2, "--components i1-full"),
        (("generate", "x", "-m", FILE, "--components", "o1-nano"), 2, "is no I1 or E1"),
        (("generate", "x", "-m", "./i1/vae/" + WEIGHTS), 4, "holds no I1 or E1"),
        (
            ("generate", "x", "-m", "./mask.png", "--components", "./i1"),
            4,
            "not a safetensors file",
        ),
        (("generate", "x", "-m", FILE, "--components", "i1-full"), 4, "hidream models pull"),
        (("models", "info", "./mask.png"), 4, "is not a safetensors file"),
        (("models", "verify", FILE), 2, "--components i1-full"),
        (("composite", "a.png", "x", *SUBJECT, "--place", "nan,0.5"), 2, "is no place"),
        (("composite", "a.png", "x", *SUBJECT, "--scale", "inf"), 2, "not a number above 0"),
        (("composite", "a.png", "x", "--subject-mask", "a.png", "--background", "none.png"), 3, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(place, flags, code, said, capsys):
    assert main([*flags]) == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert len([line for line in told.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--refiner", "nosuch"), "has no refiner"),
        (("--refiner", "nosuch", "-m", "./i1"), "has no refiner"),
        (("--llama", "nosuch"), "has no Llama"),
        (("--no-clip-cfg-norm", "-m", "./i1"), "is for E1's editing"),
        (("--image-guidance-scale", "0"), "is for E1's editing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_parts_that_a_model_does_not_have(place, flags, said, capsys):
    (place / "lines.txt").write_text("a tree\n")
    for what in (("a tree",), ("--prompt-file", "lines.txt")):
        assert main(["generate", *what, *flags]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert "loading" not in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refiner": "i1-full"}, "has no refiner"),
        ({"text_encoders": False}, "has no text encoders"),
        ({"llama": "x"}, "has no Llama"),
    ],
)
def test_parts_that_cannot_be_loaded(options, said):
    with pytest.raises(UsageError, match=said):
        load("o1-nano", **options)


def test_a_refiner_that_refines_nothing_is_told(place, capsys):
    flags = ["edit", "a.png", "redden", "-m", "./e1", "--refiner", "./i1", "--dry-run"]
    assert main(flags) == 0
    told = capsys.readouterr().err
    assert "--refiner has no effect" in told
    assert "draws by the instruction" not in told
    assert main([*flags, "--refine-strength", "0.5"]) == 0
    told = capsys.readouterr().err
    assert "--refiner has no effect" not in told
    assert told.count("the refining I1 draws by the instruction itself") == 1


def test_a_missing_component_is_named_before_weights(place, folders, capsys):
    shutil.copytree(folders / "i1", place / "broken")
    shutil.rmtree(place / "broken" / "tokenizer_2")
    assert main(["generate", "x", "-m", "./broken", *FEW]) == 4
    assert "tokenizer_2" in capsys.readouterr().err
    (place / "broken" / "text_encoder" / "model.safetensors").rename(
        place / "broken" / "text_encoder" / "pytorch_model.bin"
    )
    assert main(["generate", "x", "-m", "./broken", *FEW]) == 4
    assert "pickle" in capsys.readouterr().err


def test_verify_reads_the_whole_repository(place, folders, capsys):
    """Llama only where it lies inside; an E1 may be published alone."""
    (place / "alone").mkdir()
    (place / "alone" / "transformer").symlink_to(folders / "e1" / "transformer")
    beside = ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
    for folder, parts in (
        ("i1", ["transformer", *beside[:3], "text_encoder_4", "vae"]),
        ("gated", ["transformer", *beside]),
        ("alone", ["transformer"]),
        ("i1/transformer", ["transformer"]),
    ):
        assert main(["models", "verify", f"./{folder}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["parts"] == parts
        assert found["num_files"] == len(parts)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (("text_encoder_2", f"vae/{WEIGHTS}"), ("no text_encoder_2", f"vae holds no {WEIGHTS}")),
        (("tokenizer_3",), ("no tokenizer_3",)),
        (("text_encoder", "vae"), ("no text_encoder,", "vae does not exist")),
        (("text_encoder_3/model.safetensors",), ("text_encoder_3 holds no model.safetensors",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_verify_names_what_is_missing(place, folders, capsys, removed, said):
    shutil.copytree(folders / "gated", place / "broken")
    for name in removed:
        part = place / "broken" / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert main(["models", "verify", "./broken"]) == 4
    told = capsys.readouterr()
    assert "whole" not in told.out
    for words in said:
        assert words in told.err


@pytest.mark.parametrize("file", ["text_encoder_2/model.safetensors", f"vae/{WEIGHTS}"])
@pytest.mark.parametrize("flaw", ["nan", "shape"])
def test_verify_reads_values_and_shapes_of_every_part(place, folders, capsys, file, flaw):
    shutil.copytree(folders / "gated", place / "broken")
    tensors = load_file(place / "broken" / file)
    name = next(name for name, tensor in tensors.items() if tensor.dim() > 1)
    tensors[name] = tensors[name][:-1].clone() if flaw == "shape" else tensors[name] * torch.nan
    save_file(tensors, place / "broken" / file, metadata={"format": "pt"})
    assert main(["models", "verify", "./broken"]) == 4
    told = capsys.readouterr().err
    assert name in told
    assert ("wrong shape" if flaw == "shape" else "not finite") in told


@pytest.fixture
def comfy(place, folders):
    """A tiny I1's transformer in one file with ComfyUI's names; `parts` is the rest of it."""
    tensors = load_file(folders / "i1" / "transformer" / WEIGHTS)
    save_file({f"model.diffusion_model.{n}": t for n, t in tensors.items()}, "comfy.safetensors")
    shutil.copytree(folders / "i1", place / "parts")
    (place / "parts" / "transformer" / WEIGHTS).unlink()
    return ["-m", "comfy.safetensors", "--components", "./parts"]


def test_a_single_file_draws_as_its_folder(place, comfy, capsys):
    assert main(["generate", "a tree", "-m", "./i1", *FEW, "-o", "one.png"]) == 0
    assert main(["generate", "a tree", *comfy, *FEW, "-o", "two.png"]) == 0
    assert main(["generate", "a tree", *comfy, *FEW, "-o", "three.png", "--memory", "stream"]) == 0
    (place / "lines.txt").write_text("a tree\n")
    many = ["--prompt-file", "lines.txt", "-o", "four.png"]
    assert main(["generate", *comfy, *FEW, *many]) == 0
    assert main(["embed", "a tree", *comfy, "-o", "tree.safetensors"]) == 0
    embedded = ["--embeddings", "tree.safetensors", "-n", ""]
    assert main(["generate", *comfy, *FEW, *embedded, "-o", "five.png"]) == 0
    assert main(["generate", "--from", "two.png", *comfy[2:], "-o", "six.png"]) == 0
    for name in ("two", "three", "four", "five", "six"):
        assert (pixels("one.png") == pixels(f"{name}.png")).all()
    capsys.readouterr()
    assert main(["generate", "a tree", *comfy, "--variant", "fast", "--dry-run", "--json"]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["model"], request["num_inference_steps"]) == ("comfy.safetensors", 16)


def test_a_single_file_from_python(place, comfy):
    asked = {"num_inference_steps": 2, "seed": 7, "negative_prompt": "blur"}
    whole = load("./i1", device="cpu")("a tree", **asked).images[0]
    pipe = load(place / comfy[1], device="cpu", components=place / "parts")
    assert (np.asarray(pipe("a tree", **asked).images[0]) == np.asarray(whole)).all()


def test_a_single_file_is_described_and_verified(place, comfy, capsys):
    assert main(["models", "info", "./i1", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["models", "info", comfy[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_params"] == whole["num_params"]
    assert found["prefix"] == "model.diffusion_model."
    assert found["dtypes"] == {"F32": found["num_tensors"]}
    assert main(["models", "info", comfy[1], "--tensors"]) == 0
    assert "\nx_embedder.proj.weight  [" in capsys.readouterr().out
    assert main(["models", "verify", *comfy[1:]]) == 0
    assert "comfy.safetensors is whole" in capsys.readouterr().out


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(place, capsys):
    flags = ["-m", "./i1", "--variant", "fast", "-n", "blur", *FEW]
    assert main(["generate", "x", *flags, "-o", "out.png"]) == 0
    assert "negative prompt has no effect" in capsys.readouterr().err
