"""What a picture says of itself, in every kind of file."""

import random
import re
import struct
import zlib
from xml.etree import ElementTree

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from hidream.errors import InputError
from hidream.foreign import read_parameters
from hidream.metadata import MADE_BY_AI, find_texts
from hidream.pictures import read_metadata, read_texts, write_picture
from tests import tiny

REQUEST = {
    "prompt": "two 猫 \U0001f408 & <|tms_token|>, é",
    "negative_prompt": "a dog",
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "sampler": "unipc",
    "seed": 2**63 - 1,
    "width": 64,
    "height": 32,
    "strength": None,
}
NOTE = {
    "hidream": 1,
    "request": REQUEST,
    "model": {"name": "runs/a, b", "digest": "0123456789abcdef" * 4},
    "versions": {"hidream": "0.1.0"},
}
KINDS = ["png", "jpg", "webp"]


def written(folder, kind, note=NOTE):
    path = folder / f"a.{kind}"
    write_picture(tiny.picture(0, 64, 32), path, note)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_all_of_it(tmp_path, kind):
    path = written(tmp_path, kind)
    assert read_metadata(path) == NOTE
    texts = read_texts(path)
    assert texts.source_type == "trainedAlgorithmicMedia"
    found = read_parameters(texts.parameters)
    assert found["prompt"] == REQUEST["prompt"]
    assert found["negative_prompt"] == "a dog"
    assert found["settings"] == {
        "Steps": "4",
        "Sampler": "UniPC",
        "CFG scale": "3",
        "Seed": str(2**63 - 1),
        "Size": "64x32",
        "Model hash": "0123456789",
        "Model": "runs/a, b",
        "Version": "hidream 0.1.0",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_is_a_property_of_well_formed_xmp(tmp_path, kind):
    packet = Image.open(written(tmp_path, kind)).info["xmp"]
    mark = ".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    inner = re.search(rb"<x:xmpmeta.*</x:xmpmeta>", packet, re.DOTALL)
    assert ElementTree.fromstring(inner[0]).find(mark).text == MADE_BY_AI


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_the_comment_is_encoded_as_other_programs_expect(tmp_path, kind):
    exif = Image.open(written(tmp_path, kind)).getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be").startswith(REQUEST["prompt"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [30_000, 64_000, 300_000])
def test_long_notes(tmp_path, kind, length):
    """Longer than a JPEG's segment, and with everything that JSON and XML escape."""
    note = {**NOTE, "request": {**REQUEST, "prompt": ('猫<&>"\\' * length)[:length]}}
    path = written(tmp_path, kind, note)
    assert read_metadata(path) == note
    assert read_texts(path).source_type == "trainedAlgorithmicMedia"
    assert Image.open(path).size == (64, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_source_goes_along(tmp_path, kind):
    """What Pillow keeps of a source (place, comment, name) is in no result."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSAreaInformation] = b"secret place"
    source = tiny.picture(0, 32, 32)
    source.info = {
        "exif": exif.tobytes(),
        "comment": b"secret",
        "xmp": b"<x>secret</x>",
        "Author": "secret",
        "icc_profile": bytes(16) + b"CMYK" + b"secret",
    }
    for note in (None, NOTE):
        path = tmp_path / f"{note is None}.{kind}"
        write_picture(source, path, note)
        assert b"secret" not in path.read_bytes()
    write_picture(source, tmp_path / f"bare.{kind}")
    bare = (tmp_path / f"bare.{kind}").read_bytes()
    for word in (b"hidream", b"parameters", b"Exif", b"EXIF", b"xmp", b"XMP", b"eXIf", b"tEXt"):
        assert word not in bare


def test_a_note_behind_the_pixels_is_found(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("hidream", '{"hidream": 1}')
    chunks.chunks[0] = (*chunks.chunks[0][:2], True)  # after the pixels
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert (tmp_path / "a.png").read_bytes().index(b"IDAT") < 100
    assert read_metadata(tmp_path / "a.png") == {"hidream": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "1" * 5000, '"x"', "null"])
def test_damaged_notes_are_refused(tmp_path, text):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("hidream", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    if text:
        with pytest.raises(InputError, match="hidream metadata in picture is damaged"):
            read_metadata(tmp_path / "a.png")
    else:
        assert read_metadata(tmp_path / "a.png") is None


def changed(data, dice):
    """Some bytes changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 3, 20])):
        place = dice.randrange(len(data) + 1)
        end = place + dice.choice([0, 1, 4])
        data[place:end] = dice.choice([bytes([dice.randrange(256)]), b"", b"\xff\xff\0\0"])
    return bytes(data)


def changed_chunk(data, dice):
    """A PNG with one chunk changed and its checksum right, or one bit of its name."""
    chunks, place = [], 8
    while place < len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        chunks.append(data[place + 4 : place + 8 + length])
        place += 12 + length
    number = dice.randrange(len(chunks) - 1)
    name, body = chunks[number][:4], chunks[number][4:]
    if dice.random() < 0.2:
        name = dice.choice([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"])
    chunks[number] = name + changed(body, dice)
    checked = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    return data[:8] + b"".join(checked)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("png", changed), ("png", changed_chunk), ("jpg", changed), ("webp", changed)],
)
def test_any_damage_is_refused_or_read(tmp_path, kind, change):
    """An InputError in one line at most, never another."""
    whole = written(tmp_path, kind).read_bytes()
    dice = random.Random(0)
    outcomes = set()
    for _ in range(150):
        (tmp_path / "damaged").write_bytes(change(whole, dice))
        try:
            read_texts(tmp_path / "damaged")
            read_metadata(tmp_path / "damaged")
            outcomes.add("read")
        except InputError as error:
            outcomes.add("refused" if "\n" not in str(error) else "refused in many lines")
    assert outcomes == {"read", "refused"}


def test_comments_of_other_programs(tmp_path):
    for comment, text in [
        (b"UNICODE\0" + "a é 猫".encode("utf-16-be"), "a é 猫"),
        (b"UNICODE\0" + "a é 猫".encode("utf-16-le"), "a é 猫"),
        (b"ASCII\0\0\0plain\0", "plain"),
        (b"no encoding told", "no encoding told"),
        (b"UNICODE\0\0", None),
        (b"", None),
    ]:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
        assert find_texts(Image.open(tmp_path / "a.jpg")).parameters == text


def test_a_comfy_webp(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = 'prompt:{"1": {}}'
    exif[ExifTags.Base.Make] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    texts = read_texts(tmp_path / "a.webp")
    assert (texts.prompt, texts.workflow, texts.note) == ('{"1": {}}', "{}", None)
