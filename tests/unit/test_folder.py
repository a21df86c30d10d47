"""A model folder is judged by its headers: whole folders open, broken ones say what is broken."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from hidream import locating
from hidream.errors import ModelError, UsageError
from hidream.folder import TRANSFORMER, open_folder, read_header
from hidream.locating import locate
from hidream.registry import SPECS


@pytest.fixture
def whole(tmp_path):
    """A folder of two shards and an index."""
    tensors = {name: np.ones((2, 3), np.float32) for name in ("a.weight", "b.weight", "c.bias")}
    shards = {"model-00001-of-00002.safetensors": ["a.weight"]}
    shards["model-00002-of-00002.safetensors"] = ["b.weight", "c.bias"]
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    placed = {name: file for file, held in shards.items() for name in held}
    write(tmp_path / "model.safetensors.index.json", {"weight_map": placed})
    write(tmp_path / "config.json", {"model_type": "qwen3_vl"})
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


def broken(path, why):
    with pytest.raises(ModelError, match=why) as caught:
        open_folder(path)
    assert "\n" not in str(caught.value)


def test_a_whole_folder(whole):
    write(whole / "hidream.json", {"patch_size": 16})
    folder = open_folder(whole)
    assert folder.config["model_type"] == "qwen3_vl"
    assert folder.settings == {"patch_size": 16}
    assert folder.tensors["a.weight"].shape == (2, 3)
    assert folder.tensors["c.bias"].file.name == "model-00002-of-00002.safetensors"
    assert folder.num_params == 18


def test_without_an_index(whole):
    (whole / "model.safetensors.index.json").unlink()
    assert len(open_folder(whole).tensors) == 3
    (whole / "model-00001-of-00002.safetensors").unlink()
    broken(whole, "shard model-00001-of-00002.safetensors is missing")


def test_missing_parts(whole):
    broken(whole / "nowhere", "does not exist")
    broken(whole / "config.json", "is a file")
    (whole / "model-00002-of-00002.safetensors").unlink()
    broken(whole, "shard model-00002-of-00002.safetensors is missing")
    (whole / "config.json").unlink()
    broken(whole, "config.json is missing")


def test_an_index_that_disagrees(whole):
    index = whole / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    write(index, {"weight_map": {**placed, "d": "model-00001-of-00002.safetensors"}})
    broken(whole, "places d in")
    write(index, {"weight_map": {k: v for k, v in placed.items() if k != "c.bias"}})
    broken(whole, "holds c.bias")
    write(index, {"weight_map": {**placed, "a.weight": "../x.safetensors"}})
    broken(whole, "no file of this folder")
    write(index, {"weight_map": {**placed, "a.weight": "pytorch_model.bin"}})
    broken(whole, "a pickle")
    write(index, {})
    broken(whole, "no weight_map")


def test_a_tensor_in_two_shards(whole):
    (whole / "model.safetensors.index.json").unlink()
    save_file({"a.weight": np.ones(1)}, whole / "model-00002-of-00002.safetensors")
    broken(whole, r"a\.weight is both in")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_pickles_are_never_loaded(tmp_path, suffix):
    write(tmp_path / "config.json", {})
    broken(tmp_path, r"holds no model\.safetensors")
    pickle = tmp_path / f"pytorch_model{suffix}"
    pickle.write_bytes(b"\x80\x04")
    broken(tmp_path, "is a pickle.*hidream models convert IN OUT")
    broken(pickle, "is a pickle")


def test_json_that_is_none(whole):
    (whole / "config.json").write_text("{")
    broken(whole, "not readable JSON")
    (whole / "config.json").write_text("[" * 100_000)
    broken(whole, "not readable JSON")
    (whole / "config.json").write_text("[]")
    broken(whole, "does not hold a JSON object")


def test_files_of_a_wrong_length(whole):
    file = whole / "model-00001-of-00002.safetensors"
    good = file.read_bytes()
    for content, why in (
        (good[:-1], "truncated"),
        (good[:20], "truncated inside its header"),
        (good + b"x", "longer"),
        (good[:4], "not a safetensors file"),
        (b"", "not a safetensors file"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"\x80\x04" * 40, "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{no}", "header .* is damaged"),
        (struct.pack("<Q", 2) + b"[]", "header .* is damaged"),
    ):
        file.write_bytes(content)
        broken(whole, why)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]},
        {"dtype": "F99", "shape": [3], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
        {"dtype": "F32", "shape": [3]},
        {"shape": [3], "data_offsets": [0, 12]},
        None,
    ],
    ids=str,
)
def test_headers_that_contradict_themselves(tmp_path, entry):
    text = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with pytest.raises(ModelError, match="damaged"):
        read_header(file)


def test_overlapping_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    text = json.dumps({"x": entry, "y": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    with pytest.raises(ModelError, match="overlaps"):
        read_header(file)


def test_locating_folders_and_names(whole, monkeypatch):
    write(whole / "hidream.json", {"patch_size": 8, "variant": "dev"})
    spec, path = locate(whole)
    assert (spec.patch_size, spec.variant, path) == (8, "dev", whole)
    assert locate(str(whole), variant="full")[0].variant == "full"
    with pytest.raises(ModelError, match="does not exist"):
        locate("./nowhere")
    with pytest.raises(UsageError, match="o1-nano"):
        locate("o1-nona")
    with pytest.raises(UsageError, match="variant"):
        locate(whole, variant="large")
    monkeypatch.setattr(locating, "fetch", lambda repo, local_only: whole)
    spec, path = locate("HiDream-ai/HiDream-O1-Image-Dev")
    assert (spec.name, spec.patch_size, path) == ("o1-dev", 8, whole)


@pytest.mark.parametrize(
    ("kind", "shift", "variant"),
    [
        ("UniPCMultistepScheduler", None, "full"),
        ("FlowMatchLCMScheduler", 6.0, "dev"),
        ("FlowMatchLCMScheduler", 3.0, "fast"),
        ("FlashFlowMatchEulerDiscreteScheduler", 3.0, "fast"),
        ("SomethingElse", 3.0, None),
    ],
)
def test_an_i1_is_of_its_schedulers_variant(tmp_path, kind, shift, variant):
    """Where neither its name, nor hidream.json, nor the user says another."""
    for part in ("transformer", "scheduler"):
        (tmp_path / part).mkdir()
    config = {"_class_name": TRANSFORMER, "max_resolution": [128, 128]}
    write(tmp_path / "transformer" / "config.json", config)
    write(tmp_path / "scheduler" / "scheduler_config.json", {"_class_name": kind, "shift": shift})
    assert locating.told_variant(tmp_path) == variant
    spec = locate(tmp_path)[0]
    wanted = SPECS[f"i1-{variant or 'full'}"]
    assert (spec.variant, spec.defaults) == (wanted.variant, wanted.defaults)
    for chosen in ("full", "dev", "fast"):
        assert locate(tmp_path, variant=chosen)[0].variant == chosen
    write(tmp_path / "hidream.json", {"variant": "dev"})
    assert locate(tmp_path)[0].variant == locating.told_variant(tmp_path) == "dev"


def test_a_variant_that_a_name_has_not_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(locating, "fetch", None)
    for name in ("e1-full", "o1-nano"):
        with pytest.raises(UsageError, match=f"--variant fast: {name} is full; an .1 can be"):
            locate(name, variant="fast")


def test_what_is_not_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hidream models pull HiDream-ai/HiDream-O1-Image"):
        locating.fetch("HiDream-ai/HiDream-O1-Image", local_only=True)
    with pytest.raises(UsageError, match="did you mean"):
        locate("HiDream-ai/HiDream-O1-Imag")


def test_a_hub_id_finds_its_snapshot_in_the_hubs_cache(whole, monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repo, commit = cache / "models--HiDream-ai--HiDream-O1-Image-Dev", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(whole, repo / "snapshots" / commit)
    for name in ("HiDream-ai/HiDream-O1-Image-Dev", "o1-dev"):
        spec, path = locate(name)
        assert (spec.name, spec.variant) == ("o1-dev", "dev")
        assert open_folder(path).num_params == 18
