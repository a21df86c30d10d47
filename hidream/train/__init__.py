"""Training: a recipe in, a run folder with checkpoints, log, grids and the exported model out."""

from hidream.train.config import Recipe, load_recipe, parse_recipe
from hidream.train.launch import run

__all__ = ["Recipe", "load_recipe", "parse_recipe", "run"]
