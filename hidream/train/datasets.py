"""Training samples out of a dataset: which picture at which step, at which size, beside the world.

Which sample is at a place of the run is a pure function of (seed, place, the dataset), so that
there is no state to save and any number of processes sees the same run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from hidream.data import listing
from hidream.data.dataset import Item, complain, open_dataset
from hidream.errors import InputError, UsageError
from hidream.train.config import Recipe, Stage
from hidream.train.draws import REDRAW, Stream, draw_sample, draw_task, generator
from hidream.world.tasks import TASKS, Sample

logger = logging.getLogger(__name__)

MAX_ASPECT = 4  # of the sizes that pictures are trained at
NUM_STEPS = 16  # of their sides, at most, along a square's
MAX_KEPT = 256 * 1024**2  # bytes of pictures that are ready to be trained on
MAX_CROP = 1 / 3  # of a picture; what loses more is named
FINGERPRINT = "data.json"
Size = tuple[int, int]  # width, height
_SIDES = {"left", "right", "left-hand", "right-hand"}
Fits = Callable[[str, str], str]  # (task, words) -> why they do not fit; empty where they do


@dataclass(frozen=True)
class Pictured:
    """A sample of a dataset, as the world's are: its words, and its pictures at their sizes.

    Of language there is no picture: `pixels` are black, and nobody looks at them.
    """

    task: str
    prompt: str
    pixels: np.ndarray
    references: tuple[np.ndarray, ...] = ()
    answer: str = ""

    @property
    def size(self) -> Size:
        """Of its picture."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def target(self, width: int, height: int) -> np.ndarray:
        """The picture: uint8 (height, width, 3)."""
        assert self.pixels.shape == (height, width, 3)
        return self.pixels

    def reference_pictures(self, width: int, height: int) -> tuple[np.ndarray, ...]:
        """An edit's source at the picture's size; subjects at their own."""
        return self.references


@dataclass(frozen=True)
class Drawn:
    """A process's samples of a step, all of one task and size.

    `corrupt`: pictures that could not be read, and were replaced.
    """

    task: str
    size: Size
    samples: tuple[Sample | Pictured, ...]
    corrupt: int


class TrainingData:
    """The dataset of a recipe.

    `multiple`: the model's pictures have sides that are multiples of it, in pixels. `unpack`: read
    every picture whole, not its header alone. Raises InputError for a dataset with anything wrong,
    UsageError where a stage asks for a task that it has no items of and the world has no share.
    """

    def __init__(
        self, recipe: Recipe, multiple: int, fits: Fits | None = None, *, unpack: bool = False
    ):
        self.recipe = recipe
        self.multiple = multiple
        self.dataset = open_dataset(recipe.data.path, recipe.data.kind)
        self.items = self.dataset.items
        self._named: set[str] = set()
        self._ready = _Kept(MAX_KEPT)
        self._shapes = self._check(fits or (lambda task, words: ""), unpack)
        self.sizes = tuple(shapes[0] if shapes else (1, 1) for shapes in self._shapes)
        self._check_tasks()

    def _check(self, fits: Fits, unpack: bool) -> tuple[tuple[Size, ...], ...]:
        """The sizes of each item's pictures. Raises InputError with all that is wrong."""
        problems, shapes = list(self.dataset.problems), []
        for item in self.items:
            problem = fits(item.task, item.words)
            if problem:
                problems.append(f"{item.name}: {problem}.")
            sizes = []
            for blob in item.blobs:
                try:
                    sizes.append(blob.size())
                    if unpack:
                        blob.picture()
                except (InputError, OSError) as error:
                    problems.append(f"{blob.name}: {_why(error)}")
                    continue
                if blob is item.picture:
                    problems += self._too_small(item, blob.name, sizes[0])
            shapes.append(tuple(sizes))
        if problems:
            raise complain(self.dataset.path, problems, self.dataset.notes)
        return tuple(shapes)

    def _check_tasks(self) -> None:
        """Raise UsageError for tasks or filters with which there is nothing to learn from."""
        there = Counter(item.task for item in self.items)
        for number, task in self._asked:
            if there[task] and not self._of_stage(number, task):
                raise UsageError(
                    f"stages.{number}.filter leaves none of {there[task]} of {task} in "
                    f"{self.dataset.path}.",
                    "Loosen its rules.",
                )
        lacking = [(number, task) for number, task in self._asked if not there[task]]
        if lacking and (len(lacking) == len(self._asked) or not self.recipe.data.world):
            number, task = lacking[0]
            raise UsageError(
                f"stages.{number}.tasks has {task}; the data {self.dataset.path} has "
                f"{', '.join(f'{n} of {task}' for task, n in sorted(there.items()))}.",
                "Give tasks that it has: stages.0.tasks = { "
                f"{next(iter(there), 'text_to_image')} = 1.0 }}.",
            )

    @cached_property
    def _asked(self) -> list[tuple[int, str]]:
        """The stages by number, with each of their tasks."""
        stages = enumerate(self.recipe.stages)
        return [(number, task) for number, stage in stages for task, w in stage.tasks.items() if w]

    def _too_small(self, item: Item, name: str, found: Size) -> list[str]:
        for stage in self.recipe.stages:
            if not _trains(stage, item, found):
                continue
            width, height = nearest_size(found, stage.size, self.multiple)
            if found[0] < width or found[1] < height:
                return [
                    f"{name}: {found[0]}x{found[1]} is too small: it would be trained at "
                    f"{width}x{height}."
                ]
        return []

    @property
    def summary(self) -> str:
        """What is learnt from, and the sizes at which the last stage trains it."""
        last = len(self.recipe.stages) - 1
        tasks = Counter(self.items[i].task for i in self._trained)
        sizes = Counter(
            self._size(last, i)
            for task in tasks
            for i in self._of_stage(last, task)
            if self.items[i].picture is not None
        )
        shown = ", ".join(f"{n} at {w}x{h}" for (w, h), n in sizes.most_common(4))
        more = ", …" if len(sizes) > 4 else ""
        counts = ", ".join(f"{n} of {task}" for task, n in sorted(tasks.items()))
        return f"data: {counts}" + (f" ({shown}{more})" if sizes else "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling: what is left out, cropped, or comes from the world alone."""
        notes, all_of = list(self.dataset.notes), f"of {len(self.items)}"
        asked = {task for _, task in self._asked}
        there = Counter(item.task for item in self.items)
        untold = sorted(there.keys() - asked)
        count = sum(there[task] for task in untold)
        if count:
            notes.append(f"{count} {all_of} are left out: no stage has {', '.join(untold)}")
        count = len(self.items) - len(self._trained) - count
        if count:
            notes.append(f"{count} {all_of} are left out: no stage's filter admits them")
        lacking = sorted(asked - there.keys())
        if lacking:
            notes.append(f"the data has no {', '.join(lacking)}: all of it comes from the world")
        cut = [told for i in self._trained if (told := self._cropped(i))]
        if cut:
            notes.append(f"cropping takes more than a third of {len(cut)}: {listing.some(cut)}")
        return tuple(notes)

    @cached_property
    def _trained(self) -> tuple[int, ...]:
        """The items that any stage trains."""
        return tuple(sorted({i for asked in self._asked for i in self._of_stage(*asked)}))

    def _cropped(self, number: int) -> str:
        """Which of an item's pictures loses too much at which size; empty where none does."""
        item, shapes = self.items[number], self._shapes[number]
        fitted = item.blobs if item.task == "edit" else item.blobs[:1]  # as `_pictured` does
        for stage in self.recipe.stages:
            if not _trains(stage, item, self.sizes[number]):
                continue
            width, height = nearest_size(self.sizes[number], stage.size, self.multiple)
            for blob, found in zip(fitted, shapes, strict=False):
                ratio = (found[0] * height) / (found[1] * width)
                if min(ratio, 1 / ratio) < 1 - MAX_CROP:
                    return f"{blob.name} ({found[0]}x{found[1]} at {width}x{height})"
        return ""

    def draw(self, step: int, rank: int = 0, world: int = 1) -> Drawn:
        """Process `rank`'s samples of `step`: rank, rank + world, … of the step's. All have the
        task and the size of its first."""
        recipe = self.recipe
        number, _ = recipe.locate(step)
        stage, first = recipe.stages[number], recipe.first_sample(step)
        task = draw_task(recipe, stage, step)
        these = self._of_stage(number, task)
        size = self._size(number, self._at(these, first)) if these else (stage.size, stage.size)
        samples: list[Sample | Pictured] = []
        corrupt = 0
        for index in range(first + rank, first + stage.batch_size, world):
            if self.from_world(number, task, index):
                samples.append(draw_sample(recipe, stage, task, index))
                continue
            sample, failed = self._sample(number, self._of_size(number, task, size), index)
            samples.append(sample)
            corrupt += failed
        return Drawn(task, size, tuple(samples), corrupt)

    def from_world(self, stage: int, task: str, index: int) -> bool:
        """Whether the run's sample `index` is one of the world's; all are of a task that the data
        lacks."""
        if not self._of_stage(stage, task):
            return True
        dice = generator(self.recipe.seed, Stream.SOURCE, index)
        return dice.random() < self.recipe.data.world

    def sample(self, stage: int, task: str, index: int) -> tuple[Pictured, int]:
        """The run's sample `index`, at the size nearest to its own, and how many before it could
        not be read."""
        return self._sample(stage, self._of_stage(stage, task), index)

    def size_at(self, stage: int, task: str, index: int) -> Size:
        """The size of that picture, if it can be read; of the world's, a square."""
        if self.from_world(stage, task, index):
            side = self.recipe.stages[stage].size
            return (side, side)
        return self._size(stage, self._at(self._of_stage(stage, task), index))

    def first(self, task: str, count: int) -> list[Item]:
        """The first items of a task."""
        return [self.items[i] for i in self._of_task(task)[:count]]

    def describe(self) -> None:
        """Write into the run's folder what was learnt from; say so if it is another than before."""
        told = [(i.name, i.task, i.words, s) for i, s in zip(self.items, self.sizes, strict=True)]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        record = {"path": str(self.dataset.path), "items": len(told), "sha256": digest}
        file = self.recipe.run_dir / FINGERPRINT
        try:
            before = json.loads(file.read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            before = digest
        if before != digest:
            logger.warning("%s is not what this run began with.", record["path"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n")

    def _of_task(self, task: str) -> Sequence[int]:
        return self._by_task.get(task, ())

    @cached_property
    def _by_task(self) -> dict[str, tuple[int, ...]]:
        return {
            task: tuple(i for i, item in enumerate(self.items) if item.task == task)
            for task in TASKS
        }

    @lru_cache(maxsize=64)  # noqa: B019 (as long-lived as the run)
    def _of_size(self, stage: int, task: str, size: Size) -> tuple[int, ...]:
        return tuple(i for i in self._of_stage(stage, task) if self._size(stage, i) == size)

    @lru_cache(maxsize=64)  # noqa: B019
    def _of_stage(self, stage: int, task: str) -> tuple[int, ...]:
        """What a stage learns from of a task."""
        rules = self.recipe.stages[stage]
        return tuple(i for i in self._of_task(task) if _trains(rules, self.items[i], self.sizes[i]))

    def _size(self, stage: int, number: int) -> Size:
        """At which a stage trains item `number`."""
        return nearest_size(self.sizes[number], self.recipe.stages[stage].size, self.multiple)

    def _at(self, these: Sequence[int], place: int) -> int:
        """Which of them is at a place of the run: every epoch has an order of its own."""
        epoch, inside = divmod(place, len(these))
        return these[int(_order(self.recipe.seed, len(these), epoch)[inside])]

    def _sample(self, stage: int, these: Sequence[int], index: int) -> tuple[Pictured, int]:
        """Which of these items is at a place of the run, and how many before it could not be
        read."""
        failed = 0
        for number in self._tried(these, index):
            try:
                sample = self._pictured(number, self._size(stage, number))
                return mirrored(sample) if self._flips(index) else sample, failed
            except (InputError, OSError) as error:
                failed += 1
                item = self.items[number]
                if item.name not in self._named:
                    self._named.add(item.name)
                    logger.warning("%s is left out: %s", item.name, _why(error))
        raise InputError(
            f"of {len(these)} pictures of {self.dataset.path} that a step may show, none can be "
            "read any more.",
            "See what was left out above.",
        )

    def _flips(self, index: int) -> bool:
        dice = generator(self.recipe.seed, Stream.FLIP, index)
        return self.recipe.data.flip and dice.random() < 0.5

    def _tried(self, these: Sequence[int], index: int) -> Iterator[int]:
        """The item at a place, then others of its kind: drawn, and in the end each of them."""
        for draw in range(4):
            yield self._at(these, index + draw * REDRAW)
        yield from these

    def _pictured(self, number: int, size: Size) -> Pictured:
        item = self.items[number]
        if item.picture is None:
            black = np.broadcast_to(np.uint8(0), (size[1], size[0], 3))  # takes no memory
            return Pictured(item.task, "", black, answer=item.caption)
        kept = self._ready.get((number, size))
        if kept is None:
            pixels = np.asarray(fit(item.picture.picture(), size))
            pictures = [blob.picture() for blob in item.references]
            if item.task == "edit":
                pictures = [fit(picture, size) for picture in pictures]
            kept = (pixels, *map(np.asarray, pictures))
            self._ready.put((number, size), kept)
        seen = kept if item.task == "understanding" else kept[1:]
        return Pictured(item.task, item.caption, kept[0], seen, item.answer)


def _trains(stage: Stage, item: Item, size: Size) -> bool:
    """Whether a stage learns from an item whose picture, if it has one, is of `size`."""
    num_pixels = math.prod(size) if item.picture is not None else None
    return bool(stage.tasks.get(item.task)) and stage.filter.admits(item.caption, num_pixels)


class _Kept:
    """Pictures by key, the longest unused leaving first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.kept: OrderedDict[tuple[int, Size], tuple[np.ndarray, ...]] = OrderedDict()

    def get(self, key: tuple[int, Size]) -> tuple[np.ndarray, ...] | None:
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def put(self, key: tuple[int, Size], pictures: tuple[np.ndarray, ...]) -> None:
        self.kept[key] = pictures
        self.num_bytes += sum(picture.nbytes for picture in pictures)
        while self.num_bytes > self.max_bytes:
            _, gone = self.kept.popitem(last=False)
            self.num_bytes -= sum(picture.nbytes for picture in gone)


@lru_cache(maxsize=16)
def _order(seed: int, count: int, epoch: int) -> np.ndarray:
    return generator(seed, Stream.ORDER, epoch).permutation(count)


@lru_cache(maxsize=32)
def training_sizes(side: int, multiple: int) -> tuple[Size, ...]:
    """The sizes of a stage: at most side² pixels, sides in steps of `multiple` or some of it."""
    step = multiple * max(1, round(side / multiple / NUM_STEPS))
    sizes = []
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        if long <= MAX_ASPECT * short:
            sizes += [(long, short), (short, long)]
    return tuple(dict.fromkeys(sizes)) or ((side, side),)


@lru_cache(maxsize=4096)
def nearest_size(picture: Size, side: int, multiple: int) -> Size:
    """The size of a stage whose aspect is nearest to the picture's; of equals the largest."""
    aspect = math.log(picture[0] / picture[1])

    def distance(size: Size) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - aspect), 6), -size[0] * size[1]

    return min(training_sizes(side, multiple), key=distance)


def fit(picture: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture, scaled to `size`: all of one of its sides is seen."""
    if picture.size == size:
        return picture
    width, height = size
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    scaled = (
        max(round(picture.width * scale), width),
        max(round(picture.height * scale), height),
    )
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + width, top + height))


def mirrored(sample: Pictured) -> Pictured:
    """The sample with all its pictures mirrored; as it is where its words tell sides."""
    words = f"{sample.prompt} {sample.answer}".lower()
    if sample.task == "language" or _SIDES & set(re.findall(r"[\w-]+", words)):
        return sample
    return replace(
        sample,
        pixels=np.ascontiguousarray(sample.pixels[:, ::-1]),
        references=tuple(np.ascontiguousarray(p[:, ::-1]) for p in sample.references),
    )


def _why(error: Exception) -> str:
    if isinstance(error, InputError):
        return f"{error.problem} {error.remedy}".strip()
    told = getattr(error, "strerror", None) or str(error)
    return f"it cannot be read ({' '.join(told.split())})."
