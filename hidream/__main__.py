"""`python -m hidream` is the command `hidream`."""

from hidream.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
