"""Language and understanding: captions, and questions about pictures."""

from __future__ import annotations

from dataclasses import replace

from hidream.world import prompts
from hidream.world.build import Part, build_scene, claims_of
from hidream.world.sample import Claims, Sample
from hidream.world.scene import BACKGROUNDS, Dice, Scene
from hidream.world.text_to_image import free, related


def _describe(dice: Dice) -> tuple[Scene, Claims, str, tuple[Part, ...]]:
    """A scene and a caption that says all of it."""
    parts, relation = related(dice) if dice.chance(0.4) else free(dice)
    parts = tuple(replace(p, say_color=True) for p in parts)
    background = dice.pick(BACKGROUNDS)
    relations = ((0, relation, 1),) if relation else ()
    scene, pairs, sizes = build_scene(dice, parts, background, relations)
    groups = tuple(p.group(s) for p, s in zip(parts, sizes, strict=True))
    text = prompts.caption(dice, groups, relation, background)
    return scene, claims_of(parts, sizes, pairs, background), text, parts


def language(dice: Dice, category: str | None) -> Sample:
    scene, claims, text, _ = _describe(dice)
    return Sample(
        task="language", category="language", prompt="", answer=text, scene=scene, claims=claims
    )


def understanding(dice: Dice, category: str | None) -> Sample:
    scene, claims, answer, parts = _describe(dice)
    question = dice.pick(("Describe the picture.", "What is in the picture?", "Write a caption."))
    style = dice.random()
    things = [p for p in parts if p.kind != "sign"]
    if style < 0.2 and things:
        part = dice.pick(things)
        number = sum(p.count for p in things if p.kind == part.kind)
        question = f"How many {prompts.plural(part.kind)} are there?"
        answer = prompts.NUMBERS[number]
    elif style < 0.4 and things:
        part = dice.pick(things)
        if sum(p.kind == part.kind for p in things) == 1:
            verb, noun = (
                ("is", part.kind) if part.count == 1 else ("are", prompts.plural(part.kind))
            )
            question, answer = f"What colour {verb} the {noun}?", part.color
    elif style < 0.55 and claims.relations and len(scene.objects) == 2:
        i, relation, j = claims.relations[0]
        a, b = scene.objects[i], scene.objects[j]
        if a.kind != b.kind and "sign" not in (a.kind, b.kind):
            where = prompts.RELATION_PHRASES[relation][0]
            question = f"What is {where} the {b.kind}?"
            answer = prompts.article(f"{a.color} {a.kind}")
    elif style < 0.6:
        question = "Where is this?"
        answer = prompts.PLACES[scene.background][0]
    return Sample(
        task="understanding",
        category="understanding",
        prompt=question,
        answer=answer,
        scene=scene,
        claims=claims,
    )
