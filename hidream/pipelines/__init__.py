"""From requests to pictures: `load` a model, call it."""

from hidream.pipelines.diffusers_style import HiDreamPipeline
from hidream.pipelines.pipeline import Output, Pipeline, load

__all__ = ["HiDreamPipeline", "Output", "Pipeline", "load"]
