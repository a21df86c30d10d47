"""Prompts as a person types them: lower case, few articles, lists with commas, a "pls"."""

from __future__ import annotations

from hidream.camera import CAMERA
from hidream.world import prompts
from hidream.world.prompts import Group
from hidream.world.scene import Dice

_OPENINGS = (
    "pic of {}",
    "picture of {}",
    "draw {}",
    "draw me {}",
    "i want {}",
    "show me {}",
    "can you draw {}",
    "give me {}",
    "photo of {}",
    "make {}",
)
_ENDINGS = (" pls", " please", " thanks", ", thx")
_SHORT_VIEWS: dict[str, tuple[str, ...]] = {
    "front": ("from the front", "front"),
    "side": ("from the side", "side"),
    "back": ("from behind", "from the back", "back"),
    "three-quarter": ("3/4 view", "three quarter view"),
}
_SHORT_ANGLES: dict[str, tuple[str, ...]] = {
    "high": ("high angle", "from a high angle"),
    "low": ("low angle", "from below"),
    "eye-level": ("eye level", "at eye level"),
    "birds-eye": ("from above", "birds eye view", "top down"),
}
_SHORT_SHOTS: dict[str, tuple[str, ...]] = {
    "extreme-full": ("extreme full shot", "very wide shot"),
    "full": ("full shot", "full body"),
    "medium-full": ("medium full shot", "medium long shot"),
    "medium": ("medium shot", "mid shot"),
    "medium-close-up": ("medium close up", "medium closeup"),
    "close-up": ("close up", "closeup"),
    "extreme-close-up": ("extreme close up", "extreme closeup", "macro"),
}
SHORT = {"shot": _SHORT_SHOTS, "angle": _SHORT_ANGLES, "view": _SHORT_VIEWS}


def request_of(dice: Dice, text: str) -> str:
    """The text as somebody asks for it: bare, or "draw me …", often with thanks."""
    if dice.chance(0.5):
        text = dice.pick(_OPENINGS).format(text)
    return text + dice.pick(_ENDINGS) if dice.chance(0.2) else text


def typed_camera(dice: Dice, name: str, told: dict[str, str], place: str = "") -> str:
    """ "red car, side view, close-up": a name and what is told of its camera (field -> value)."""
    words = [
        dice.pick(SHORT[field][value]) if dice.chance(0.6) else CAMERA[field][value]
        for field, value in told.items()
    ]
    what = prompts.article(name) if dice.chance(0.3) else name
    parts = [what, *dice.some(words, len(words)), *([place] if place else [])]
    if len(parts) == 2 and parts[1].startswith(("from ", "at ")):
        return " ".join(parts)
    return ", ".join(parts)


def typed(dice: Dice, groups: tuple[Group, ...], relation: str = "") -> str:
    """Groups of objects, the first standing in `relation` to the second, as a person types them."""
    bare = dice.chance(0.6)
    things = [_thing(dice, group, bare) for group in groups]
    if relation:
        where = dice.pick(prompts.RELATION_PHRASES[relation])
        text = f"{things[0]} {where} {things[1]}"
    elif len(things) == 1 and bare and groups[0].color and groups[0].kind != "sign":
        text = dice.pick((things[0], things[0], f"{groups[0].kind}, {groups[0].color}"))
    else:
        text = dice.pick((" and ", " and ", ", ", " & ", " + ")).join(things)
    return request_of(dice, text)


def _thing(dice: Dice, group: Group, bare: bool) -> str:
    if group.kind == "sign":
        sign = f"{group.color} sign" if group.color else "sign"
        says = dice.pick(("saying {}", "that says {}", "with {}", "{}"))
        text = f"{sign} {says.format(prompts.quoted(group.word))}"
        return text if bare else prompts.article(text)
    if group.count > 1:
        number = str(group.count) if dice.chance(0.5) else prompts.NUMBERS[group.count]
        return f"{number} {prompts.name(group)}"
    return prompts.name(group) if bare else prompts.article(prompts.name(group))
