"""Other programs' settings: read where they are well formed, bounded and told where not."""

import json
import random
import time

from hidream.foreign import MAX_TEXT, read_comfy, read_parameters, write_parameters

A1111 = """a red cube, (sharp:1.2),
on a table
Negative prompt: blurry,
low quality
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 123, Size: 512x768, \
Model hash: cc6cb27103, Model: v1-5, Hypernet: "a: b, \\"c\\"", Version: v1.9.0"""

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42,
            "steps": 25,
            "cfg": 6.5,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["9", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a red cube"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": ["8", 0]}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "blurry"}},
    "9": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["6", 0], "guidance": 3.5}},
}


def test_parameters():
    found = read_parameters(A1111)
    assert found["prompt"] == "a red cube, (sharp:1.2),\non a table"
    assert found["negative_prompt"] == "blurry,\nlow quality"
    assert found["settings"]["Sampler"] == "DPM++ 2M Karras"
    assert found["settings"]["Seed"] == "123"
    assert found["settings"]["Hypernet"] == 'a: b, "c"'
    assert found["settings"]["Version"] == "v1.9.0"


def test_parameters_without_settings():
    found = read_parameters("just a prompt: with a colon")
    assert found == {
        "prompt": "just a prompt: with a colon",
        "negative_prompt": "",
        "settings": {},
    }
    assert read_parameters("")["prompt"] == ""


def test_a_prompt_may_look_like_settings():
    request = {"prompt": "Steps: 3, Seed: 4, Size: 5x5", "negative_prompt": " ", "seed": 7}
    found = read_parameters(write_parameters({"request": request}))
    assert found["prompt"] == request["prompt"]
    assert found["negative_prompt"] == ""
    assert found["settings"]["Seed"] == "7"


def test_parameters_of_odd_notes():
    assert write_parameters({}) == ""
    assert write_parameters({"request": {}}) == ""
    name = "\udcff.png"  # a file name that is no valid text
    text = write_parameters({"request": {"prompt": "x", "seed": 1}, "model": {"name": name}})
    assert text.encode()


def test_a_graph():
    assert read_comfy(json.dumps(GRAPH), "{}") == {
        "prompt": "a red cube",
        "negative_prompt": "blurry",
        "settings": {
            "seed": 42,
            "steps": 25,
            "cfg": 6.5,
            "sampler": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "width": 512,
            "height": 640,
            "model": "sd15.safetensors",
        },
        "num_nodes": 7,
    }


def test_a_graph_with_a_guider():
    graph = {
        "1": {"inputs": {"noise": ["2", 0], "guider": ["3", 0]}},
        "2": {"inputs": {"noise_seed": 5}},
        "3": {"inputs": {"conditioning": ["4", 0]}},
        "4": {"inputs": {"text": "a fox"}},
    }
    found = read_comfy(json.dumps(graph), None)
    assert (found["prompt"], found["settings"]) == ("a fox", {"seed": 5})


def test_a_drawn_workflow():
    nodes = [{"type": "KSampler"}, {"type": "SaveImage"}, {"type": "KSampler"}, 7]
    assert read_comfy(None, json.dumps({"nodes": nodes})) == {
        "num_nodes": 3,
        "nodes": ["KSampler", "SaveImage"],
    }


def test_what_cannot_be_read_is_told():
    for text in ("{", "[" * 100_000, "7", "[]", '"x"', "", "{}", '{"1": 3}', "1" * 5000):
        assert "problem" in read_comfy(text, None), text[:20]
    for text in ("{", "[" * 100_000, "7"):
        assert "problem" in read_comfy(None, text), text[:20]
    assert read_comfy(None, '{"nodes": 3}')["num_nodes"] == 0
    assert "too long" in read_parameters("a" * (MAX_TEXT + 1))["problem"]
    assert "too long" in read_comfy("a" * (MAX_TEXT + 1), None)["problem"]


def test_a_graph_that_turns_in_a_circle():
    graph = {
        "1": {"inputs": {"positive": ["2", 0], "negative": ["1", 0]}},
        "2": {"inputs": {"a": ["3", 0], "b": ["nowhere", 0], "c": [[], 0], "d": [{}], "e": None}},
        "3": {"inputs": {"a": ["2", 0], "text": ["2", 0]}},
    }
    found = read_comfy(json.dumps(graph), None)
    assert (found["prompt"], found["negative_prompt"]) == ("", "")


def test_hostile_parameters_take_no_long_time():
    """Texts that make careless patterns try every split."""
    start = time.process_time()
    for text in (
        " " * MAX_TEXT,
        'a:"\\",' * 15_000,
        "a: " * 30_000,
        "Ab " * 500_000,
        ",:" * 50_000,
    ):
        read_parameters(text + "Steps: 1, a: 2, b: 3")
    assert time.process_time() - start < 20


def test_any_text_is_read_without_a_fault():
    dice = random.Random(0)
    parts = ["a", ": ", ", ", '"', "\\", "\n", "Negative prompt:", "Steps: 1", "猫", "\0", "{", "]"]
    whole = json.dumps(GRAPH)
    for _ in range(500):
        text = "".join(dice.choices(parts, k=dice.randrange(40)))
        assert set(read_parameters(text)) == {"prompt", "negative_prompt", "settings"}
        place = dice.randrange(len(whole))
        cut = whole[:place] + dice.choice(["", "3", "[]", "null", '"'])
        read_comfy(cut + whole[place + dice.randrange(9) :], text)
