"""Pictures in and out of files: what is accepted, how it becomes RGB, and where results go."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from hidream.errors import InputError, UsageError
from hidream.metadata import Texts, find_texts, read_note, save_options

FORMATS = ("PNG", "JPEG", "WEBP")
SMALL = 512 * 512  # pixels; up to here a preview is written faster than it is packed
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 8192 * 8192  # of a picture that is read
MAX_BYTES = 512 * 2**20  # of a file that is read
MAX_ASPECT = 64  # longer side over shorter side of a picture that is read
# What Pillow raises on files that are not what they say.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, struct.error)


def read_picture(source: str | Path | Image.Image, name: str = "picture") -> Image.Image:
    """An upright RGB picture of 8 bits from a PNG, JPEG or WebP file, or from a PIL image.

    Transparency is laid over white, 16 bits are rounded to 8, CMYK and palettes are converted, and
    the rotation noted in the EXIF data is carried out. `name` is what messages call the picture.

    Raises:
        InputError: the file is missing, no such picture, truncated, too large or too thin.
    """
    return _rgb(_loaded(source, name), background=255)


def read_mask(
    source: str | Path | Image.Image, size: tuple[int, int] | None = None, name: str = "mask"
) -> Image.Image:
    """A mask as an upright grey picture: white (255) where the picture of `size` may change.

    Transparency counts as black, so white strokes on an empty layer are a mask as they stand.

    Raises:
        InputError: as `read_picture`, or the mask is not of `size`.
    """
    mask = _rgb(_loaded(source, name), background=0).convert("L")
    if size is not None and mask.size != size:
        raise InputError(
            f"the mask is {mask.width}x{mask.height}, but its picture is {size[0]}x{size[1]}.",
            "Draw the mask on the picture itself.",
        )
    return mask


def mask_warning(mask: Image.Image) -> str | None:
    """What to tell about a mask that is all black or all white."""
    low, high = mask.getextrema()
    if high == 0:
        return "the mask is all black: nothing may change."
    if low == 255:
        return "the mask is all white: everything may change."
    return None


def read_size(source: str | Path | Image.Image, name: str = "picture") -> tuple[int, int]:
    """The upright (width, height) of a picture, from its header alone."""
    image = _opened(source, name)
    try:
        with _quietly():
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except _BROKEN as error:
        raise InputError(f"{_label(source, name)} is damaged: {_first_line(error)}.") from error
    return (image.height, image.width) if rotated else image.size


def open_picture(
    data: bytes, name: str = "picture", formats: Sequence[str] = FORMATS
) -> Image.Image:
    """A picture from a file's bytes, its header checked like that of any picture that is read.

    `formats`: Pillow's names of those that are read. Of several frames it is the first.
    """
    return _opened(data, name, formats)


def read_file(source: str | Path, name: str = "picture") -> bytes:
    """A picture's file as it is.

    Raises:
        InputError: it is missing, no file, may not be read or is too large.
    """
    label = _label(source, name)
    if str(source).startswith("memory:"):
        raise InputError(f"{name} was a picture in memory and is in no file.", "Give it again.")
    try:
        path = Path(source).expanduser()
        if not path.exists():
            raise InputError(f"{label} does not exist.", "Check its path.")
        if not path.is_file():
            raise InputError(f"{label} is not a file.", "Name a PNG, JPEG or WebP file.")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{label} has more than {MAX_BYTES // 2**20} MB.", "Scale it down.")
        return path.read_bytes()
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{label} may not be read.", "Check its permissions.") from error
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, or ~ of an unknown user
        raise InputError(f"{label} cannot be read: {_first_line(error)}.") from error


def read_texts(source: str | Path | Image.Image, name: str = "picture") -> Texts:
    """What is written in the picture, by hidream and by others.

    Raises:
        InputError: the file is no picture or is damaged.
    """
    image = _opened(source, name)
    try:
        with _quietly():
            return find_texts(image)
    except _BROKEN as error:
        raise InputError(f"{_label(source, name)} is damaged: {_first_line(error)}.") from error


def read_metadata(source: str | Path | Image.Image, name: str = "picture") -> dict[str, Any] | None:
    """What `write_picture` noted in the picture, or None where there is nothing of ours.

    Raises:
        InputError: the file is no picture, or the note is damaged.
    """
    text = read_texts(source, name).note
    found = read_note(text) if text is not None else None
    if text is not None and found is None:
        raise InputError(f"the hidream metadata in {name} is damaged.", "Give the settings anew.")
    return found


def write_picture(
    image: Image.Image,
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    quick: bool = False,
) -> None:
    """Write a picture whole or not at all: beside its place, synced, then renamed.

    `metadata` is the note that `hidream.metadata` puts into it. Nothing else that a picture brings
    along from its source goes out with it, except its colour profile. `quick`, for previews, does
    not wait for the disk and packs less tightly, a small PNG not at all.

    Raises:
        InputError: the file exists and may not be overwritten, or cannot be written.
    """
    kind = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
    if quick:
        options |= {"compress_level": 1, "method": 0}  # PNG's and WebP's
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":
        options["icc_profile"] = profile
    small = image.width * image.height <= SMALL
    unpacked = quick and kind == "PNG" and small and "icc_profile" not in options
    if metadata is not None:
        options |= save_options(kind, metadata)
    if not overwrite and os.path.exists(path):
        raise _exists(path)
    temporary = os.path.join(path.parent, f".hidream-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if unpacked:
                file.write(_unpacked(image, options.get("pnginfo")))
            else:
                image = image.copy()
                image.info = {}
                image.save(file, kind, **options)
            file.flush()
            if not quick:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror or error}.") from error
        raise


def _unpacked(image: Image.Image, texts: PngInfo | None) -> bytes:
    """An RGB picture as a PNG of raw rows. Pillow tries all filters on them even at level 0."""
    rows = np.zeros((image.height, 1 + 3 * image.width), np.uint8)  # 0 before each: no filter
    rows[:, 1:] = np.asarray(image).reshape(image.height, -1)
    chunks = [(b"IHDR", struct.pack(">II5B", *image.size, 8, 2, 0, 0, 0))]
    chunks += [chunk[:2] for chunk in texts.chunks] if texts else []
    chunks += [(b"IDAT", zlib.compress(rows.data, 0)), (b"IEND", b"")]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        sum32 = zlib.crc32(data, zlib.crc32(name))
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", sum32)]
    return b"".join(parts)


def plan_outputs(
    template: str, seeds: Sequence[int], *, default: str = "out-{seed}.png", mark: str = "{seed}"
) -> tuple[Path, ...]:
    """Where each picture goes, one a seed.

    `{seed}` and `{index}` (from 0) are filled in; several pictures without either get `-` and the
    `mark` before the suffix; a folder gets the `default` in it; no suffix means `.png`.

    Raises:
        UsageError: an unknown kind of file, or two pictures in one place.
    """
    if template.endswith(("/", os.sep)) or _is_folder(template):
        template = os.path.join(template, default)
    path = Path(template).expanduser()
    if not path.suffix or "{" in path.suffix:
        path = path.with_name(path.name + ".png")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f'the output "{template}" ends in {path.suffix}; it can end in .png, .jpg, .jpeg or '
            ".webp."
        )
    if len(seeds) > 1 and "{seed}" not in str(path) and "{index}" not in str(path):
        path = path.with_name(f"{path.stem}-{mark}{path.suffix}")
    paths = tuple(
        Path(str(path).replace("{seed}", str(seed)).replace("{index}", str(index)))
        for index, seed in enumerate(seeds)
    )
    if len(set(paths)) < len(paths):
        raise UsageError(
            f'two pictures would be written to one file by "{template}".', "Put {index} into it."
        )
    return paths


def check_outputs(
    paths: Sequence[Path], *, overwrite: bool, num_bytes: int = 0, make_folders: bool = True
) -> None:
    """Find out before the work whether its results can be written; makes missing folders.

    `num_bytes` is what one picture may need on the disk. Without `make_folders` nothing on the
    disk changes and only what exists is looked at.

    Raises:
        InputError: a path is taken or cannot be written, or the disk is too full.
    """
    folders = {path.parent for path in paths}
    try:
        for path in paths:
            if path.is_dir():
                raise InputError(f"the output {path} is a folder.", "Name a file in it.")
            with suppress(FileNotFoundError):
                os.lstat(path)  # a name that is too long, or passes through a file, shows here
                if not overwrite:
                    raise _exists(path)
        for folder in folders:
            if make_folders:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(prefix=".hidream-", dir=folder):
                    pass
            elif folder.exists() and not folder.is_dir():
                raise NotADirectoryError(20, "a part of the path is a file")
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot write {paths[0]}: {error.strerror or error}.", "Choose another place with -o."
        ) from error
    except ValueError as error:  # a NUL in a path
        raise InputError(f"the output path is not usable: {error}.") from error
    for folder in folders:
        here = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(here).free
        needed = num_bytes * sum(path.parent == folder for path in paths)
        if free < needed:
            raise InputError(
                f"the disk of {folder} is too full: {free / 1e6:.1f} MB are free and up to "
                f"{needed / 1e6:.1f} MB are needed.",
                "Make room, or choose another place with -o.",
            )


def _opened(
    source: str | Path | bytes | Image.Image, name: str, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """The picture with its header read and its size checked, its pixels not yet."""
    if isinstance(source, Image.Image):
        image = source
    else:
        data = source if isinstance(source, bytes) else read_file(source, name)
        image = _opened_file(data, _label(source, name), formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width}x{height} pixels; the limit is {MAX_PIXELS} (8192x8192).",
            "Scale it down first.",
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name} is {width}x{height}; its longer side may be at most {MAX_ASPECT} times the "
            "shorter.",
            "Crop it first.",
        )
    return image


def _opened_file(data: bytes, label: str, formats: Sequence[str]) -> Image.Image:
    try:
        with _quietly():
            return Image.open(io.BytesIO(data), formats=tuple(formats))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{label} would unpack to more pixels than the limit of {MAX_PIXELS} (8192x8192).",
            "Scale it down first.",
        ) from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{label} is not a PNG, JPEG or WebP picture.", "Convert it to one of these."
        ) from error
    except _BROKEN as error:
        raise InputError(f"{label} is damaged: {_first_line(error)}.", "Save it anew.") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings of damage that it passes over; a bomb's is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _loaded(source: str | Path | Image.Image, name: str) -> Image.Image:
    image = _opened(source, name)
    try:
        with _quietly():
            image.load()
            return ImageOps.exif_transpose(image)
    except _BROKEN as error:
        raise InputError(
            f"{_label(source, name)} is truncated or damaged: {_first_line(error)}.",
            "Save it anew.",
        ) from error


def _rgb(image: Image.Image, *, background: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        return Image.alpha_composite(under, image).convert("RGB")
    return image.convert("RGB")


def _label(source: object, name: str) -> str:
    """What a message calls a picture: with its path, where it has one."""
    return f"{name} ({source})" if isinstance(source, str | Path) else name


def _exists(path: Path) -> InputError:
    return InputError(f"{path} exists.", "Overwrite it with --overwrite, or choose another -o.")


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, ValueError):
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
