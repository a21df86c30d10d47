"""What world 1.1 drew is drawn the same for good: o1-nano was trained and measured on it.

`python -m tests.unit.test_world_golden` prints the digests, to be changed with WORLD_VERSION only.
"""

import hashlib
import json

import pytest

from hidream.world.tasks import TASKS, sample

EDITS = ("recolour", "remove", "add", "replace", "move", "background", "word")
PLANS = (
    "single",
    "colors",
    "two_objects",
    "position",
    "counting",
    "attribute_binding",
    "words",
    "related",
    "free",
)
SEEDS = (1, 2**32 + 7)  # one of training, one of evaluation
NUM_WORDS, NUM_PICTURES = 12, 3  # indices of each seed
#: Task or category -> digests of the words and the truth, and of the pictures.
DIGESTS: dict[str, tuple[str, str]] = {
    "text_to_image": ("a7f170f046fd6285", "1f0092b6dc5771b8"),
    "edit": ("c6818dbd3e9b7630", "7cc87f068b22d263"),
    "subject": ("038fb292782472d2", "bbffee960f277cbe"),
    "language": ("9e50d4c46e4c7a78", "3791567dc537e698"),
    "understanding": ("16fb98f3f0168131", "5ea1940417eb07b5"),
    "single": ("b65bf505f1a43982", "e6dde4e4f79c2a91"),
    "colors": ("41e7a19c6717894d", "5b77b9926001f6a4"),
    "two_objects": ("bd8b2fb17b9c1cd4", "b51539b44b52fd02"),
    "position": ("e0a739a83bdeda5a", "db1a540a4863da12"),
    "counting": ("52ba54b146b23451", "6f5ffca092289f62"),
    "attribute_binding": ("b6c9d99a926187cb", "405b7c0fc5e03aad"),
    "words": ("22596ad27fbbad00", "b08e4af964c2a143"),
    "related": ("2d51d0f3f1d03662", "3d0474b770b68ee0"),
    "free": ("e6025f9a1e76280a", "48010d13291ccc93"),
    "recolour": ("3d02bb840856a28a", "b9cdf3bd9439b234"),
    "remove": ("a6d406db91800fdb", "693fee33457b7f20"),
    "add": ("ecd864c60aad336d", "06dd5556c6b31c6f"),
    "replace": ("bcee8e45964fc879", "141a4dfc48473197"),
    "move": ("bf4cbb00618f8441", "e48f6e2d3fc8b319"),
    "background": ("f5e20f1f2eb01d69", "0e8b8735fc16286e"),
    "word": ("5b2e2f335cbaf1f5", "e5583dcc320c4056"),
    "edits": ("c6818dbd3e9b7630", "7cc87f068b22d263"),
    "subjects": ("038fb292782472d2", "bbffee960f277cbe"),
}


def told(item):
    """All that a sample says, as world 1.1 had it."""

    def scene(one):
        return [
            (o.kind, o.color, o.size, o.x, o.y, o.pattern, o.color2, o.word) for o in one.objects
        ], one.background

    scenes = [item.scene] + ([item.source] if item.source else [])
    claims = [(c.kind, c.color, c.size, c.word, c.pattern, c.color2) for c in item.claims.objects]
    subjects = [(s.kind, s.pattern, s.color, s.color2) for s in item.subjects]
    words = (item.task, item.category, item.prompt, item.answer, item.edit, item.changed)
    return repr(
        (
            *words,
            claims,
            item.claims.relations,
            item.claims.background,
            [scene(one) for one in scenes],
            subjects,
        )
    )


def digests(key):
    words, pictures = hashlib.sha256(), hashlib.sha256()
    task = key if key in TASKS else "edit" if key in EDITS else "text_to_image"
    for index in range(NUM_WORDS):
        for seed in SEEDS:
            item = sample(task, seed, index, category=None if key in TASKS else key)
            words.update(told(item).encode())
            if index < NUM_PICTURES:
                for picture in (item.target(96, 96), *item.reference_pictures(96, 96)):
                    pictures.update(picture.tobytes())
    return words.hexdigest()[:16], pictures.hexdigest()[:16]


@pytest.mark.parametrize("key", DIGESTS)
def test_old_samples_stay_the_same(key):
    assert digests(key) == DIGESTS[key]


if __name__ == "__main__":
    keys = (*TASKS, *PLANS, *EDITS, "edits", "subjects")
    print(json.dumps({key: digests(key) for key in keys}, indent=1))
