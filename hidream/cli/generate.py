"""`hidream generate`: pictures from a prompt."""

from __future__ import annotations

from hidream.cli.arguments import Parser, add_drawing, request_fields
from hidream.cli.drawing import draw

EXAMPLES = """\
hidream generate "a red cube left of a blue sphere" --seed 7 -o cube.png
hidream generate "two green stars" --num-images 4 -o 'stars-{seed}.png'
hidream generate --prompt-file prompts.txt -o 'pictures/{index}.png'
hidream generate --from cube.png -o again.png
hidream generate "a cat in the snow" -m ./HiDream-O1-Image-Dev --variant dev --dry-run"""


def run(argv: list[str]) -> int:
    parser = Parser(
        "generate",
        "Draw pictures from a prompt.",
        usage="hidream generate PROMPT [flags]",
        epilog=EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    add_drawing(parser)
    arguments = parser.parse(argv)
    return draw(arguments, request_fields(arguments))
