"""I1's text encoders: loaded when needed, each text once; what is missing is said at once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError, UsageError
from hidream.models.i1 import llama, text
from hidream.models.i1.config import I1_TINY
from hidream.models.i1.text import TextEncoders, Texts
from tests.tiny_i1 import TINIEST, make_tiny_llama

CUBE, SPHERE, EMPTY = Texts.of("a red cube"), Texts.of("the blue sphere"), Texts.of("")
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_i1_folder, tmp_path):
    return shutil.copytree(tiny_i1_folder, tmp_path / "i1")


@pytest.fixture
def loads(monkeypatch):
    """The labels of the encoders whose weights are read, in order."""
    seen, load = [], text._Encoder._load

    def counted(self, dtype):
        seen.append(self.kind.label)
        return load(self, dtype)

    monkeypatch.setattr(text._Encoder, "_load", counted)
    return seen


def equal(one, other):
    return all(torch.equal(tensor, getattr(other, name)) for name, tensor in vars(one).items())


def change(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_shapes_fit_the_network(tiny_i1_folder):
    encoders = TextEncoders.open(tiny_i1_folder, dtype=torch.bfloat16)
    features = encoders.encode([CUBE, EMPTY, CUBE])
    assert features.t5.shape == (3, 128, I1_TINY.t5_size)
    assert features.llama.shape == (3, 3, 128, I1_TINY.llama_size)
    assert features.pooled.shape == (3, I1_TINY.pooled_size)
    assert {tensor.dtype for tensor in vars(features).values()} == {torch.bfloat16}


def test_rows_do_not_depend_on_their_neighbours(tiny_i1_folder):
    together = TextEncoders.open(tiny_i1_folder).encode([CUBE, SPHERE, CUBE])
    for row, prompt in enumerate([CUBE, SPHERE, CUBE]):
        alone = TextEncoders.open(tiny_i1_folder).encode([prompt])
        assert torch.equal(together.t5[row], alone.t5[0])
        assert torch.equal(together.llama[:, row], alone.llama[:, 0])
        assert torch.equal(together.pooled[row], alone.pooled[0])


def test_a_text_is_encoded_once_and_then_needs_no_encoder(tiny_i1_folder, loads):
    encoders = TextEncoders.open(tiny_i1_folder, keep=False)
    assert encoders.in_memory == ()
    first = encoders.encode([CUBE, EMPTY])
    assert loads == ["CLIP-L", "CLIP-G", "T5", "Llama"]
    assert encoders.in_memory == ()
    assert equal(encoders.encode([CUBE, EMPTY]), first)
    assert len(loads) == 4
    encoders.encode([Texts.of("a red cube", {"t5": "a cube"}), EMPTY])
    assert loads[4:] == ["T5"]


def test_kept_encoders_are_read_once_until_released(tiny_i1_folder, loads):
    encoders = TextEncoders.open(tiny_i1_folder)
    encoders.encode([CUBE])
    encoders.encode([SPHERE])
    assert len(loads) == 4
    assert encoders.in_memory == text.NAMES
    encoders.release()
    assert encoders.in_memory == ()


def test_one_encoder_at_a_time(tiny_i1_folder, monkeypatch):
    encoders = TextEncoders.open(tiny_i1_folder, keep=False)
    most, load = [], text._Encoder._load
    monkeypatch.setattr(
        text._Encoder, "_load", lambda *a: most.append(len(encoders.in_memory)) or load(*a)
    )
    encoders.encode([CUBE, SPHERE])
    assert most == [0, 0, 0, 0]


def test_outputs_are_kept_up_to_a_limit_the_latest_used(tiny_i1_folder, loads):
    encoders = TextEncoders.open(tiny_i1_folder)
    encoders.encode([CUBE])
    size = sum(row.nbytes for row in encoders._kept.values())
    encoders.max_kept = 2 * size
    encoders.keep = False
    for prompt in (SPHERE, CUBE, EMPTY):  # SPHERE is the longest unused then
        encoders.encode([prompt])
    loads.clear()
    encoders.encode([CUBE])
    assert loads == []
    encoders.encode([SPHERE])
    assert len(loads) == 4
    encoders.max_kept = 0
    encoders.encode([CUBE])
    assert not encoders._kept


def test_usable_in_training_when_made_under_inference_mode(tiny_i1_folder):
    with torch.inference_mode():
        features = TextEncoders.open(tiny_i1_folder).encode([CUBE])
    assert not features.t5.is_inference()
    assert not features.t5.requires_grad


def test_texts_for_each_encoder():
    assert Texts.of("a", {"llama": "b"}) == Texts("a", "a", "a", "b")
    with pytest.raises(UsageError, match='unknown text encoder "lama"; did you mean "llama"'):
        Texts.of("a", {"lama": "b"})


def test_what_is_cut_is_counted(tiny_i1_folder):
    encoders = TextEncoders.open(tiny_i1_folder)
    long = "red " * 150
    assert encoders.cut(CUBE) == ()
    assert encoders.cut(Texts.of("red", {"t5": long})) == (
        "T5 reads 128 of the prompt's 151 tokens; the rest is cut.",
    )
    assert len(encoders.cut(Texts.of(long))) == 4


def test_a_special_token_in_a_prompt_is_text(tiny_i1_folder):
    encoders = TextEncoders.open(tiny_i1_folder)
    spelled = "a <|startoftext|> b <|endoftext|> c </s> d <pad> e <|eot_id|> f <extra_id_7>"
    for encoder in encoders._encoders.values():
        plain, ids = (encoder._tokens(t)["input_ids"] for t in ("a", spelled))
        special = set(encoder._tokenizer.all_special_ids)
        assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_a_mirror_of_llama_that_pads_otherwise_gives_the_same(tiny_i1_folder, tmp_path):
    mirror = make_tiny_llama(tmp_path / "mirror")
    settings = mirror / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    other = {"pad_token": "<|begin_of_text|>", "padding_side": "left"}
    settings.write_text(json.dumps({**content, **other}))
    (mirror / WEIGHTS).unlink()
    shutil.copy(tiny_i1_folder / "text_encoder_4" / WEIGHTS, mirror)
    named = TextEncoders.open(tiny_i1_folder, llama=mirror).encode([CUBE])
    assert equal(named, TextEncoders.open(tiny_i1_folder).encode([CUBE]))


def test_llamas_head_is_not_read(folder, tiny_i1_folder):
    file = folder / "text_encoder_4" / WEIGHTS
    change(file, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    encoders = TextEncoders.open(folder)
    assert equal(encoders.encode([CUBE]), TextEncoders.open(tiny_i1_folder).encode([CUBE]))
    with_head = sum(tensor.numel() for tensor in load_file(file).values())
    assert encoders.num_params["llama"] < with_head


@pytest.mark.parametrize(
    "part", ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_2"]
)
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=f"has no {part}, which"):
        TextEncoders.open(folder)


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("text_encoder", lambda t: t.pop("text_projection.weight"), "1 missing: text_projection"),
        ("text_encoder_3", lambda t: t.update(x=torch.ones(1)), "1 not of this model: x"),
        (
            "text_encoder_4",
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"norm.weight \[3\] instead of \[40\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_before_any_is_read(folder, loads, file, edit, said):
    change(folder / file / WEIGHTS, edit)
    with pytest.raises(ModelError, match=said):
        TextEncoders.open(folder)
    assert loads == []


def test_folders_of_something_else_or_not_safe(folder):
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder_3", folder / "text_encoder_2")
    with pytest.raises(ModelError, match='of type "t5"; CLIP-G is "clip_text_model"'):
        TextEncoders.open(folder)
    (folder / "text_encoder" / WEIGHTS).rename(folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        TextEncoders.open(folder)


def test_damaged_values_and_tokenizers(folder):
    file = folder / "text_encoder_3" / WEIGHTS
    change(file, lambda tensors: tensors["shared.weight"].fill_(float("inf")))
    (folder / "tokenizer_2" / "vocab.json").write_text("{")
    encoders = TextEncoders.open(folder)
    with pytest.raises(ModelError, match="tokenizer_2 cannot be read"):
        encoders.encode([CUBE])
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"shared.weight in .* not finite"):
        TextEncoders.open(folder).encode([CUBE])


def test_encoders_of_another_size(folder, tmp_path):
    short = make_tiny_llama(tmp_path / "short", config=TINIEST)
    with pytest.raises(ModelError, match=r"Llama has 2 layers of 40 values; .* reads 3 of 40"):
        TextEncoders.open(folder, llama=short)
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"give 8 and 8 values; .* reads 20 together"):
        TextEncoders.open(folder)


def test_where_llama_is_looked_for(folder, tmp_path, monkeypatch):
    monkeypatch.delenv(llama.VARIABLE, raising=False)
    inside = (folder / "text_encoder_4", folder / "tokenizer_4")
    assert llama.find_llama(folder) == inside
    own = make_tiny_llama(tmp_path / "own")
    assert llama.find_llama(folder, own) == (own, own)
    for part in inside:
        shutil.rmtree(part)

    def fetch(repo, *, local_only):
        assert local_only
        if repo not in here:
            raise ModelError(f"{repo} is not on this machine.")
        return tmp_path / repo

    monkeypatch.setattr(llama, "fetch", fetch)
    here = {llama.REPOS[2], "me/llama"}
    assert llama.find_llama(folder)[0] == tmp_path / llama.REPOS[2]
    assert llama.find_llama(folder, "me/llama")[0] == tmp_path / "me" / "llama"
    monkeypatch.setenv(llama.VARIABLE, str(own))
    assert llama.find_llama(folder) == (own, own)
    monkeypatch.delenv(llama.VARIABLE)
    here = set()
    with pytest.raises(ModelError, match=r"gated and not on this machine.*HIDREAM_LLAMA=unsloth"):
        llama.find_llama(folder)
    with pytest.raises(ModelError, match="does not exist"):
        llama.find_llama(folder, tmp_path / "nowhere")
