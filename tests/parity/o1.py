"""Parity with the published O1 code: `python -m tests.parity.o1 DIR` prints a JSON line a case.

DIR has the format of shared/parity/o1. Everything starts from its pictures and prompts; only the
initial noise and the flash sampler's noise are taken from the stored tensors.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hidream.models.o1.batch import collate
from hidream.models.o1.model import O1
from hidream.models.o1.patches import to_picture, unpatchify
from hidream.models.o1.tokens import UNCONDITIONAL_PROMPT, Tokenizer, Tokens, encode, text_positions
from hidream.models.o1.weights import load_o1
from hidream.pictures import read_picture
from hidream.sampling import cfg, dev_sigmas, euler, flash, full_sigmas, unipc


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def run_case(
    model: O1, tokenizer: Tokenizer, folder: Path, name: str, case: dict[str, Any]
) -> dict:
    """One request through our code, compared with what the reference code made of it."""
    want = load_file(folder / f"{name}.safetensors")
    config, size = model.config, {"width": case["width"], "height": case["height"]}
    num_pictures = case["num_refs"]
    references = [read_picture(folder / f"ref{i}.png") for i in range(num_pictures)]
    boxes = published_boxes(case.get("layout_bboxes") or [])
    prompts = [case["prompt"]]
    if case["guidance_scale"] > 1:
        prompts.append(UNCONDITIONAL_PROMPT)
    branches = [
        encode(tokenizer, config, prompt, references=references, layout=boxes, **size)
        for prompt in prompts
    ]

    prefixes = [model.prefill([tokens]) for tokens in branches]
    z0, sigmas, sampler = want["z0"], _sigmas(case), case.get("scheduler_name", "unipc")

    def velocity(prefix):
        return lambda x_t, sigma: model.velocity(x_t, sigma, prefix)

    denoise = velocity(prefixes[0])
    if len(prefixes) > 1:
        denoise = cfg(denoise, velocity(prefixes[1]), case["guidance_scale"])
    if sampler == "flash":
        z = flash(
            denoise,
            z0,
            sigmas,
            noise=lambda step: want["step_noise"][step],
            noise_scale=(case["noise_scale_start"], case["noise_scale_end"]),
            noise_clip_std=case["noise_clip_std"],
        )
    else:
        z = {"unipc": unipc, "flow_match": euler}[sampler](denoise, z0, sigmas)
    picture = to_picture(unpatchify(z[0], branches[0].grid, config.patch_size))

    x_pred = _generated(model, branches[0], z0, want)
    theirs = want["image"].numpy().astype(int)
    return {
        "case": name,
        "ids_equal": all(_ids_equal(t, tokenizer, want, i) for i, t in enumerate(branches)),
        "positions_equal": all(
            torch.equal(t.position_ids, want[f"branch{i}_position_ids"][:, 0])
            for i, t in enumerate(branches)
        ),
        "kinds_equal": all(_kinds_equal(t, want, i) for i, t in enumerate(branches)),
        "refs_equal": _references_equal(branches[0], want),
        "x_pred_rel": relative(x_pred, want["x_pred_step0"]),
        "z_final_rel": relative(z, want["z_final"]),
        "image_max_diff": int(np.abs(np.array(picture).astype(int) - theirs).max()),
    }


def published_boxes(layout: Any) -> list[tuple[float, ...]]:
    """Boxes as the reference code reads them: it sorts and clamps what our requests refuse."""
    layout = ast.literal_eval(layout) if isinstance(layout, str) else layout
    if isinstance(layout, dict):
        keys = ("layout_bboxes", "bboxes", "boxes", "bbox_list")
        layout = next(layout[key] for key in keys if key in layout)
    boxes = []
    for box in layout:
        if isinstance(box, dict):
            box = box.get("bbox", box.get("box"))
        scale = 1 if max(box) <= 1 else 100
        x1, x2, y1, y2 = (min(max(value / scale, 0.0), 1.0) for value in box)
        boxes.append((min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)))
    return boxes


def _sigmas(case: dict[str, Any]) -> Tensor:
    if case.get("scheduler_name") in ("flash", "flow_match"):
        return dev_sigmas()
    return full_sigmas(case["num_inference_steps"], case["shift"])


def _generated(model: O1, tokens: Tokens, z0: Tensor, want: dict[str, Tensor]) -> Tensor:
    """The first step's output at the target *and* the references, where the fixture has it.

    A step computes the target rows alone; the whole sequence gives the others.
    """
    t = want["timestep_step0"]
    a = len(tokens.input_ids)
    batch = collate([tokens])
    hidden: list[Tensor] = []
    handle = model.model.language_model.register_forward_hook(
        lambda module, inputs, output: hidden.append(output)
    )
    model(batch, z0[0], 1 - t)
    handle.remove()
    whole = model.model.final_layer2(hidden[0][a + 1 :])
    prefix = model.prefill([tokens])
    step = model.predict_x0(z0, 1 - t[0], prefix)[0]
    return torch.cat([step, whole[len(step) :]])


def _ids_equal(tokens: Tokens, tokenizer: Tokenizer, want: dict[str, Tensor], branch: int) -> bool:
    ids = [*tokens.input_ids.tolist(), tokenizer.special["<|tms_token|>"]]
    return ids == want[f"branch{branch}_input_ids"][0].tolist()


def _kinds_equal(tokens: Tokens, want: dict[str, Tensor], branch: int) -> bool:
    """Which tokens are generated, which of them are patches, and the vision tower's grids."""
    a = len(tokens.input_ids)
    kinds = torch.arange(tokens.position_ids.shape[1]) >= a
    patches = torch.arange(len(kinds)) > a
    grids = want.get(f"branch{branch}_image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
    return (
        torch.equal(kinds.long(), want[f"branch{branch}_token_types"][0].long())
        and torch.equal(patches, want[f"branch{branch}_vinput_mask"][0])
        and [(1, *grid) for grid in tokens.image_grids] == [tuple(g) for g in grids.tolist()]
    )


def _references_equal(tokens: Tokens, want: dict[str, Tensor]) -> bool:
    if "ref_patches" not in want:
        return len(tokens.references) == 0
    equal = torch.equal(tokens.references, want["ref_patches"][0])
    if "pixel_values" in want:
        equal = equal and torch.equal(tokens.pixel_values, want["pixel_values"])
    return equal


def run_language(model: O1, folder: Path) -> dict[str, Any]:
    """Logits of plain causal text."""
    want = load_file(folder / "lm.safetensors")
    rows = []
    for ids in want["input_ids"]:
        tokens = text_tokens(model, ids)
        logits = model(collate([tokens])).logits
        assert logits is not None
        rows.append(logits)
    return {"case": "lm", "logits_rel": relative(torch.stack(rows), want["logits"])}


def text_tokens(model: O1, ids: Tensor) -> Tokens:
    """Tokens of a text alone."""
    slots = torch.zeros(len(ids), dtype=torch.bool)
    return Tokens(
        input_ids=ids,
        position_ids=text_positions(slots, [], num_after=1),
        references=torch.zeros(0, model.config.patch_dim),
        image_slots=slots,
        pixel_values=torch.zeros(0, model.config.vision.patch_dim),
        image_grids=(),
        grid=(0, 0),
        caption=slice(0, len(ids)),
    )


@torch.inference_mode()
def run(folder: Path) -> Iterator[dict[str, Any]]:
    model, tokenizer = load_o1(folder)
    for name, case in json.loads((folder / "cases.json").read_text())["cases"].items():
        yield run_case(model, tokenizer, folder, name, case)
    if (folder / "lm.safetensors").is_file():
        yield run_language(model, folder)


if __name__ == "__main__":
    for line in run(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
