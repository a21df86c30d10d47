"""Prompts written from what a scene is to show, in varied grammar."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hidream.world.scene import Dice

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {"fish": "fish"}
RELATION_PHRASES = {
    "left": ("left of", "to the left of", "on the left of", "left of"),
    "right": ("right of", "to the right of", "on the right of", "right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = {
    "studio": ("on a grey studio floor", "in a grey studio", "in a studio"),
    "wood": ("on a wooden table", "on a wooden table", "on a table"),
    "grass": ("on grass", "on the grass", "in a meadow"),
    "snow": ("in the snow", "on snow", "in the snow"),
    "night": ("at night", "at night", "on a dark night"),
    "beach": ("on the beach", "on a beach", "on the sand"),
}
PATTERN_WORDS = {
    "stripes": "striped",
    "bands": "banded",
    "dots": "dotted",
    "checks": "checked",
    "halves": "half-and-half",
}
STYLE_WORDS = {"white": "white", "wooden": "wooden"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some like objects, as a prompt speaks of them; empty `color` or `size` goes unsaid.

    `noun` stands in for the kind where the prompt says it otherwise ("the mug in the picture").
    """

    kind: str
    count: int = 1
    color: str = ""
    size: str = ""
    word: str = ""
    noun: str = ""


def plural(kind: str) -> str:
    return PLURALS.get(kind, kind + "s")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name(group: Group) -> str:
    """Adjectives and noun without article or number: "small red cubes"."""
    noun = group.kind if group.count == 1 else plural(group.kind)
    return " ".join(part for part in (group.size, group.color, noun) if part)


def phrase(dice: Dice, group: Group) -> str:
    """The group as a noun phrase: "a red cube", "three small stars", 'a sign that says "CAT"'."""
    if group.noun:
        return group.noun
    if group.kind == "sign":
        return _sign(dice, group)
    if group.count == 1:
        return "one " + name(group) if dice.chance(0.02) else article(name(group))
    number = str(group.count) if dice.chance(0.12) else NUMBERS[group.count]
    return f"{number} {name(group)}"


def definite(group: Group) -> str:
    """The group as one already spoken of: "the red cube"."""
    return group.noun or "the " + name(group)


def _sign(dice: Dice, group: Group) -> str:
    board = article((STYLE_WORDS[group.color] + " " if group.color else "") + "sign")
    says = dice.pick(
        (
            "that says {}",
            "that says {}",
            "saying {}",
            "with the word {}",
            "with the word {} on it",
            "that reads {}",
            "with the text {}",
        )
    )
    if " " in group.word:
        says = says.replace("the word ", "the words ")
    return f"{board} {says.format(quoted(group.word))}"


def quoted(word: str) -> str:
    return f'"{word}"'


def listing(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def related(dice: Dice, first: Group, relation: str, second: Group) -> str:
    """Two groups and where the first stands: "a red cube left of a blue sphere"."""
    a, b = phrase(dice, first), phrase(dice, second)
    style = dice.random()
    if style < 0.8:
        return f"{a} {dice.pick(RELATION_PHRASES[relation])} {b}"
    if style < 0.88:
        return f"{b} {dice.pick(RELATION_PHRASES[OPPOSITE[relation]])} {a}"
    if relation in ("left", "right"):
        if style < 0.94:
            return f"{a} on the {relation} and {b} on the {OPPOSITE[relation]}"
        return (
            f"{b} with {a} on its {relation}" if second.count == 1 else (f"{a} {relation} of {b}")
        )
    if style < 0.94:
        top, low = (a, b) if relation == "above" else (b, a)
        return f"{top} at the top and {low} at the bottom"
    return f"{b} with {a} {relation} it" if second.count == 1 else f"{a} {relation} {b}"


def opening(dice: Dice, text: str) -> str:
    """The text, often with "a photo of" or the like before it."""
    style = dice.random()
    if style < 0.34:
        return "a photo of " + text
    if style < 0.42:
        return dice.pick(("a picture of ", "an image of ", "a drawing of ")) + text
    return text


def in_place(dice: Dice, text: str, background: str) -> str:
    """The text with its background said; an empty background leaves the text alone."""
    if not background:
        return text
    place = dice.pick(PLACES[background])
    return f"{place}, {text}" if dice.chance(0.12) else f"{text} {place}"


def caption(
    dice: Dice,
    groups: tuple[Group, ...],
    relation: str = "",
    background: str = "",
    plain: bool = False,
) -> str:
    """A prompt for the groups; `relation` places the first against the second.

    `plain` keeps to one phrase, as GenEval's prompts are.
    """
    style = 0.0 if plain else dice.random()
    if style < 0.82:
        if relation:
            text = related(dice, groups[0], relation, groups[1])
            if len(groups) > 2:
                text += ", and " + listing([phrase(dice, g) for g in groups[2:]])
        else:
            text = listing([phrase(dice, g) for g in groups])
        return in_place(dice, opening(dice, text), background)
    return _detailed(dice, groups, relation, background)


def _detailed(dice: Dice, groups: tuple[Group, ...], relation: str, background: str) -> str:
    """Sentences: what is there, where it stands, how large it is."""
    bare = tuple(replace(g, size="") for g in groups)
    late_size = dice.chance(0.5) and all(g.kind != "sign" for g in groups)
    shown = bare if late_size else groups
    what = listing([phrase(dice, g) for g in shown])
    verb = "is" if groups[0].count == 1 else "are"
    place = dice.pick(PLACES[background]) if background else ""
    if dice.chance(0.5):
        first = f"There {verb} {what}" + (f" {place}" if place else "")
    elif place:
        first = f"{place[0].upper()}{place[1:]} there {verb} {what}"
    else:
        first = f"The picture shows {what}"
    sentences = [first + "."]
    if relation:
        a, b = (_referent(g, groups) for g in groups[:2])
        verb = "is" if groups[0].count == 1 else "are"
        where = dice.pick(RELATION_PHRASES[relation])
        sentences.append(f"{a[0].upper()}{a[1:]} {verb} {where} {b}.")
    if late_size:
        for group in groups:
            if group.size:
                a = _referent(group, groups)
                verb = "is" if group.count == 1 else "are"
                sentences.append(f"{a[0].upper()}{a[1:]} {verb} {group.size}.")
    return " ".join(sentences)


def _referent(group: Group, groups: tuple[Group, ...]) -> str:
    """The shortest name that tells the group from the others."""
    if group.noun or group.kind == "sign":
        return group.noun or "the sign"
    same = [g for g in groups if g.kind == group.kind]
    return definite(replace(group, size="", color=group.color if len(same) > 1 else ""))


#: Words that signs bear; a quarter of the signs bear random letters instead.
_WORD_LIST = """
A I GO UP NO ON HI OK ME WE BY IT CAT DOG SUN MAP RED BOX ZOO TEA BUS KEY JAM FOX EGG ICE NEW
OLD YES TOP BAR ART SKY TAXI OPEN STOP EXIT CAFE SALE HOME FISH BLUE LOVE GOOD PARK BOOK MILK
WAVE KING JUMP QUIZ COLD MOON STAR TREE SNOW HELLO WORLD BREAD MUSIC PIZZA BEACH HOTEL GREEN
HAPPY MAGIC LEMON NIGHT QUEEN RIVER SMILE TIGER WATER ZEBRA HOUSE PARTY GARDEN COFFEE MARKET
SCHOOL WINTER SUMMER MUSEUM CASTLE FOREST ORANGE PURPLE YELLOW BAKERY JUNGLE ROCKET STATION
LIBRARY WELCOME KITCHEN THEATER RAINBOW MORNING JOURNEY UMBRELLA ELEPHANT MOUNTAIN FOOTBALL
KEYBOARD HOSPITAL SANDWICH TREASURE
"""
WORDS = tuple(_WORD_LIST.split())
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def random_word(dice: Dice, longest: int = 8) -> str:
    """A word of 1 to `longest` letters: mostly a real one, sometimes letters at random."""
    if dice.chance(0.25):
        return "".join(dice.pick(LETTERS) for _ in range(1 + dice.below(longest)))
    while True:
        word = dice.pick(WORDS)
        if len(word) <= longest:
            return word
