"""The world's judge: whether a picture shows what a sample's prompt asks for, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from hidream.judges.finding import Finding, Found, find
from hidream.judges.layouts import LEAST_IOU, box_overlaps
from hidream.judges.shots import ShotFinding, find_shot
from hidream.world.panels import cut_panels
from hidream.world.sample import Claim, Sample
from hidream.world.scene import Object, holds, size_name

JUDGE_VERSION = "2.0"
IN_PLACE = 0.08  # how far an untouched object of an edit may have moved


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a picture is right, why not, and what was found in it; of a layout, the overlap of
    each asked box with its subject's (intersection over union)."""

    right: bool
    reasons: tuple[str, ...]
    overlaps: tuple[float, ...] = ()
    finding: Finding | ShotFinding | tuple[Finding, ...] = field(repr=False)


def judge(picture: Image.Image | np.ndarray, sample: Sample) -> Verdict:
    """Whether the picture shows what the sample's prompt asks for, and nothing else."""
    if sample.panels:
        return _judge_panels(picture, sample)
    if sample.scene.camera is not None:
        return _judge_shot(find_shot(picture), sample)
    finding = find(picture)
    reasons = list(finding.faults)
    check = _check_edit if sample.task == "edit" else _check_claims
    reasons += check(finding, sample)
    allowed = [[_fulfils(o, c) for o in finding.objects] for c in sample.claims.objects]
    overlaps = tuple(box_overlaps(finding.objects, sample.layout, allowed)) if sample.layout else ()
    if any(overlap < LEAST_IOU for overlap in overlaps):
        reasons.append(f"box overlaps {', '.join(f'{overlap:.2f}' for overlap in overlaps)}")
    return Verdict(right=not reasons, reasons=tuple(reasons), overlaps=overlaps, finding=finding)


def _judge_panels(picture: Image.Image | np.ndarray, sample: Sample) -> Verdict:
    """Every panel as its words say, and the subject in one colour in all."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    cut = cut_panels(image, len(sample.panels), sample.columns)
    verdicts = [judge(one, panel) for one, panel in zip(cut, sample.panels, strict=True)]
    reasons = [f"panel {n}: {why}" for n, v in enumerate(verdicts, 1) for why in v.reasons]
    findings = tuple(v.finding for v in verdicts if isinstance(v.finding, Finding))
    kind = sample.claims.objects[0].kind
    colors = {o.color for finding in findings for o in finding.objects if o.kind == kind}
    if len(colors) > 1:
        reasons.append(f"the {kind} is {', '.join(sorted(colors))}")
    return Verdict(right=not reasons, reasons=tuple(reasons), finding=findings)


def _judge_shot(finding: ShotFinding, sample: Sample) -> Verdict:
    """The figure claimed, seen as claimed."""
    claims, reasons = sample.claims, list(finding.faults)
    (claim,) = claims.objects
    if finding.kind != claim.kind or claim.color not in ("", finding.color):
        reasons.append(f"found {finding.color} {finding.kind}")
    for name, value in claims.camera.items():
        seen = getattr(finding.camera, name)
        if seen != value:
            reasons.append(f"{name} {seen}, not {value}")
    if claims.background not in ("", finding.background):
        reasons.append(f"background {finding.background}, not {claims.background}")
    return Verdict(right=not reasons, reasons=tuple(reasons), finding=finding)


def _fulfils(found: Found, claim: Claim) -> bool:
    """Whether an object is as the prompt says; what it leaves unsaid is free."""
    if found.kind != claim.kind or (claim.word and found.word != claim.word):
        return False
    if claim.size and size_name(found.size) != claim.size:
        return False
    if claim.pattern:
        return found.pattern == claim.pattern and _same_pair(found, claim)
    return not found.pattern and (not claim.color or found.color == claim.color)


def _same_pair(found: Found, claim: Claim) -> bool:
    """The texture's two colours; which is which matters for dots and halves only."""
    pair = (found.color, found.color2)
    wanted = (claim.color, claim.color2)
    return pair == wanted or (claim.pattern not in ("dots", "halves") and pair[::-1] == wanted)


def _assign(allowed: list[list[bool]]) -> list[list[int]]:
    """Every way to give each row its own column: few objects, so plain enumeration."""
    ways: list[list[int]] = [[]]
    for row in allowed:
        ways = [[*w, j] for w in ways for j, ok in enumerate(row) if ok and j not in w]
    return ways


def _check_claims(finding: Finding, sample: Sample) -> list[str]:
    """Exactly the objects claimed, each as claimed, standing as claimed."""
    claims, objects = sample.claims, finding.objects
    reasons = []
    if claims.background and finding.background != claims.background:
        reasons.append(f"background {finding.background}, not {claims.background}")
    if len(objects) != len(claims.objects):
        return [*reasons, f"{len(objects)} objects, not {len(claims.objects)}: {_list(objects)}"]
    ways = _assign([[_fulfils(o, c) for o in objects] for c in claims.objects])
    if not ways:
        return [*reasons, f"found {_list(objects)}"]
    boxes = [o.box for o in objects]
    if not any(
        all(holds(relation, boxes[way[i]], boxes[way[j]]) for i, relation, j in claims.relations)
        for way in ways
    ):
        reasons.append("the objects do not stand as asked")
    return reasons


def _check_edit(finding: Finding, sample: Sample) -> list[str]:
    """The change asked for happened, and all else is as it was: objects, places, background."""
    assert sample.source is not None
    reasons = []
    if finding.background != sample.scene.background:
        reasons.append(f"background {finding.background}, not {sample.scene.background}")
    objects, wanted = finding.objects, sample.scene.objects
    if len(objects) != len(wanted):
        return [*reasons, f"{len(objects)} objects, not {len(wanted)}: {_list(objects)}"]
    allowed = []
    for i, (claim, truth) in enumerate(zip(sample.claims.objects, wanted, strict=True)):
        touched = i in sample.changed
        allowed.append([_fulfils(o, claim) and _stands(o, truth, sample, touched) for o in objects])
    ways = _assign(allowed)
    if not ways:
        return [*reasons, f"found {_list(objects)}"]
    if not any(
        all(
            holds(relation, objects[way[i]].box, objects[way[j]].box)
            for i, relation, j in sample.claims.relations
        )
        for way in ways
    ):
        reasons.append("what was added does not stand as asked")
    return reasons


def _stands(found: Found, truth: Object, sample: Sample, touched: bool) -> bool:
    """Whether an object is where it has to be after the edit."""
    if touched and sample.edit == "add":
        return True  # anywhere, or where its relation says
    reach = 2 * IN_PLACE if touched and sample.edit == "move" else IN_PLACE
    if touched and sample.edit == "word":
        return abs(found.y - truth.y) < reach + 0.03
    return abs(found.x - truth.x) < reach and abs(found.y - truth.y) < reach


def _list(objects: tuple[Found, ...]) -> str:
    """The objects in words, for a verdict's reasons."""
    if not objects:
        return "nothing"
    named = []
    for o in objects:
        texture = f" {o.pattern} {o.color2}" if o.pattern else ""
        named.append(f"{o.color}{texture} {o.kind}" + (f' "{o.word}"' if o.word else ""))
    return ", ".join(named)
