"""Damaged inputs by the thousand, and the count of what became of them.

TRUSTJAX_FUZZ is the number of inputs of a test, 300 by default. Input i is made from the random
generator of seed i alone, so that one that fails can be made again.
"""

import copy
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_INPUTS = int(os.environ.get("TRUSTJAX_FUZZ", "300"))
SECONDS = 20  # longer is a hang
Random = np.random.Generator
# What stands in damaged or hostile JSON in the place of a sensible value.
ABSURD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-320, 1e308, -0.0,
    float("nan"), float("inf"), "", "a\nb", "16", "x" * 5000, "../../etc/passwd", "\0", "\ud800",
    [], [0.5] * 3, [None], [[]], {}, {"0": "a"}, {"height": 16, "width": 16},
]  # fmt: skip


class Hang(BaseException):
    """Past all handlers of the code under test."""


def _interrupt(*_: Any) -> None:
    raise Hang


# Of the events that make or change files, the place of the path among the arguments.
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.symlink": 1, "os.link": 1}
_writes: list[str] = []
_allowed: list[str] = []  # the folder to write in, while watched


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what Python writes outside the allowed folder. A hook cannot be taken off again."""
    if not _allowed or (event != "open" and event not in _CHANGES):
        return
    path = arguments[_CHANGES.get(event, 0)]
    if event == "open":
        _, mode, flags = arguments
        reads = not set(mode) & set("wax+") if mode else not flags & (os.O_WRONLY | os.O_RDWR)
        if reads:
            return
    if isinstance(path, str | os.PathLike):  # else a descriptor that is open already
        full = Path(os.path.abspath(path))
        if not full.is_relative_to(_allowed[0]) and str(full) != os.devnull:
            _writes.append(f"{event} {full}")


sys.addaudithook(_watch)


def fuzz(
    name: str,
    folder: Path,
    attempt: Callable[[Random], None],
    refusals: tuple[type[Exception], ...],
) -> None:
    """Runs `attempt` on `NUM_INPUTS` inputs; prints and checks the counts.

    `attempt` makes the input, reads it, and asserts that the result is whole. It may raise one of
    `refusals` with a message of one line; warnings are errors, as everywhere in the tests.
    """
    accepted, refused, faults, hangs, slowest = 0, 0, [], [], 0.0
    _writes.clear()
    before = signal.signal(signal.SIGALRM, _interrupt)
    _allowed.append(str(folder))
    try:
        for index in range(NUM_INPUTS):
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                attempt(np.random.default_rng(index))
                accepted += 1
            except Hang:
                hangs.append(index)
            except refusals as error:
                refused += 1
                if "\n" in str(error) or not str(error):
                    faults.append(f"input {index}: not one line: {error!r}")
            except Exception:
                faults.append(f"input {index}: {traceback.format_exc(limit=-4)}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - start)
    finally:
        _allowed.clear()
        signal.signal(signal.SIGALRM, before)
    counts = (
        f"{name}: {NUM_INPUTS} inputs, {accepted} accepted, {refused} refused, {len(faults)} other "
        f"errors, {len(hangs)} hangs, {len(_writes)} files outside, slowest {slowest:.2f} s"
    )
    print(counts)
    problems = [*faults, *(f"input {index}: a hang" for index in hangs), *_writes]
    assert not problems, "\n".join([counts, *problems[:5]])
    assert accepted, counts  # or nothing was tried but the first check
    assert refused, counts


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
