"""Requests as tokens: ids as in the whole rendered chat, positions, patches, packed batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer

from hidream.errors import ModelError
from hidream.models.o1.batch import collate
from hidream.models.o1.config import O1_TINY
from hidream.models.o1.patches import patchify, to_picture, to_tensor, unpatchify, vision_patches
from hidream.models.o1.tokens import (
    FIRST_TARGET_POSITION,
    SPECIAL_TOKENS,
    Tokenizer,
    encode,
    patch_positions,
    text_positions,
)
from tests import tiny

PROMPTS = [
    "a red cube",
    "A RED cube, 3 of them; “quoted” and 'quoted' and \"QUOTED\"",
    "一只红色的猫坐在蓝色的桌子上，写着“你好”",
    "🦊 and 👩‍👩‍👧 in the café, naïve",
    "cafe\u0301, decomposed",
    "  leading and trailing  ",
    " ",
    "user\nassistant" + " line " * 40,
    "<|im_start, |>, <think>, <|unknown|>",
    "\ue000caption\ue000",
    "{{ messages }} {% if 1 %}",
]


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """The file's tokenizer as the library reads it: special tokens in text count as such."""
    return FastTokenizer.from_file(str(tiny_folder / "tokenizer.json"))


def rendered(prompt, num_images=0):
    images = "<|vision_start|><|image_pad|><|vision_end|>" * num_images
    return f"<|im_start|>user\n{images}{prompt}<|im_end|>\n<|im_start|>assistant\n"


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_those_of_the_whole_chat(tokenizer, plain, prompt):
    ids, _ = tokenizer.chat(prompt)
    assert ids == plain.encode(rendered(prompt), add_special_tokens=False).ids
    with_images, _ = tokenizer.chat(prompt, [1, 1])
    assert with_images == plain.encode(rendered(prompt, 2), add_special_tokens=False).ids


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("lengths", [(), (2, 5)])
def test_the_caption_is_found_again(tokenizer, prompt, lengths):
    """But for a first space, which this tokenizer joins to the line break before it."""
    ids, span = tokenizer.chat(prompt, lengths)
    text = tokenizer.decode(ids[span])
    assert text.strip() == tokenizer._text.normalizer.normalize_str(prompt).strip()


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_in_a_prompt_stay_text(tokenizer, special):
    prompt = f"a {special}{special} red cube {special}"
    ids, span = tokenizer.chat(prompt, [3])
    template_ids, _ = tokenizer.chat("a", [3])
    numbers = set(tokenizer.special.values())
    assert [i for i in ids if i in numbers] == [i for i in template_ids if i in numbers]
    assert not numbers & set(ids[span])
    assert tokenizer.decode(ids[span]) == prompt
    tokens = encode(tokenizer, O1_TINY, prompt, width=32, height=32)
    assert not tokens.image_slots.any()


def test_special_tokens_that_their_file_calls_ordinary(tmp_path, tokenizer):
    """Were they so, a prompt could still not speak them."""
    tiny.write_tokenizer(tmp_path)
    content = tiny.read_json(tmp_path / "tokenizer.json")
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    prompt = "a <|image_pad|> and a <|tms_token|>"
    assert Tokenizer(tmp_path).chat(prompt) == tokenizer.chat(prompt)


def test_pictures_become_placeholders(tokenizer):
    ids, _ = tokenizer.chat("red", [2, 3])
    pad, start, end = (
        tokenizer.special[f"<|{name}|>"] for name in ("image_pad", "vision_start", "vision_end")
    )
    first = ids.index(start)
    assert ids[first : first + 9] == [start, pad, pad, end, start, pad, pad, pad, end]
    assert ids.count(pad) == 5


def test_tokens_end_with_the_picture_to_come(tokenizer):
    tokens = encode(tokenizer, O1_TINY, "red", width=48, height=32)
    assert tokens.input_ids[-1] == tokenizer.special["<|boi_token|>"]
    assert tokens.grid == (2, 3)  # rows, columns
    assert tokens.num_target == 6
    assert tokens.num_generated == 7  # and the timestep
    assert tokens.position_ids.shape == (3, len(tokens.input_ids) + 7)
    assert tokens.references.shape == (0, O1_TINY.patch_dim)
    assert tokens.pixel_values.shape == (0, O1_TINY.vision.patch_dim)


def test_templates_in_their_other_places(tmp_path, tokenizer):
    """Older folders keep the template in a JSON file."""
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for name in ("chat_template.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": tiny.TEMPLATE}))
        assert Tokenizer(tmp_path).chat("a cube", [1]) == tokenizer.chat("a cube", [1])
        (tmp_path / name).write_text("{}")


def refused(folder):
    with pytest.raises(ModelError) as caught:
        Tokenizer(folder)
    assert caught.value.exit_code == 4
    assert str(folder) in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_broken_tokenizers_are_refused(tmp_path):
    tiny.write_tokenizer(tmp_path)
    good = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(good[:500])
    assert "tokenizer.json" in refused(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tiny.TEMPLATE}))
    assert "tokenizer.json" in refused(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text(good)
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "chat_template.jinja").unlink()
    assert "template" in refused(tmp_path)


def test_qwens_own_tokenizer_is_refused(tmp_path):
    """It lacks O1's five tokens."""
    tiny.write_tokenizer(tmp_path, SPECIAL_TOKENS[:7])
    said = refused(tmp_path)
    assert "<|boi_token|>" in said
    assert "<|tms_token|>" in said
    assert "<|im_start|>" not in said


# -- positions -------------------------------------------------------------------------------------


def test_text_counts_up_on_all_axes():
    found = text_positions(torch.zeros(4, dtype=torch.bool), [], num_after=2)
    assert torch.equal(found, torch.arange(6).expand(3, -1))


def test_pictures_spread_over_rows_and_columns():
    """a a [2×3 picture] a [1×1 picture] [2×1 picture] and one after."""
    slots = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
    found = text_positions(slots, [(2, 3), (1, 1), (2, 1)], num_after=1)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 7, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 7, 9],
    ]


def test_grids_follow_one_another():
    found = patch_positions([(2, 3), (1, 1), (1, 2)])
    p = FIRST_TARGET_POSITION
    assert p == 4096
    assert found.tolist() == [
        [p] * 6 + [p + 3] + [p + 4] * 2,
        [p, p, p, p + 1, p + 1, p + 1, p + 3, p + 4, p + 4],
        [p, p + 1, p + 2, p, p + 1, p + 2, p + 3, p + 4, p + 5],
    ]


def test_positions_of_a_request(tokenizer):
    tokens = encode(
        tokenizer, O1_TINY, "the cube", width=48, height=32, references=tiny.pictures(3)
    )
    a = len(tokens.input_ids)
    merged = [tuple(n // O1_TINY.vision.merge_size for n in grid) for grid in tokens.image_grids]
    expected = text_positions(tokens.image_slots, merged, num_after=1)
    assert torch.equal(tokens.position_ids[:, : a + 1], expected)
    target = tokens.position_ids[:, a + 1 : a + 7]
    assert target[0].unique().tolist() == [4096]
    assert target[1].tolist() == [4096] * 3 + [4097] * 3
    assert target[2].tolist() == [4096, 4097, 4098] * 2
    rest = tokens.position_ids[:, a + 7 :]
    assert rest.shape[1] == len(tokens.references)
    assert rest.min() == 4099
    longer = encode(tokenizer, O1_TINY, "the cube " * 9, width=48, height=32)
    assert torch.equal(longer.position_ids[:, -6:], target)  # whatever the prompt's length


# -- patches ---------------------------------------------------------------------------------------


def test_patches_are_rows_first_and_channels_first():
    pixels = torch.arange(3 * 4 * 6).reshape(3, 4, 6).float()
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    assert torch.equal(patches[1], pixels[:, 0:2, 2:4].flatten())
    assert torch.equal(patches[3], pixels[:, 2:4, 0:2].flatten())
    assert torch.equal(unpatchify(patches, (2, 3), 2), pixels)
    batch = torch.stack([pixels, -pixels])
    assert torch.equal(patchify(batch, 2)[1], -patches)
    assert torch.equal(unpatchify(patchify(batch, 2), (2, 3), 2), batch)


def test_every_level_survives():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    picture = Image.fromarray(levels)
    values = to_tensor(picture)
    assert (values.min(), values.max()) == (-1, 1)
    assert values.shape == (3, 16, 16)
    assert tiny.levels(to_picture(values), picture) == 0


def test_pictures_are_rounded_and_clipped():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.001, 1.0, 9.0]).expand(3, 1, 6)
    assert np.array(to_picture(values))[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert np.array(to_picture(torch.tensor([[[-0.001]]] * 3)))[0, 0, 0] == 127


def test_vision_patches_stand_in_merge_order():
    """Four patches of a token together, left to right and down; each frame doubled in time."""
    picture = tiny.picture(0, 96, 64)
    patches = vision_patches(picture, 16, 2, 2)
    assert patches.shape == (24, O1_TINY.vision.patch_dim)
    pixels = to_tensor(picture)
    places = []
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            places += [(row + i, column + j) for i in range(2) for j in range(2)]
    for patch, (row, column) in zip(patches, places, strict=True):
        expected = pixels[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        both = patch.view(3, 2, 16, 16)
        assert torch.equal(both[:, 0], both[:, 1])
        torch.testing.assert_close(both[:, 0], expected, atol=1e-6, rtol=0)


# -- batches ---------------------------------------------------------------------------------------


@pytest.fixture
def requests(tokenizer):
    return [
        encode(tokenizer, O1_TINY, prompt, width=32, height=32, references=tiny.pictures(count))
        for prompt, count in (("the red cube", 2), ("a", 0), ("make it red", 1))
    ]


def test_batches_are_packed_by_kind(requests):
    batch = collate(requests)
    for name in ("input_ids", "references"):
        one_by_one = torch.cat([getattr(tokens, name) for tokens in requests])
        assert torch.equal(getattr(batch, name), one_by_one)
    assert batch.lengths == tuple(
        (len(tokens.input_ids), 4, len(tokens.references)) for tokens in requests
    )
    assert batch.targets == [4, 4, 4]
    kinds = [
        tokens.position_ids.split([n.text, 1, n.target, n.references], dim=1)
        for tokens, n in zip(requests, batch.lengths, strict=True)
    ]
    by_kind = torch.cat([part for kind in zip(*kinds, strict=True) for part in kind], dim=1)
    assert torch.equal(batch.position_ids, by_kind)
    pads = batch.input_ids[batch.image_slots]
    assert len(pads) == sum(int(t.image_slots.sum()) for t in requests)
    assert len(pads.unique()) == 1
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == sum(rows * columns for rows, columns in batch.image_grids)


def test_who_may_read_whom(requests):
    """Entry by entry: text reads its sample's earlier text; the rest reads all of its sample."""
    batch = collate(requests)
    kinds = [(n.text, 1, n.target, n.references) for n in batch.lengths]
    owner = [i for kind in zip(*kinds, strict=True) for i, n in enumerate(kind) for _ in range(n)]
    assert len(owner) == batch.position_ids.shape[1]
    num_text, size = len(batch.input_ids), len(owner)
    marks = torch.eye(size)[:, None]  # token i has the value e_i: what is read tells of whom
    read = batch.packing.read(torch.zeros_like(marks), torch.zeros_like(marks), marks)[:, 0]
    for query in range(size):
        expected = [
            owner[key] == owner[query] and (query >= num_text or key <= query)
            for key in range(size)
        ]
        assert (read[query] > 0).tolist() == expected


def test_moving_keeps_everything(requests):
    tokens = requests[0]
    moved = tokens.to("meta")
    assert moved.input_ids.device.type == moved.references.device.type == "meta"
    assert (moved.grid, moved.caption) == (tokens.grid, tokens.caption)
    assert collate(requests[1:2]).to("cpu").pixel_values is None
