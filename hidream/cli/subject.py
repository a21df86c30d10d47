"""`hidream subject`: what reference pictures show, drawn into a new picture."""

from __future__ import annotations

from hidream.cli.arguments import Parser, add_drawing, request_fields
from hidream.cli.drawing import draw

EXAMPLES = """\
hidream subject "this dog on a beach" --ref dog.jpg
hidream subject "the two toys on a shelf" --ref a.png --box 0.1,0.4,0.3,0.8 \\
                                          --ref b.png --box 0.6,0.9,0.3,0.8"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "subject",
        "Draw what reference pictures show, anew.",
        usage="hidream subject PROMPT --ref IMAGE ... [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    add_drawing(parser)
    arguments = parser.parse(argv)
    given = request_fields(arguments)
    if not arguments.from_picture:
        given = {"keep_aspect": False, **given}
    return draw(arguments, given, needs_reference="Give 1 to 11 with --ref IMAGE.")
