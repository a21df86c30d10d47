"""Storyboards: two to six panels that keep a subject, worded as `hidream storyboard` words them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hidream.sheet import Sheet
from hidream.storyboard import Panel, Script, sheet_prompt
from hidream.world import prompts
from hidream.world.build import Part, build_scene, claims_of
from hidream.world.prompts import Group
from hidream.world.sample import Sample
from hidream.world.scene import BACKGROUNDS, COLORS, KINDS, RELATIONS, SIZES, Dice

#: (panels, columns) -> how often. No side has more than three panels.
GRIDS: tuple[tuple[tuple[int, int], float], ...] = (
    ((2, 1), 0.12),
    ((2, 2), 0.12),
    ((3, 1), 0.1),
    ((3, 2), 0.06),
    ((3, 3), 0.1),
    ((4, 2), 0.26),
    ((5, 2), 0.05),
    ((5, 3), 0.05),
    ((6, 2), 0.07),
    ((6, 3), 0.07),
)
PANEL_KINDS = tuple(KINDS)


@dataclass(frozen=True)
class _Turn:
    """What a panel's words say beyond its subject; empty is unsaid."""

    background: str
    size: str
    company: Part | None
    relation: str


def storyboards(dice: Dice) -> Sample:
    """A sample of the category: its panels are samples too, each with its own words and claims."""
    number, columns = dice.weighted(GRIDS)
    kind, color = dice.pick(PANEL_KINDS), dice.pick(COLORS)
    subject = Part(kind=kind, color=color, say_color=dice.chance(0.85))
    told = dice.chance(0.5)  # of all panels at once
    panels: list[Sample] = []
    turns: set[tuple[str, ...]] = set()
    background = dice.pick(BACKGROUNDS)
    while len(panels) < number:
        turn = _turn(dice, subject)
        other = turn.company
        key = (turn.background, turn.size, other.kind + other.color if other else "", turn.relation)
        if key in turns:
            continue
        turns.add(key)
        background = turn.background or background
        panels.append(_panel(dice, subject, turn, background, introduced=told or bool(panels)))
    group = Group(kind=kind, color=color if subject.say_color else "")
    script = Script(
        panels=tuple(Panel(prompt=panel.prompt) for panel in panels),
        subject=prompts.article(prompts.name(group)) if told else None,
    )
    return Sample(
        task="text_to_image",
        category="storyboards",
        prompt=sheet_prompt(script, Sheet(number=number, columns=columns)),
        scene=panels[0].scene,
        claims=panels[0].claims,
        panels=tuple(panels),
        columns=columns,
    )


def _turn(dice: Dice, subject: Part) -> _Turn:
    while True:
        background = dice.pick(BACKGROUNDS) if dice.chance(0.6) else ""
        size = dice.pick(("small", "large")) if dice.chance(0.25) else ""
        company = None
        if dice.chance(0.45):
            kind = dice.pick([k for k in PANEL_KINDS if k != subject.kind])
            company = Part(kind=kind, color=dice.pick([c for c in COLORS if c != subject.color]))
        relation = dice.pick(RELATIONS) if company and dice.chance(0.6) else ""
        if background or size or company:
            return _Turn(background, size, company, relation)


def _panel(dice: Dice, subject: Part, turn: _Turn, background: str, *, introduced: bool) -> Sample:
    """One panel; of a subject that is `introduced`, the words say "the car" or "it"."""
    size = SIZES[turn.size or dice.pick(("medium", "large"))]
    parts: tuple[Part, ...] = (replace(subject, size=size, say_size=bool(turn.size)),)
    if turn.company:
        parts = (*parts, replace(turn.company, size=SIZES["medium"]))
    relations = ((0, turn.relation, 1),) if turn.relation else ()
    scene, pairs, sizes = build_scene(dice, parts, background, relations)
    groups = [part.group(size) for part, size in zip(parts, sizes, strict=True)]
    if introduced:
        groups[0] = replace(groups[0], noun=_again(dice, groups[0]))
    text = prompts.phrase(dice, groups[0])
    if turn.company:
        other = prompts.phrase(dice, groups[1])
        where = prompts.RELATION_PHRASES[turn.relation] if turn.relation else ("and", "with")
        text = f"{text} {dice.pick(where)} {other}"
    text = prompts.in_place(dice, text, turn.background)
    return Sample(
        task="text_to_image",
        category="panel",
        prompt=text,
        scene=scene,
        claims=claims_of(parts, sizes, pairs, turn.background),
    )


def _again(dice: Dice, group: Group) -> str:
    """The subject, once it was spoken of."""
    if group.color and dice.chance(0.4):
        return prompts.definite(group)
    if not group.size and dice.chance(0.3):
        return "it"
    return prompts.definite(replace(group, color=""))
