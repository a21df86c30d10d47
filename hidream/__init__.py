"""HiDream's image generators as one library; importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CancelToken",
    "GenerateRequest",
    "HiDreamPipeline",
    "TextRequest",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from hidream.cancel import CancelToken
    from hidream.pipelines import HiDreamPipeline, load
    from hidream.request import GenerateRequest
    from hidream.text_request import TextRequest

_HOMES = {
    "CancelToken": "hidream.cancel",
    "load": "hidream.pipelines",
    "HiDreamPipeline": "hidream.pipelines",
    "GenerateRequest": "hidream.request",
    "TextRequest": "hidream.text_request",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first asked for."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hidream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
