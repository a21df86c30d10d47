"""LoRA files by their headers: names of every style, what fits, what is refused and why."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch import nn

from hidream import lora_file
from hidream.errors import InputError, ModelError
from hidream.lora_file import find_lora, linear_layers, read_lora
from hidream.models.loading import tensor_shapes
from hidream.models.o1.config import O1_8B
from hidream.models.o1.weights import shapes_of
from tests import lora_files

Q = "model.language_model.layers.0.self_attn.q_proj"
K = "model.language_model.layers.0.self_attn.k_proj"
LAYERS = {Q: (6, 8), K: (6, 4)}


def write(file: Path, shapes: dict[str, tuple], **options) -> str:
    dtype = options.pop("dtype", np.float32)
    save_file({name: np.zeros(shape, dtype) for name, shape in shapes.items()}, file, **options)
    return str(file)


def pair(layer=Q, rank=2, down="lora_A.weight", up="lora_B.weight"):
    inner, out = LAYERS[layer]
    return {f"{layer}.{down}": (rank, inner), f"{layer}.{up}": (out, rank)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "style.safetensors"


# -- names -----------------------------------------------------------------------------------------


def test_every_linear_layer_and_nothing_else_can_be_changed(tiny_model):
    linear = {
        name: (module.weight[0].numel(), len(module.weight))
        for name, module in tiny_model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv3d)
    }
    assert linear_layers(tensor_shapes(tiny_model)) == linear
    assert {f"{name}.weight" for name in linear} < set(shapes_of(tiny_model.config))


@pytest.mark.parametrize("style", lora_files.STYLES)
def test_every_style_names_every_layer(tiny_model, file, style):
    lora = lora_files.matrices(tiny_model)
    found = read_lora(
        lora_files.write(file, lora, style), linear_layers(tensor_shapes(tiny_model)), "o1"
    )
    assert found.warnings == ()
    assert {layer.layer for layer in found.layers} == set(lora)
    assert {layer.rank for layer in found.layers} == {3}
    assert {layer.scale for layer in found.layers} == {1.0}
    assert all((layer.alpha is not None) == lora_files.STYLES[style][2] for layer in found.layers)


def test_no_two_layers_of_the_published_model_share_a_name():
    """Underscores for dots could make two names one; in O1 they do not."""
    names = lora_file._names(linear_layers(shapes_of(O1_8B)))
    assert len(names) > 1000
    assert [owners for owners in names.values() if len(owners) > 1] == []


def test_a_name_that_may_be_two_layers_is_refused(file):
    layers = {"model.a.b_c": (4, 4), "model.a_b.c": (4, 4)}
    shapes = {"lora_unet_a_b_c.lora_down.weight": (2, 4), "lora_unet_a_b_c.lora_up.weight": (4, 2)}
    with pytest.raises(InputError, match=r"may be model\.a\.b_c or model\.a_b\.c"):
        read_lora(write(file, shapes), layers, "o1")
    dotted = {f"model.a_b.c.lora_{s}.weight": shape for s, shape in (("A", (2, 4)), ("B", (4, 2)))}
    (layer,) = read_lora(write(file, dotted), layers, "o1").layers
    assert layer.layer == "model.a_b.c"


# -- what fits -------------------------------------------------------------------------------------


def test_a_partial_fit_says_how_many(file):
    shapes = pair(Q) | pair(K)
    for name in ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"):
        shapes |= {f"{name}.lora_A.weight": (2, 5), f"{name}.lora_B.weight": (5, 2)}
    found = read_lora(write(file, shapes), LAYERS, "o1-nano")
    assert {layer.layer for layer in found.layers} == {Q, K}
    (warning,) = found.warnings
    assert "style.safetensors: 2 of 5 layers fit o1-nano" in warning
    assert "blocks.0.attn, blocks.1.attn and 1 more" in warning


def test_tensors_that_are_no_lora_are_named(file):
    found = read_lora(write(file, pair(Q) | {f"{Q}.diff_b": (8,)}), LAYERS, "o1")
    assert [layer.layer for layer in found.layers] == [Q]
    assert found.warnings == (
        f"style.safetensors: tensors of other kinds are left out: {Q}.diff_b.",
    )


def test_alphas_of_peft_stand_beside_the_file(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    path = write(file, pair(Q, rank=4) | pair(K, rank=4))
    (warning,) = read_lora(path, LAYERS, "o1").warnings
    assert "adapter_config.json" in warning

    def scales(**config):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = read_lora(str(tmp_path), LAYERS, "o1")  # the folder names the file
        assert found.warnings == ()
        return {layer.layer: layer.scale for layer in found.layers}

    assert scales(lora_alpha=16) == {Q: 4.0, K: 4.0}
    assert scales(lora_alpha=16, use_rslora=True) == {Q: 8.0, K: 8.0}
    assert scales(lora_alpha=4, alpha_pattern={"self_attn.k_proj": 2}) == {Q: 1.0, K: 0.5}
    assert scales(lora_alpha=4, alpha_pattern={rf"^{K}": 2}) == {Q: 1.0, K: 0.5}
    assert scales(lora_alpha=4, alpha_pattern={"k": 2, "_proj": 2}) == {Q: 1.0, K: 1.0}
    for bad in ({"lora_alpha": "16"}, {"lora_alpha": None}, {"alpha_pattern": {"(a": 1}}):
        with pytest.raises(InputError, match="alphas"):
            scales(**bad)


def test_alphas_of_diffusers_stand_in_the_header(file):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1.0})}
    (layer,) = read_lora(write(file, pair(rank=4), metadata=metadata), LAYERS, "o1").layers
    assert layer.scale == 0.25


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x.lora_A.weight": (2, 6), "x.lora_B.weight": (8, 2)}, ["none of the 1", "o1-nano", "x"]),
        ({f"{Q}.lora_A.weight": (2, 6)}, ["incomplete", Q, "up"]),
        ({f"{Q}.lora_B.weight": (8, 2)}, ["incomplete", Q, "down"]),
        (pair() | {f"{Q}.lora_A.weight": (2, 7)}, ["another size", "7", "6"]),
        (pair() | {f"{Q}.lora_B.weight": (9, 2)}, ["another size", "9", "8"]),
        (pair() | {f"{Q}.lora_B.weight": (8, 3)}, ["damaged", "[8, 3]", "[2, 6]"]),
        (pair() | {f"{Q}.lora_A.weight": (12,)}, ["damaged"]),
        (pair(rank=0), ["damaged"]),
        (pair() | {f"{Q}.alpha": (2,)}, ["alpha", "one number"]),
        (pair() | {f"{Q}.dora_scale": (1, 6)}, ["dora_scale", "[1, 6]", "8 rows"]),
        (pair() | {f"{Q}.lora_A.b.weight": (2, 6)}, ["two LoRAs"]),
        (pair() | {f"transformer.{name}": s for name, s in pair().items()}, [Q, "twice"]),
        ({f"{Q}.lokr_w1": (2, 2), f"{Q}.lokr_w2": (4, 3), f"{Q}.alpha": ()}, ["LoKr"]),
        ({f"{Q}.hada_w1_a": (2, 2), f"{Q}.hada_w1_b": (4, 3)}, ["LoHa"]),
        ({f"{Q}.weight": (8, 6)}, ["no LoRA", "lora_A"]),
        ({}, ["no LoRA"]),
    ],
    ids=str,
)
def test_refused(file, shapes, words):
    path = write(file, shapes)
    with pytest.raises(InputError) as caught:
        read_lora(path, LAYERS, "o1-nano")
    assert caught.value.exit_code == 3
    for word in (*words, str(file)):
        assert word in str(caught.value)


def test_integers_are_refused(file):
    with pytest.raises(InputError, match="is I8"):
        read_lora(write(file, pair(), dtype=np.int8), LAYERS, "o1")


def test_damaged_files_are_refused(file):
    write(file, pair())
    whole = file.read_bytes()
    for content, word in (
        (whole[:-1], "truncated"),
        (whole + b"x", "longer"),
        (b"PK\x03\x04" + whole, "not a safetensors file"),
        (b"", "not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=word) as caught:
            read_lora(str(file), LAYERS, "o1")
        assert "folder" not in str(caught.value)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "a.bin", "A.CKPT", "missing/a.pth"):
        with pytest.raises(InputError, match="is a pickle"):
            find_lora(name)
    for name in (
        "a.safetensors",
        "x/a.safetensors",
        "./a",
        "../x/y",
        "/a/b",
        "x/../y/a.safetensors",
    ):
        with pytest.raises(InputError, match="does not exist"):
            find_lora(name)
    for name, command in (
        ("owner/name", "hf download owner/name"),
        ("owner/name/x/a.safetensors", "hf download owner/name x/a.safetensors"),
    ):
        with pytest.raises(ModelError, match=command):
            find_lora(name)
    (tmp_path / "many").mkdir()
    with pytest.raises(InputError, match="0 safetensors files"):
        find_lora("many")
    for name in ("a", "b"):
        write(tmp_path / "many" / f"{name}.safetensors", pair())
    with pytest.raises(InputError, match=r"a\.safetensors, b\.safetensors"):
        find_lora("many")
    assert find_lora("many/a.safetensors") == Path("many/a.safetensors")


def test_hub_files_on_this_machine_are_found(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, *, local_only):
        asked.append((repo, local_only))
        return tmp_path

    monkeypatch.setattr(lora_file, "fetch", fetch)
    write(tmp_path / "a.safetensors", pair())
    assert find_lora("owner/name") == tmp_path / "a.safetensors"
    assert find_lora("owner/name/a.safetensors") == tmp_path / "a.safetensors"
    assert asked == [("owner/name", True)] * 2
    with pytest.raises(ModelError, match=r"hf download owner/name b\.safetensors"):
        find_lora("owner/name/b.safetensors")


def test_no_torch_is_imported(file):
    write(file, pair())
    code = (
        "import sys; from hidream.lora_file import read_lora; "
        f"read_lora({str(file)!r}, {LAYERS!r}, 'o1'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
