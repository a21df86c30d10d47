"""O1 folders: what is saved is loaded to the bit, and what is not whole is refused, in time."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hidream.errors import ModelError
from hidream.locating import SHIPPED
from hidream.models import loading
from hidream.models.o1.config import O1_NANO, O1_TINY, SIZES, O1Config, ReferenceBudgets
from hidream.models.o1.model import O1
from hidream.models.o1.tokens import Tokenizer, encode
from hidream.models.o1.weights import load_o1, save_o1, shapes_of, verify_folder
from tests import tiny

WEIGHTS = "model.safetensors"
A_TENSOR = "model.language_model.layers.1.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny folder, to be broken."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def rewrite(folder, change):
    """Put the folder's tensors, changed, back into one file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder, count=3):
    """Cut the folder's weights into numbered shards with an index, as the hub has them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    placed = {name: names[i % count] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: tensors[n] for n, f in placed.items() if f == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_to_the_bit(tmp_path, tokenizer, dtype):
    model = tiny.random_o1().to(dtype)
    save_o1(model, tmp_path / "new" / "folder", tokenizer=tokenizer, settings=tiny.SETTINGS)
    loaded, its_tokenizer = load_o1(tmp_path / "new" / "folder", dtype=dtype)
    assert equal(loaded, model)
    assert loaded.config == model.config
    assert its_tokenizer.chat("a red cube", [2]) == tokenizer.chat("a red cube", [2])
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    stored = load_file(tmp_path / "new" / "folder" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {dtype}


def test_a_second_round_changes_nothing(tiny_folder, tmp_path):
    model, tokenizer = load_o1(tiny_folder)
    save_o1(model, tmp_path, tokenizer=tokenizer, settings=tiny.SETTINGS)
    for file in ("config.json", "hidream.json", "tokenizer.json", "chat_template.jinja", WEIGHTS):
        assert (tmp_path / file).read_bytes() == (tiny_folder / file).read_bytes()


def test_saved_over_itself(folder):
    """Training goes on from a folder and writes to it."""
    model, tokenizer = load_o1(folder)
    with torch.no_grad():
        model.model.final_layer2.linear.bias += 1
    save_o1(model, folder, tokenizer=tokenizer, settings=tiny.SETTINGS)
    assert equal(load_o1(folder)[0], model)


def test_not_saved_among_shards(folder, tokenizer, tiny_model):
    """Their index would still lead to them."""
    names = shard(folder)
    with pytest.raises(ModelError, match=f"other weights: {names[0]}"):
        save_o1(tiny_model, folder, tokenizer=tokenizer)
    assert not (folder / WEIGHTS).exists()


def test_a_folder_says_what_its_config_cannot(tmp_path, tokenizer):
    """Patch, bottleneck and budgets are in no published config.json: they are always written."""
    config = replace(O1_TINY, patch_size=8, bottleneck_size=24, budgets=ReferenceBudgets())
    model = tiny.random_o1(config)
    save_o1(model, tmp_path, tokenizer=tokenizer)
    loaded, _ = load_o1(tmp_path)
    assert loaded.config == config
    assert equal(loaded, model)
    assert loaded.model.x_embedder.proj1.weight.shape == (24, 3 * 8 * 8)


def test_dtype_is_the_loaders_choice(tiny_folder, tiny_model):
    loaded, _ = load_o1(tiny_folder, dtype=torch.bfloat16)
    assert equal(loaded, tiny.random_o1().to(torch.bfloat16))
    assert loaded.config == tiny_model.config


def test_a_sharded_folder(folder, tiny_model):
    shard(folder)
    assert equal(load_o1(folder)[0], tiny_model)
    assert len(verify_folder(folder).tensors) == len(tiny_model.state_dict())


def test_without_lm_head(folder, tiny_model, tokenizer):
    """Pictures are the same; there is no text to be had."""
    rewrite(folder, lambda tensors: tensors.pop(HEAD))
    model, _ = load_o1(folder)
    assert model.lm_head is None
    assert not model.config.has_lm_head
    tokens = encode(tokenizer, O1_TINY, "red", width=32, height=32)
    x_t, sigma = torch.ones(1, 4, O1_TINY.patch_dim), torch.tensor(0.5)
    ours, whole = (m.velocity(x_t, sigma, m.prefill([tokens])) for m in (model, tiny_model))
    torch.testing.assert_close(ours, whole)  # a file's header shifts its tensors in memory
    save_o1(model, folder, tokenizer=tokenizer, settings=tiny.SETTINGS)
    assert equal(load_o1(folder)[0], model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings(tmp_path, tokenizer, dtype):
    """One tensor in the file, one in memory, also after loading, moving and casting."""
    tiny.write_tokenizer(tmp_path)
    model = tiny.random_o1(replace(O1_TINY, tie_word_embeddings=True)).to(dtype)
    save_o1(model, tmp_path, tokenizer=Tokenizer(tmp_path), settings=tiny.SETTINGS)
    assert HEAD not in load_file(tmp_path / WEIGHTS)
    loaded, _ = load_o1(tmp_path, dtype=dtype)
    assert loaded.config == model.config
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert equal(loaded, model)
    moved = loaded.to("cpu", torch.float64)
    assert moved.lm_head.weight is moved.model.language_model.embed_tokens.weight


def test_weights_are_read_once(tiny_folder, monkeypatch):
    """No copy through another dtype or a second state dict: the module holds what was read."""
    read = []
    original = loading.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.shard = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            read.append(self.shard.get_tensor(name))
            return read[-1]

    monkeypatch.setattr(loading, "safe_open", Spy)
    model, _ = load_o1(tiny_folder)
    places = {tensor.data_ptr() for tensor in read}
    assert len(read) == len(model.state_dict())
    assert {weight.data_ptr() for weight in model.parameters()} == places


def test_what_ships_is_whole_and_small():
    folder = verify_folder(SHIPPED / "o1_nano")
    assert sum(file.stat().st_size for file in folder.path.iterdir()) <= 64e6
    model, tokenizer = load_o1(folder.path)
    assert model.lm_head is not None
    assert max(tokenizer.special.values()) < model.config.text.vocab_size
    assert folder.settings["name"] == "o1-nano"


# -- refused ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch):
    """The message of a refusal; by default no weight may have been read before it."""

    def check(folder, *said, reads=False):
        with monkeypatch.context() as patch:
            if not reads:

                def read(*args, **kwargs):
                    raise AssertionError("weights were read")

                patch.setattr(loading, "safe_open", read)
            with pytest.raises(ModelError) as caught:
                load_o1(folder)
        message = str(caught.value)
        assert caught.value.exit_code == 4
        assert caught.value.remedy
        assert len(message.splitlines()) <= 5
        for words in said:
            assert words in message
        return message

    return check


def test_a_missing_shard(folder, refused):
    names = shard(folder)
    (folder / names[1]).unlink()
    refused(folder, names[1], "missing")


def test_a_shard_that_lost_its_index(folder, refused):
    names = shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / names[2]).unlink()
    refused(folder, names[2], "missing")


def test_a_key_too_few(folder, refused):
    rewrite(folder, lambda tensors: tensors.pop(A_TENSOR))
    refused(folder, A_TENSOR, "1 missing")


def test_a_key_too_many(folder, refused):
    rewrite(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(1)}))
    refused(folder, "model.extra.weight", "1 not of this model")


def test_a_layer_too_many(folder, refused):
    """Many names are counted, three are shown."""

    def add(tensors):
        layer = {n: t for n, t in tensors.items() if ".language_model.layers.3." in n}
        tensors.update({n.replace("layers.3.", "layers.4."): t.clone() for n, t in layer.items()})

    rewrite(folder, add)
    said = refused(folder, "11 not of this model", "…")
    assert said.count("layers.4.") == 3


def test_a_wrong_shape(folder, refused):
    def cut(tensors):
        tensors[A_TENSOR] = tensors[A_TENSOR][:-1].contiguous()

    rewrite(folder, cut)
    refused(folder, A_TENSOR, "[127, 64] instead of [128, 64]")


def test_several_faults_at_once(folder, refused):
    def damage(tensors):
        tensors["model.extra.weight"] = torch.ones(1)
        tensors[A_TENSOR] = tensors.pop("model.t_embedder1.mlp.0.bias")

    rewrite(folder, damage)
    refused(folder, "1 missing: model.t_embedder1", "model.extra", f"wrong shape: {A_TENSOR}")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles(folder, refused, suffix):
    (folder / WEIGHTS).rename(folder / f"pytorch_model{suffix}")
    refused(folder, "pickle", "hidream models convert")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(folder, refused, value):
    def poison(tensors):
        tensors[A_TENSOR][3, 7] = value

    rewrite(folder, poison)
    refused(folder, A_TENSOR, "not finite", reads=True)


def test_truncated(folder, refused):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    refused(folder, "truncated")


def test_config_of_something_else(folder, refused):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refused(folder, "config.json", "text_config")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("head_dim", 30, "mrope_section"),
        ("num_key_value_heads", 3, "num_key_value_heads=3"),
        ("hidden_size", "wide", "hidden_size='wide' is not a whole number"),
        ("num_key_value_heads", 0, "num_kv_heads=0"),
        ("num_hidden_layers", True, "num_layers=True"),
        ("hidden_size", 32, "wrong shape"),
        ("vocab_size", 100, "wrong shape"),
        ("num_hidden_layers", 5, "missing"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_config_that_contradicts(folder, refused, field, value, said):
    config = tiny.read_json(folder / "config.json")
    config["text_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, said)


def test_no_folder(tmp_path, refused):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "config.json")


# -- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_config_survives_its_file(name, tokenizer):
    config = SIZES[name]
    written = json.loads(json.dumps([config.to_dict(tokenizer.special), config.to_settings()]))
    assert O1Config.from_dict(*written) == config


def test_newer_files_name_rope_otherwise(tokenizer):
    config = O1_NANO.to_dict(tokenizer.special)
    rope = config["text_config"].pop("rope_scaling")
    rope["rope_theta"] = config["text_config"].pop("rope_theta")
    config["text_config"]["rope_parameters"] = rope
    found = O1Config.from_dict(config)
    assert found.text == O1_NANO.text
    assert found.patch_size == 32  # the published one, where nothing else is said
    assert found.budgets == ReferenceBudgets()


def test_shapes_come_from_the_module():
    with torch.device("meta"):
        expected = {n: list(w.shape) for n, w in O1(O1_TINY).named_parameters()}
    assert shapes_of(O1_TINY) == expected
    assert HEAD not in shapes_of(replace(O1_TINY, tie_word_embeddings=True))
    assert HEAD not in shapes_of(replace(O1_TINY, has_lm_head=False))
    assert shapes_of(O1_TINY)[EMBEDDING] == [768, 64]
