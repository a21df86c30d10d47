"""Pictures of every accepted kind become the RGB a person sees; the others are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hidream import pictures
from hidream.errors import InputError, UsageError
from hidream.pictures import check_outputs, plan_outputs, read_mask, read_picture, write_picture
from tests import tiny

RED = (200, 30, 40)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def png_header(width, height):
    """A PNG that announces a size and then ends."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (header, b"IDAT" + zlib.compress(b"")):
        parts += [struct.pack(">I", len(chunk) - 4), chunk, struct.pack(">I", zlib.crc32(chunk))]
    return b"".join(parts)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "no_suffix"])
def test_rgb_in_every_format(tmp_path, name):
    kind = {"jpg": "JPEG", "webp": "WEBP"}.get(name.split(".")[-1], "PNG")
    path = saved(tmp_path, Image.new("RGB", (9, 5), RED), name, format=kind)
    image = read_picture(path)
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 3


def test_alpha_lies_over_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert read_picture(saved(tmp_path, half)).getpixel((0, 0)) == (127, 127, 127)
    grey = Image.new("LA", (4, 4), (0, 0))
    assert read_picture(saved(tmp_path, grey)).getpixel((0, 0)) == (255, 255, 255)


def test_palettes_with_and_without_transparency(tmp_path):
    palette = Image.new("RGB", (4, 4), RED).quantize(4)
    assert read_picture(saved(tmp_path, palette)).getpixel((1, 1)) == RED
    clear = saved(tmp_path, palette, "b.png", transparency=palette.getpixel((0, 0)))
    assert read_picture(clear).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    deep = np.array([[0, 257, 32767, 65535]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(deep))
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 1, 127, 255]


def test_cmyk(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", quality=95)
    red, green, blue = read_picture(path).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_exif_rotation_is_carried_out(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera lay on its side: turn by a quarter, clockwise
    image = Image.new("RGB", (40, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 8, 8))  # top left before, top right after
    path = saved(tmp_path, image, exif=exif)
    assert pictures.read_size(path) == (16, 40)
    upright = read_picture(path)
    assert upright.size == (16, 40)
    assert upright.getpixel((14, 1)) == (0, 0, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_pil_images_pass(tmp_path):
    image = Image.new("L", (3, 4), 7)
    assert read_picture(image).getpixel((0, 0)) == (7, 7, 7)
    lazy = Image.open(saved(tmp_path, image))
    assert pictures.read_size(lazy) == (3, 4)
    assert read_picture(lazy).size == (3, 4)


def refused(path, why, reader=read_picture):
    with pytest.raises(InputError, match=why) as caught:
        reader(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused(tmp_path):
    refused(tmp_path / "none.png", "does not exist")
    refused(tmp_path, "is not a file")
    (tmp_path / "text.png").write_text("hello")
    refused(tmp_path / "text.png", "not a PNG, JPEG or WebP")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "not a PNG, JPEG or WebP")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    refused(tmp_path / "a.gif", "not a PNG, JPEG or WebP")
    refused("a\x00b.png", "damaged|not exist")
    refused("memory:4x4", "in memory")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_pictures_are_refused(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    refused(path, "truncated|damaged|not a PNG")


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_by_their_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    refused(tmp_path / "bomb.png", "limit")
    refused(tmp_path / "bomb.png", "limit", pictures.read_size)


def test_a_bomb_in_a_text_chunk_is_refused(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "PNG")
    data = b"zTXt" + b"note\0\0" + zlib.compress(b"a" * 50_000_000)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path = tmp_path / "text_bomb.png"
    path.write_bytes(good.getvalue()[:33] + chunk + good.getvalue()[33:])
    refused(path, "damaged|text")


def test_very_thin_pictures_are_refused(tmp_path):
    refused(saved(tmp_path, Image.new("RGB", (1, 2000))), "64 times")
    assert read_picture(saved(tmp_path, Image.new("RGB", (1, 1)))).size == (1, 1)


def test_masks(tmp_path):
    strokes = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    strokes.putpixel((1, 1), (255, 255, 255, 255))
    mask = read_mask(saved(tmp_path, strokes), (4, 4))
    assert mask.mode == "L"
    assert (mask.getpixel((1, 1)), mask.getpixel((0, 0))) == (255, 0)
    assert pictures.mask_warning(mask) is None
    assert "nothing" in pictures.mask_warning(Image.new("L", (4, 4), 0))
    assert "everything" in pictures.mask_warning(Image.new("L", (4, 4), 255))
    with pytest.raises(InputError, match="mask is 4x4, but its picture is 8x4"):
        read_mask(strokes, (8, 4))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_metadata_survives(tmp_path, name):
    note = {"hidream": 1, "prompt": "猫 \U0001f408 <|tms_token|>"}
    write_picture(Image.new("RGB", (8, 8), RED), tmp_path / name, note)
    assert pictures.read_metadata(tmp_path / name) == note
    assert read_picture(tmp_path / name).size == (8, 8)
    write_picture(Image.new("RGB", (8, 8)), tmp_path / name, overwrite=True)
    assert pictures.read_metadata(tmp_path / name) is None


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("profile", [None, bytes(16) + b"RGB " + bytes(100)])
def test_a_quick_picture_is_as_good(tmp_path, name, profile):
    """Also where the rows of a PNG are written as they are, with their checksums."""
    note = {"hidream": 1, "prompt": "猫"}
    image = tiny.picture(3, 37, 23)
    image.info = {"icc_profile": profile} if profile else {}
    for quick in (True, False):
        write_picture(image, tmp_path / name, note, quick=quick, overwrite=True)
        assert pictures.read_metadata(tmp_path / name) == note
        with Image.open(tmp_path / name) as found:
            found.verify()
        with Image.open(tmp_path / name) as found:
            assert found.info.get("icc_profile") == profile
            assert found.size == image.size
            assert name != "a.png" or found.tobytes() == image.tobytes()


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_picture(Image.new("RGB", (8, 8), RED), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        write_picture(Image.new("RGB", (8, 8)), path)

    def interrupted(self, file, kind, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_picture(Image.new("RGB", (8, 8)), path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_writing_where_one_cannot(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_picture(Image.new("RGB", (8, 8)), tmp_path / "no" / "a.png")


def names(template, seeds):
    return [str(path) for path in plan_outputs(template, seeds)]


def test_output_names(tmp_path):
    assert names("a.png", [7]) == ["a.png"]
    assert names("a.png", [7, 9]) == ["a-7.png", "a-9.png"]
    assert names("b/{seed}.webp", [7, 9]) == ["b/7.webp", "b/9.webp"]
    assert names("b-{index}-{seed}.jpg", [7, 7]) == ["b-0-7.jpg", "b-1-7.jpg"]
    assert names("a", [7]) == ["a.png"]
    assert names("out/", [7]) == ["out/out-7.png"]
    assert names(str(tmp_path), [7]) == [f"{tmp_path}/out-7.png"]
    assert names("{other}.png", [7]) == ["{other}.png"]
    with pytest.raises(UsageError, match=r"ends in \.gif"):
        plan_outputs("a.gif", [7])
    with pytest.raises(UsageError, match="one file"):
        plan_outputs("a-{seed}.png", [7, 7])


def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    check_outputs([path], overwrite=False, make_folders=False)
    assert not path.parent.exists()
    check_outputs([path], overwrite=False)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="--overwrite"):
        check_outputs([path], overwrite=False)
    check_outputs([path], overwrite=True)
    for bad in (path / "a.png", tmp_path / ("a" * 300 + ".png"), tmp_path / "a\0.png"):
        with pytest.raises(InputError, match=r"cannot write|not usable"):
            check_outputs([bad], overwrite=True)
    with pytest.raises(InputError, match="is a folder"):
        check_outputs([tmp_path / "new"], overwrite=True)
    with pytest.raises(InputError, match="too full"):
        check_outputs([tmp_path / "b.png"], overwrite=False, num_bytes=10**18)
