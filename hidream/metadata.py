"""What a picture says of itself, and where in its file.

The note, JSON, is enough to make the picture again. Beside it stand A1111's `parameters`, for other
programs, and the mark that a machine made it (IPTC's DigitalSourceType).

             note                            parameters          mark
    PNG      text chunk `hidream`            text chunk          text chunk XML:com.adobe.xmp
    JPEG     XMP; APP10 where it is longer   EXIF UserComment    XMP
    WebP     XMP                             EXIF UserComment    XMP
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import ExifTags, Image, PngImagePlugin

from hidream.foreign import write_parameters

VERSION = 1  # of the note: readers refuse what is newer
NOTE = "hidream"
MADE_BY_AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MAX_NOTE = 64 * 2**20  # characters
_PNG_XMP = "XML:com.adobe.xmp"
_SEGMENT = b"hidream\0"  # what our segments of a JPEG begin with
_JPEG_ROOM = 65_000  # bytes of a segment
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # how EXIF names a comment's encoding
_OPEN, _CLOSE = "<hidream:note>", "</hidream:note>"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:hidream="urn:hidream:picture" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{mark}</Iptc4xmpExt:DigitalSourceType>{note}"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is written in a picture, unread: our note, A1111's parameters, ComfyUI's prompt and
    workflow; `source_type` is IPTC's word for how the picture came about."""

    note: str | None = None
    parameters: str | None = None
    prompt: str | None = None
    workflow: str | None = None
    source_type: str | None = None


def save_options(kind: str, note: Mapping[str, Any]) -> dict[str, Any]:
    """Pillow's options that write a note into a "PNG", "JPEG" or "WEBP".

    A JPEG whose parameters pass the 64 kB of its EXIF data goes without them; the note is whole.
    """
    text, parameters = json.dumps(note, ensure_ascii=True), write_parameters(note)
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(NOTE, text)
        if parameters:
            chunks.add_text("parameters", parameters)
        chunks.add_itxt(_PNG_XMP, _packet())
        return {"pnginfo": chunks}
    options: dict[str, Any] = {"xmp": _packet(text).encode()}
    if kind == "JPEG" and len(options["xmp"]) > _JPEG_ROOM:
        options = {"xmp": _packet().encode(), "extra": _segments(text.encode())}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "hidream"
    comment = _UNICODE + parameters.encode("utf-16-be")
    if parameters and (kind == "WEBP" or len(comment) < _JPEG_ROOM):
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return {**options, "exif": exif}


def find_texts(image: Image.Image) -> Texts:
    """The texts in an opened picture. What Pillow raises on damaged files passes through."""
    exif = image.getexif()  # first: of a PNG it reads all chunks, also those after the pixels
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    packet = image.info.get("xmp", b"")
    if not isinstance(packet, bytes):
        packet = str(packet).encode()
    mark = re.search(rb"/newscodes/digitalsourcetype/(\w{1,60})", packet)
    return Texts(
        note=_text(image, NOTE) or _segment_text(image) or _xmp_note(packet),
        parameters=_text(image, "parameters") or _comment(comment),
        prompt=_text(image, "prompt") or _prefixed(exif, "prompt:"),
        workflow=_text(image, "workflow") or _prefixed(exif, "workflow:"),
        source_type=mark[1].decode() if mark else None,
    )


def read_note(text: str) -> dict[str, Any] | None:
    """A note from its JSON; None where it is none."""
    try:
        found = json.loads(text) if len(text) <= MAX_NOTE else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else None


def _packet(note: str | None = None) -> str:
    inner = f"{_OPEN}{escape(note)}{_CLOSE}" if note else ""
    return _PACKET.format(mark=MADE_BY_AI, note=inner)


def _xmp_note(packet: bytes) -> str | None:
    _, begin, rest = packet.decode("utf-8", "replace").partition(_OPEN)
    inner, end, _ = rest.partition(_CLOSE)
    return unescape(inner) if begin and end else None


def _segments(data: bytes) -> bytes:
    """As many of a JPEG's APP10 segments as it takes."""
    parts = [data[i : i + _JPEG_ROOM] for i in range(0, len(data), _JPEG_ROOM)]
    return b"".join(
        b"\xff\xea" + struct.pack(">H", 2 + len(_SEGMENT) + len(part)) + _SEGMENT + part
        for part in parts
    )


def _segment_text(image: Image.Image) -> str | None:
    segments = [data for name, data in getattr(image, "applist", ()) if name == "APP10"]
    ours = [data[len(_SEGMENT) :] for data in segments if data.startswith(_SEGMENT)]
    return b"".join(ours).decode("ascii", "replace") or None


def _text(image: Image.Image, key: str) -> str | None:
    value = image.info.get(key)
    return str(value) if isinstance(value, str) else None


def _comment(value: object) -> str | None:
    """EXIF's UserComment: eight bytes that name the encoding, then the text."""
    if not isinstance(value, bytes):
        return None
    head, body = value[:8], value[8:]
    if head == _UNICODE:  # big endian by custom, whatever the rest of the EXIF data is
        body = body[: len(body) // 2 * 2]
        big = body[0::2].count(0) >= body[1::2].count(0)
        text = body.decode("utf-16-be" if big else "utf-16-le", "replace")
    else:
        text = (body if head == _ASCII else value).decode("utf-8", "replace")
    return text.strip("\0 ") or None


def _prefixed(exif: Image.Exif, prefix: str) -> str | None:
    """ComfyUI's texts in a WebP: an EXIF tag whose value begins with their name."""
    for tag in (ExifTags.Base.Make, ExifTags.Base.Model):
        value = exif.get(tag)
        if isinstance(value, str) and value.startswith(prefix):
            return value[len(prefix) :]
    return None
