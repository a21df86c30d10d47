"""What the tests of commands share."""

import pytest

from hidream.cli import main


@pytest.fixture
def hidream(tiny_folder, tmp_path, capsys, monkeypatch):
    """Run a command in an empty folder; returns (exit code, stdout, stderr).

    `model` is what -m names, None or False for no -m.
    """
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments, model=tiny_folder):
        chosen = ["-m", str(model)] if model else []
        code = main([command, *map(str, arguments), *chosen])
        out, err = capsys.readouterr()
        return code, out, err

    return run
