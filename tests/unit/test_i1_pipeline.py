"""I1's and E1's pipeline on tiny folders in the published layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hidream import sampling
from hidream.errors import InputError, ModelError, UsageError
from hidream.models.i1.config import I1_TINY
from hidream.models.i1.embeddings import Embeddings, save_embeddings
from hidream.models.i1.text import Texts
from hidream.pipelines import HiDreamPipeline, load
from hidream.pipelines import latent as latents
from hidream.request import GenerateRequest
from hidream.tiling import step_shift
from tests import tiny_i1

FEW = {"num_inference_steps": 3, "seed": 7}
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_i1.make_tiny_i1(tmp_path_factory.mktemp("i1") / "tiny", llama_inside=True)


@pytest.fixture(scope="module")
def e1_folder(tmp_path_factory):
    config = replace(I1_TINY, max_resolution=(16, 32))
    path = tmp_path_factory.mktemp("e1") / "tiny"
    return tiny_i1.make_tiny_i1(path, config=config, llama_inside=True, seed=40)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def editor(e1_folder, folder):
    return load(e1_folder, device="cpu", refiner=folder)


def levels(one, other):
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def picture(seed=0, size=(128, 128)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size)


@pytest.fixture
def seen(monkeypatch):
    """Rows, sigma and prefix of every call of a network."""
    calls = []
    velocity = latents.I1.velocity

    def spy(self, x_t, sigma, prefix, on_layer=None):
        calls.append((self, len(x_t), float(sigma), prefix))
        return velocity(self, x_t, sigma, prefix, on_layer)

    monkeypatch.setattr(latents.I1, "velocity", spy)
    return calls


def test_a_prompt_becomes_a_picture(pipe, seen):
    out = pipe("three red cubes", negative_prompt="blur", **FEW)
    (image,) = out.images
    assert image.size == (128, 128)  # what its 64 patches make
    assert np.asarray(image).std() > 1
    assert (out.num_forwards, out.num_prefills) == (3, 2)
    assert [rows for _, rows, _, _ in seen] == [2, 2, 2]
    assert levels(image, pipe("three red cubes", **FEW).images[0]) > 0  # the negative prompt acts
    assert levels(image, pipe("three red cubes", negative_prompt="blur", **FEW).images[0]) == 0


@pytest.mark.parametrize("size", [(128, 64), (64, 112), (96, 96)])
def test_any_multiple_of_16_up_to_the_limit(pipe, size):
    (image,) = pipe("a tree", width=size[0], height=size[1], **FEW).images
    assert image.size == size


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 256, "height": 128}, "32768 pixels|256x128 is more than"),
        ({"width": 120}, "not a multiple of 16"),
        ({"references": (Image.new("RGB", (64, 64)),)}, "reads no reference pictures"),
        ({"refine_strength": 0.3}, "E1's editing"),
        ({"encoder_prompts": {"bert": "x"}}, "unknown text encoder"),
    ],
)
def test_what_it_cannot_do(pipe, fields, said):
    with pytest.raises(UsageError, match=said):
        pipe("a tree", **FEW, **fields)


def test_a_batch_is_its_pictures_alone(pipe):
    asked = [
        GenerateRequest(prompt=prompt, width=SIDE, height=SIDE, num_inference_steps=2, seed=seed)
        for prompt, seed in (("red", 1), ("blue", 2), ("red", 3))
    ]
    for out, request in zip(pipe(asked), asked, strict=True):
        assert levels(out.images[0], pipe(request).images[0]) <= 1
        assert out.num_forwards == 2


def test_the_latents_are_what_the_velocity_says(pipe, monkeypatch):
    """With an exact network every sampler lands on its picture, through codec and composition."""
    x0 = pipe.codec.encode(latents.to_tensor(picture(1))[None])
    monkeypatch.setattr(
        latents.I1, "velocity", lambda self, x_t, sigma, prefix, on_layer: (x_t - x0) / sigma
    )
    wanted = latents.to_picture(pipe.codec.decode(x0)[0])
    for sampler in ("euler", "heun", "unipc", "flash"):
        assert levels(pipe("x", sampler=sampler, **FEW).images[0], wanted) <= 1


def test_distilled_variants(tmp_path, seen):
    path = tiny_i1.make_tiny_i1(tmp_path / "fast", variant="fast", llama_inside=True)
    pipe = load(path, device="cpu", variant="fast")
    out = pipe("a tree", negative_prompt="blur", width=SIDE, height=SIDE, seed=1)
    assert [rows for _, rows, _, _ in seen] == [1] * 16  # no guidance
    assert out.request.sampler == "flash"
    assert any("negative prompt has no effect" in text for text in out.warnings)


def test_the_seed_is_also_that_of_the_steps(tmp_path):
    path = tiny_i1.make_tiny_i1(tmp_path / "dev", variant="dev", llama_inside=True)
    pipe = load(path, device="cpu", variant="dev")
    fields = {"width": SIDE, "height": SIDE, "num_inference_steps": 4}
    one, again, other = (pipe("a tree", seed=seed, **fields).images[0] for seed in (3, 3, 4))
    torch.manual_seed(5)  # no global generator has a part in it
    assert levels(one, again) == 0 < levels(one, other)


def test_image_to_image(pipe):
    source = picture(2)
    near, far = (
        pipe("a tree", init_image=source, strength=strength, num_inference_steps=10, seed=1)
        for strength in (0.1, 1.0)
    )
    assert near.num_forwards == 1
    assert far.num_forwards == 10
    coded = pipe.codec.decode(pipe.codec.encode(latents.to_tensor(source)[None]))
    wanted = latents.to_picture(coded[0])

    def distance(image):
        return np.abs(np.asarray(image, int) - np.asarray(wanted, int)).mean()

    assert distance(near.images[0]) < distance(far.images[0])


def test_outside_a_mask_pixels_are_the_sources(pipe):
    source = picture(3)
    mask = Image.new("L", source.size)
    mask.paste(255, (32, 32, 96, 96))
    for fields in ({"references": (source,)}, {"init_image": source, "strength": 1.0}):
        (image,) = pipe("a tree", mask=mask, **fields, **FEW).images
        changed = np.abs(np.asarray(image, int) - np.asarray(source, int)).max(axis=2) > 0
        assert not changed[np.asarray(mask) == 0].any()
        assert changed[np.asarray(mask) == 255].any()


def test_growing(pipe):
    source = picture(4, (64, 64))
    (image,) = pipe("more", references=(source,), expand=(0, 0, 48, 16), **FEW).images
    assert image.size == (112, 80)
    assert levels(image.crop((0, 0, 64, 64)), source) == 0


def test_growing_a_picture_of_the_native_size(pipe, seen):
    """The canvas is more than the network takes: it is drawn in tiles."""
    source = picture(4)
    (image,) = pipe("more", references=(source,), expand=(32, 0, 64, 16), **FEW).images
    assert image.size == (224, 144)
    assert levels(image.crop((32, 0, 160, 128)), source) == 0
    assert np.asarray(image.crop((160, 0, 224, 144))).std() > 1
    assert {prefix.grid for *_, prefix in seen} == {(8, 8)}


def test_a_mask_in_a_picture_beyond_the_limit(pipe):
    source = picture(3, (256, 128))
    mask = Image.new("L", source.size)
    mask.paste(255, (112, 32, 176, 96))
    fields = {"mask": mask, "width": 256, "height": 128}
    (image,) = pipe("a tree", references=(source,), **fields, **FEW).images
    changed = np.abs(np.asarray(image, int) - np.asarray(source, int)).max(axis=2) > 0
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[np.asarray(mask) == 255].mean() > 0.9


def test_a_picture_is_made_larger_in_tiles(pipe, seen):
    """Beyond the network's limit: every call is of tiles, and with an exact one they agree."""
    small = picture(4)
    out = pipe("a tree", init_image=small, width=256, height=192, num_inference_steps=10, seed=1)
    assert out.images[0].size == (256, 192)
    assert out.request.strength == 0.35
    assert {prefix.grid for *_, prefix in seen} == {(8, 8)}
    num_tiles = 3 * 2  # 128 wide, a quarter over each other
    assert out.num_forwards == 4 * num_tiles


def test_a_texture_goes_on_beside_itself(pipe, monkeypatch):
    """Each step sees the picture rolled by another shift, and the decoder sees it wrapped."""

    def bordered(self, x_t, sigma, prefix, on_layer=None):
        x0 = torch.zeros_like(x_t)
        x0[..., 0] = 3.0  # a line at the left border of what is shown
        return (x_t - x0) / sigma

    shown = []
    decode = pipe.codec.decode
    monkeypatch.setattr(latents.I1, "velocity", bordered)
    monkeypatch.setattr(pipe.codec, "decode", lambda x: shown.append(x) or decode(x))
    fields = {"sampler": "flash", "num_inference_steps": 4, "seed": 1}
    assert pipe("x", tile=True, **fields).images[0].size == (128, 128)
    margin = latents.MARGIN
    (wrapped,) = shown
    assert wrapped.shape[-2:] == (16 + 2 * margin, 16 + 2 * margin)
    assert torch.equal(wrapped[..., :16], wrapped[..., 16:32])
    latent = wrapped[..., margin:-margin, margin:-margin]
    (column,) = (latent[0, 0, 0] > 1).nonzero()[:, 0].tolist()
    assert column == -step_shift(3, (16, 16))[1] % 16 != 0


def test_encoder_prompts(pipe):
    plain, other = (
        pipe("a tree", encoder_prompts=prompts, width=SIDE, height=SIDE, **FEW).images[0]
        for prompts in ({}, {"t5": "a house"})
    )
    assert levels(plain, other) > 0


def test_an_embedding_file_is_its_own_requests_alone(pipe, tmp_path):
    """Also beside another file of the same prompt, and for what comes after."""
    fields = {"width": SIDE, "height": SIDE, "guidance_scale": 1, **FEW}
    plain = pipe("a tree", **fields).images[0]
    texts, requests = Texts.of("a tree"), []
    for seed in (5, 6):
        path = tmp_path / f"{seed}.safetensors"
        features = tiny_i1.features(batch=1, seed=seed)
        save_embeddings(path, Embeddings(features=features, texts=texts))
        requests.append(GenerateRequest(prompt="a tree", embeddings=path, **fields))
    one, other = (out.images[0] for out in pipe(requests))
    assert levels(one, other) > 0
    for request, image in zip(requests, (one, other), strict=True):
        assert levels(image, pipe(request).images[0]) == 0
    assert levels(plain, pipe("a tree", **fields).images[0]) == 0
    with pytest.raises(InputError, match="another prompt"):
        pipe(replace(requests[0], shot="close-up"))
    with pytest.raises(InputError, match="another number of tokens"):
        pipe(replace(requests[0], guidance_scale=5))


def test_tokenizers_wait_for_their_turn(pipe, monkeypatch):
    held = []
    cut = pipe.encoders.cut
    spy = lambda texts: held.append(pipe._turn._is_owned()) or cut(texts)  # noqa: E731
    monkeypatch.setattr(pipe.encoders, "cut", spy)
    pipe._plan(GenerateRequest(prompt="a tree"))
    assert held == [True]


def test_the_steps_noise_can_be_clipped(pipe):
    fields = {"width": SIDE, "height": SIDE, "sampler": "flash", **FEW}
    plain = pipe("a tree", **fields).images[0]
    assert levels(plain, pipe("a tree", noise_clip_std=0.1, **fields).images[0]) > 0


def test_long_prompts_are_said_to_be_cut(pipe):
    out = pipe("red " * 300, width=SIDE, height=SIDE, **FEW)
    assert any("128 of the prompt's" in text for text in out.warnings)


@pytest.mark.parametrize("variant", ["full", "dev"])
@pytest.mark.parametrize("size", [(128, 128), (256, 112)])
def test_as_published_is_diffusers_pipeline(folder, variant, size):
    """Text encoders, guidance, network, scheduler and VAE together, from the same noise."""
    from diffusers import FlowMatchLCMScheduler, HiDreamImagePipeline, UniPCMultistepScheduler
    from transformers import AutoTokenizer, LlamaForCausalLM

    steps, shift = (6, 3.0) if variant == "full" else (5, 6.0)
    kind = UniPCMultistepScheduler if variant == "full" else FlowMatchLCMScheduler
    own = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    theirs = HiDreamImagePipeline.from_pretrained(
        folder,
        scheduler=kind(**own) if variant == "full" else kind(shift=shift),
        text_encoder_4=LlamaForCausalLM.from_pretrained(
            folder / "text_encoder_4", output_hidden_states=True, output_attentions=True
        ),
        tokenizer_4=AutoTokenizer.from_pretrained(folder / "tokenizer_4"),
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.default_sample_size = 16
    ours = load(folder, device="cpu", variant=variant)
    asked = {"width": size[0], "height": size[1], "num_inference_steps": steps}
    torch.manual_seed(11)
    out = ours("a red cube", negative_prompt="blur", as_published=True, seed=3, **asked)
    image = out.images[0]
    noise = sampling.initial_noise([3], (4, image.height // 8, image.width // 8))
    torch.manual_seed(11)
    (wanted,) = theirs(
        "a red cube",
        negative_prompt="blur",
        **asked,
        guidance_scale=5.0 if variant == "full" else 0.0,
        latents=noise,
    ).images
    assert image.size == wanted.size
    assert levels(image, wanted) <= 1
    assert any("is scaled to" in text for text in out.warnings) == (image.size != size)


def test_as_published_keeps_latents_in_the_networks_dtype(folder, monkeypatch):
    asked = []
    velocity = latents.I1.velocity

    def spy(self, x_t, sigma, prefix, on_layer=None):
        asked.append(x_t)
        return velocity(self, x_t, sigma, prefix, on_layer)

    monkeypatch.setattr(latents.I1, "velocity", spy)
    pipe = load(folder, device="cpu", dtype="bf16")
    for as_published in (True, False):
        asked.clear()
        pipe("a red cube", as_published=as_published, **FEW)
        rounded = [torch.equal(x_t, x_t.bfloat16().float()) for x_t in asked[1:]]
        assert rounded == [as_published] * len(rounded)


# -- E1 --------------------------------------------------------------------------------------------


def test_an_edit_sees_its_source(editor, seen):
    one, other = (editor("make it red", references=(picture(seed),), **FEW) for seed in (5, 6))
    assert one.images[0].size == (128, 128)
    assert levels(one.images[0], other.images[0]) > 0
    assert [rows for _, rows, _, _ in seen] == [3] * 6
    prefix = seen[0][3]
    assert prefix.source.shape[1] == 64
    assert torch.equal(prefix.source[1], prefix.source[2])  # the source, twice
    assert not torch.equal(prefix.source[0], prefix.source[1])  # none
    assert prefix.num_pads == 0 or prefix.grid == (8, 8)


@pytest.mark.parametrize("norm", [True, False])
def test_three_row_guidance(editor, monkeypatch, norm):
    """The steps follow the formula of E1's code, applied to what the three rows answer."""
    answers = []
    velocity = latents.I1.velocity

    def spy(self, x_t, sigma, prefix, on_layer=None):
        answers.append((x_t, float(sigma), velocity(self, x_t, sigma, prefix, on_layer)))
        return answers[-1][2]

    monkeypatch.setattr(latents.I1, "velocity", spy)
    editor(
        "make it red",
        references=(picture(5),),
        sampler="euler",
        clip_cfg_norm=norm,
        guidance_scale=3.0,
        image_guidance_scale=1.5,
        **FEW,
    )
    (x, sigma, v), (x_next, sigma_next, _) = answers[:2]
    none, source, full = v.chunk(3)
    guided = source + 3.0 * (full - source)
    if norm:
        guided = guided * (full.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)).clamp(
            max=1
        )
        wanted = none + 1.5 * (guided - none)
    else:
        wanted = none + 1.5 * (source - none) + 3.0 * (full - source)
    stepped = (x_next[:1] - x[:1]) / (sigma_next - sigma)
    assert torch.allclose(stepped, wanted, rtol=1e-3, atol=1e-3)


def test_an_editor_without_encoders_has_those_of_i1(e1_folder, folder, editor, tmp_path):
    (tmp_path / "e1").mkdir()
    (tmp_path / "e1" / "transformer").symlink_to(e1_folder / "transformer")
    alone = load(tmp_path / "e1", device="cpu", refiner=folder)
    assert alone.encoders.files
    assert all(folder in file.parents for file in alone.encoders.files)
    out = alone("make it red", references=(picture(5),), **FEW)
    assert levels(out.images[0], editor("make it red", references=(picture(5),), **FEW).images[0])


def test_refining_has_the_weights_of_i1(editor, seen):
    """The last steps are another network's, without a source and with the target's description."""
    prompt = "Editing Instruction: redden it. Target Image Description: a red cube"
    out = editor(
        prompt, references=(picture(5),), num_inference_steps=10, refine_strength=0.3, seed=1
    )
    networks = [network for network, *_ in seen]
    assert networks[:7] == [editor.model] * 7
    assert len({id(network) for network in networks}) == 2
    assert [rows for _, rows, _, _ in seen] == [3] * 7 + [2] * 3
    assert seen[-1][3].source.shape[1] == 0
    assert not torch.equal(networks[-1].x_embedder.proj.weight, editor.model.x_embedder.proj.weight)
    assert out.num_forwards == 10


def test_without_a_target_refining_reads_what_editing_reads(editor):
    asked = GenerateRequest(prompt="redden", references=(picture(5),), refine_strength=0.5)
    for prompts in ({}, {"llama": "a red cube"}):
        plan = editor._plan(replace(asked, encoder_prompts=prompts))
        (job,) = plan.jobs
        assert job.target == job.texts
        assert any("draws by the instruction itself" in text for text in plan.warnings)
    described = replace(asked, prompt="redden. Target Image Description: a red cube")
    for request in (described, replace(asked, refine_strength=0)):
        assert editor._plan(request).warnings == ()


def test_a_refiner_of_other_latents_or_texts(e1_folder, tmp_path):
    config = replace(I1_TINY, llama_size=48)
    tiny_i1.save_i1(tiny_i1.random_i1(config), tmp_path / "other" / "transformer")
    editor = load(e1_folder, device="cpu", refiner=tmp_path / "other")
    with pytest.raises(UsageError, match=r"caption_channels is \[24, 48\], not \[24, 40\]"):
        editor("redden", references=(picture(5),), refine_strength=0.5, **FEW)


@pytest.mark.parametrize("count", [0, 2])
def test_an_editor_needs_one_picture(editor, count):
    with pytest.raises(UsageError, match="edits one picture"):
        editor("x", references=tuple(picture(i) for i in range(count)), **FEW)


@pytest.mark.parametrize("how", ["stretch", "crop"])
def test_as_published_an_edit_has_its_sources_size(e1_folder, tmp_path, how, seen):
    path = tmp_path / how
    path.mkdir()
    for part in e1_folder.iterdir():
        (path / part.name).symlink_to(part)
    tiny_i1.write_json(path / "hidream.json", {"published_edit": how})
    editor = load(path, device="cpu")
    source = picture(5, (200, 104))
    out = editor("redden", references=(source,), as_published=True, **FEW)
    drawn = {"stretch": (128, 128), "crop": (176, 80)}[how]
    assert (out.request.width, out.request.height) == drawn
    assert out.images[0].size == source.size
    assert {prefix.grid for *_, prefix in seen} == {(drawn[1] // 16, drawn[0] // 16)}
    (job,) = editor._plan(out.request).jobs
    assert job.edited.size == drawn
    plain = editor("redden", references=(source,), **FEW).images[0]
    assert plain.size == (176, 80)


def test_an_editor_keeps_what_its_mask_forbids(editor):
    source = picture(3)
    mask = Image.new("L", source.size)
    mask.paste(255, (0, 0, 64, 128))
    (image,) = editor("redden", references=(source,), mask=mask, **FEW).images
    assert levels(image.crop((64, 0, 128, 128)), source.crop((64, 0, 128, 128))) == 0


def test_an_editor_grows_a_picture_of_the_native_size(editor, seen):
    """Every tile sees its own part of the source, as if that were all there is."""
    source = picture(4)
    fields = {"references": (source,), "expand": (0, 0, 64, 0), "refine_strength": 0.4}
    (image,) = editor("more", **fields, **FEW).images
    assert image.size == (192, 128)
    assert levels(image.crop((0, 0, 128, 128)), source) == 0
    assert {prefix.grid for *_, prefix in seen} == {(8, 8)}
    canvas = Image.new("RGB", image.size, (127, 127, 127))
    canvas.paste(source)
    coded = editor.codec.encode(latents.to_tensor(canvas)[None])
    tiles = [prefix.source for network, _, _, prefix in seen[:2]]
    for left, beside in zip((0, 8), tiles, strict=True):
        part = coded[..., left : left + 16]
        wanted = editor.model.x_embedder(editor.model._patches(part))
        assert torch.allclose(beside[2], wanted[0], atol=1e-4)
        assert not torch.allclose(beside[0], wanted[0], atol=1e-4)  # none
    refined = seen[-1][3]
    assert refined.source.shape[1] == 0


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"memory": "low"}], ids=["auto", "low"])
def test_the_reviews_own_snippet(monkeypatch, tmp_path, options):
    """As printed, but for the machine's having no GPU; the repository lies in the hub's cache.

    It has no Llama, as the published one, which the environment names.
    """
    import huggingface_hub

    folder = tiny_i1.make_tiny_i1(tmp_path / "tiny")
    llama = tiny_i1.make_tiny_llama(tmp_path / "llama")
    monkeypatch.setenv("HIDREAM_LLAMA", str(llama))
    asked = []

    def download(repo, **options):
        asked.append(repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipe = HiDreamPipeline.from_pretrained(
        "hidream/HiDream-I1", torch_dtype=torch.float16, **options
    )
    pipe = pipe.to("cpu")
    image = pipe(
        prompt="A professional photograph of a modern kitchen interior",
        num_inference_steps=30,
        guidance_scale=7.5,
    ).images[0]
    assert asked == ["HiDream-ai/HiDream-I1-Full"]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 1


def test_an_editor_as_diffusers_users_call_it(e1_folder, editor):
    pipe = HiDreamPipeline.from_pretrained(e1_folder, memory="balanced")
    generator = torch.Generator().manual_seed(7)
    (image,) = pipe(
        "make it red",
        image=picture(5),
        generator=generator,
        num_inference_steps=3,
        image_guidance_scale=1.5,
    ).images
    wanted = editor("make it red", references=(picture(5),), image_guidance_scale=1.5, **FEW)
    assert levels(image, wanted.images[0]) == 0


def test_an_image_is_what_i1_starts_from(pipe):
    known, source = HiDreamPipeline(pipe), picture(5)
    for strength in (0.5, None):
        out = known("a tree", image=source, strength=strength, **FEW)
        wanted = pipe("a tree", init_image=source, strength=strength, **FEW)
        assert levels(out.images[0], wanted.images[0]) == 0
    out = known("more", image=source, expand=(0, 0, 16, 0), **FEW)
    assert levels(out.images[0].crop((0, 0, 128, 128)), source) == 0


def test_a_missing_component(folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ModelError, match="text_encoder_2"):
        load(broken, device="cpu")


def test_a_vae_of_other_latents(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "vae")
    tiny_i1.write_vae(tmp_path / "broken" / "vae", 8)
    with pytest.raises(ModelError, match="latents of 8 channels; this transformer reads 4"):
        load(tmp_path / "broken", device="cpu")


def test_it_writes_no_text(pipe):
    with pytest.raises(ModelError, match="cannot write"):
        pipe.describe(picture(1))
