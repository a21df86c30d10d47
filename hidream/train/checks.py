"""What no recipe may say, whatever its files and machine: a fault is one line, naming its key."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from hidream.errors import UsageError
from hidream.train.filter import check_filter
from hidream.train.layout import check_batches, check_parallel, layout_of
from hidream.train.objective import Objective
from hidream.train.track import TRACKERS
from hidream.world.tasks import CATEGORIES, SUBJECTS, TASKS, TEXT_TASKS
from hidream.world.text_to_image import PLANS

if TYPE_CHECKING:
    from hidream.train.config import Recipe, Stage

PRECISIONS = ("float32", "bfloat16", "float16")
LORA_KEYS = ("diffusers", "comfyui")
DEVICE = re.compile(r"(cpu|mps|cuda(:\d+)?)")
#: What validation draws: one square picture a scene.
SQUARE = tuple(name for name in CATEGORIES if name != "storyboards")
OF_WORDS = tuple(name for name in SQUARE if name not in ("edits", *SUBJECTS))


def check_recipe(recipe: Recipe) -> None:
    """Raise UsageError naming the first value that is wrong, or that does not go with another.

    A stage's objective is checked where it is read (`hidream.train.objective`).
    """
    require(len(recipe.stages) > 0, "the recipe has no [[stages]].")
    _check_run(recipe)
    check_parallel(
        recipe.parallel, muon=recipe.optimizer.muon > 0, float16=recipe.precision == "float16"
    )
    _check_optimizer(recipe)
    _check_lora(recipe)
    _check_data(recipe)
    _check_validation(recipe)
    named = [(f"stages.{i}", stage) for i, stage in enumerate(recipe.stages)]
    named += [(f"vae.stages.{i}", stage) for i, stage in enumerate(recipe.vae.stages)]
    for where, stage in named:
        _check_stage(recipe, where, stage)
        _check_mixture(recipe, where, stage)
    for number in range(len(recipe.stages)):
        _check_losses(recipe, number)
    if recipe.processes > 1:  # else, the group that starts the run says how many there are
        layout = layout_of(recipe.parallel, recipe.processes)
        sizes = {f"{where}.batch_size": stage.batch_size for where, stage in named}
        check_batches(layout, sizes, recipe.accumulate)


def check_sizes(recipe: Recipe, multiple: int) -> None:
    """UsageError unless every stage's size is one of `multiple` pixels."""
    for number, stage in enumerate(recipe.stages):
        require(
            stage.size % multiple == 0,
            f"stages.{number}.size = {stage.size} must be a multiple of {multiple}, the side of "
            f"{recipe.model}'s patches.",
        )


def require(holds: bool, problem: str, remedy: str = "") -> None:
    """UsageError unless it holds."""
    if not holds:
        raise UsageError(problem, remedy)


def _check_run(recipe: Recipe) -> None:
    for key in ("max_text", "accumulate", "processes", "num_tokens"):
        require(getattr(recipe, key) >= 1, f"{key} = {getattr(recipe, key)} must be at least 1.")
    for key in ("log_every", "checkpoint_every", "keep_checkpoints", "grid_every", "prefetch"):
        require(getattr(recipe, key) >= 0, f"{key} = {getattr(recipe, key)} must be 0 or more.")
    for key, known in (("precision", PRECISIONS), ("report_to", TRACKERS)):
        value = getattr(recipe, key)
        require(value in known, f'{key} = "{value}" must be one of {", ".join(known)}.')
    require(
        DEVICE.fullmatch(recipe.device) is not None,
        f'device = "{recipe.device}" must be cpu, cuda, cuda:N or mps.',
    )
    require(0 <= recipe.seed < 2**31, f"seed = {recipe.seed} must lie in 0 … 2^31 - 1.")


def _check_optimizer(recipe: Recipe) -> None:
    options = recipe.optimizer
    for key in ("muon", "eps", "weight_decay", "clip"):
        value = getattr(options, key)
        require(value >= 0, f"optimizer.{key} = {value} must be 0 or more.")
    require(
        0 <= options.ema_decay < 1,
        f"optimizer.ema_decay = {options.ema_decay} must be at least 0 and less than 1.",
    )
    require(
        all(0 <= beta < 1 for beta in options.betas),
        f"optimizer.betas = {list(options.betas)} must be at least 0 and less than 1.",
    )


def _check_lora(recipe: Recipe) -> None:
    lora = recipe.lora
    require(
        lora.rank >= 0 and lora.alpha >= 0 and 0 <= lora.dropout < 1,
        "lora.rank and lora.alpha must not be negative, and lora.dropout must lie in 0 … 1.",
    )
    dtypes = ("dtype", PRECISIONS), ("frozen_dtype", PRECISIONS[:2])
    for key, known in (("keys", ("", *LORA_KEYS)), *dtypes):
        value, told = getattr(lora, key), ", ".join(filter(None, known))
        require(value in known, f'lora.{key} = "{value}" must be one of {told}.')
    if lora.rank == 0:
        return
    require(
        not (recipe.parallel.shards_weights or recipe.parallel.sp > 1),
        "a LoRA is trained with [parallel] replicate alone: what is frozen is whole everywhere.",
    )
    require(
        lora.frozen_dtype == "float32" or recipe.precision == "bfloat16",
        f'lora.frozen_dtype = "{lora.frozen_dtype}" goes with precision = "bfloat16".',
    )
    require(bool(recipe.init), "lora.rank needs the model that the LoRA is for: init = FOLDER.")
    require(
        recipe.optimizer.muon == 0,
        f"optimizer.muon = {recipe.optimizer.muon} goes with whole matrices, and lora.rank with "
        "AdamW alone.",
        "Set optimizer.muon=0.",
    )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    require(0 <= data.world < 1, f"data.world = {data.world} must be at least 0 and less than 1.")
    require(
        bool(data.path) or data.world == 0,
        f"data.world = {data.world} is a share beside pictures of your own: name them, "
        "data=FOLDER.",
    )


def _check_stage(recipe: Recipe, where: str, stage: Stage) -> None:
    require(stage.steps >= 1, f"{where}.steps = {stage.steps} must be at least 1.")
    require(stage.size >= 1, f"{where}.size = {stage.size} must be positive.")
    require(stage.batch_size >= 1, f"{where}.batch_size = {stage.batch_size} must be at least 1.")
    require(stage.learning_rate > 0, f"{where}.learning_rate must be positive.")
    require(stage.final_rate >= 0, f"{where}.final_rate must be 0 or more.")
    require(
        min(stage.warmup, stage.decay) >= 0 and stage.warmup + stage.decay <= stage.steps,
        f"{where}: warmup + decay must fit into its {stage.steps} steps.",
    )
    check_filter(stage.filter, f"{where}.filter")
    require(
        0 <= stage.sparsity < 1, f"{where}.sparsity = {stage.sparsity} must lie in 0 … below 1."
    )
    require(
        stage.sparsity == 0 or (recipe.family == "o1" and not recipe.compile),
        f"{where}.sparsity = {stage.sparsity} goes with an O1 and compile = false.",
    )
    require(
        stage.sparsity == 0 or recipe.parallel.sp == recipe.parallel.tp == 1,
        f"{where}.sparsity = {stage.sparsity} goes with parallel.sp = 1 and parallel.tp = 1.",
    )


def _check_mixture(recipe: Recipe, where: str, stage: Stage) -> None:
    require(
        stage.tasks.get("subject", 0) > 0 or not any(map(stage.categories.get, SUBJECTS)),
        f"{where}.categories names {' or '.join(SUBJECTS)}, but {where}.tasks no subject.",
    )
    for table, known in (("tasks", TASKS), ("categories", (*PLANS, *SUBJECTS))):
        weights = getattr(stage, table)
        for key, weight in weights.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise UsageError(f'unknown key "{where}.{table}.{key}"; did you mean "{near}"?')
            require(weight >= 0, f"{where}.{table}.{key} = {weight} must not be negative.")
        required = (table == "tasks" and recipe.family != "hidit") or weights
        require(
            not required or sum(weights.values()) > 0,
            f"{where}.{table} names nothing with a weight.",
        )


def _check_losses(recipe: Recipe, number: int) -> None:
    objective, usual = recipe.objective_of(number), Objective().reference_dropout
    spoken = [task for task in TEXT_TASKS if recipe.stages[number].tasks.get(task, 0) > 0]
    require(
        not spoken or objective.lm_weight > 0,
        f"stages.{number}.tasks has {' and '.join(spoken)}: its lm_weight must be above 0.",
    )
    require(
        recipe.family != "o1"
        or objective.reference_dropout <= max(objective.caption_dropout, usual),
        f"objective.reference_dropout = {objective.reference_dropout} must be at most "
        f"caption_dropout = {objective.caption_dropout}: an O1 loses its references only where it "
        "loses the caption, too.",
    )


def _check_validation(recipe: Recipe) -> None:
    options = recipe.validation
    if options.every == 0:
        return
    known = {"o1": SQUARE, "i1": OF_WORDS, "e1": ("edits",)}.get(recipe.family)
    if known is None:
        raise UsageError(
            f"{recipe.model} draws no scenes of the world.", "Leave validation.every at 0."
        )
    require(
        min(options.every, options.scenes, options.steps + 1) >= 1,
        f"validation.every = {options.every}, scenes = {options.scenes} and steps = "
        f"{options.steps} must be positive; steps may be 0.",
    )
    unknown = [name for name in options.categories if name not in known]
    require(
        not unknown and bool(options.categories),
        f"validation.categories = {list(options.categories)} must be some of {', '.join(known)}.",
    )
