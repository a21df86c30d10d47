"""Embedding files: what is read is what was written; what is something else is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hidream.errors import InputError
from hidream.models.i1.config import I1_TINY
from hidream.models.i1.embeddings import Embeddings, load_embeddings, save_embeddings
from hidream.models.i1.text import Texts
from tests.tiny_i1 import features

PROMPT = Embeddings(
    features=features(batch=1),
    texts=Texts.of("一个 “cube”", {"t5": "a cube"}),
    encoders={"t5": "0" * 64},
)
BOTH = replace(PROMPT, negative=features(batch=1, seed=9), negative_texts=Texts.of(""))
KEY = "hidream.embeddings"


@pytest.mark.parametrize("embeddings", [PROMPT, BOTH])
def test_round_trip(tmp_path, embeddings):
    file = tmp_path / "cube.safetensors"
    save_embeddings(file, embeddings)
    loaded = load_embeddings(file, I1_TINY)
    for ours, saved in (
        (loaded.features, embeddings.features),
        (loaded.negative, embeddings.negative),
    ):
        assert (ours is None) == (saved is None)
        for name, tensor in vars(saved).items() if saved else ():
            assert torch.equal(getattr(ours, name), tensor)
    assert (loaded.texts, loaded.negative_texts) == (embeddings.texts, embeddings.negative_texts)
    assert loaded.encoders == {"t5": "0" * 64}


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "cube.safetensors"
    save_embeddings(file, PROMPT)
    with pytest.raises(InputError, match="exists already"):
        save_embeddings(file, BOTH)

    def full(*_):
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_embeddings(file, BOTH, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    with pytest.raises(InputError, match="no name of an embedding file"):
        save_embeddings(tmp_path / "cube.pt", PROMPT)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(I1_TINY, t5_size=32), r"t5 is \[1, 7, 24\]; here it is \[1, tokens, 32\]"),
        (replace(I1_TINY, llama_size=32), r"llama is \[3, 1, 5, 40\]; here .* 32\]"),
        (replace(I1_TINY, llama_layers=(0, 1, 2, 3)), r"here it is \[4, 1, tokens, 40\]"),
        (replace(I1_TINY, pooled_size=21), r"pooled is \[1, 20\]; here it is \[1, 21\]"),
    ],
)
def test_of_another_model(tmp_path, config, said):
    save_embeddings(tmp_path / "cube.safetensors", PROMPT)
    with pytest.raises(InputError, match=said):
        load_embeddings(tmp_path / "cube.safetensors", config)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors, note: note.clear(), "is no embedding file"),
        (lambda tensors, note: note.update(version=2), "later version"),
        (lambda tensors, note: note.update(texts={"t5": "a"}), "is no embedding file"),
        (lambda tensors, note: note.update(texts="a"), "is no embedding file"),
        (lambda tensors, note: note.update(encoders=3), "is no embedding file"),
        (lambda tensors, note: note.pop("negative"), "does not hold the tensors"),
        (lambda tensors, note: tensors.pop("negative.t5"), "does not hold the tensors"),
        (lambda tensors, note: tensors["llama"].fill_(float("nan")), "llama in .* not finite"),
        (lambda tensors, note: tensors.update(t5=tensors["t5"].long()), "t5 in .* is I64"),
        (
            lambda tensors, note: tensors.update({"negative.pooled": torch.ones(2, 20)}),
            r"negative.pooled is \[2, 20\]",
        ),
    ],
)
def test_something_else(tmp_path, edit, said):
    file = tmp_path / "cube.safetensors"
    save_embeddings(file, BOTH)
    with safe_open(file, "pt") as opened:
        note = json.loads(opened.metadata()[KEY])
    tensors = load_file(file)
    edit(tensors, note)
    save_file(tensors, file, metadata={KEY: json.dumps(note)})
    with pytest.raises(InputError, match=said):
        load_embeddings(file, I1_TINY)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_embeddings(tmp_path / "no.safetensors", I1_TINY)
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="is a pickle"):
        load_embeddings(tmp_path / "x.pt", I1_TINY)
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(InputError, match="truncated"):
        load_embeddings(tmp_path / "x.safetensors", I1_TINY)
    save_file(vars(features(batch=1)), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="is no embedding file"):
        load_embeddings(tmp_path / "plain.safetensors", I1_TINY)
