"""A request is checked once, filled in once, and survives JSON."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hidream import limits, registry
from hidream.errors import InputError, UsageError
from hidream.request import (
    GenerateRequest,
    check_ability,
    resolve,
    size_error,
    snap_size,
    warnings_of,
)

FULL = registry.find("o1")
DEV = registry.find("o1-dev")


def ask(**fields):
    return GenerateRequest(prompt="a cat", **fields)


def filled(request, spec=FULL, **options):
    return resolve(request, spec.defaults_for(request.task), spec.patch_size, **options)


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t", "\u200b", "\u3000"])
def test_empty_prompts_are_refused(prompt):
    with pytest.raises(InputError, match="prompt is empty"):
        GenerateRequest(prompt=prompt)


@pytest.mark.parametrize("prompt", ["a\x00b", "a\x1b[31m", "\x7f", "\x85", "\ud800", "a\udcff"])
def test_control_characters_and_surrogates_are_refused(prompt):
    with pytest.raises(InputError, match=r"U\+"):
        GenerateRequest(prompt=prompt)
    with pytest.raises(InputError, match="negative_prompt"):
        ask(negative_prompt="x" + prompt)


def test_prompts_may_be_anything_readable():
    for prompt in ("一只红色的猫", "🐈‍⬛ cat", "שלום \u202ecat", "<|tms_token|>", "é" * 32_000):
        assert GenerateRequest(prompt=prompt).prompt == prompt
    assert GenerateRequest(prompt="a\nb\tc\r\nd\re").prompt == "a b c d e"
    with pytest.raises(InputError, match="32001 characters; the limit is 32000"):
        GenerateRequest(prompt="a" * 32_001)
    with pytest.raises(UsageError, match="must be text"):
        GenerateRequest(prompt=7)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 0, "height": 64},
        {"width": -64},
        {"height": 99_999},
        {"width": 8192, "height": 8192},
        {"width": 64.0},
        {"width": "64"},
        {"width": True},
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 3.5},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"guidance_scale": -1},
        {"guidance_scale": 101},
        {"guidance_scale": "5"},
        {"guidance_interval": (0.5,)},
        {"guidance_interval": (0.7, 0.3)},
        {"guidance_interval": (0, 1.5)},
        {"shift": 0},
        {"shift": math.nan},
        {"sampler": "eular"},
        {"sigmas": ()},
        {"sigmas": (0.5, 0.7)},
        {"sigmas": (1.2, 0.5)},
        {"sigmas": (0.5, -0.1)},
        {"sigmas": (math.nan,)},
        {"sigmas": "0.5"},
        {"sigmas": (0.9, 0.5), "num_inference_steps": 3},
        {"noise_scale": 0},
        {"noise_clip_std": -1},
        {"seed": -2},
        {"seed": 2**63},
        {"seed": 1.0},
        {"seed": ()},
        {"seed": (1, 2**63)},
        {"seed": (1, 2), "num_images": 3},
        {"seed": 2**63 - 1, "num_images": 2},
        {"num_images": 0},
        {"num_images": 1001},
        {"snap": "down"},
        {"keep_aspect": "yes"},
        {"strength": 0.5},
        {"strength": 0.0, "init_image": "a.png"},
        {"strength": 1.1, "init_image": "a.png"},
        {"references": 7},
        {"references": (7,)},
        {"references": ("a.png",) * 12},
        {"mask": "m.png"},
        {"mask": "m.png", "references": ("a.png", "b.png")},
        {"mask": 3, "references": ("a.png",)},
        {"init_image": 3},
        {"loras": ("x.safetensors", 0.5)},
        {"loras": (("x.safetensors", math.nan),)},
        {"loras": (("x.safetensors", -100.5),)},
        {"loras": (("x.safetensors", "1"),)},
        {"loras": (("x.safetensors", True),)},
        {"loras": (("x.safetensors", 1, 2),)},
        {"loras": ((7, 1),)},
        {"loras": (("", 1),)},
        {"loras": (("a\x00b", 1),)},
        {"loras": {"x.safetensors": 1}},
        {"loras": 7},
        {"loras": ("x.safetensors",) * 17},
        {"refine_prompt": "auto"},
        {"refine_strength": 1.5},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"image_guidance_scale": -2.0},
    ],
    ids=str,
)
def test_refused(fields):
    with pytest.raises(UsageError) as caught:
        ask(**fields)
    name = next(iter(fields))
    assert any(word in str(caught.value) for word in (name, name.rstrip("s"), *map(str, fields)))


def test_the_nearest_sampler_is_named():
    with pytest.raises(UsageError, match='unknown sampler "eular"; did you mean "euler"'):
        ask(sampler="eular")


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ((0.5, 0.2, 0, 1), "inverted"),
        ((0, 1, 0.7, 0.3), "inverted"),
        ((0.2, 0.2, 0, 1), "empty"),
        ((0, 120, 0, 50), "outside"),
        ((-0.1, 0.5, 0, 1), "outside"),
        ((math.nan, 0.5, 0, 1), "finite"),
        ((0, math.inf, 0, 1), "finite"),
        ((0, 1, 0), "four numbers"),
        ("0,1,0,1", "four numbers"),
        ({"corners": [0, 1, 0, 1]}, "four numbers"),
    ],
)
def test_bad_boxes(box, why):
    with pytest.raises(InputError, match=why):
        ask(references=("a.png",), layout=[box])


def test_layouts_in_every_published_form():
    want = ((0.1, 0.5, 0.2, 0.6), (0.25, 0.75, 0.0, 1.0))
    one, two = [0.1, 0.5, 0.2, 0.6], [25, 75, 0, 100]  # fractions and percent, box by box
    forms = [
        [one, two],
        [{"bbox": one}, {"box": two}],
        *({key: [one, two]} for key in ("layout_bboxes", "bboxes", "boxes", "bbox_list")),
    ]
    for form in forms:
        assert ask(references=("a", "b"), layout=form).layout == want


def test_a_box_needs_its_reference():
    box = (0, 0.5, 0, 0.5)
    with pytest.raises(InputError, match="2 boxes for 1 references"):
        ask(references=("a.png",), layout=[box, box])
    with pytest.raises(InputError, match="1 boxes for 0 references"):
        ask(layout=[box])
    with pytest.raises(InputError, match="limit is 10"):
        ask(references=("a",) * 11, layout=[box] * 11)
    with pytest.raises(InputError, match="not a list"):
        ask(layout="boxes.json")


def test_more_than_five_boxes_is_a_warning():
    asked = ask(references=("a",) * 6, layout=[(0, 50, 0, 50)] * 6)
    (warning,) = warnings_of(asked, filled(asked))
    assert "at most 5" in warning
    five = ask(references=("a",) * 5, layout=[(0, 50, 0, 50)] * 5)
    assert warnings_of(five, filled(five)) == ()


def test_size_errors_name_the_two_nearest():
    message = size_error(1000, 1000, 32)
    assert "width=1000 is not a multiple of 32; the nearest are 992 and 1024." in message
    assert "height=1000" in message
    assert size_error(1024, 992, 32) is None
    assert "the nearest is 32" in size_error(20, 32, 32)
    with pytest.raises(UsageError, match="992 and 1024"):
        filled(ask(width=1000, height=1024))


def test_snapping_is_to_the_nearest_and_said():
    asked = ask(width=1000, height=20, snap="nearest")
    resolved = filled(asked)
    assert (resolved.width, resolved.height) == (992, 32)
    assert warnings_of(asked, resolved) == (
        "width=1000 is snapped to 992.",
        "height=20 is snapped to 32.",
    )
    assert snap_size(1008, 8190, 32) == (1024, 8192)


def test_every_none_becomes_the_published_default():
    request = filled(ask(), draw_seed=lambda: 11)
    assert (request.width, request.height, request.num_inference_steps) == (2048, 2048, 50)
    assert (request.guidance_scale, request.shift, request.sampler) == (5.0, 3.0, "unipc")
    assert (request.seeds, request.num_images, request.negative_prompt) == ((11,), 1, " ")
    dev = filled(ask(), DEV)
    assert (dev.num_inference_steps, dev.sampler, dev.guidance_scale) == (28, "flash", 0.0)
    assert dev.sigmas == DEV.defaults.sigmas
    assert filled(ask(references=("a",)), DEV).sampler == "euler"
    assert filled(ask(references=("a", "b")), DEV).sampler == "flash"


def test_devs_table_is_for_its_own_steps_and_shift():
    assert filled(ask(num_inference_steps=10), DEV).sigmas is None
    assert filled(ask(num_inference_steps=28), DEV).sigmas == DEV.defaults.sigmas
    assert filled(ask(shift=2.0), DEV).sigmas is None
    own = filled(ask(sigmas=(0.9, 0.5, 0.0)), DEV)
    assert (own.sigmas, own.num_inference_steps) == ((0.9, 0.5), 2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seed": (4, -1, 9)},
        {"num_images": 3},
        {"width": 512, "height": 64, "guidance_scale": 0},
        {"num_inference_steps": 7, "shift": 2.5},
        {"references": ("a",)},
        {"init_image": "a", "strength": 0.25},
        {"references": ("a", "b"), "layout": [[0, 50, 0, 50], [0.5, 1, 0.5, 1]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", [FULL, DEV], ids=["full", "dev"])
def test_a_resolved_request_is_its_own_recipe(fields, spec):
    resolved = filled(ask(**fields), spec, source_size=(300, 200))
    again = GenerateRequest.from_dict(json.loads(json.dumps(resolved.to_dict())))
    assert again == resolved
    assert filled(again, spec, source_size=(300, 200)) == resolved


def test_an_edit_keeps_its_sources_aspect_at_the_native_area():
    edit = filled(ask(references=("a",)), source_size=(1600, 900))
    assert (edit.width, edit.height) == (2720, 1536)
    assert edit.keep_aspect is True
    sized = filled(ask(references=("a",), width=512, height=512), source_size=(1600, 900))
    assert (sized.width, sized.height, sized.keep_aspect) == (512, 512, False)
    subject = filled(ask(references=("a",), keep_aspect=False), source_size=(1600, 900))
    assert (subject.width, subject.height) == (2048, 2048)
    one_side = filled(ask(init_image="a", width=1024), source_size=(200, 100))
    assert (one_side.width, one_side.height) == (1024, 2048)
    kept = filled(ask(init_image="a", width=1024, keep_aspect=True), source_size=(200, 100))
    assert (kept.width, kept.height) == (1024, 512)


@pytest.mark.parametrize("source", [(1, 1), (64, 1), (1, 64), (3000, 2999), (7, 5)])
def test_kept_aspects_are_whole_patches_within_the_area(source):
    for area, patch in ((128 * 128, 16), (2048 * 2048, 32)):
        width, height = limits.aspect_size(source, area, patch)
        assert width % patch == height % patch == 0
        assert patch * patch <= width * height <= area
        assert width * height > area / 2


def test_seeds():
    assert filled(ask(seed=5, num_images=3)).seeds == (5, 6, 7)
    assert filled(ask(seed=[9, 4])).seeds == (9, 4)
    assert filled(ask(seed=[9, 4])).num_images == 2
    drawn = filled(ask(seed=-1), draw_seed=lambda: 42)
    assert drawn.seed == 42
    with pytest.raises(UsageError, match="Resolve"):
        _ = ask().seeds


def test_a_negative_prompt_without_guidance_is_a_warning():
    asked = ask(negative_prompt="blur")
    assert "no effect" in warnings_of(asked, filled(asked, DEV))[0]
    assert warnings_of(asked, filled(asked)) == ()


@pytest.mark.parametrize(
    ("fields", "idle", "busy"),
    [
        ({"guidance_interval": (0.2, 0.8)}, {"guidance_scale": 0}, {"guidance_scale": 3}),
        ({"clip_cfg_norm": False}, {"guidance_scale": 1}, {"guidance_scale": 3}),
        ({"noise_clip_std": 2.5}, {"sampler": "unipc"}, {"sampler": "flash"}),
        ({"noise_clip_std": 2.5}, {"sampler": "euler"}, {"sampler": "flash-official"}),
    ],
)
def test_what_has_no_effect_is_told(fields, idle, busy):
    (name,) = fields
    asked = ask(**fields, **idle)
    (warning,) = warnings_of(asked, filled(asked))
    assert warning.startswith(f"{name} has no effect: ")
    asked = ask(**fields, **busy)
    assert warnings_of(asked, filled(asked)) == ()
    plain = ask(**idle)
    assert warnings_of(filled(plain), filled(plain)) == ()  # as --from has it


@pytest.mark.parametrize("name", ["o1", "i1-full"])
@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({"clip_cfg_norm": False}, False),
        ({"clip_cfg_norm": True}, False),
        ({"image_guidance_scale": 0}, False),
        ({"refine_strength": 0}, True),
        ({"tile": False, "as_published": False, "encoder_prompts": {}}, True),
    ],
)
def test_what_is_another_familys_is_refused_at_every_value(name, fields, good):
    spec = registry.find(name)
    request = filled(ask(**fields), spec)
    if good:
        return check_ability(spec, request)
    with pytest.raises(UsageError, match="is for E1's editing"):
        check_ability(spec, request)


def test_loras_are_paths_with_scales():
    for given, held in (
        (None, ()),
        ([], ()),
        ("x.safetensors", (("x.safetensors", 1.0),)),
        (
            ["a", Path("b"), ("c", 2), ["d", -0.5]],
            (("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", -0.5)),
        ),
        ([("a", 0), ("a", -100)], (("a", 0.0), ("a", -100.0))),
    ):
        asked = ask(loras=given)
        assert asked.loras == held
        assert GenerateRequest.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


def test_unknown_fields_get_the_nearest_name():
    with pytest.raises(UsageError, match='unknown field "guidance"; did you mean "guidance_scale"'):
        GenerateRequest.from_dict({"prompt": "a", "guidance": 3})
    with pytest.raises(UsageError, match="no prompt"):
        GenerateRequest.from_dict({"seed": 3})


def test_pictures_in_memory_are_noted_by_size():
    request = ask(references=Image.new("RGB", (4, 3)))
    assert len(request.references) == 1
    assert request.to_dict()["references"] == ["memory:4x3"]


def test_a_request_is_frozen():
    with pytest.raises(AttributeError):
        ask().seed = 3
    assert replace(ask(), seed=3).seed == 3


def test_no_torch_is_imported():
    code = (
        "import sys, hidream, hidream.request, hidream.pictures, hidream.folder; "
        "hidream.GenerateRequest(prompt='a'); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("size", [(256, 48), (1344, 768), (2048, 560), (4096, 272), (512, 512)])
def test_a_size_is_scaled_to_the_native_area_once(size):
    spec = registry.find("i1-full")
    once = filled(ask(width=size[0], height=size[1], as_published=True, seed=1), spec)
    assert filled(once, spec) == once
    assert once.width * once.height <= 1024**2 < (once.width + 16) * (once.height + 16)


def test_image_guidance_without_guidance_is_said_to_do_nothing():
    spec, asked = registry.find("e1-1"), ask(image_guidance_scale=2.0, guidance_scale=1.0)
    (told,) = warnings_of(asked, filled(asked, spec))
    assert "image_guidance_scale has no effect" in told
