"""What docs/memory.md says of the 8B, and the commands it shows."""

import re

import pytest

from hidream.memory import POLICIES
from hidream.models.o1.config import O1_8B
from hidream.models.o1.memory import BatchSize, need, weight_bytes
from tests.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "memory.md")


def batch(side: int, num_references: int) -> BatchSize:
    """A guided picture of this side with a prompt of 200 tokens."""
    patches = O1_8B.budgets.side(max(1, num_references), side) // 32
    vision = O1_8B.budgets.vision_side(max(1, num_references)) // 16
    return BatchSize(
        num_pictures=1,
        num_branches=2,
        num_target=(side // 32) ** 2,
        num_references=num_references * patches**2,
        num_prefix=200 + num_references * ((vision // 2) ** 2 + 2),
        num_vision_patches=num_references * vision**2,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_is_what_is_counted(name):
    policy = POLICIES[name]
    weights = weight_bytes(O1_8B, policy, width=2, device="cuda")
    needs = [
        need(O1_8B, policy, batch(*asked), width=2, device="cuda").total
        for asked in ((1024, 0), (2048, 0), (2048, 4))
    ]
    shown = " | ".join(f"{n / 1e9:.1f}" for n in (weights.always, *needs, weights.cpu))
    assert f"| `{name}` | {shown} |" in PAGE.text


def test_every_policy_is_explained():
    explained = re.findall(r"^\| `(\w+)` \| [^\d]", PAGE.text, flags=re.M)
    assert explained == list(POLICIES)


def test_the_commands_run(tmp_path):
    assert len(PAGE.run(tmp_path)) == len(PAGE.commands) > 0
