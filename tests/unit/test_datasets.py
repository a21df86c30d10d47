"""Datasets: each layout read, each fault named with its file, and the samples of a run."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hidream.data.dataset import open_dataset
from hidream.errors import InputError, UsageError
from hidream.train.config import parse_recipe
from hidream.train.datasets import TrainingData, fit, nearest_size, training_sizes
from hidream.train.o1 import O1Learner
from hidream.world.sample import Sample
from tests import tiny

NANO = Path(__file__).parents[2] / "hidream" / "models" / "o1_nano"


def recipe_of(path, *, tasks=("text_to_image",), steps=40, size=32, **data):
    stage = {"size": size, "steps": steps, "batch_size": 4, "learning_rate": 1e-3}
    stage["tasks"] = dict.fromkeys(tasks, 1.0)
    plain = {"name": "tiny", "model": "o1-tiny", "seed": 3, "stages": [stage], "out": str(path)}
    return parse_recipe(plain | {"data": {"path": str(path), **data}})


def picture_bytes(seed=0, width=60, height=44, kind="PNG"):
    stream = io.BytesIO()
    tiny.picture(seed, width, height).save(stream, kind)
    return stream.getvalue()


def fill(folder, *names):
    """Files by name: pictures by their suffix, and captions that name their file."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        if name.endswith(".txt"):
            (folder / name).write_text(f"this is\n{name[:-4]}\n")
        else:
            kind = {"jpg": "JPEG", "webp": "WEBP"}.get(name.rpartition(".")[2], "PNG")
            (folder / name).write_bytes(picture_bytes(seed, kind=kind))
    return folder


def shard(path, *members):
    """A tar of (name, bytes), or of a TarInfo as it stands."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def problems(path, kind="auto"):
    return "\n".join(open_dataset(path, kind).problems)


def lines_of(folder, *rows):
    file = folder / "metadata.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    file.write_text("".join(lines))
    return file


# -- layouts ---------------------------------------------------------------------------------------

TRIPLET = ("e.source.png", "e.target.png", "e.txt")
SUBJECT = ("s.png", "s.ref1.png", "s.ref2.png", "s.txt")


def test_a_folder(tmp_path):
    fill(tmp_path, "a.png", "a.txt", *TRIPLET, *SUBJECT, ".hidden.png")
    fill(tmp_path / "in", "b.jpg", "b.txt")
    (tmp_path / "notes.md").write_text("mine")
    found = open_dataset(tmp_path)
    assert not found.problems
    assert found.notes == ("1 other files are left out: notes.md",)
    items = {item.name: item for item in found.items}
    assert {name: item.task for name, item in items.items()} == {
        "a": "text_to_image",
        "in/b": "text_to_image",
        "e": "edit",
        "s": "subject",
    }
    assert items["a"].caption == "this is a"
    assert items["in/b"].picture.picture().size == items["in/b"].picture.size() == (60, 44)
    assert (items["e"].picture.name, items["e"].references[0].name) == TRIPLET[1::-1]
    assert [blob.name for blob in items["s"].references] == list(SUBJECT[1:3])


def test_a_table(tmp_path):
    fill(tmp_path, "a.png", "b.png", "c.png")
    lines_of(
        tmp_path,
        {"file_name": "a.png", "text": "one", "license": "mine"},
        "\n",
        {"source": "a.png", "target": "b.png", "instruction": "do"},
        {"image": str(tmp_path / "b.png"), "caption": "two", "references": ["a.png", "c.png"]},
    )
    found = open_dataset(tmp_path)
    assert not found.problems
    assert found.notes == ("other columns are left out: license",)
    said = [(item.task, item.caption, len(item.references)) for item in found.items]
    assert said == [("text_to_image", "one", 0), ("edit", "do", 1), ("subject", "two", 2)]
    assert [len(item.blobs) for item in open_dataset(tmp_path / "metadata.jsonl").items] == [
        1,
        2,
        3,
    ]
    assert open_dataset(tmp_path, "folder").problems  # the pictures alone have no captions


def test_shards(tmp_path):
    shard(
        tmp_path / "0.tar",
        ("x/a.png", picture_bytes(0)),
        ("x/a.txt", b"one"),
        ("x/a.cls", b"7"),
        ("b.jpg", picture_bytes(1, kind="JPEG")),
        ("b.json", b'{"caption": "two"}'),
    )
    edit = [(name, picture_bytes(2)) for name in TRIPLET[:2]]
    shard(tmp_path / "1.tar", *edit, (TRIPLET[2], b"three"))
    found = open_dataset(tmp_path)
    assert not found.problems
    assert [(i.task, i.caption) for i in found.items] == [
        ("text_to_image", "one"),
        ("text_to_image", "two"),
        ("edit", "three"),
    ]
    pixels = np.asarray(found.items[0].picture.picture())
    assert (pixels == np.asarray(tiny.picture(0))).all()
    assert len(open_dataset(tmp_path / "1.tar").items) == 1


def test_parquet_says_what_it_needs(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"needs pyarrow.*hidream\[data\]"):
        open_dataset(tmp_path / "a.parquet")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the extra data")
    from pyarrow import parquet

    fill(tmp_path, "a.png")
    cells = [{"bytes": picture_bytes(i), "path": f"{i}.png"} for i in range(3)]
    table = pyarrow.table({"image": cells, "text": ["one", "two", ""]})
    parquet.write_table(table, tmp_path / "bytes.parquet", row_group_size=2)
    parquet.write_table(
        pyarrow.table({"image": ["a.png"], "caption": ["one"]}), tmp_path / "paths.parquet"
    )
    found = open_dataset(tmp_path / "bytes.parquet")
    assert found.problems == ("bytes.parquet, row 3: the caption is empty.",)
    second = np.asarray(found.items[1].picture.picture())
    assert (second == np.asarray(tiny.picture(1))).all()
    (item,) = open_dataset(tmp_path / "paths.parquet").items
    assert item.picture.size() == (60, 44)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(InputError, match="damaged"):
        open_dataset(tmp_path / "bad.parquet")


def test_all_tables_of_a_folder_are_read(tmp_path):
    """As the hub lays them out; their paths begin in their own folder."""
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data" / "pictures", "a.png")
    tmp_path.joinpath("README.md").write_text("mine")
    row = {"image": str(tmp_path / "data" / "pictures" / "a.png")}
    for name in ("train-1.jsonl", "train-0.JSONL"):
        (tmp_path / "data" / name).write_text(json.dumps(row | {"caption": name}) + "\n")
    assert problems(tmp_path)  # beside pictures a table has to be named
    found = open_dataset(tmp_path, "table")
    assert not found.problems
    assert [item.caption for item in found.items] == ["train-0.JSONL", "train-1.jsonl"]
    assert found.notes == (
        "2 tables are read: data/train-0.JSONL, data/train-1.jsonl",
        "1 other files are left out: README.md",
    )
    (tmp_path / "data" / "pictures").rename(tmp_path.parent / "pictures")
    assert problems(tmp_path) == (
        f"data/train-0.JSONL, line 1: {row['image']} does not exist.\n"
        f"data/train-1.jsonl, line 1: {row['image']} does not exist."
    )


def test_tables_and_shards_side_by_side_are_refused(tmp_path):
    (tmp_path / "more").mkdir()
    shard(tmp_path / "more" / "0.TAR", ("a.png", picture_bytes()), ("a.txt", b"one"))
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    found = open_dataset(tmp_path)
    assert [item.name for item in found.items] == ["more/0.TAR: a"]
    assert found.notes == ("0.tar.gz is left out: archives are read as .tar, not compressed",)
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"more than one kind: b\.jsonl and more/0\.TAR"):
        open_dataset(tmp_path)
    (tmp_path / "c.parquet").write_text("{}")
    with pytest.raises(InputError, match=r"more than one kind: b\.jsonl and c\.parquet"):
        open_dataset(tmp_path, "table")
    with pytest.raises(InputError, match="holds no table"):
        open_dataset(tmp_path / "more", "table")
    with pytest.raises(InputError, match="neither a folder nor a file"):
        open_dataset(tmp_path / "0.tar.gz")


def test_what_lies_beside_is_named(tmp_path):
    fill(tmp_path / "in", "a.png", "b.png")
    for name in ("train.jsonl", "metadata.csv", "0.tar", "0.zip", *(f"{i}.md" for i in range(5))):
        (tmp_path / name).write_text("x")
    notes = open_dataset(tmp_path).notes
    assert notes[0] == "5 other files are left out: 0.md, 1.md, 2.md and 2 more"
    assert notes[1].startswith("train.jsonl is left out: beside pictures a table is read as")
    assert [note.partition(" is")[0] for note in notes[2:]] == ["0.tar", "metadata.csv", "0.zip"]
    (tmp_path / "in" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "two"}')
    found = open_dataset(tmp_path)
    assert [item.caption for item in found.items] == ["two"]
    assert not found.problems
    assert "in/a.png is left out: no row and no shard has it" in found.notes


def test_a_line_ends_where_it_ends(tmp_path):
    fill(tmp_path, "a.png")
    said = "one\u2028two\u0085three\x1cfour"
    row = json.dumps({"image": "a.png", "caption": said}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{row}\r\n{row}\n".encode())
    found = open_dataset(tmp_path)
    assert not found.problems
    assert [item.caption for item in found.items] == ["one two three four"] * 2


def test_parquet_has_every_column_in_every_row(tmp_path):
    """The tasks of one table: what a row lacks is null there."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the extra data")
    from pyarrow import parquet

    def cell(number):
        return {"bytes": picture_bytes(number), "path": None}

    rows = [
        {"image": cell(0), "caption": "one"},
        {"source": cell(1), "target": cell(2), "instruction": "do"},
        {"image": cell(3), "caption": "two", "references": [cell(4), cell(5)]},
        {"image": {"bytes": None, "path": None}, "caption": "three"},
    ]
    names = ("image", "caption", "source", "target", "instruction", "references")
    full = [{name: row.get(name) for name in names} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(full), tmp_path / "a.parquet", row_group_size=2)
    found = open_dataset(tmp_path / "a.parquet")
    assert found.problems == ("a.parquet, row 4: it has no image.",)
    assert not found.notes
    said = [(item.task, item.caption) for item in found.items]
    assert said == [("text_to_image", "one"), ("edit", "do"), ("subject", "two")]
    pictures = [np.asarray(blob.picture()) for item in found.items for blob in item.blobs]
    for number, pixels in zip((0, 2, 1, 3, 4, 5), pictures, strict=True):
        assert (pixels == np.asarray(tiny.picture(number))).all()
    plain = [{**row, "references": None} for row in full]
    plain[2]["references"] = [picture_bytes(6)]
    plain[3]["image"] = cell(7)
    parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "b.parquet")
    items = open_dataset(tmp_path / "b.parquet").items
    assert [item.task for item in items] == ["text_to_image", "edit", "subject", "text_to_image"]
    assert items[2].references[0].size() == (60, 44)


def test_damaged_pages_are_told_in_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the extra data")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    table = pyarrow.table({"image": [picture_bytes(i) for i in range(3)], "caption": ["one"] * 3})
    parquet.write_table(table, file, use_dictionary=False)
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the pictures' page
    file.write_bytes(data)
    with pytest.raises(InputError, match="3 things are wrong") as raised:
        TrainingData(recipe_of(file), 16)
    for number, line in enumerate(raised.value.details, start=1):
        assert line.startswith(f"a.parquet, row {number}: the data {file} is damaged: ")
        assert "\n" not in line


def test_a_column_named_source_makes_no_edit_of_a_picture(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    row = {"image": "a.png", "caption": "one"}
    lines_of(tmp_path, row | {"source": "flickr"}, row | {"target": "dog", "source": None})
    found = open_dataset(tmp_path)
    assert not found.problems
    assert [item.task for item in found.items] == ["text_to_image"] * 2
    assert found.notes[0] == "other columns are left out: source, target"
    lines_of(tmp_path, row | {"source": "flickr", "target": "b.png"}, row | {"source": "b.png"})
    told = open_dataset(tmp_path).problems
    assert "flickr does not exist. A row whose source or target is a picture is an edit" in told[0]
    assert "the target is missing. A row whose source" in told[1]


def test_pictures_that_others_write_and_captions_of_other_names(tmp_path):
    for seed, kind in enumerate(("GIF", "BMP", "TIFF", "TIFF")):
        suffix = ".tif" if seed == 3 else f".{kind.lower()}"
        frames = [tiny.picture(i, 60, 44) for i in (seed, 9)]
        more = {} if kind == "BMP" else {"save_all": True, "append_images": frames[1:]}
        frames[0].save(tmp_path / f"{seed}{suffix}", kind, **more)
        (tmp_path / f"{seed}.caption").write_text(f"number {seed}")
    found = open_dataset(tmp_path)
    assert not found.problems
    assert [item.caption for item in found.items] == [f"number {i}" for i in range(4)]
    for seed, item in enumerate(found.items):
        assert item.picture.size() == (60, 44)
        difference = np.asarray(item.picture.picture()).astype(int) - tiny.picture(seed, 60, 44)
        assert abs(difference).mean() < (12 if seed == 0 else 0.1)  # GIF has 256 colours
    files = sorted(path for path in tmp_path.iterdir() if path.name[0] in "01")
    packed = shard(tmp_path / "a.tar", *((path.name, path.read_bytes()) for path in files))
    assert [item.caption for item in open_dataset(packed).items] == ["number 0", "number 1"]
    (tmp_path / "1.txt").write_text("again")
    Image.new("F", (60, 44)).save(tmp_path / "3.tif")
    with pytest.raises(InputError, match="2 things are wrong") as raised:
        TrainingData(recipe_of(tmp_path), 16)
    assert raised.value.details == (
        "1.caption and 1.txt: two captions of one name.",
        "3.tif: its colours (F) are not read. Save it as RGB.",
        "a.tar is left out: shards are read where they are alone, or by their path.",
    )


def test_a_caption_of_a_picture_that_is_not_read(tmp_path):
    fill(tmp_path, "a.txt", "b.png", "metadata.csv")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match="2 things are wrong") as raised:
        TrainingData(recipe_of(tmp_path), 16)
    assert raised.value.details == (
        "b.png: it has no caption (b.txt is not there).",
        "a.txt: no picture has this name (a.heic is not read).",
        "a.heic is left out: pictures are read as PNG, JPEG, WebP, GIF, BMP or TIFF.",
        "metadata.csv is left out: tables are read as .jsonl or .parquet.",
    )


# -- faults ----------------------------------------------------------------------------------------


def test_a_folders_faults_are_told_together(tmp_path):
    fill(tmp_path, "bare.png", "blank.png", "two.png", "two.jpg", "two.txt", "lonely.txt")
    fill(tmp_path, "e.source.png", "e.txt", "r.ref1.png", "r.txt", "deep.png")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "deep.txt").write_bytes(b"\xff\xfe\xff")
    told = open_dataset(tmp_path).problems
    assert sorted(told) == sorted(
        [
            "bare.png: it has no caption (bare.txt is not there).",
            "blank.txt: the caption is empty.",
            "two.jpg and two.png: two pictures of one name.",
            "lonely.txt: no picture has this name.",
            "e: an edit has a source and a target; the target is missing.",
            "r: references, but no picture that shows them.",
            "deep.txt: it is not UTF-8.",
        ]
    )


def test_a_tables_faults(tmp_path):
    fill(tmp_path, "a.png")
    lines_of(
        tmp_path,
        "{]\n",
        "3\n",
        {"image": "a.png"},
        {"image": "a.png", "caption": " "},
        {"image": "a.png", "caption": 3},
        {"caption": "one"},
        {"image": "gone.png", "caption": "one"},
        {"image": 3, "caption": "one"},
        {"image": "a.png", "caption": "one", "references": "a.png"},
        {"source": "a.png", "instruction": "do"},
    )
    told = open_dataset(tmp_path).problems
    wanted = ["no JSON (", "no JSON object", "it has no caption", "the caption is empty"]
    wanted += ["the caption is no text", "it has no image", "gone.png does not exist"]
    wanted += ["an image is no path", "references must be a list", "the target is missing"]
    assert len(told) == len(wanted)
    for number, (line, words) in enumerate(zip(told, wanted, strict=True), start=1):
        assert line.startswith(f"metadata.jsonl, line {number}: ")
        assert words in line
    (tmp_path / "metadata.jsonl").write_text("")
    assert problems(tmp_path) == "metadata.jsonl: it has no rows."


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "a\\out.png"])
def test_no_member_leads_out_of_its_shard(tmp_path, name):
    shard(tmp_path / "a.tar", (name, picture_bytes()))
    assert problems(tmp_path) == f"a.tar: {name}: its name leads out of the shard."


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_shards_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = kind, "/etc/passwd"
    shard(tmp_path / "a.tar", link)
    assert "it is a link, a device" in problems(tmp_path)


def test_oversized_truncated_and_doubled_members(tmp_path):
    vast = tarfile.TarInfo("a.png")
    vast.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(vast.tobuf() + bytes(1024))
    assert "a.png: it has 1099511627776 bytes; at most" in problems(tmp_path / "a.tar")
    long = ("b.txt", b"x" * ((1 << 20) + 1))
    assert "b.txt: it has 1048577 bytes" in problems(shard(tmp_path / "b.tar", long))
    whole = shard(tmp_path / "c.tar", ("a.png", picture_bytes()), ("a.txt", b"one")).read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[:700])
    assert "damaged" in problems(tmp_path / "c.tar")
    (tmp_path / "d.tar").write_bytes(b"this is no archive" * 100)
    assert "d.tar: damaged, or no tar file" in problems(tmp_path / "d.tar")
    twice = shard(tmp_path / "e.tar", ("a.txt", b"one"), ("a.txt", b"two"))
    assert "another member of this name" in problems(twice)
    for text, told in ((b"[]", "no JSON object"), (b"{", "no JSON"), (b'{"text": 3}', "no text")):
        assert told in problems(shard(tmp_path / "f.tar", ("a.json", text)))
    assert problems(shard(tmp_path / "g.tar", ("a.cls", b"1"))) == (
        "g.tar: there is no picture in it."
    )


def test_a_name_in_two_shards(tmp_path):
    for name in ("0.tar", "1.tar"):
        shard(tmp_path / name, ("a.png", picture_bytes()), ("a.txt", b"one"))
    assert problems(tmp_path) == "1.tar: a: 0.tar has a sample of this name, too."


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_dataset(tmp_path / "gone")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="neither a folder nor a file that is known"):
        open_dataset(tmp_path / "a.zip")
    with pytest.raises(UsageError, match=r'data\.kind = "zip" must be one of auto, folder'):
        open_dataset(tmp_path, "zip")
    (tmp_path / "a.jsonl").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        open_dataset(tmp_path / "a.jsonl")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert problems(empty) == "empty: there is no picture in it."


def test_sizes_captions_and_damage_are_told_with_the_rest(tmp_path):
    fill(tmp_path, "good.png", "good.txt", "bare.png", "long.png", "long.txt")
    (tmp_path / "long.txt").write_text("long " * 99)
    (tmp_path / "tiny.png").write_bytes(picture_bytes(width=20, height=30))
    (tmp_path / "tiny.txt").write_text("small")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.txt").write_text("x")

    def fits(task, caption):
        return "too many words" if len(caption) > 99 else ""

    with pytest.raises(InputError, match="4 things are wrong with the data") as raised:
        TrainingData(recipe_of(tmp_path), 16, fits)
    assert raised.value.exit_code == 3
    details = "\n".join(raised.value.details)
    assert "bare.png: it has no caption" in details
    assert "long: too many words." in details
    assert "tiny.png: 20x30 is too small: it would be trained at 32x32." in details
    assert "text.png" in details
    assert "is not a PNG, JPEG or WebP picture" in details


def test_damage_inside_of_a_picture_is_told_with_the_rest(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "b.jpg", "b.txt", "c.png")
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="one thing is wrong"):
        TrainingData(recipe_of(tmp_path), 16)
    with pytest.raises(InputError, match="2 things are wrong") as raised:
        TrainingData(recipe_of(tmp_path), 16, unpack=True)
    assert "c.png" in raised.value.details[0]
    assert "b.jpg" in raised.value.details[1]
    assert "truncated or damaged" in raised.value.details[1]


def test_what_no_stage_trains_and_what_is_cropped_is_told(tmp_path):
    fill(tmp_path, "a.png", "a.txt", *TRIPLET, *SUBJECT)
    (tmp_path / "s.png").write_bytes(picture_bytes(width=20, height=20))  # nor is it too small
    data = TrainingData(recipe_of(tmp_path, size=32), 16)
    assert data.summary == "data: 1 of text_to_image (1 at 32x32)"
    assert data.notes == ("2 of 3 are left out: no stage has edit, subject",)
    for number in range(5):
        (tmp_path / f"wide{number}.png").write_bytes(picture_bytes(number, 1000, 40))
        (tmp_path / f"wide{number}.txt").write_text("a very wide picture")
    (tmp_path / "e.source.png").write_bytes(picture_bytes(3, 44, 90))
    data = TrainingData(recipe_of(tmp_path, tasks=("text_to_image", "edit"), size=32), 16)
    assert data.notes == (
        "1 of 8 are left out: no stage has subject",
        "cropping takes more than a third of 6: e.source.png (44x90 at 32x32), "
        "wide0.png (1000x40 at 64x16), wide1.png (1000x40 at 64x16) and 3 more",
    )
    plain = recipe_of(tmp_path, size=32).to_dict()
    (stage,) = plain["stages"]
    few = parse_recipe(plain | {"stages": [stage | {"filter": {"without": ["wide"]}}]})
    assert TrainingData(few, 16).notes[1] == "5 of 8 are left out: no stage's filter admits them"


def test_many_problems_are_counted(tmp_path):
    fill(tmp_path, *(f"{i:03}.png" for i in range(60)))
    with pytest.raises(InputError) as raised:
        TrainingData(recipe_of(tmp_path), 16)
    assert len(raised.value.details) == 51
    assert raised.value.details[-1] == "and 10 more."


def test_a_stage_cannot_have_tasks_that_the_data_lacks(tmp_path):
    fill(tmp_path, *TRIPLET)
    with pytest.raises(UsageError, match=r"tasks has text_to_image.*has 1 of edit") as raised:
        TrainingData(recipe_of(tmp_path), 16)
    assert raised.value.remedy.endswith("stages.0.tasks = { edit = 1.0 }.")
    with pytest.raises(UsageError, match=r"tasks has text_to_image.*has 1 of edit"):
        TrainingData(recipe_of(tmp_path, world=0.5), 16)  # nothing would be learnt from it


def test_tasks_that_the_data_lacks_come_from_the_world_where_it_has_a_share(ten):
    tasks = ("text_to_image", "language", "edit")
    recipe = replace(
        recipe_of(ten, tasks=tasks, steps=20, size=48, world=0.01), tokenizer=str(NANO)
    )
    learner = O1Learner(recipe)
    assert learner.data.notes == ("the data has no edit, language: all of it comes from the world",)
    seen = Counter()
    for step in range(20):
        batch = learner.make_batch(step)
        seen.update(batch.tasks)
        for one in (learner.data.draw(step), learner.data.draw(step, 1, 2)):
            own = {isinstance(sample, Sample) for sample in one.samples}
            assert own == {True} or one.task == "text_to_image"
    assert min(seen[task] for task in tasks) > 10


def test_language_and_questions(tmp_path):
    fill(tmp_path, "a.png")
    lines_of(
        tmp_path,
        {"text": "Once upon a time,\nthere was a cube."},
        {"image": "a.png", "question": "What is left?", "answer": "A red\ncube."},
        {"image": "a.png", "caption": "one", "question": "why", "answer": "so"},
        {"image": "a.png", "question": "What is it?", "answer": "A tree."},
    )
    found = open_dataset(tmp_path)
    assert not found.problems
    assert found.notes == ("other columns are left out: answer, question",)
    tasks = ["language", "understanding", "text_to_image", "understanding"]
    assert [item.task for item in found.items] == tasks
    recipe = recipe_of(tmp_path, tasks=tuple(set(tasks)), steps=20, flip=True)
    learner = O1Learner(replace(recipe, tokenizer=str(NANO)))
    assert learner.data.summary == (
        "data: 1 of language, 1 of text_to_image, 2 of understanding (3 at 32x32)"
    )
    samples = [learner.data.sample(0, task, i)[0] for task in tasks for i in range(9)]
    said = {(sample.task, sample.prompt, sample.answer) for sample in samples}
    assert said == {
        ("language", "", "Once upon a time,\nthere was a cube."),
        ("understanding", "What is left?", "A red\ncube."),
        ("understanding", "What is it?", "A tree."),
        ("text_to_image", "one", ""),
    }
    mirrored = {}
    for sample in samples:
        pictures = sample.reference_pictures(*sample.size)
        assert len(pictures) == (sample.task == "understanding")
        mirrored.setdefault(sample.prompt, set()).update(p.tobytes() for p in pictures)
    assert [len(mirrored[words]) for words in ("What is left?", "What is it?")] == [1, 2]
    batches = [learner.make_batch(step) for step in range(8)]
    spoken = {name: sum(len(b.said[name]) for b in batches) for name in batches[0].said}
    assert spoken["language"] > 20 < spoken["understanding"]
    assert {task for batch in batches for task in batch.tasks} == set(tasks)
    lines_of(
        tmp_path,
        {"image": "a.png", "question": "What?"},
        {"image": "a.png", "answer": "What?"},
        {"text": "one", "id": 3},
        {"text": " "},
    )
    told = [problem.partition(": ")[2] for problem in open_dataset(tmp_path).problems]
    assert told == [
        "it has no answer.",
        "it has no question.",
        "it has no image (as language, text stands alone).",
        "the caption is empty.",
    ]


# -- samples ---------------------------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path):
    """Six wide pictures and four high ones."""
    for i in range(10):
        size = (80, 44) if i < 6 else (44, 80)
        (tmp_path / f"{i}.png").write_bytes(picture_bytes(i, *size))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    return tmp_path


def test_sizes_keep_the_aspect_within_the_stages_area():
    for side, multiple in ((128, 16), (2048, 32), (64, 16)):
        sizes = training_sizes(side, multiple)
        assert (side, side) in sizes
        assert len(sizes) <= 40
        for width, height in sizes:
            assert width * height <= side * side
            assert width % multiple == height % multiple == 0
            assert max(width, height) <= 4 * min(width, height)
    assert nearest_size((300, 300), 128, 16) == (128, 128)
    assert nearest_size((400, 300), 128, 16) == (144, 112)
    assert nearest_size((300, 400), 128, 16) == (112, 144)
    assert nearest_size((9000, 100), 128, 16) == (256, 64)


def test_fitting_crops_the_middle_and_does_not_stretch():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    fitted = np.asarray(fit(picture, (32, 32))).astype(int)
    assert (fitted[:, 2:-2, 2] > 200).all()
    assert fit(picture, (96, 32)).size == (96, 32)


def test_every_epoch_has_each_picture_once_in_an_order_of_its_own(tmp_path):
    fill(tmp_path, *(f"{i}.{kind}" for i in range(8) for kind in ("png", "txt")))
    data = TrainingData(recipe_of(tmp_path), 16)
    said = [s.prompt for step in range(8) for s in data.draw(step).samples]
    epochs = [said[start : start + 8] for start in range(0, 32, 8)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = TrainingData(recipe_of(tmp_path), 16)
    assert [s.prompt for s in again.draw(5).samples] == said[20:24]


def test_a_steps_samples_share_a_size_and_sizes_come_as_often_as_they_are(ten):
    data = TrainingData(recipe_of(ten, steps=200, size=48), 16)
    drawn = [data.draw(step) for step in range(200)]
    for one in drawn:
        assert {s.target(*one.size).shape[:2] for s in one.samples} == {one.size[::-1]}
    wide = sum(one.size[0] > one.size[1] for one in drawn) / 200
    assert wide == pytest.approx(0.6, abs=0.12)
    counts = Counter(s.prompt for one in drawn for s in one.samples)
    assert len(counts) == 10
    assert max(counts.values()) < 2 * min(counts.values())


def test_samples_of_one_step_may_have_each_its_own_size(ten):
    recipe = recipe_of(ten, steps=9, size=48, world=0.2)
    learner = O1Learner(replace(recipe, tokenizer=str(NANO)))
    sizes = set()
    for step in range(9):
        batch = learner.make_batch(step)
        of_grids = [(16 * columns, 16 * rows) for rows, columns in batch.grids]
        first = recipe.first_sample(step)
        named = [learner.data.size_at(0, "text_to_image", first + i) for i in range(4)]
        assert of_grids == named
        assert [w * h // 256 for w, h in of_grids] == batch.batch.targets
        sizes.add(frozenset(of_grids))
    assert any(len(of_step) > 1 for of_step in sizes)
    epoch = [learner.data.sample(0, "text_to_image", i)[0].prompt for i in range(10, 20)]
    assert len(set(epoch)) == 10


def test_processes_share_the_samples_of_one(ten):
    data = TrainingData(recipe_of(ten, world=0.3), 16)
    for step in range(4):
        whole = [s.prompt for s in data.draw(step).samples]
        for rank in range(2):
            assert [s.prompt for s in data.draw(step, rank, 2).samples] == whole[rank::2]


def test_a_share_comes_from_the_world_at_the_same_size(ten):
    data = TrainingData(recipe_of(ten, steps=100, size=48, world=0.25), 16)
    drawn = [data.draw(step) for step in range(100)]
    own = [s.prompt.startswith("number ") for one in drawn for s in one.samples]
    assert 1 - sum(own) / len(own) == pytest.approx(0.25, abs=0.06)
    size, other = next((d.size, s) for d in drawn for s in d.samples if isinstance(s, Sample))
    assert other.target(*size).shape[1::-1] == size


def test_an_edits_source_has_its_targets_size_and_subjects_their_own(tmp_path):
    fill(tmp_path, *TRIPLET, *SUBJECT)
    (tmp_path / "e.source.png").write_bytes(picture_bytes(3, 90, 50))
    data = TrainingData(recipe_of(tmp_path, tasks=("edit", "subject")), 16)
    samples = {s.task: s for step in range(12) for s in data.draw(step).samples}
    size = samples["edit"].pixels.shape
    assert [p.shape for p in samples["edit"].reference_pictures(*size[1::-1])] == [size]
    assert [p.shape for p in samples["subject"].references] == [(44, 60, 3)] * 2


def test_a_picture_that_breaks_is_skipped_named_once_and_counted(tmp_path, caplog):
    fill(tmp_path, *(f"{i}.{kind}" for i in range(4) for kind in ("png", "txt")))
    data = TrainingData(recipe_of(tmp_path), 16)
    (tmp_path / "2.png").write_bytes(b"broken")
    (tmp_path / "3.png").unlink()
    drawn = [data.draw(step) for step in range(10)]
    said = {s.prompt for one in drawn for s in one.samples}
    assert said == {"this is 0", "this is 1"}
    assert sum(one.corrupt for one in drawn) >= 20  # two of four in each epoch, and in some again
    assert [len(one.samples) for one in drawn] == [4] * 10
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert any(line.startswith("2 is left out: ") and "not a PNG" in line for line in told)
    assert any(line.startswith("3 is left out: ") for line in told)
    for name in ("0.png", "1.png"):
        (tmp_path / name).unlink()
    fresh = TrainingData.__new__(TrainingData)
    fresh.__dict__ |= {**vars(data), "_ready": type(data._ready)(0)}
    with pytest.raises(InputError, match="none can be read any more"):
        fresh.draw(0)


def test_half_are_mirrored_but_for_those_that_tell_sides(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "b.png", "b.txt", *TRIPLET)
    (tmp_path / "b.txt").write_text("a cube, left of a sphere")
    plain, flipped = (
        TrainingData(recipe_of(tmp_path, tasks=("text_to_image", "edit"), flip=flip), 16)
        for flip in (False, True)
    )
    same = Counter()
    for step in range(40):
        for one, two in zip(plain.draw(step).samples, flipped.draw(step).samples, strict=True):
            pictures = zip(
                (one.pixels, *one.references), (two.pixels, *two.references), strict=True
            )
            equal = [np.array_equal(a, b) for a, b in pictures]
            assert equal == [np.array_equal(one.pixels, two.pixels)] * len(equal)
            assert equal[0] or np.array_equal(one.pixels[:, ::-1], two.pixels)
            same[one.prompt, equal[0]] += 1
    assert same["a cube, left of a sphere", False] == 0
    assert same["a cube, left of a sphere", True] > 10
    for words in ("this is a", "this is e"):
        share = same[words, False] / (same[words, False] + same[words, True])
        assert share == pytest.approx(0.5, abs=0.2)


def test_another_dataset_under_a_run_is_told(tmp_path, caplog):
    folder = fill(tmp_path / "data", "a.png", "a.txt")
    recipe = parse_recipe(recipe_of(folder).to_dict() | {"out": str(tmp_path)})
    TrainingData(recipe, 16).describe()
    TrainingData(recipe, 16).describe()
    assert not caplog.records
    (folder / "a.txt").write_text("other words")
    TrainingData(recipe, 16).describe()
    assert "is not what this run began with" in caplog.text


def test_a_stages_filter_goes_by_captions_and_the_sizes_of_the_files(tmp_path):
    for number, side in enumerate((64, 64, 128, 40)):
        name = ("red", "blue", "red", "red")[number]
        (tmp_path / f"{number}.png").write_bytes(picture_bytes(number, side, side))
        (tmp_path / f"{number}.txt").write_text(f"a {name} cube")
    plain = recipe_of(tmp_path, size=64).to_dict()
    (stage,) = plain["stages"]

    def trained(**rules):
        recipe = parse_recipe(plain | {"stages": [stage | {"filter": rules}]})
        data = TrainingData(recipe, 16)
        return {hash(s.pixels.tobytes()) for step in range(20) for s in data.draw(step).samples}

    assert len(trained(min_size=64)) == 3  # the smallest would be too small, and is not asked for
    assert len(trained(min_size=64, only=["Red"])) == 2
    assert len(trained(min_size=128)) == 1
    with pytest.raises(InputError, match="40x40 is too small"):
        trained()
    with pytest.raises(UsageError, match="leaves none of 4 of text_to_image"):
        trained(min_size=64, only=["green"])
