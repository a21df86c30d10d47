"""From the command line to one command, and from what it raises to an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

from hidream import __version__
from hidream.cli.console import INTERRUPTED, let_first_process_say_it, say, use_any_text
from hidream.errors import Cancelled, HidreamError, MemoryExceeded, UsageError
from hidream.registry import nearest

# command -> (module with `run(argv) -> int`, what it does)
COMMANDS = {
    "generate": ("generate", "draw pictures from a prompt"),
    "edit": ("edit", "change a picture as an instruction says"),
    "subject": ("subject", "draw what reference pictures show, in a new picture"),
    "storyboard": ("storyboard", "draw a script's panels in one picture, and cut them out"),
    "composite": ("composite", "set what a mask cuts out on another picture, and blend its edge"),
    "embed": ("embed", "have I1's text encoders read a prompt once, for later"),
    "describe": ("describe", "say what a picture shows, or answer a question about it"),
    "info": ("info", "show what a picture says about itself"),
    "models": ("models", "list, describe, check and download models"),
    "doctor": ("doctor", "look at this machine and installation"),
    "train": ("train", "train a model by a recipe"),
    "bench": ("bench", "time this machine, against two other ways to draw"),
    "hidit": ("hidit", "Hi-DiT: ImageNet data, training, sampling, FID"),
    "eval": ("evaluate", "measure how often a model's pictures are right"),
}
HELP = "\n".join(
    [
        "usage: hidream COMMAND ...",
        "",
        "Pictures from text with the HiDream models.",
        "",
        *(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()),
        "",
        'hidream generate "a red cube left of a blue sphere" --seed 7',
        "hidream COMMAND --help lists a command's flags; hidream --version shows the version.",
        "",
        "Exit codes: 0 done, 2 usage, 3 bad input, 4 model missing or broken, 5 out of memory,",
        "130 interrupted. Paths, text or JSON go to stdout, progress and messages to stderr.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` None means this process's own arguments."""
    if argv is None:
        argv = sys.argv[1:]
        use_any_text()
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _run(list(argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (KeyboardInterrupt, Cancelled):
        say("interrupted.")
        return INTERRUPTED
    except HidreamError as error:
        if isinstance(error, UsageError):  # every process of a group has found it
            let_first_process_say_it()
        return _complain(error)
    except BrokenPipeError:
        # Nobody reads any more; what was asked for is done. Python flushes stdout once again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
            return _complain(
                MemoryExceeded(
                    "there is not enough memory for this.",
                    "Ask for a smaller size or fewer pictures; --dry-run estimates the need.",
                )
            )
        return _bug(error)
    except Exception as error:
        return _bug(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"hidream {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        what = "flag" if argv[0].startswith("-") else "command"
        known = ["--help", "--version"] if what == "flag" else list(COMMANDS)
        raise UsageError(f'unknown {what} "{argv[0]}"; {nearest(argv[0], known)}', "See --help.")
    module = import_module(f"hidream.cli.{COMMANDS[argv[0]][0]}")
    return module.run(argv[1:])


def _complain(error: HidreamError) -> int:
    """Two lines, whatever the message holds, and one for each of its details."""
    say("error: " + " ".join(error.problem.split()))
    for line in error.details:
        say("       " + " ".join(line.split()))
    if error.remedy:
        say("       " + " ".join(error.remedy.split()))
    return error.exit_code


def _bug(error: Exception) -> int:
    if os.environ.get("HIDREAM_TRACEBACK"):
        raise error
    message = " ".join(str(error).split())[:300]
    say(f"error: unexpected {type(error).__name__}: {message}")
    say("       This is a fault of hidream; HIDREAM_TRACEBACK=1 shows where it happened.")
    return 1


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that half-written files are removed
