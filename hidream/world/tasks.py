"""The tasks of the world: which picture goes with which words, and what the words claim.

`sample(task, seed, index)` is a pure function. Seeds of training and of evaluation come from two
disjoint ranges; `check_seed` holds them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from hidream.errors import UsageError
from hidream.world.editing import EDITS, edit
from hidream.world.language import language, understanding
from hidream.world.layouts import layout
from hidream.world.sample import Sample
from hidream.world.scene import Dice
from hidream.world.subjects import subject
from hidream.world.text_to_image import PLANS, text_to_image

TASKS = ("text_to_image", "edit", "subject", "language", "understanding")
TEXT_TASKS = ("language", "understanding")  # those that draw nothing
CATEGORIES = (
    "single",
    "colors",
    "two_objects",
    "position",
    "counting",
    "attribute_binding",
    "words",
    "edits",
    "subjects",
    "shots",
    "many_words",
    "casual",
    "storyboards",
    "layout",
)
#: What world 2.0 added: numbered after all that was there, whose samples so stay the same.
LATER = ("shots", "many_words", "casual", "storyboards", "layout")
#: Those of the task subject.
SUBJECTS = ("subjects", "layout")
TRAIN_SEEDS = range(2**32)
EVAL_SEEDS = range(2**32, 2**33)

_MAKE: dict[str, Callable[[Dice, str | None], Sample]] = {
    "text_to_image": text_to_image,
    "edit": edit,
    "subject": lambda dice, name: layout(dice) if name == "layout" else subject(dice, name),
    "language": language,
    "understanding": understanding,
}


def task_of(category: str) -> str:
    """The task whose samples a category holds."""
    if category in EDITS or category == "edits":
        return "edit"
    return "subject" if category in SUBJECTS else "text_to_image"


def check_seed(seed: int, purpose: str) -> int:
    """The seed itself, if it may serve the purpose ("train" or "eval"); else a UsageError."""
    allowed = {"train": TRAIN_SEEDS, "eval": EVAL_SEEDS}[purpose]
    if seed not in allowed:
        raise UsageError(
            f"seed {seed} is not one of the world's {purpose} seeds.",
            f"They run from {allowed.start} to {allowed.stop - 1}; training and evaluation must "
            "never see the same scenes.",
        )
    return seed


def eval_seed(seed: int) -> int:
    """A user's evaluation seed (0 … 2³²−1) as a seed of the world, where no training seed is."""
    return check_seed(EVAL_SEEDS.start + seed, "eval")


def sample(task: str, seed: int, index: int, *, category: str | None = None) -> Sample:
    """Item `index` of a task: a pure function of its arguments.

    `category` (one of `CATEGORIES`, "related", "free" or `EDITS`; it names its task)
    restricts the kind of item; None mixes them as in training.
    """
    if task not in _MAKE:
        raise UsageError(f'unknown task "{task}".', f"The world's tasks are {', '.join(TASKS)}.")
    first = (plan for plan in PLANS if plan not in LATER)
    known = (*first, *EDITS, "edits", "subjects", *LATER)
    if category is not None and category not in known:
        raise UsageError(f'unknown category "{category}".', f"Known are {', '.join(known)}.")
    if category == "layout":
        task = "subject"
    elif category in ("edits", "subjects"):
        task, category = {"edits": "edit", "subjects": "subject"}[category], None
    chosen = 0 if category is None else 1 + known.index(category)
    return _MAKE[task](Dice(TASKS.index(task), chosen, seed, index), category)
