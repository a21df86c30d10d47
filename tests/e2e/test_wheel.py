"""The wheel carries o1-nano, and draws with it where only it and its dependencies are."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from hidream import __version__

ROOT = Path(__file__).parents[2]
MAX_NANO = 64 * 2**20  # bytes


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network from a copy, so that nothing left in the tree gets in."""
    source = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "hidream", source / "hidream", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", built, source)
    return next(built.glob("hidream-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the unpacked wheel; returns a runner of commands in it."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)

    def run(*arguments, cwd):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"},
            cwd=cwd,
            capture_output=True,
            text=True,
        )

    where = run("-c", "import hidream; print(hidream.__file__)", cwd=target)
    assert where.stdout.startswith(str(target)), where.stdout + where.stderr
    return run


def test_the_wheel_holds_nano_and_the_marker_of_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    nano = {
        name: size for name, size in sizes.items() if name.startswith("hidream/models/o1_nano/")
    }
    names = {Path(name).name for name in nano}
    needed = {"config.json", "hidream.json", "model.safetensors", "tokenizer.json"}
    assert needed <= names
    assert "chat_template.jinja" in names
    assert sum(nano.values()) <= MAX_NANO
    assert "hidream/py.typed" in sizes
    assert any(name.endswith("licenses/LICENSE") for name in sizes)
    assert not any(name.startswith(("tests", "runs", "recipes")) for name in sizes)
    assert not any(name.endswith((".pt", ".bin", ".pkl", ".ckpt")) for name in sizes)


def test_the_installed_command(installed, tmp_path):
    assert (
        installed("-m", "hidream", "--version", cwd=tmp_path).stdout == f"hidream {__version__}\n"
    )
    assert "generate" in installed("-m", "hidream", "--help", cwd=tmp_path).stdout


def test_the_installed_model_draws(installed, tmp_path):
    done = installed(
        *["-m", "hidream", "generate", "a red cube left of a blue sphere"],
        *["--seed", 7, "--steps", 2, "-o", "demo.png"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "demo.png\n"
    assert min(Image.open(tmp_path / "demo.png").size) >= 128
