"""Models are found by name and hub id, and a folder's own settings win."""

import pytest

from hidream import registry
from hidream.errors import ModelError, UsageError


def test_names_and_hub_ids_find_the_same_spec():
    assert registry.find("o1-dev").repo == "HiDream-ai/HiDream-O1-Image-Dev"
    assert registry.find("hidream-ai/hidream-o1-image-DEV") is registry.find("O1-Dev")


@pytest.mark.parametrize(
    ("name", "hint"), [("o1-nona", '"o1-nano"'), ("HiDream-ai/HiDream-O1-Imag", "O1-Image")]
)
def test_an_unknown_name_gets_the_nearest(name, hint):
    with pytest.raises(UsageError, match="did you mean") as caught:
        registry.find(name)
    assert hint in str(caught.value)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(UsageError, match="o1-nano, o1, o1-dev"):
        registry.find("zzz")


def test_published_defaults():
    full, dev = registry.find("o1"), registry.find("o1-dev-2604")
    assert (full.defaults.num_inference_steps, full.defaults.guidance_scale) == (50, 5.0)
    assert full.defaults.sigmas is None
    assert len(dev.defaults.sigmas) == dev.defaults.num_inference_steps == 28
    assert dev.defaults.sampler == "flash"
    edit = dev.defaults_for("edit")
    assert (edit.sampler, edit.noise_scale) == ("euler", 8.0)
    assert full.defaults_for("subject").shift == 1.0


def test_a_folders_settings_win_over_the_published_ones():
    settings = {"shift": 1.5, "patch_size": 16, "tasks": {"edit": {"num_inference_steps": 9}}}
    spec = registry.of_folder(settings, name="mine")
    assert (spec.name, spec.patch_size, spec.variant) == ("mine", 16, "full")
    assert spec.defaults.shift == spec.defaults_for("subject").shift == 1.5
    assert spec.defaults_for("edit").num_inference_steps == 9
    assert spec.defaults.num_inference_steps == 50
    assert registry.of_folder({"variant": "dev"}).defaults.sampler == "flash"
    assert registry.of_folder({"variant": "dev"}, variant="full").defaults.sampler == "unipc"


def test_a_folder_is_laid_over_its_own_family():
    fast = registry.of_folder({"shift": 2.0}, variant="fast", family="i1")
    assert (fast.family, fast.defaults.num_inference_steps, fast.defaults.shift) == ("i1", 16, 2.0)
    with pytest.raises(ModelError, match='variant is "fast"; it can be full or dev'):
        registry.of_folder({"variant": "fast"})
    with pytest.raises(UsageError, match=r"--variant dev: \./e1 is full; an E1 can be full"):
        registry.of_folder({}, name="./e1", variant="dev", family="e1")


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "medium"},
        {"patch_size": 0},
        {"sampler": "eular"},
        {"shift": "3"},
        {"sigmas": [1, "x"]},
        {"num_inference_steps": 2.5},
        {"tasks": {"paint": {}}},
    ],
)
def test_damaged_settings_are_refused(settings):
    with pytest.raises(ModelError, match=r"hidream\.json"):
        registry.of_folder(settings)
