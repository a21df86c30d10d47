"""A model's digest: a function of its files alone, remembered where that is possible."""

import hashlib
import json
import os

import pytest

from hidream import digest
from hidream.errors import ModelError
from hidream.folder import open_folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


def of(folder, cache):
    return digest.of_model(folder, list(folder.iterdir()), cache)


def test_it_is_what_sha256sum_says(model, tmp_path):
    lines = [
        f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert of(model, tmp_path / "cache" / "a.json") == expected
    assert of(model.rename(tmp_path / "elsewhere"), tmp_path / "b.json") == expected


def test_it_changes_with_content_and_names(model, tmp_path):
    cache = tmp_path / "cache.json"
    first = of(model, cache)
    (model / "config.json").write_text("CONFIG.JSON")  # as long as before
    second = of(model, cache)
    (model / "config.json").rename(model / "other.json")
    third = of(model, cache)
    assert len({first, second, third}) == 3


def test_files_are_hashed_once(model, tmp_path, monkeypatch):
    cache = tmp_path / "cache.json"
    files = list(model.iterdir())
    assert not digest.is_known(files, cache)
    first = of(model, cache)
    assert digest.is_known(files, cache)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert of(model, cache) == first
    os.utime(model / "config.json", ns=(1, 1))
    assert not digest.is_known(files, cache)
    with pytest.raises(TypeError):
        of(model, cache)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, '{"a": 1}', '{"PATH": [0, 0, "short"]}', "\0"]
)
def test_a_damaged_cache_is_no_error(model, tmp_path, content):
    expected = of(model, tmp_path / "good.json")
    cache = tmp_path / "cache.json"
    cache.write_text(content.replace("PATH", str(model / "config.json")))
    assert of(model, cache) == expected
    assert digest.is_known(list(model.iterdir()), cache)


def test_a_cache_that_cannot_be_written_is_no_error(model, tmp_path):
    (tmp_path / "file").write_text("no folder")
    expected = of(model, tmp_path / "good.json")
    assert of(model, tmp_path / "file" / "cache.json") == expected
    assert of(model, model) == expected  # a folder in its place
    assert sorted(file.name for file in model.iterdir()) == ["config.json", "model.safetensors"]


def test_files_that_are_gone_are_forgotten(model, tmp_path):
    cache = tmp_path / "cache.json"
    of(model, cache)
    (model / "config.json").unlink()
    (model / "new.json").write_text("new")
    of(model, cache)
    names = sorted(os.path.basename(path) for path in json.loads(cache.read_text()))
    assert names == ["model.safetensors", "new.json"]


def test_a_missing_file(model, tmp_path):
    with pytest.raises(ModelError, match=r"gone\.json cannot be read"):
        digest.of_model(model, [model / "gone.json"], tmp_path / "cache.json")


def test_only_files_that_matter_count(tiny_folder, tmp_path):
    names = {file.name for file in open_folder(tiny_folder).files}
    assert {"config.json", "hidream.json", "model.safetensors", "tokenizer.json"} <= names
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("hello")
    (copy / "lora.safetensors").write_text("hello")
    assert {file.name for file in open_folder(copy).files} == names
