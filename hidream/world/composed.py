"""Composed scenes: what a prompt leaves open is settled in one way, as in curated pictures.

A scene's objects may stand anywhere; a network must then decide, in noise, between arrangements
that the words do not tell apart. In composed scenes sizes that go unsaid are large, and places
follow from how many objects there are and how they are related; what is unsaid of a camera has one
value.
"""

from __future__ import annotations

from dataclasses import replace

from hidream.world.sample import Sample
from hidream.world.scene import SIZES, Camera, Scene
from hidream.world.shots import shot_scene

_LOW, _MIDDLE, _HIGH = 0.25, 0.5, 0.75
#: Number of objects -> their centres (x, y), in the order in which the prompt names them. Around
#: each is room for the largest size; all lie alike across patches of an eighth of the side.
_PLACES: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((_MIDDLE, _MIDDLE),),
    2: ((_LOW, _MIDDLE), (_HIGH, _MIDDLE)),
    3: ((_LOW, _LOW), (_HIGH, _LOW), (_MIDDLE, _HIGH)),
    4: ((_LOW, _LOW), (_HIGH, _LOW), (_LOW, _HIGH), (_HIGH, _HIGH)),
}
#: Of two objects, the first standing in a relation to the second.
_RELATED: dict[str, tuple[tuple[float, float], ...]] = {
    "left": _PLACES[2],
    "right": _PLACES[2][::-1],
    "above": ((_MIDDLE, _LOW), (_MIDDLE, _HIGH)),
    "below": ((_MIDDLE, _HIGH), (_MIDDLE, _LOW)),
}
_CAMERA = {"shot": "medium-full", "angle": "eye-level", "view": "three-quarter"}


def composed(sample: Sample) -> Sample:
    """The sample, its objects at the places above; words, claims and looks stay.

    What has an arrangement of its own stays as it is: edits, layouts, storyboards, signs with
    something beside them, relations between more than two objects, and pictures that are only
    spoken of.
    """
    if sample.task not in ("text_to_image", "subject"):
        return sample
    if sample.scene.camera is not None:
        return replace(sample, scene=_shot(sample))
    objects, relations = sample.scene.objects, sample.claims.relations
    signs = any(thing.kind == "sign" for thing in objects)
    most = 1 if signs else 2 if relations else max(_PLACES)
    if sample.layout or sample.panels or len(objects) > most:
        return sample
    places = _RELATED[relations[0][1]] if relations else _PLACES[len(objects)]
    arranged = tuple(
        replace(
            thing,
            size=thing.size if claim.size or claim.word else SIZES["large"],
            x=x,
            y=y,
        )
        for thing, claim, (x, y) in zip(objects, sample.claims.objects, places, strict=True)
    )
    return replace(sample, scene=replace(sample.scene, objects=arranged))


def _shot(sample: Sample) -> Scene:
    (thing,) = sample.scene.objects
    told = {**_CAMERA, **sample.claims.camera}
    camera = Camera(shot=told["shot"], angle=told["angle"], view=told["view"])
    return shot_scene(thing.kind, thing.color, sample.scene.background, camera)
