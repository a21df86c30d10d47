"""From requests to pictures and texts: `load` a model, call it."""

from hidream.pipelines.base import Output, Pipeline
from hidream.pipelines.diffusers_style import HiDreamPipeline, Outputs
from hidream.pipelines.loading import load
from hidream.pipelines.text import TextOutput

__all__ = ["HiDreamPipeline", "Output", "Outputs", "Pipeline", "TextOutput", "load"]
