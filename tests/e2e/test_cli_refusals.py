"""What the command line refuses: exit code, at most five lines that name the mistake, no torch.

All refusals run in one fresh process, which reports whether torch was imported.
"""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from hidream.cli import main

RUNNER = """
import contextlib, io, json, sys
from hidream.cli import main
results = []
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    results.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
json.dump(results, sys.stdout)
"""

FLAGS = [
    # (arguments, exit code, what the message must hold)
    (["xyzzy"], 2, ['"xyzzy"', "generate"]),
    (["genrate", "x"], 2, ['did you mean "generate"']),
    (["--verion"], 2, ['"--version"']),
    (["generate"], 2, ["prompt"]),
    (["generate", ""], 3, ["prompt is empty"]),
    (["generate", "   "], 3, ["prompt is empty"]),
    (["generate", "a\x1b[31mb"], 3, ["control character", "U+001B"]),
    (["generate", "a\x00b"], 3, ["control character", "U+0000"]),
    (["generate", "a\udcffb"], 3, ["surrogate"]),
    (["generate", "x" * 32_001], 3, ["32001", "32000"]),
    (["generate", "x", "y"], 2, ['"y"']),
    (["generate", "x", "--stesp", "3"], 2, ['did you mean "--steps"']),
    (["generate", "x", "--step", "3"], 2, ["--step", "--steps"]),
    (["generate", "x", "--size", "0x0"], 2, ["width=0", "8192"]),
    (["generate", "x", "--size", "-64x64"], 2, ["width=-64"]),
    (["generate", "x", "--size", "64x-64"], 2, ["height=-64"]),
    (["generate", "x", "--size", "1024x"], 2, ["1024x", "256x256"]),
    (["generate", "x", "--size", "big"], 2, ["big", "256x256"]),
    (["generate", "x", "--size", "99999x99999"], 2, ["99999", "8192"]),
    (["generate", "x", "--size", "8000x8000"], 2, ["million pixels"]),
    (["generate", "x", "--size", "100x128"], 2, ["width=100", "multiple of 16", "96 and 112"]),
    (["generate", "x", "--size", "1000x1024", "-m", "o1"], 2, ["992 and 1024"]),
    (["generate", "x", "-m", "e1-1"], 2, ["e1-1 edits one picture; there are 0"]),
    (["generate", "x", "-m", "i1-full", "--size", "2048x2048"], 2, ["more than i1-full draws"]),
    (["generate", "x", "--snap", "down"], 2, ["--snap"]),
    (["generate", "x", "--steps", "0"], 2, ["num_inference_steps=0", "1 … 1000"]),
    (["generate", "x", "--steps", "1001"], 2, ["1001", "1 … 1000"]),
    (["generate", "x", "--steps", "-3"], 2, ["-3"]),
    (["generate", "x", "--steps", "many"], 2, ["--steps", "many"]),
    (["generate", "x", "--steps", "1e9"], 2, ["--steps", "1e9"]),
    (["generate", "x", "--guidance", "nan"], 2, ["guidance_scale", "finite"]),
    (["generate", "x", "--guidance", "inf"], 2, ["guidance_scale", "finite"]),
    (["generate", "x", "--guidance", "-inf"], 2, ["guidance_scale", "finite"]),
    (["generate", "x", "--guidance", "-1"], 2, ["guidance_scale=-1", "0 … 100"]),
    (["generate", "x", "--guidance", "five"], 2, ["--guidance", "five"]),
    (["generate", "x", "--shift", "0"], 2, ["shift=0"]),
    (["generate", "x", "--sigmas", "0.3", "0.5"], 2, ["sigmas must fall"]),
    (["generate", "x", "--sampler", "eular"], 2, ['unknown sampler "eular"', '"euler"']),
    (["generate", "x", "-m", "o1-nona"], 2, ['unknown model "o1-nona"', '"o1-nano"']),
    (["generate", "x", "-m", "HiDream-ai/HiDream-O1-Imag"], 2, ["HiDream-ai/HiDream-O1-Image"]),
    (["generate", "x", "--seed", "-2"], 2, ["seed=-2"]),
    (["generate", "x", "--seed", str(2**63)], 2, [str(2**63)]),
    (["generate", "x", "--seed", "1.5"], 2, ["--seed", "1.5"]),
    (["generate", "x", "--num-images", "0"], 2, ["num_images=0"]),
    (["generate", "x", "--seed", "1", "2", "--num-images", "3"], 2, ["2 seeds", "num_images=3"]),
    (["generate", "x", "--seed", "3", "3", "-o", "a-{seed}.png"], 2, ["one file", "{index}"]),
    (["generate", "x", "-o", "a.gif"], 2, [".gif", ".png"]),
    (["generate", "x", "--strength", "0.5"], 2, ["--init"]),
    (["generate", "x", "--device", "tpu"], 2, ["tpu", "cpu"]),
    (["generate", "x", "--dtype", "int8"], 2, ["int8", "bf16"]),
    (["generate", "x", "--memory", "lwo"], 2, ['unknown memory policy "lwo"', '"low"']),
    (["generate", "x", "--preview-every", "0"], 2, ["--preview-every 0"]),
    (["generate", "x", "--lora", "a.safetensors"], 2, ["--lora", "2 arguments"]),
    (["generate", "x", "--lora", "a.safetensors", "big"], 2, ["--lora", '"big"', "SCALE"]),
    (["generate", "x", "--lora", "a.safetensors", "nan"], 2, ["loras", "nan"]),
    (["generate", "x", "--lora", "a.safetensors", "-100.5"], 2, ["loras", "-100.5"]),
    (["generate", "x", *["--lora", "a.safetensors", "1"] * 17], 2, ["17 loras", "16"]),
    (["generate", "x", "--lora", "nowhere.safetensors", "1"], 3, ["nowhere", "does not exist"]),
    (["generate", "x", "--lora", "a.pt", "1"], 3, ["a.pt", "pickle"]),
    (["generate", "x", "--lora", "owner/name", "1"], 4, ["hf download owner/name"]),
    (["generate", "x", "--shot", "closup"], 2, ["shot", "close-up"]),
    (["generate", "x", "--refine-prompt", "on"], 2, ["refine_prompt", "not available"]),
    (["generate", "x", "--refine-prompt", "auto"], 2, ["refine_prompt", "not available"]),
    (["generate", "x", "--sparsity", "1"], 2, ["sparsity=1", "below 1"]),
    (["generate", "x", "--prompt-file", "a.txt"], 2, ["PROMPT and --prompt-file", "Leave one"]),
    (["edit", "a.png", "x", "--prompt-file", "a.txt"], 2, ["PROMPT and --prompt-file"]),
    (["generate", "--from", "a.png", "--prompt-file", "a.txt"], 2, ["--from and --prompt-file"]),
    (["generate", "--prompt-file", "none.txt"], 3, ["none.txt", "No such file"]),
    (["generate", "--prompt-file", "."], 3, ["prompt file .", "directory"]),
    (["generate", "--prompt-file", "a\0b"], 3, ["prompt file", "null byte"]),
    (["generate", "x", "--embed-inputs", "--no-metadata"], 2, ["--embed-inputs", "exclude"]),
    (["edit", "--from", "a.png", "b.png", "c", "d"], 2, ["one argument too many"]),
    (["generate", "x", "--box", "0,1,0,1"], 3, ["1 boxes for 0 references"]),
    (["generate", "x", "--mask", "m.png"], 2, ["mask", "0 references"]),
    (["subject", "x"], 2, ["--ref"]),
    (["edit", "a.png"], 2, ["INSTRUCTION"]),
    (["edit", "a.png", "x", "--expand", "1,2,3"], 2, ["--expand", '"1,2,3"', "LEFT,TOP"]),
    (["edit", "a.png", "x", "--expand", "0,0,0,0"], 2, ["expand adds nothing"]),
    (["edit", "a.png", "x", "--expand", "-5,0,0,0"], 2, ["expand=-5"]),
    (["edit", "a.png", "x", "--expand", "16", "--init", "b.png"], 2, ["expand", "initial"]),
    (["edit", "a.png", "x", "--expand", "16", "--keep-aspect"], 2, ["keep_aspect", "exclude"]),
    (["generate", "x", "--expand", "16,0,0,0"], 2, ["expand", "0 references"]),
    (["storyboard"], 2, ["SCRIPT"]),
    (["storyboard", "none.txt"], 3, ["none.txt", "No such file"]),
    (["storyboard", "a\0b"], 3, ["script", "cannot be read"]),
    (["storyboard", "--from", "a.png", "--columns", "2"], 2, ["--columns needs the SCRIPT"]),
    (["storyboard", "--from", "a.png", "--shot", "full"], 2, ["--shot needs the SCRIPT"]),
    (["storyboard", "--from", "none.png"], 3, ["none.png", "does not exist"]),
    (["info", "a.png", "--patch", "16"], 2, ["--patch", "--analyse"]),
    (["info", "a.png", "--analyse", "--patch", "1"], 2, ["--patch 1", "2 … 8192"]),
    (["info", "a.png", "--analyse", "--patch", "big"], 2, ["--patch", "big"]),
    (["describe"], 2, ["IMAGE"]),
    (["describe", "a.png", "b?", "c?"], 2, ['"c?"']),
    (["describe", "a.png", ""], 3, ["question is empty"]),
    (["describe", "a.png", "a\x1b"], 3, ["control character", "U+001B"]),
    (["describe", "a.png", "--max-tokens", "0"], 2, ["max_new_tokens=0", "1 … 32768"]),
    (["describe", "a.png", "--max-tokens", "40000"], 2, ["40000", "1 … 32768"]),
    (["describe", "a.png", "--max-tokens", "many"], 2, ["--max-tokens", "many"]),
    (["describe", "a.png", "--temperature", "-1"], 2, ["temperature=-1", "0 … 100"]),
    (["describe", "a.png", "--temperature", "nan"], 2, ["temperature", "finite"]),
    (["describe", "a.png", "--top-p", "0"], 2, ["top_p=0"]),
    (["describe", "a.png", "--top-p", "1.5"], 2, ["top_p=1.5", "up to 1"]),
    (["describe", "a.png", "--seed", "-2"], 2, ["seed=-2"]),
    (["describe", "a.png", "--steps", "3"], 2, ['"--steps"']),
    (["describe", "a.png", "--device", "tpu"], 2, ["tpu", "cpu"]),
    (["describe", "a.png", "--memory", "lwo"], 2, ['unknown memory policy "lwo"', '"low"']),
    (["bench", "--memory", "stream"], 2, ["--memory stream", "Leave --memory out"]),
    (["describe", "a.png", "-m", "o1-nona"], 2, ['unknown model "o1-nona"', '"o1-nano"']),
    (["describe", "none.png"], 3, ["none.png", "does not exist"]),
    (["models", "inf"], 2, ['"info"']),
    (["models", "info", "o1-nona"], 2, ['"o1-nano"']),
    (["train"], 2, ["RECIPE.toml"]),
]
if importlib.util.find_spec("torchao") is None:
    FLAGS += [
        (["generate", "x", "--memory", name], 2, ["torchao", "hidream[quant]", "--memory stream"])
        for name in ("int8", "fp8")
    ]


def bomb(file, width, height):
    """A PNG of a few bytes that announces many pixels."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (header, b"IDAT" + zlib.compress(b"")):
        parts += [struct.pack(">I", len(chunk) - 4), chunk, struct.pack(">I", zlib.crc32(chunk))]
    file.write_bytes(b"".join(parts))


def input_cases(tmp: Path) -> list:
    """Refusals that need files, still without torch."""
    good, mask = str(tmp / "good.png"), str(tmp / "mask.png")
    Image.effect_noise((64, 48), 50).convert("RGB").save(good)
    Image.new("L", (32, 48), 255).save(mask)
    (tmp / "text.png").write_text("no picture")
    cut = (tmp / "good.png").read_bytes()
    (tmp / "cut.png").write_bytes(cut[: len(cut) // 2])
    bomb(tmp / "bomb.png", 60_000, 60_000)
    Image.new("RGB", (8, 8)).save(tmp / "old.gif")
    Image.new("RGB", (1, 3000)).save(tmp / "thin.png")
    (tmp / "boxes.json").write_text("{")
    (tmp / "nan.json").write_text("[[0, NaN, 0, 1]]")
    (tmp / "taken.png").write_bytes(b"")
    (tmp / "two.txt").write_text("a star\na heart\n")
    (tmp / "one.txt").write_text("a star")
    (tmp / "latin.txt").write_bytes(b"caf\xe9\n\xff")
    (tmp / "long.txt").write_text("x" * 1_000_001)
    (tmp / "broken.json").write_text("[")
    (tmp / "odd.json").write_text('{"panels": ["a", {"prompt": "b", "shot": "closup"}]}')
    (tmp / "good.list").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "seed": 1}')
    for name in ("n-1.png", "p-1-step0018.png"):
        (tmp / name).write_bytes(b"")
    sides = {"A": (2, 8), "B": (8, 2)}
    foreign = {f"blocks.0.lora_{side}.weight": np.zeros(shape) for side, shape in sides.items()}
    save_file(foreign, tmp / "foreign.safetensors")

    def ref(name):
        return ["subject", "x", "--ref", str(tmp / name)]

    def box(text):
        return [*ref("good.png"), "--box", text]

    def story(*flags, script="two.txt"):
        return ["storyboard", str(tmp / script), *flags, "-o", str(tmp / "story.png")]

    (tmp / "story2-panel2.png").write_bytes(b"")
    broken = tmp / "broken"
    broken.mkdir()
    model = ["generate", "x", "-m"]
    return [
        (ref("none.png"), 3, ["none.png", "does not exist"]),
        (ref("text.png"), 3, ["text.png", "PNG, JPEG or WebP"]),
        (ref("old.gif"), 3, ["old.gif", "PNG, JPEG or WebP"]),
        (ref("cut.png"), 3, ["cut.png", "truncated"]),
        (ref("bomb.png"), 3, ["bomb.png", "8192x8192"]),
        (ref("thin.png"), 3, ["1x3000", "64"]),
        (ref("."), 3, ["is not a file"]),
        (["subject", "x", *["--ref", good] * 12], 2, ["12 references", "11"]),
        (["edit", str(tmp / "none.png"), "x"], 3, ["does not exist"]),
        (["edit", good, "x", "--mask", str(tmp / "none.png")], 3, ["mask", "does not exist"]),
        (["edit", good, "x", "--mask", str(tmp / "text.png")], 3, ["mask", "PNG, JPEG or WebP"]),
        (["edit", good, "x", "--mask", str(tmp / "cut.png")], 3, ["mask", "truncated"]),
        (["edit", good, "x", "--mask", str(tmp / "bomb.png")], 3, ["mask", "8192x8192"]),
        (["edit", good, "x", "--mask", mask], 3, ["32x48", "64x48"]),
        (["generate", "x", "--init", str(tmp / "cut.png")], 3, ["initial picture", "truncated"]),
        (box("0.9,0.1,0,1"), 3, ["inverted"]),
        (box("0,1,0.9,0.1"), 3, ["inverted"]),
        (box("0,nan,0,1"), 3, ["not finite"]),
        (box("0,inf,0,1"), 3, ["not finite"]),
        (box("0,150,0,50"), 3, ["outside"]),
        (box("-0.2,0.5,0,1"), 3, ["outside"]),
        (box("0.5,0.5,0,1"), 3, ["empty"]),
        (box("0,1,0"), 3, ["four numbers"]),
        (box("a,b,c,d"), 3, ["four numbers"]),
        ([*box("0,1,0,1"), "--box", "0,1,0,1"], 3, ["2 boxes for 1 references"]),
        ([*ref("good.png"), "--layout", str(tmp / "boxes.json")], 3, ["not JSON"]),
        (["generate", "x", "--lora", "good.png", "1"], 3, ["good.png", "not a safetensors file"]),
        (
            ["generate", "x", "--lora", "foreign.safetensors", "1"],
            3,
            ["none of the 1 layers", "o1-nano", "blocks.0"],
        ),
        ([*ref("good.png"), "--layout", str(tmp / "none.json")], 3, ["none.json"]),
        ([*ref("good.png"), "--layout", str(tmp / "nan.json")], 3, ["not finite"]),
        ([*box("0,1,0,1"), "--layout", str(tmp / "nan.json")], 2, ["--box and --layout"]),
        (["generate", "x", "-o", str(tmp / "taken.png")], 3, ["taken.png", "--overwrite"]),
        (["generate", "x", "-o", str(tmp / "taken.png" / "a.png")], 3, ["cannot write"]),
        (["generate", "x", "-o", "/proc/nowhere/a.png"], 3, ["cannot write"]),
        (["generate", "x", "-o", str(tmp / ("n" * 300 + ".png"))], 3, ["cannot write"]),
        (["generate", "--from", good, "-o", str(tmp / "f.png")], 3, ["no settings"]),
        (story(script="one.txt"), 3, ["2 … 64 panels", "has 1"]),
        (story(script="latin.txt"), 3, ["latin.txt", "UTF-8"]),
        (story(script="long.txt"), 3, ["long.txt", "1000000"]),
        (story(script="."), 3, ["cannot be read"]),
        (story(script="broken.json"), 3, ["not JSON"]),
        (story(script="odd.json"), 3, ['panel 2: unknown shot "closup"', "close-up"]),
        (story("--columns", "3"), 2, ["columns=3", "2 panels"]),
        (story("--columns", "0"), 2, ["columns=0"]),
        (story("--gutter", "5"), 2, ["gutter=5", "0 and 16"]),
        (story("--gutter", "-16"), 2, ["gutter=-16"]),
        (story("--panel", "40x32"), 2, ["width=40", "32 and 48"]),
        (story("--panel", "big"), 2, ["--panel", "big"]),
        (story("--panel", "32x32", "--size", "64x64"), 2, ["--panel and --size"]),
        (story("--size", "64x64"), 2, ["height=64 does not part into 2 panels", "48 and 80"]),
        (story("--mask", good, "--ref", good), 2, ["sheet of panels and mask"]),
        (story("--shot", "closup"), 2, ["close-up"]),
        ([*story()[:-1], str(tmp / "story2.png")], 3, ["story2-panel2.png exists"]),
        (["storyboard", "--from", good], 3, ["no settings"]),
        (["edit", good, "x", "--expand", "0,0,10,0"], 2, ["width=74", "--expand 0,0,16,0"]),
        (["edit", good, "x", "--expand", "16", "--size", "64x64"], 2, ["with expand", "96x80"]),
        (["info", good, "--analyse"], 2, ["which model", "--patch 32"]),
        (["info", str(tmp / "text.png")], 3, ["PNG, JPEG or WebP"]),
        (["describe", str(tmp / "cut.png")], 3, ["cut.png", "truncated"]),
        (["describe", good, "-m", str(tmp / "nowhere")], 4, ["nowhere", "does not exist"]),
        ([*model, str(tmp / "nowhere")], 4, ["nowhere", "does not exist"]),
        ([*model, "./nowhere"], 4, ["nowhere", "does not exist"]),
        ([*model, str(broken)], 4, ["config.json is missing"]),
        (["train", str(tmp / "none.toml")], 3, ["none.toml"]),
    ]


def prompt_file_cases(tmp: Path) -> list:
    """Every way in which a line, or the whole file, is wrong: file and line are named."""
    good = str(tmp / "good.png")

    def case(name, content, code, *words, argv=("generate",)):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp / name).write_bytes(data)
        return ([*argv, "--prompt-file", name], code, [name, *words])

    edit, subject = ("edit", good), ("subject",)
    return [
        case("none.list", "", 3, "no requests"),
        case("comments.list", "# a cat\n\n   \n", 3, "no requests"),
        case("latin.list", b"a cat\na caf\xe9\n", 3, "line 2", "UTF-8"),
        case("control.list", "a cat\na\x1bb\n", 3, "line 2", "U+001B"),
        case("cut.list", 'a\n\n{"prompt": "b"', 3, "line 3", "must be JSON"),
        case("brace.list", "{red} cube", 3, "line 1", '{"prompt": "…"}'),
        case("twice.list", '{"prompt": "a", "seed": 1, "seed": 2}', 3, '"seed" is given twice'),
        case("field.list", '{"prompt": "a", "step": 3}', 2, 'unknown field "step"'),
        case("size.list", 'a\n{"prompt": "b", "width": 100}', 2, "line 2", "96 and 112"),
        case("range.list", '{"prompt": "a", "num_inference_steps": 0}', 2, "1 … 1000"),
        case("type.list", '{"prompt": "a", "sampler": []}', 2, "line 1", "unknown sampler"),
        case("kind.list", '{"prompt": 3}', 2, "line 1", "must be text"),
        case("prompt.list", 'a\n{"seed": 3}', 2, "line 2", "no prompt"),
        case("layout.list", '{"prompt": "a", "layout": [[0, 1, 0, 1]]}', 3, "1 boxes for 0"),
        case("model.list", '{"prompt": "a", "model": "o1-nona"}', 2, '"o1-nano"'),
        case(
            "models.list",
            '{"prompt": "a", "model": "o1-nano"}\n{"prompt": "a", "model": "o1"}',
            2,
            "line 2",
            "the model o1, the run has o1-nano",
        ),
        case("reference.list", '{"prompt": "a", "references": ["no.png"]}', 3, "line 1", "no.png"),
        case("picture.list", '{"prompt": "a", "references": ["text.png"]}', 3, "text.png"),
        case("loras.list", '{"prompt": "a", "loras": [["no.safetensors", 1]]}', 3, "line 1", "no."),
        case(
            "mask.list", 'a\n{"prompt": "b", "mask": "mask.png"}', 3, "line 2", "32x48", argv=edit
        ),
        case("bare.list", "a", 2, "line 1", "--ref", argv=subject),
        (["edit", "--prompt-file", "bare.list"], 2, ["line 1", "hidream edit IMAGE"]),
        case("seeds.list", '{"prompt": "a", "seed": [1, 2], "num_images": 3}', 2, "line 1"),
        case("many.list", '{"prompt": "a", "num_images": 1000}\n' * 11, 3, "11000 pictures"),
        (
            ["generate", "--prompt-file", "many.list", "--num-images", "2", "--seed", "1", "2"],
            2,
            ["many.list, line 1", "2 seeds"],
        ),
        (["generate", "--prompt-file", "good.list", "-o", "{seed}.png"], 2, ["one file"]),
        (["generate", "--prompt-file", "good.list", "-o", "a.gif"], 2, [".gif"]),
        (["generate", "--prompt-file", "good.list", "-o", "n.png"], 3, ["n-1.png exists"]),
        (
            ["generate", "--prompt-file", "good.list", "--preview-every", "9", "-o", "p.png"],
            3,
            ["p-1-step0018.png exists", "--overwrite"],
        ),
    ]


def folder_cases(tmp: Path, tiny: Path) -> list:
    """Model folders whose headers tell that something is wrong."""
    cases = []

    def copy(name):
        folder = tmp / name
        shutil.copytree(tiny, folder)
        return folder, folder / "model.safetensors"

    def add(folder, *words):
        output = ["-o", str(tmp / "never.png")]
        cases.append((["generate", "x", "-m", str(folder), *output], 4, list(words)))
        cases.append((["models", "verify", str(folder)], 4, list(words)))

    folder, weights = copy("pickle")
    weights.rename(folder / "pytorch_model.bin")
    add(folder, "pytorch_model.bin", "pickle", "hidream models convert")
    folder, weights = copy("truncated")
    weights.write_bytes(weights.read_bytes()[:-100])
    add(folder, "model.safetensors", "truncated")
    folder, weights = copy("shard")
    weights.rename(folder / "model-00001-of-00002.safetensors")
    add(folder, "model-00002-of-00002.safetensors", "missing")
    folder, weights = copy("no_weights")
    weights.unlink()
    add(folder, "no model.safetensors")
    folder, _ = copy("settings")
    (folder / "hidream.json").write_text('{"sampler": "eular"}')
    add(folder, "hidream.json", "eular")
    folder, weights = copy("headless")
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights)
    argv = ["describe", str(tmp / "good.png"), "-m", str(folder)]
    cases.append((argv, 4, ["no lm_head", "can draw, but not write"]))
    return cases


@pytest.fixture(scope="module")
def refusals(tmp_path_factory, tiny_folder):
    """Every case with its outcome, from one fresh process."""
    tmp = tmp_path_factory.mktemp("refusals")
    groups = [FLAGS, input_cases(tmp), prompt_file_cases(tmp), folder_cases(tmp, tiny_folder)]
    cases = [case for group in groups for case in group]
    # What reads weights' shapes imports torch, so those come last.
    cases.sort(key=lambda case: case[0][:2] == ["models", "verify"])
    argvs = [case[0] for case in cases]
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(argvs),
        capture_output=True,
        text=True,
        cwd=tmp,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.returncode == 0, process.stderr
    return list(zip(cases, json.loads(process.stdout), strict=True))


def test_every_refusal_has_its_exit_code(refusals):
    wrong = [
        (argv, code, result[0], result[2])
        for (argv, code, _), result in refusals
        if result[0] != code
    ]
    assert wrong == []


def test_every_refusal_says_what_is_wrong_in_few_lines(refusals):
    for (argv, _, words), (_, out, err, _) in refusals:
        assert out == "", argv
        assert 1 <= len(err.splitlines()) <= 5, (argv, err)
        assert "Traceback" not in err, argv
        assert err.startswith("error: "), (argv, err)
        for word in words:
            assert word in err, (argv, word, err)


def test_no_refusal_needs_torch(refusals):
    late = [argv for (argv, _, _), result in refusals if result[3] and argv[0] != "models"]
    assert late == []


@pytest.mark.parametrize("flaw", ["missing", "extra", "shape", "nan"])
def test_weights_that_do_not_fit_the_configuration(tiny_folder, tmp_path, capsys, flaw):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    word = {"missing": "1 missing", "extra": "1 not of", "shape": "wrong shape", "nan": "finite"}
    if flaw == "missing":
        del tensors[name]
    elif flaw == "extra":
        tensors["model.surprise.weight"] = np.ones(3, np.float32)
    elif flaw == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    output = tmp_path / "out.png"
    assert main(["generate", "x", "-m", str(folder), "-o", str(output)]) == 4
    err = capsys.readouterr().err
    assert word[flaw] in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "loading" not in line]) <= 5
    assert not output.exists()
    assert main(["models", "verify", str(folder)]) == 4
    assert word[flaw] in capsys.readouterr().err


def test_a_full_disk_is_found_before_the_work(tiny_folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hidream.pictures.shutil.disk_usage", lambda place: usage)
    output = tmp_path / "out.png"
    assert main(["generate", "x", "-m", str(tiny_folder), "-o", str(output)]) == 3
    assert "too full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
