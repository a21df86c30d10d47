"""`--preview-every`: when previews are made, what they are, and what becomes of them at the end."""

import argparse
import math

import pytest
from PIL import Image

from hidream.cli import previews
from hidream.cli.previews import Previews
from hidream.errors import Cancelled, InputError
from hidream.pictures import read_metadata

NUM_STEPS = 8
NOTE = {"hidream": 1, "embedded": {"a": "b"}}


class Silent:
    def step(self, step, num_steps):
        pass


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Take steps with a preview after every second; returns (step, preview's step) as made.

    Previews of less than `together` seconds are made in a row; `error` ends the steps.
    """

    def run(last, together, error=None, folder=tmp_path):
        monkeypatch.setattr(previews, "TOGETHER", together)
        made = []
        with Previews(argparse.Namespace(preview_every=2, overwrite=False)) as saver:
            on_step = saver.on_step(Silent(), [folder / "a.png"], lambda: [NOTE])
            for step in range(1, last + 1):

                def preview(of=step):
                    made.append((step, of))  # noqa: B023
                    return [Image.new("RGB", (8, 8), (of, 0, 0))]

                on_step(step, NUM_STEPS, preview)
            if error:
                raise error
        return made

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("together", "made"),
    [(0, [(2, 2), (4, 4), (6, 6)]), (math.inf, [(8, 2), (8, 4), (8, 6)])],
)
def test_previews_of_quick_steps_are_made_in_a_row(steps, tmp_path, together, made):
    assert steps(NUM_STEPS, together) == made
    assert names(tmp_path) == [f"a-step000{step}.png" for step in (2, 4, 6)]
    for step in (2, 4, 6):
        with Image.open(tmp_path / f"a-step000{step}.png") as image:
            assert image.getpixel((0, 0)) == (step, 0, 0)
        note = {"hidream": 1, "preview": {"step": step, "num_steps": NUM_STEPS}}
        assert read_metadata(tmp_path / f"a-step000{step}.png") == note


def test_a_cancelled_picture_leaves_its_previews(steps, tmp_path):
    with pytest.raises(Cancelled):
        steps(6, math.inf, Cancelled("the call was cancelled."))
    assert names(tmp_path) == [f"a-step000{step}.png" for step in (2, 4, 6)]


def test_what_a_write_raises_comes_out(steps, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*step0002"):
        steps(2, math.inf, folder=tmp_path / "no")
    with pytest.raises(ZeroDivisionError):
        steps(2, math.inf, ZeroDivisionError(), folder=tmp_path / "no")
