"""`hidream edit`: a picture changed as an instruction says."""

from __future__ import annotations

from hidream.cli.arguments import Parser, add_drawing, request_fields
from hidream.cli.drawing import draw

EXAMPLES = """\
hidream edit cube.png "make the cube green" -o green.png
hidream edit photo.jpg "remove the car" --mask car.png --size 1024x1024
hidream edit photo.jpg "more of the beach" --expand 256,0,256,0 --snap nearest
hidream edit cube.png --prompt-file changes.txt -o 'cube-{index}.png'
hidream edit --from green.png -o again.png
hidream edit other.png --from green.png -o other-green.png"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "edit",
        "Change a picture as an instruction says. The result has the picture's aspect at the\n"
        "model's native area unless --size says otherwise; with --expand it is the picture, pixel\n"
        "for pixel, with more around it.",
        usage="hidream edit IMAGE INSTRUCTION [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="the picture to change")
    parser.add_argument("prompt", nargs="?", metavar="INSTRUCTION", help="what to change")
    add_drawing(parser, with_references=False)
    arguments = parser.parse(argv)
    given = request_fields(arguments)
    elsewhere = arguments.from_picture or arguments.prompt_file or "embeddings" in given
    if arguments.prompt is None and not elsewhere:
        missing = "INSTRUCTION" if arguments.image else "IMAGE, INSTRUCTION"
        parser.error(f"the following arguments are required: {missing}")
    if arguments.image is not None:
        given["references"] = (arguments.image,)
    return draw(arguments, given, needs_reference="Name it: hidream edit IMAGE INSTRUCTION.")
