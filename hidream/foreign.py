"""The settings that other programs write into pictures: A1111's `parameters`, ComfyUI's graph.

All of it is a stranger's text: it is read within bounds, and what cannot be read is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

MAX_TEXT = 2**21  # characters of a text that is read
MAX_LINE = 100_000  # characters of A1111's line of settings
MAX_NODES = 10_000  # of ComfyUI's graph
SAMPLER_NAMES = {"euler": "Euler", "heun": "Heun", "unipc": "UniPC"}
NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'([A-Za-z][\w /-]{0,60}):\s*("(?:\\.|[^\\"]){0,2000}"|[^,]*)(?:,|$)')
# Where ComfyUI's nodes keep what a person wants to know.
_SETTINGS = {
    "seed": ("seed", "noise_seed"),
    "steps": ("steps",),
    "cfg": ("cfg", "guidance"),
    "sampler": ("sampler_name",),
    "scheduler": ("scheduler",),
    "denoise": ("denoise",),
    "width": ("width",),
    "height": ("height",),
    "model": ("ckpt_name", "unet_name", "model_name"),
    "lora": ("lora_name",),
}
_TEXTS = ("text", "prompt", "text_g", "t5xxl", "clip_l", "string", "value")


def write_parameters(note: Mapping[str, Any]) -> str:
    """A note of ours in A1111's form, as other programs read it; "" where it has no request."""
    request, model = note.get("request"), note.get("model") or {}
    if not isinstance(request, Mapping) or not request.get("prompt"):
        return ""
    sampler = request.get("sampler")
    settings = {
        "Steps": request.get("num_inference_steps"),
        "Sampler": SAMPLER_NAMES.get(str(sampler), sampler),
        "CFG scale": request.get("guidance_scale"),
        "Seed": request.get("seed"),
        "Size": f"{request.get('width')}x{request.get('height')}",
        "Model hash": str(model.get("digest") or "")[:10] or None,
        "Model": model.get("name"),
        "Denoising strength": request.get("strength"),
        "Shift": request.get("shift"),
        "Version": f"hidream {(note.get('versions') or {}).get('hidream', '')}".strip(),
    }
    lines = [request["prompt"]]
    if (request.get("negative_prompt") or "").strip():
        lines.append(f"{NEGATIVE} {request['negative_prompt']}")
    pairs = (f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    lines.append(", ".join(pairs))
    return "\n".join(lines).encode("utf-8", "replace").decode()


def read_parameters(text: str) -> dict[str, Any]:
    """A1111's text as `prompt`, `negative_prompt` and `settings` (text by name).

    Its last line holds the settings if it has at least three; what cannot be read is left as
    `problem`, a sentence.
    """
    if len(text) > MAX_TEXT:
        return {"problem": f"its parameters are too long to be read ({len(text)} characters)."}
    lines = text.strip().split("\n")
    pairs = _PAIR.findall(lines[-1]) if len(lines[-1]) <= MAX_LINE else []
    if len(pairs) >= 3:
        lines.pop()
    else:
        pairs = []
    cut = next((n for n, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[cut:]).removeprefix(NEGATIVE)
    return {
        "prompt": "\n".join(lines[:cut]).strip(),
        "negative_prompt": negative.strip(),
        "settings": {name.strip(): _unquoted(value.strip()) for name, value in pairs},
    }


def read_comfy(prompt: str | None, workflow: str | None) -> dict[str, Any]:
    """ComfyUI's graph as `prompt`, `negative_prompt`, `settings` and `num_nodes`.

    `prompt` is the graph as it was run, which tells settings by name; of `workflow`, the drawing
    of the graph, only the nodes' kinds are told. What cannot be read is left as `problem`.
    """
    text = prompt if prompt is not None else workflow or ""
    name = "prompt" if prompt is not None else "workflow"
    if len(text) > MAX_TEXT:
        return {"problem": f"its {name} is too long to be read ({len(text)} characters)."}
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return {"problem": f"its {name} is not readable JSON."}
    if not isinstance(graph, dict):
        return {"problem": f"its {name} is no graph."}
    if prompt is None:
        drawn = graph.get("nodes")
        kinds = [n.get("type") for n in drawn if isinstance(n, dict)] if _is_list(drawn) else []
        return {"num_nodes": len(kinds), "nodes": sorted({str(kind)[:100] for kind in kinds})[:100]}
    nodes = {
        key: node["inputs"]
        for key, node in list(graph.items())[:MAX_NODES]
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    if not nodes:
        return {"problem": "its prompt is no graph."}
    return {
        "prompt": _first_text(nodes, "positive", "conditioning"),
        "negative_prompt": _first_text(nodes, "negative"),
        "settings": dict(_comfy_settings(nodes)),
        "num_nodes": len(nodes),
    }


def _comfy_settings(nodes: Mapping[str, dict]) -> Iterator[tuple[str, Any]]:
    for name, keys in _SETTINGS.items():
        values = (inputs[key] for inputs in nodes.values() for key in keys if key in inputs)
        plain = (v for v in values if isinstance(v, str | int | float) and v != "")
        value = next(plain, None)
        if value is not None:
            yield name, value


def _first_text(nodes: Mapping[str, dict], *names: str) -> str:
    """The text at the end of the first link of such a name."""
    for name in names:
        for inputs in nodes.values():
            found = _text_behind(nodes, inputs.get(name))
            if found:
                return found
    return ""


def _text_behind(nodes: Mapping[str, dict], link: Any) -> str:
    """The nearest text that a link, `[node, output]`, leads to."""
    waiting: list[Any] = [link]
    seen: set[str] = set()
    while waiting and len(seen) < 100:
        link = waiting.pop(0)
        key = link[0] if _is_list(link) and len(link) == 2 else None
        if not isinstance(key, str) or key in seen or key not in nodes:
            continue
        seen.add(key)
        texts = (nodes[key].get(name) for name in _TEXTS)
        text = next((t for t in texts if isinstance(t, str) and t.strip()), "")
        if text:
            return text
        waiting += [value for value in nodes[key].values() if _is_list(value)][:100]
    return ""


def _is_list(value: object) -> TypeGuard[list]:
    return isinstance(value, list)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            pass
    return text
