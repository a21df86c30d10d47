"""References and layouts: sizes by number and aspect, boxes ranked, coloured and drawn."""

import math

import numpy as np
import pytest
from PIL import Image

from hidream.models.o1.config import O1_8B, O1_TINY, ReferenceBudgets
from hidream.models.o1.references import (
    LAYOUT_COLORS,
    draw_layout,
    fit_to_area,
    pixel_boxes,
    prepare_references,
    rank_by_area,
    vision_copy,
)
from hidream.models.o1.tokens import encode
from tests import tiny

BLACK = (0, 0, 0)


def prepare(references, layout=(), width=256, height=192, patch_size=16, budgets=None):
    return prepare_references(
        references,
        layout,
        width=width,
        height=height,
        patch_size=patch_size,
        budgets=budgets or O1_8B.budgets,
    )


def colors(picture):
    return {color for _, color in picture.getcolors(maxcolors=picture.width * picture.height)}


# -- sizes -----------------------------------------------------------------------------------------


def test_published_budgets():
    budgets = ReferenceBudgets()
    sides = {k: budgets.side(k, 2048) for k in range(1, 13)}
    assert sides == {
        **dict.fromkeys((1,), 2048),
        **dict.fromkeys((2,), 1536),
        **dict.fromkeys((3, 4), 1024),
        **dict.fromkeys(range(5, 9), 768),
        **dict.fromkeys(range(9, 13), 512),
    }
    vision = {k: budgets.vision_side(k) for k in range(1, 13)}
    assert vision == {
        **dict.fromkeys(range(1, 5), 384),
        **dict.fromkeys(range(5, 9), 288),
        **dict.fromkeys(range(9, 13), 192),
    }
    assert budgets.side(2, 100) == 75
    assert budgets.side(5, 100) == 37  # rounded down


@pytest.mark.parametrize("size", [(60, 44), (44, 60), (1000, 30), (33, 33), (2000, 1500), (7, 5)])
@pytest.mark.parametrize("side", [64, 100, 256])
def test_a_reference_fills_its_area_in_whole_patches(size, side):
    fitted = fit_to_area(tiny.picture(0, *size), side, 16)
    width, height = fitted.size
    assert width % 16 == height % 16 == 0
    assert min(width, height) >= 16
    if min(width, height) > 16:
        assert width * height <= side**2
        assert (width + 16) * (height + 16) > side**2
        assert abs(math.log((width / height) / (size[0] / size[1]))) < math.log(
            (1 + 16 / width) * (1 + 16 / height)
        )


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((1248, 1000), 100, (112, 80)),  # 111.7 × 89.5: only rounded is it seven patches wide
        ((227, 284), 143, (128, 144)),  # 127.8 × 159.9: both rounded is too much, so one is
        ((284, 227), 143, (144, 128)),
    ],
)
def test_sides_are_rounded_or_floored(size, side, expected):
    """Then cut to patches: the largest of the four that is within the area."""
    assert fit_to_area(Image.new("RGB", size), side, 16).size == expected


def test_a_reference_of_its_size_already_stays_as_it_is():
    picture = tiny.picture(0, 128, 128)
    assert tiny.levels(fit_to_area(picture, 128, 16), picture) == 0


@pytest.mark.parametrize("size", [(70, 40), (60, 40), (40, 70), (40, 60)])
def test_cropped_from_the_centre(size):
    """Nothing of a picture is stretched: what is too much goes on both sides alike."""
    width, height = size
    picture = Image.new("RGB", size, (255, 0, 0))
    picture.paste((0, 255, 0), (width // 2, 0, width, height))
    picture.paste((255, 0, 255), (0, height // 2, width // 2, height))
    picture.paste((0, 255, 255), (width // 2, height // 2, width, height))
    fitted = np.array(fit_to_area(picture, 52, 16)).astype(int)
    assert fitted.shape[0] / fitted.shape[1] != height / width
    red, blue = fitted[..., 0], fitted[..., 2]
    assert abs(red.mean() - 127.5) < 5  # half a pixel is 4
    assert abs(blue.mean() - 127.5) < 5
    assert red[:, : red.shape[1] // 2 - 2].min() == blue[blue.shape[0] // 2 + 2 :].min() == 255


def test_large_pictures_are_halved_first():
    """512 to 64 is three halvings by BOX: plain means of 8×8 pixels, and no other filter."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    fitted = np.array(fit_to_area(Image.fromarray(pixels), 64, 16)).astype(float)
    means = pixels.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(fitted - means).max() < 3  # each halving rounds


def test_one_patch_is_the_least():
    assert fit_to_area(tiny.picture(0), 4, 16).size == (16, 16)
    assert vision_copy(tiny.picture(0, 64, 16), 8, 32).size == (32, 32)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 128), (1024, 16)])
def test_the_vision_copy_keeps_the_aspect(size):
    copy = vision_copy(tiny.picture(0, *size), 128, 32)
    assert copy.width % 32 == copy.height % 32 == 0
    exact = math.sqrt(128**2 * size[0] / size[1])
    assert copy.width == max(int(exact / 32) * 32, 32)
    assert copy.height == max(int(exact * size[1] / size[0] / 32) * 32, 32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 11])
def test_every_reference_arrives(tokenizer, count):
    """In order, each as patches and as vision tokens, at the size for their number."""
    references = tiny.pictures(count)
    prepared = prepare(references, budgets=O1_TINY.budgets, width=64, height=48)
    side = O1_TINY.budgets.side(count, 64)
    assert [p.size for p in prepared] == [fit_to_area(r, side, 16).size for r in references]
    tokens = encode(tokenizer, O1_TINY, "all", width=64, height=48, references=references)
    assert len(tokens.references) == sum(p.width * p.height for p in prepared) // 256
    assert len(tokens.image_grids) == count
    copies = [vision_copy(p, O1_TINY.budgets.vision_side(count), 32) for p in prepared]
    assert list(tokens.image_grids) == [(c.height // 16, c.width // 16) for c in copies]
    assert len(tokens.pixel_values) == sum(rows * columns for rows, columns in tokens.image_grids)
    assert int(tokens.image_slots.sum()) == len(tokens.pixel_values) // 4


# -- layouts ---------------------------------------------------------------------------------------

TWO = [(0.1, 0.3, 0.1, 0.3), (0.4, 0.9, 0.2, 0.8)]


def test_boxes_in_pixels():
    assert pixel_boxes([(0, 1, 0, 1)], 200, 100) == [(0, 0, 199, 99)]
    assert pixel_boxes([(0.1, 0.25, 0.5, 0.755)], 200, 100) == [(20, 50, 50, 76)]


def test_the_largest_box_is_first():
    assert rank_by_area([(0, 0, 10, 10), (0, 0, 30, 30), (0, 0, 20, 20)]) == [2, 0, 1]
    assert rank_by_area([(0, 0, 9, 9), (5, 5, 14, 14), (0, 0, 10, 10)]) == [1, 2, 0]  # equals


def test_colors_are_the_published_ones():
    assert len(set(LAYOUT_COLORS)) == 10
    assert LAYOUT_COLORS[:4] == ((255, 0, 0), (0, 180, 0), (0, 0, 255), (204, 180, 0))


def test_outlines_on_black():
    """400×400: the largest line is int(0.05·400) = 20 pixels, the next 20 − 4 = 16."""
    drawn = draw_layout(TWO, 400, 400)
    assert drawn.size == (400, 400)
    assert colors(drawn) == {BLACK, LAYOUT_COLORS[0], LAYOUT_COLORS[1]}
    pixels = np.array(drawn)
    row = pixels[200]  # through the large box: x 160 … 360, both inside
    red = np.flatnonzero((row == LAYOUT_COLORS[0]).all(-1))
    assert red.tolist() == [*range(160, 180), *range(341, 361)]
    row = pixels[80]  # through the small one: x 40 … 120
    green = np.flatnonzero((row == LAYOUT_COLORS[1]).all(-1))
    assert green.tolist() == [*range(40, 56), *range(105, 121)]


def test_lines_are_never_thinner_than_five():
    pixels = np.array(draw_layout([(0, 1, 0, 1)], 60, 60))
    assert (pixels[30, :, 0] == 255).sum() == 10


def test_the_smaller_box_is_drawn_over_the_larger():
    drawn = draw_layout([(0.1, 0.3, 0.1, 0.9), (0.1, 0.9, 0.1, 0.9)], 400, 400)
    assert drawn.getpixel((45, 200)) == LAYOUT_COLORS[1]


def test_ten_boxes_are_all_drawn():
    """The published code drops all but five."""
    layout = [(0.1 * i, 0.1 * i + 0.09, 0.02, 0.1 + 0.08 * i) for i in range(10)]
    assert colors(draw_layout(layout, 640, 640)) == {BLACK, *LAYOUT_COLORS}


def test_each_reference_wears_its_boxes_color():
    """The second box is the larger: rank 0, red. References keep their order, then the layout."""
    grey = [Image.new("RGB", (64, 64), (120, 120, 120)), Image.new("RGB", (96, 64), (90, 90, 90))]
    first, second, layout = prepare(grey, TWO)
    for picture, color, inside in ((first, 1, (120,) * 3), (second, 0, (90,) * 3)):
        assert picture.getpixel((picture.width // 2, picture.height // 2)) == inside
        line = int(0.04 * math.sqrt(picture.width * picture.height))
        assert line >= 4
        middle = np.array(picture)[picture.height // 2]
        edge = (middle == LAYOUT_COLORS[color]).all(-1)
        assert edge[: line - 1].all()
        assert edge[1 - line :].all()
        assert not edge[line + 1 : -line - 1].any()
    assert tiny.levels(layout, fit_to_area(draw_layout(TWO, 256, 192), 128, 16)) == 0


def test_a_layout_counts_as_a_reference():
    """Two and a layout are three: half the side, where two alone have three quarters."""
    references = tiny.pictures(2)
    alone, with_layout = prepare(references), prepare(references, TWO)
    assert (len(alone), len(with_layout)) == (2, 3)
    assert all(p.width * p.height <= 128**2 for p in with_layout)
    assert all(128**2 < p.width * p.height <= 192**2 for p in alone)


def test_a_box_short_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        prepare(tiny.pictures(2), TWO[:1])
