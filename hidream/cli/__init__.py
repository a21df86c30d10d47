"""The command `hidream`: a file per command, torch imported only where a command needs it."""

from hidream.cli.main import main

__all__ = ["main"]
