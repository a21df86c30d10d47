"""`hidream info`: what a picture is and what it says about how it was made."""

from __future__ import annotations

from pathlib import Path

from hidream.cli import console
from hidream.cli.arguments import Parser, add_json


def run(argv: list[str]) -> int:
    parser = Parser("info", "Show what a picture says about itself.")
    parser.add_argument("image", metavar="IMAGE")
    add_json(parser)
    arguments = parser.parse(argv)

    from hidream.pictures import read_metadata, read_size

    width, height = read_size(arguments.image)
    note = read_metadata(arguments.image)
    num_bytes = Path(arguments.image).expanduser().stat().st_size
    if arguments.json:
        picture = {"path": arguments.image, "width": width, "height": height, "bytes": num_bytes}
        console.show({**picture, "metadata": note})
        return 0
    print(f"{arguments.image}: {width}x{height}, {console.size(num_bytes)}")
    if note is None:
        print("no settings of hidream in it")
        return 0
    request = note.get("request")
    for name, value in request.items() if isinstance(request, dict) else ():
        if value not in (None, [], "off", False):
            print(f"  {name:<20} {value}")
    versions = note.get("versions")
    if isinstance(versions, dict):
        print("made with " + ", ".join(f"{name} {value}" for name, value in versions.items()))
    print(f"make it again: hidream generate --from {arguments.image} -o again.png")
    return 0
