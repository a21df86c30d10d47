"""What a share of right answers says, and how surely."""

from __future__ import annotations

import math


def wilson(num_right: int, num: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval that holds the true share with 95 % confidence (Wilson 1927).

    Unlike the share ± z·s.e. it stays inside [0, 1] and keeps its width at 0 and 1.
    """
    if num == 0:
        return 0.0, 1.0
    share, zz = num_right / num, z * z
    center = (share + zz / (2 * num)) / (1 + zz / num)
    half = z / (1 + zz / num) * math.sqrt(share * (1 - share) / num + zz / (4 * num**2))
    return max(0.0, center - half), min(1.0, center + half)
