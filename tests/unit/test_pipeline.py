"""From requests to pictures: every picture is its own, whatever is made beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import hidream
from hidream import limits, outpainting
from hidream.errors import InputError, ModelError, UsageError
from hidream.models.o1.tokens import Tokenizer
from hidream.pipelines import HiDreamPipeline, Output, Pipeline, load
from hidream.pipelines import denoise as denoising
from hidream.pipelines import o1 as pipelines
from hidream.pipelines.base import listed
from hidream.pipelines.diffusers_style import seeds_of
from hidream.request import GenerateRequest
from hidream.sheet import Sheet
from tests import tiny


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load(tiny_folder, device="cpu")


@pytest.fixture
def seen(pipe, monkeypatch):
    """What the network is asked: (rows, sigma) of every call; and the batches' jobs."""
    calls, batches = [], []
    velocity, made = pipe.model.velocity, pipelines.denoise_batch

    def spy(x_t, sigma, prefix):
        calls.append((len(x_t), float(sigma)))
        return velocity(x_t, sigma, prefix)

    def batch_spy(model, jobs, **options):
        batches.append(list(jobs))
        return made(model, jobs, **options)

    monkeypatch.setattr(pipe.model, "velocity", spy)
    monkeypatch.setattr(pipelines, "denoise_batch", batch_spy)
    return calls, batches


def request(prompt="a red cube", **fields):
    return GenerateRequest(prompt=prompt, **{"seed": 7, "num_inference_steps": 2, **fields})


def same(one, other):
    return tiny.levels(one, other) == 0


# -- one picture -----------------------------------------------------------------------------------


def test_a_prompt_becomes_a_picture(pipe):
    out = pipe("three red cubes", seed=7)
    assert isinstance(out, Output)
    (image,) = out.images
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert len(image.getcolors(64 * 64)) > 100
    assert out.seeds == (7,)
    assert out.num_forwards == 4
    assert set(out.timings) == {"encode", "denoise", "total"}
    assert 0 < out.timings["denoise"] <= out.timings["total"]
    assert out.warnings == ()


def test_the_request_tells_what_became_of_it(pipe, tiny_folder):
    out = pipe("a red cube", seed=7)
    for name, value in {
        "model": str(tiny_folder),
        "negative_prompt": " ",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "guidance_interval": (0.0, 1.0),
        "shift": 1.0,
        "sampler": "unipc",
        "noise_scale": 2.0,
        "seed": 7,
        "num_images": 1,
        "deterministic": False,
    }.items():
        assert getattr(out.request, name) == value, name
    again = pipe(GenerateRequest.from_dict(out.request.to_dict()))
    assert again.request == out.request
    assert same(again.images[0], out.images[0])


def test_a_seed_is_drawn_and_noted(pipe):
    one, other = (pipe(request(seed=seed)) for seed in (None, -1))
    assert one.seeds != other.seeds
    assert one.request.seed == one.seeds[0] >= 0
    assert same(pipe(request(seed=one.seeds[0])).images[0], one.images[0])


@pytest.mark.parametrize("size", [(96, 32), (16, 64), (16, 16)])
def test_sizes(pipe, size):
    out = pipe(request(width=size[0], height=size[1]))
    assert out.images[0].size == size
    assert (out.request.width, out.request.height) == size


def test_sizes_between_patches(pipe):
    with pytest.raises(
        UsageError, match="width=50 is not a multiple of 16; the nearest are 48 and"
    ):
        pipe(request(width=50))
    out = pipe(request(width=50, snap="nearest"))
    assert out.images[0].size == (48, 64)
    assert out.warnings == ("width=50 is snapped to 48.",)


def test_patches_land_where_they_belong(pipe, monkeypatch):
    """A network that answers with a known picture: it comes out, not turned, not mirrored."""
    from hidream.models.o1.patches import patchify, to_tensor

    wanted = tiny.picture(3, 96, 48)
    x0 = patchify(to_tensor(wanted), 16)[None]
    monkeypatch.setattr(pipe.model, "velocity", lambda x_t, sigma, prefix: (x_t - x0) / sigma)
    for sampler in ("euler", "heun", "unipc", "flash"):
        out = pipe(request(width=96, height=48, sampler=sampler))
        assert tiny.levels(out.images[0], wanted) <= 1


def test_fields_count(pipe):
    """Each of these makes another picture."""
    base = pipe(request()).images[0]
    for fields in (
        {"prompt": "a blue cube"},
        {"seed": 8},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"guidance_scale": 0},
        {"shift": 3.0},
        {"sampler": "heun"},  # two steps of UniPC are those of Euler
        {"sigmas": (0.9, 0.2)},
        {"noise_scale": 1.0},
        {"negative_prompt": "blue"},
        {"references": (tiny.picture(1),), "width": 64, "height": 64},
    ):
        assert not same(pipe(request(**fields)).images[0], base), fields


def test_steps(pipe, seen):
    calls, _ = seen
    for fields, forwards in (
        ({"num_inference_steps": 5}, 5),
        ({"num_inference_steps": 1}, 1),
        ({"sampler": "heun", "num_inference_steps": 3}, 5),
        ({"sampler": "flash", "num_inference_steps": 3}, 3),
        ({"sigmas": (0.9, 0.5, 0.1), "num_inference_steps": None}, 3),
    ):
        calls.clear()
        out = pipe(request(**fields))
        assert out.num_forwards == len(calls) == forwards
    assert [sigma for _, sigma in calls] == pytest.approx([0.9, 0.5, 0.1])


# -- guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "rows"), [(0, 1), (0.5, 1), (1, 1), (1.01, 2), (5, 2)])
def test_guidance_is_a_second_row_or_nothing(pipe, seen, scale, rows):
    calls, _ = seen
    pipe(request(guidance_scale=scale))
    assert [n for n, _ in calls] == [rows, rows]


def test_guidance_off_is_one_picture(pipe):
    images = [pipe(request(guidance_scale=scale)).images[0] for scale in (0, 0.5, 1)]
    assert same(images[0], images[1])
    assert same(images[0], images[2])
    near = pipe(request(guidance_scale=1.0001)).images[0]
    assert tiny.levels(near, images[0]) <= 2


def test_guidance_interval(pipe, seen):
    calls, _ = seen
    sigmas = (0.9, 0.7, 0.5, 0.3)
    fields = {"sigmas": sigmas, "num_inference_steps": None}
    out = pipe(request(guidance_interval=(0.4, 0.8), **fields))
    assert [rows for rows, _ in calls] == [1, 2, 2, 1]
    assert out.num_forwards == 4
    always = pipe(request(guidance_interval=(0.0, 1.0), **fields)).images[0]
    never = pipe(request(guidance_scale=1, **fields)).images[0]
    assert not same(out.images[0], always)
    assert not same(out.images[0], never)
    assert same(pipe(request(**fields)).images[0], always)


def test_the_negative_prompt_is_the_unconditional_caption(pipe, tokenizer, seen):
    _, batches = seen
    pipe(request(negative_prompt="blue sphere", references=(tiny.picture(0),)))
    (job,) = batches[0]
    for tokens, caption in ((job.tokens, "a red cube"), (job.unconditional, "blue sphere")):
        assert tokenizer.decode(tokens.input_ids[tokens.caption].tolist()) == caption
        assert len(tokens.image_grids) == 1  # the same pictures in both
    assert torch.equal(job.tokens.references, job.unconditional.references)
    for empty in (None, "", "  ", " "):
        pipe(request(negative_prompt=empty))
        (job,) = batches[-1]
        chat, caption = tokenizer.chat(" ")
        assert job.unconditional.input_ids.tolist()[:-1] == chat
        assert job.unconditional.caption == caption


def test_the_prompts_own_words_as_negative_prompt_cancel_guidance(pipe):
    guided = pipe(request(negative_prompt="a red cube", guidance_scale=7)).images[0]
    alone = pipe(request(guidance_scale=1)).images[0]
    assert tiny.levels(guided, alone) <= 1
    out = pipe(request(negative_prompt="blue", guidance_scale=1))
    assert "negative prompt has no effect" in out.warnings[0]


# -- many pictures ---------------------------------------------------------------------------------

FOUR = [
    request("a red cube", seed=7),
    request("the sphere left of a blue cube, “tall”, 红色", seed=8),
    request("make it blue", seed=9, references=(tiny.picture(1),), width=64, height=64),
    request("all of them", seed=10, references=tuple(tiny.pictures(3)), negative_prompt="red"),
]


@pytest.fixture(scope="module")
def alone(pipe):
    return [pipe(item).images[0] for item in FOUR]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2, 3), (3, 1, 0, 2), (2, 2, 0)])
def test_requests_of_one_size_are_one_batch(pipe, alone, seen, order):
    """Other prompts, prefix lengths and references beside it change a picture by a level at most;
    the first noise is the same to the bit."""
    calls, batches = seen
    outs = pipe([FOUR[i] for i in order])
    assert len(batches) == 1
    assert [rows for rows, _ in calls] == [2 * len(order)] * 2
    for out, i in zip(outs, order, strict=True):
        assert out.seeds == (FOUR[i].seed,)
        assert out.request.prompt == FOUR[i].prompt
        assert out.num_forwards == 2
        assert tiny.levels(out.images[0], alone[i]) <= 1


def test_noise_is_the_pictures_own(pipe, monkeypatch):
    """To the bit: in batches of 1, 2 and 4, in any order, from every step's noise too."""
    first = {}
    fresh = {}
    original = denoising.sampling.flash

    def spy(denoise, x_t, sigmas, *, noise, **options):
        for row, seed in enumerate(spy.seeds):
            first.setdefault(seed, []).append(x_t[row])
            fresh.setdefault(seed, []).append(noise(0)[row])
        return original(denoise, x_t, sigmas, noise=noise, **options)

    monkeypatch.setattr(denoising.sampling, "flash", spy)
    monkeypatch.setitem(denoising.sampling.SAMPLERS, "flash", spy)
    for seeds in ((1,), (2, 1), (4, 3, 2, 1), (1, 2, 3, 4), (3,)):
        spy.seeds = seeds
        pipe([request(seed=seed, sampler="flash") for seed in seeds])
    for kept in (first, fresh):
        for seed, noises in kept.items():
            assert all(torch.equal(noise, noises[0]) for noise in noises), seed
        assert not torch.equal(kept[1][0], kept[2][0])
    assert not torch.equal(first[1][0] / 2, fresh[1][0])


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "flash", "flash-official"])
def test_every_sampler_keeps_pictures_apart(pipe, sampler):
    items = [request(seed=seed, sampler=sampler, noise_clip_std=2.5) for seed in (3, 4, 5)]
    together = pipe(items)
    for item, out in zip(items, together, strict=True):
        assert tiny.levels(out.images[0], pipe(item).images[0]) <= 1


def test_deterministic_is_the_same_to_the_bit(pipe, seen):
    calls, _ = seen
    items = [replace(item, deterministic=True) for item in FOUR]
    single = [pipe(item).images[0] for item in items]
    calls.clear()
    for out, image in zip(pipe(items), single, strict=True):
        assert same(out.images[0], image)
    assert {rows for rows, _ in calls} == {2}
    several = pipe(replace(items[0], num_images=3))
    assert same(several.images[0], single[0])


def test_num_images_and_seeds(pipe):
    out = pipe(request(seed=7, num_images=3))
    assert out.seeds == (7, 8, 9)
    assert len(out.images) == out.request.num_images == 3
    chosen = pipe(request(seed=(9, 7)))
    assert chosen.seeds == (9, 7)
    assert chosen.request.num_images == 2
    assert tiny.levels(chosen.images[0], out.images[2]) <= 1
    assert tiny.levels(chosen.images[1], out.images[0]) <= 1
    assert not same(out.images[0], out.images[1])


def test_what_differs_in_size_or_schedule_is_another_batch(pipe, seen):
    _, batches = seen
    items = [
        request(seed=1),
        request(seed=2, width=32),
        request(seed=3, num_inference_steps=3),
        request(seed=4, guidance_scale=2),
        request(seed=5, shift=2),
        request(seed=6, sampler="euler"),
        request(seed=7, noise_scale=1),
        request(seed=8, guidance_interval=(0, 0.5)),
        request(seed=9, sigmas=(0.9, 0.4)),
        request(seed=10, width=32),
        request(seed=11),
        request(seed=12, init_image=tiny.picture(0, 64, 64), strength=0.5),
        request(seed=13, init_image=tiny.picture(0, 64, 64), strength=1),
    ]
    outs = pipe(items)
    assert [out.seeds[0] for out in outs] == list(range(1, 14))
    grouped = sorted(tuple(job.seed for job in jobs) for jobs in batches)
    assert grouped == [(1, 11), (2, 10), (3,), (4,), (5,), (6,), (7,), (8,), (9,), (12,), (13,)]
    assert outs[9].images[0].size == (32, 64)


def test_large_batches_are_cut(pipe, seen, monkeypatch):
    """`num_forwards` is what was run: two batches of two steps."""
    calls, batches = seen
    monkeypatch.setattr(limits, "MAX_BATCH", 2)
    out = pipe(request(seed=7, num_images=3))
    assert [len(jobs) for jobs in batches] == [2, 1]
    assert out.num_forwards == len(calls) == 4
    assert out.seeds == (7, 8, 9)
    assert tiny.levels(out.images[2], pipe(request(seed=9)).images[0]) <= 1


@pytest.mark.parametrize(
    ("side", "most"), [(16, 16), (512, 16), (1024, 4), (2048, 1), (4096, 1), (8192, 1)]
)
def test_large_pictures_are_drawn_fewer_at_once(side, most):
    assert limits.batch_size(side, side) == most


def test_the_camera_is_read_with_the_prompt(pipe):
    named = pipe(request("a cat", seed=3, shot="close-up", view="side")).images[0]
    told = pipe(request("Close-up, side view. a cat", seed=3)).images[0]
    silent = pipe(request("a cat", seed=3)).images[0]
    assert tiny.levels(named, told) == 0
    assert tiny.levels(named, silent) > 0


def test_no_requests(pipe):
    assert pipe([]) == []


# -- progress --------------------------------------------------------------------------------------


def test_steps_are_told_with_previews(pipe):
    told = []
    out = pipe(
        request(num_inference_steps=3, num_images=2),
        on_step=lambda step, total, preview: told.append((step, total, preview, preview())),
    )
    assert [(step, total) for step, total, *_ in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(len(images) == 2 and images[0].size == (64, 64) for *_, images in told)
    for image, last in zip(out.images, told[-1][3], strict=True):
        assert same(image, last)
    assert not same(told[0][3][0], out.images[0])
    assert all(same(preview()[1], images[1]) for _, _, preview, images in told)  # asked later


def test_a_call_is_cancelled_by_raising(pipe, seen):
    calls, _ = seen

    class Stop(Exception):
        pass

    def stop(step, total, preview):
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        pipe(request(num_inference_steps=9), on_step=stop)
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        pipe(
            [request(), request(width=32)],
            on_step=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
    assert len(calls) == 1
    assert pipe(request()).images  # and the next call is as ever


# -- source pictures -------------------------------------------------------------------------------


@pytest.fixture
def source():
    return tiny.picture(2, 64, 64)


@pytest.fixture
def mask():
    """White, so free to change, in a part that no patch border follows."""
    made = Image.new("L", (64, 64))
    made.paste(255, (10, 20, 37, 55))
    return made


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "flash"])
@pytest.mark.parametrize("way", ["references", "init_image"])
def test_outside_a_mask_every_pixel_is_the_sources(pipe, source, mask, sampler, way):
    given = (source,) if way == "references" else source
    out = pipe(request("make it blue", mask=mask, sampler=sampler, **{way: given}))
    made, was = np.array(out.images[0]), np.array(source)
    free = np.array(mask) == 255
    assert np.array_equal(made[~free], was[~free])
    assert (made[free] != was[free]).any(-1).mean() > 0.9


def test_the_inside_of_a_mask_sees_its_surroundings(pipe, source, mask):
    """The kept part is held during the steps, not only pasted over at the end."""
    held = pipe(request("blue", references=(source,), mask=mask)).images[0]
    free = pipe(request("blue", references=(source,), width=64, height=64)).images[0]
    inside = np.array(mask) == 255
    assert (np.array(held)[inside] != np.array(free)[inside]).any()


def test_a_white_mask_is_no_mask_and_a_black_one_keeps_all(pipe, source):
    fields = {"references": (source,), "width": 64, "height": 64}
    free = pipe(request("blue", **fields)).images[0]
    white = pipe(request("blue", mask=Image.new("L", (64, 64), 255), **fields)).images[0]
    black = pipe(request("blue", mask=Image.new("L", (64, 64), 0), **fields)).images[0]
    assert tiny.levels(white, free) <= 1
    assert same(black, source)


def test_a_grey_mask_blends_once(pipe, source, monkeypatch):
    """Half grey is half source, half what the network wants."""
    from hidream.models.o1.patches import patchify, to_tensor

    wanted = tiny.picture(0, 64, 64)
    x0 = patchify(to_tensor(wanted), 16)[None]
    monkeypatch.setattr(pipe.model, "velocity", lambda x_t, sigma, prefix: (x_t - x0) / sigma)
    out = pipe(request(init_image=source, mask=Image.new("L", (64, 64), 51)))
    assert tiny.levels(out.images[0], Image.blend(source, wanted, 51 / 255)) <= 1


def test_masks_beside_other_requests(pipe, source, mask):
    """In one batch with requests that have no source, and with another mask."""
    other = Image.new("L", (64, 64))
    other.paste(255, (0, 0, 64, 8))
    fields = {"references": (source,), "width": 64, "height": 64}
    items = [
        request(seed=1),
        request(seed=2, mask=mask, **fields),
        request(seed=3, mask=other, **fields),
    ]
    for out, item in zip(pipe(items), items, strict=True):
        assert tiny.levels(out.images[0], pipe(item).images[0]) <= 1


def test_a_mask_must_be_of_its_pictures_size(pipe, source):
    with pytest.raises(InputError, match="the mask is 32x32, but its picture is 64x64"):
        pipe(request(references=(source,), mask=Image.new("L", (32, 32))))


def test_masks_are_scaled_with_their_source(pipe):
    source = tiny.picture(1, 128, 128)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    out = pipe(request(references=(source,), mask=mask)).images[0]
    assert out.size == (64, 64)
    small = source.resize((64, 64), Image.Resampling.LANCZOS)
    left = (0, 0, 24, 64)  # clear of the edge, which LANCZOS smears
    assert same(out.crop(left), small.crop(left))


@pytest.mark.parametrize("sampler", ["euler", "unipc", "flash"])
def test_outpainting_keeps_every_pixel_of_its_source(pipe, sampler):
    source = tiny.picture(1, 37, 30)
    out = pipe(request("more", references=(source,), expand=(9, 2, 18, 0), sampler=sampler))
    (made,) = out.images
    inner = (9, 2, 46, 32)
    assert (out.request.width, out.request.height) == made.size == (64, 32)
    assert same(made.crop(inner), source)
    new = np.ones((32, 64), bool)
    new[2:, 9:46] = False
    assert (np.array(made)[new] != outpainting.GREY).any(-1).mean() > 0.9


def test_outpainting_sees_its_source_on_the_canvas(pipe, source, seen):
    given = request("more", references=(source,), expand=(0, 0, 16, 0))
    held = pipe(given).images[0]
    canvas = Image.new("RGB", (80, 64), outpainting.GREY)
    canvas.paste(source)
    mask = Image.new("L", (80, 64), 0)
    mask.paste(255, (64, 0, 80, 64))
    by_hand = request("more", references=(canvas,), mask=mask, width=80, height=64)
    assert same(held, pipe(by_hand).images[0])
    both = [given, request(width=80, height=64)]
    assert tiny.levels(pipe(both)[0].images[0], held) <= 1


def test_outpainting_with_a_mask_of_the_source(pipe, source, mask):
    out = pipe(request("more", references=(source,), mask=mask, expand=(0, 16, 0, 0)))
    inner = np.array(out.images[0].crop((0, 16, 64, 80)))
    free = np.array(mask) == 255
    assert np.array_equal(inner[~free], np.array(source)[~free])
    assert (inner[free] != np.array(source)[free]).any(-1).mean() > 0.9


def test_a_sheet_stays_white_between_its_panels(pipe, seen):
    sheet = Sheet(number=3, columns=2, width=32, height=16)
    out = pipe(request(sheet=sheet))
    (made,) = out.images
    assert made.size == out.request.sheet.size == (80, 48)
    pixels = np.array(made)
    panels = np.zeros((48, 80), bool)
    for left, top, right, bottom in out.request.sheet.boxes:
        panels[top:bottom, left:right] = True
    assert (pixels[~panels] == 255).all()
    assert (pixels[panels] != 255).any(-1).mean() > 0.9
    assert same(pipe(GenerateRequest.from_dict(out.request.to_dict())).images[0], made)


def test_panels_see_each_other_in_one_sequence(pipe, seen):
    _, batches = seen
    sheet = Sheet(number=2, columns=2, gutter=0, width=32, height=32)
    out = pipe(request(sheet=sheet))
    assert len(batches) == len(batches[0]) == 1
    assert batches[0][0].source is None  # nothing has to stay white
    assert same(out.images[0], pipe(request(width=64, height=32)).images[0])


def test_image_to_image(pipe, source, seen):
    calls, _ = seen
    near, far = (
        pipe(request(init_image=source, strength=strength, num_inference_steps=10))
        for strength in (0.2, 0.8)
    )
    assert (near.num_forwards, far.num_forwards) == (2, 8)
    assert calls[0][1] < 0.25 < 0.7 < calls[2][1]  # it starts with as much noise as that
    assert near.request.strength == 0.2
    unsaid = pipe(request(init_image=source, num_inference_steps=10))
    assert (unsaid.request.strength, unsaid.num_forwards) == (0.6, 6)
    whole = pipe(
        request(init_image=source, strength=1, sigmas=(1.0, 0.5), num_inference_steps=None)
    )
    fresh = pipe(request(width=64, height=64, sigmas=(1.0, 0.5), num_inference_steps=None))
    assert tiny.levels(whole.images[0], fresh.images[0]) <= 1  # all noise: the source is forgotten


def test_image_to_image_starts_from_the_noisy_source(pipe, source, monkeypatch):
    from hidream import sampling
    from hidream.models.o1.patches import patchify, to_tensor

    started = []
    original = sampling.euler

    def spy(denoise, x_t, sigmas, **options):
        started.append((x_t, sigmas))
        return original(denoise, x_t, sigmas, **options)

    monkeypatch.setitem(sampling.SAMPLERS, "euler", spy)
    fields = {"sampler": "euler", "sigmas": (0.8, 0.6, 0.4, 0.2), "num_inference_steps": None}
    pipe(request(init_image=source, strength=0.5, **fields))
    ((x_t, sigmas),) = started
    assert sigmas.tolist() == pytest.approx([0.4, 0.2, 0])
    noise = patchify(sampling.initial_noise([7], (3, 64, 64)), 16)
    expected = 0.6 * patchify(to_tensor(source), 16) + 0.4 * 2.0 * noise
    torch.testing.assert_close(x_t, expected)


def test_edits_keep_the_sources_aspect(pipe):
    wide = tiny.picture(0, 120, 60)
    out = pipe(request(references=(wide,)))
    width, height = out.images[0].size
    assert width > height
    assert width * height <= 64 * 64
    assert pipe(request(references=(wide,), width=64, height=64)).images[0].size == (64, 64)
    assert pipe(request(init_image=wide)).images[0].size == (width, height)
    two = pipe(request(references=(wide, wide)))
    assert two.images[0].size == (64, 64)


def test_references_may_be_files(pipe, tmp_path, source):
    source.save(tmp_path / "source.png")
    from_file = pipe(request(references=(tmp_path / "source.png",))).images[0]
    assert same(from_file, pipe(request(references=(source,))).images[0])
    with pytest.raises(InputError, match=r"nothing\.png.* does not exist"):
        pipe(request(references=(tmp_path / "nothing.png",)))


@pytest.mark.parametrize("count", [1, 2, 5, 9, 11])
def test_references_of_every_number(pipe, count):
    pictures = tuple(tiny.pictures(count))
    fields = {"width": 64, "height": 48}
    out = pipe(request("all", references=pictures, **fields)).images[0]
    turned = pipe(request("all", references=pictures[::-1], **fields)).images[0]
    assert same(out, turned) == (count == 1)


def test_layouts(pipe):
    pictures = tuple(tiny.pictures(2))
    boxes = [[0.1, 0.4, 0.2, 0.6], [50, 90, 30, 80]]
    out = pipe(request(references=pictures, layout=boxes))
    assert out.request.layout == ((0.1, 0.4, 0.2, 0.6), (0.5, 0.9, 0.3, 0.8))
    assert out.warnings == ()
    assert not same(out.images[0], pipe(request(references=pictures)).images[0])
    six = [[0.1 * i, 0.1 * i + 0.3, 0.1, 0.9] for i in range(6)]
    out = pipe(request(references=tuple(tiny.pictures(6)), layout=six))
    assert "6 boxes" in out.warnings[0]


# -- loading ---------------------------------------------------------------------------------------


def test_loading_by_folder(tiny_folder, pipe):
    loaded = hidream.load(str(tiny_folder), device="cpu", dtype="fp32")
    assert isinstance(loaded, Pipeline)
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert isinstance(loaded.tokenizer, Tokenizer)
    assert same(loaded(request()).images[0], pipe(request()).images[0])


def test_dtypes(tiny_folder, pipe):
    for dtype in ("bf16", torch.bfloat16):
        half = load(tiny_folder, device="cpu", dtype=dtype)
        assert half.dtype == torch.bfloat16
    exactly, nearly = pipe(request()).images[0], half(request()).images[0]
    difference = np.abs(np.array(exactly).astype(int) - np.array(nearly).astype(int))
    assert 0 < difference.mean() < 12


def test_dev_folders(tiny_folder, tmp_path):
    """A published folder has no hidream.json: its variant is said, or taken for full."""
    import json
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "dev")
    settings = {"patch_size": 16, "width": 32, "height": 32}
    (folder / "hidream.json").write_text(json.dumps(settings))
    out = load(folder, device="cpu", variant="dev")("a red cube", seed=1)
    assert (out.request.sampler, out.request.num_inference_steps) == ("flash", 28)
    assert (out.request.guidance_scale, out.request.noise_scale) == (0.0, 7.5)
    assert out.request.noise_clip_std == 2.5
    assert out.num_forwards == 28
    assert load(folder, device="cpu").spec.variant == "full"
    edit = load(folder, device="cpu", variant="dev")("red", references=(tiny.picture(0),))
    assert (edit.request.sampler, edit.request.noise_scale) == ("euler", 8.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cdua"}, 'did you mean "cuda"'),
        ({"dtype": "fp23"}, 'did you mean "fp32"'),
        ({"dtype": "fp16"}, "bf16"),
        ({"memory": "tight"}, "memory"),
        ({"variant": "half"}, '"dev" or "fast"'),
    ],
)
def test_unknown_options(tiny_folder, options, said):
    with pytest.raises(UsageError, match=said):
        load(tiny_folder, **{"device": "cpu", **options})


def test_unknown_models(tmp_path):
    with pytest.raises(UsageError, match=r'"o1-nona"; did you mean "o1-nano"'):
        load("o1-nona")
    with pytest.raises(ModelError):
        load(tmp_path / "nowhere")


def test_unknown_fields(pipe):
    with pytest.raises(UsageError, match='unknown field "step"'):
        pipe("a", step=3)
    with pytest.raises(UsageError, match="seed"):
        pipe(request(), seed=3)


def test_the_shape_that_diffusers_users_know(tiny_folder, pipe):
    known = HiDreamPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32).to("cpu")
    fields = {"negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 5.0}
    out = known(prompt="a red cube", generator=torch.Generator().manual_seed(7), **fields)
    assert same(out.images[0], pipe("a red cube", seed=7, **fields).images[0])
    assert len(known("a", num_images_per_prompt=2, num_inference_steps=1).images) == 2


@pytest.fixture(scope="module")
def known(pipe):
    return HiDreamPipeline(pipe)


def test_a_list_of_prompts_is_a_request_each(pipe, known):
    """`load`'s pipeline gives an Output each, diffusers' shape one flat list of pictures."""
    fields = {"num_inference_steps": 1, "seed": 3}
    outs = pipe(["red", "blue"], num_images=2, **fields)
    assert [(out.request.prompt, out.seeds) for out in outs] == [("red", (3, 4)), ("blue", (3, 4))]
    flat = known(["red", "blue"], num_images_per_prompt=2, **fields)
    wanted = [image for out in outs for image in out.images]
    assert all(same(*pair) for pair in zip(flat.images, wanted, strict=True))
    assert flat.seeds == (3, 4, 3, 4)
    (alone,) = known(prompt=["red"], **fields).images
    assert same(alone, wanted[0])
    with pytest.raises(UsageError, match="its fields inside"):
        pipe(["red", request("blue")], seed=1)
    with pytest.raises(UsageError, match="prompt is int; it must be text, a GenerateRequest or"):
        listed(7)


def test_generators_are_seeds(known):
    def seeds(prompt, generator, **fields):
        return known(prompt, generator=generator, num_inference_steps=1, **fields).seeds

    one, two, three, four = (torch.Generator().manual_seed(seed) for seed in (5, 9, 2, 7))
    assert seeds("red", one) == seeds("red", [one]) == (5,)
    assert seeds("red", [one, two], num_images_per_prompt=2) == (5, 9)
    assert seeds(["red", "blue"], [one, two]) == (5, 9)
    assert seeds(["a", "b"], [one, two, three, four], num_images_per_prompt=2) == (5, 9, 2, 7)
    assert seeds(["red", "blue"], one, num_images=2) == (5, 6, 7, 8)
    last = torch.Generator().manual_seed(2**63 - 1)
    assert seeds(["red", "blue"], last) == (2**63 - 1, 0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"generator": [torch.Generator()] * 2}, "2 generators are given for 1 pictures"),
        ({"generator": [torch.Generator()], "num_images_per_prompt": 2}, "1 generators are given"),
        ({"generator": torch.Generator(), "seed": 1}, "generator and seed say the same"),
        ({"generator": torch.Generator(), "num_images": "2"}, "not a whole number"),
        ({"num_images": 1, "num_images_per_prompt": 2}, "say the same"),
        ({"image": "a.png", "references": ("a.png",)}, "image and references say the same"),
    ],
)
def test_what_diffusers_users_may_get_wrong(known, fields, said):
    with pytest.raises(UsageError, match=said):
        known("red", **fields)


@pytest.mark.parametrize("wrong", [7, [7], [torch.Generator(), None]])
def test_what_is_no_generator(wrong):
    with pytest.raises(UsageError, match=r"which is no torch\.Generator"):
        seeds_of(wrong, 1)


def test_an_image_with_a_strength_is_where_drawing_begins(known, source):
    fields = {"num_inference_steps": 2, "seed": 1}
    assert known("red", image=source, strength=0.5, **fields).request.init_image is not None
    assert len(known("red", image=source, **fields).request.references) == 1
