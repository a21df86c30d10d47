"""`run`: start a recipe's processes, pass signals on to them, report how they ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hidream.errors import HidreamError, InputError, UsageError
from hidream.train.config import Recipe, load_recipe
from hidream.train.layout import layout_of
from hidream.train.track import tracker

logger = logging.getLogger(__name__)

INTERRUPTED = 130

TCMALLOC_PLACES = (
    "/usr/lib/*/libtcmalloc_minimal.so.4",
    "/usr/lib/libtcmalloc_minimal.so.4",
    "/usr/lib64/libtcmalloc_minimal.so.4",
)


def run(recipe_path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> int:
    """Train the recipe to its end and export the model. 0 when done, 130 when interrupted.

    `resume` continues from the run's latest checkpoint; without it, a run folder that already
    holds checkpoints is refused. SIGINT and SIGTERM end the step, save a checkpoint, and return
    130. Raises UsageError, InputError, or HidreamError for a process that failed.
    """
    recipe = load_recipe(recipe_path, overrides)
    if recipe.processes > 1 and recipe.device != "cpu":
        raise UsageError(
            f'processes = {recipe.processes} needs device = "cpu".',
            "On GPUs, start them with torchrun: torchrun --nproc-per-node N -m hidream train ...",
        )
    check(recipe)
    layout = layout_of(recipe.parallel, recipe.processes)
    if max(layout.sp, layout.tp) > 1:
        from hidream.train.learner import learner_of
        from hidream.train.parallel import check_divisible

        check_divisible(layout, learner_of(recipe))
    with tracker(recipe.report_to, recipe.run_dir, recipe.name, {}):
        pass  # what is not installed is told before anything is written
    refuse_second_run(recipe, resume)
    write_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="hidream-train-") as meeting:
        children = [
            subprocess.Popen(
                worker_command(recipe, rank, Path(meeting) / "store", resume),
                env=worker_environment(recipe),
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on, once
            )
            for rank in range(recipe.processes)
        ]
        return _wait(children)


def refuse_second_run(recipe: Recipe, resume: bool) -> None:
    """UsageError where the run's folder holds a run already, which is not to be resumed."""
    runs = [r for r in (recipe.before, recipe) if r is not None]
    started = any((r.run_dir / "checkpoints" / "latest").exists() for r in runs)
    if started and not resume:
        raise UsageError(
            f"{recipe.run_dir} already holds a run.",
            "Continue it with --resume, or give another folder with out=FOLDER.",
        )


def write_recipe(recipe: Recipe) -> None:
    """Note the recipe in the run's folder."""
    try:
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        (recipe.run_dir / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1))
    except OSError as error:
        raise InputError(
            f"the run's folder {recipe.run_dir} cannot be written: {error.strerror}.",
            "Give another one: out=FOLDER.",
        ) from error


def check(recipe: Recipe) -> None:
    """What a recipe can be told before any process starts: whether its device is here, and all
    that `check_files` says."""
    from hidream.pipelines.devices import find_device

    try:
        find_device(recipe.device)
    except UsageError as error:
        raise UsageError(error.problem, "Set device=cpu, or one that is here.") from error
    check_files(recipe)


def check_files(recipe: Recipe) -> None:
    """UsageError or InputError where the recipe does not fit its model, `init` or dataset."""
    from hidream.train.learner import class_of

    for one in (recipe.before, recipe):
        if one is not None:
            class_of(one).check(one)
    if recipe.data.path:
        check_data(recipe)


def check_data(recipe: Recipe) -> None:
    """Say what the recipe's dataset is; InputError with all that is wrong with it."""
    from hidream.train.learner import class_of

    data = class_of(recipe).open_data(recipe, unpack=recipe.data.check)
    if data is not None:
        for line in (data.summary, *data.notes):
            logger.info("%s", line)


def worker_command(recipe: Recipe, rank: int, store: Path, resume: bool) -> list[str]:
    """The command line of process `rank`."""
    command = [sys.executable, "-m", "hidream.train.worker", str(recipe.run_dir / "recipe.json")]
    command += ["--rank", str(rank), "--store", str(store)]
    return command + (["--resume"] if resume else [])


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """This process's environment with what makes small CPU training fast.

    Threads that wait must sleep, not spin (5 times faster on a busy machine), and tcmalloc, where
    it is installed, saves up to a quarter of the time. Both must be set before a process starts.
    """
    environment = dict(os.environ)
    if recipe.device != "cpu":
        return environment
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    preloaded = environment.get("LD_PRELOAD", "")
    found = find_tcmalloc()
    if found and "malloc" not in preloaded:
        environment["LD_PRELOAD"] = f"{found} {preloaded}".strip()
    if "malloc" not in environment.get("LD_PRELOAD", ""):
        logger.info("tcmalloc is not installed: training runs, up to a quarter slower.")
    return environment


def find_tcmalloc() -> str | None:
    """Path of the tcmalloc library, if this machine has it (Debian: libtcmalloc-minimal4)."""
    for pattern in TCMALLOC_PLACES:
        found = sorted(Path("/").glob(pattern.lstrip("/")))
        if found:
            return str(found[0])
    return None


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        codes: list[int] = []
        while len(codes) < len(children):
            codes = [code for child in children if (code := _poll(child)) is not None]
            if any(code not in (0, INTERRUPTED) for code in codes):
                break  # the others would wait for it for ever
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=60)
        for number, handler in before.items():
            signal.signal(number, handler)
    worst = max(codes, key=lambda code: (code not in (0, INTERRUPTED), code))
    if worst not in (0, INTERRUPTED):
        error = HidreamError(
            f"a training process ended with exit code {worst}.", "Its own message is above."
        )
        if 0 < worst <= 5:
            error.exit_code = worst
        raise error
    return worst


def _poll(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(timeout=0.1)
    except subprocess.TimeoutExpired:
        return None
