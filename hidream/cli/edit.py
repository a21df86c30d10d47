"""`hidream edit`: a picture changed as an instruction says."""

from __future__ import annotations

from hidream.cli.arguments import Parser, add_model, add_output, add_request, request_fields
from hidream.cli.drawing import draw

EXAMPLES = """\
hidream edit cube.png "make the cube green" -o green.png
hidream edit photo.jpg "remove the car" --mask car.png --size 1024x1024"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "edit",
        "Change a picture as an instruction says. The result has the picture's aspect at the\n"
        "model's native area unless --size says otherwise.",
        usage="hidream edit IMAGE INSTRUCTION [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture to change")
    parser.add_argument("prompt", metavar="INSTRUCTION", help="what to change")
    add_request(parser, with_references=False)
    add_model(parser)
    add_output(parser)
    arguments = parser.parse(argv)
    return draw(arguments, {**request_fields(arguments), "references": (arguments.image,)})
