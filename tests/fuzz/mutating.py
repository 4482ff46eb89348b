"""Bytes and JSON that were damaged."""

import copy
import json
from typing import Any

import numpy as np

Random = np.random.Generator
# What stands in damaged or hostile JSON in the place of a sensible value.
ABSURD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-320, 1e308, -0.0,
    float("nan"), float("inf"), "", "a\nb", "16", "x" * 5000, "../../etc/passwd", "\0", "\ud800",
    [], [0.5] * 3, [None], [[]], {}, {"0": "a"}, {"height": 16, "width": 16},
]  # fmt: skip


def damaged(random: Random, content: bytes) -> bytes:
    """A few bit flips, cuts, insertions or copies, often near the beginning or the end."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        if not data:
            break
        region = random.integers(4)
        at = int(random.integers(len(data)))
        if region == 0:
            at = min(at, int(random.integers(1, 64)))
        elif region == 1:
            at = len(data) - 1 - min(at, int(random.integers(64)))
        kind = random.integers(7)
        if kind <= 2:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 3:
            data[at] = int(random.choice([0, 1, 127, 128, 255]))
        elif kind == 4:
            del data[at : at + int(random.choice([1, 8, len(data)]))]
        elif kind == 5:
            data[at:at] = random.bytes(int(random.integers(1, 9)))
        else:
            width = int(random.choice([2, 4, 8]))
            value = int(random.choice([0, 1, 2**15, 2**16 - 1])) % 2 ** (8 * width)
            data[at : at + width] = value.to_bytes(width, str(random.choice(["big", "little"])))
    return bytes(data)


def edited(random: Random, value: Any) -> Any:
    """A JSON value of which one or two parts, at any depth, are absurd, missing or of others."""
    value = json.loads(json.dumps(value))
    for _ in range(random.integers(1, 3)):
        place: Any = value
        while isinstance(place, dict | list) and place:
            key = random.integers(len(place)) if isinstance(place, list) else None
            key = int(key) if key is not None else list(place)[random.integers(len(place))]
            if not isinstance(place[key], dict | list) or not place[key] or random.integers(4) == 0:
                if random.integers(5) == 0:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(ABSURD[random.integers(len(ABSURD))])
                break
            place = place[key]
    return value
