"""Runs inputs by the thousand, each under a watch, and counts what became of them.

TRUSTJAX_FUZZ is the number of inputs of a test, 300 by default. Input i is made from the seed i
alone, so that one that fails can be made again.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUM_INPUTS = int(os.environ.get("TRUSTJAX_FUZZ", "300"))
SECONDS = 20  # longer is a hang
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
_STARTS = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect",
}  # fmt: skip

_watched: list[Path] = []  # the folder, while one is watched
_touched: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what is written outside the watched folder, and what is started."""
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        paths = [path] if (flags or 0) & _WRITES and not isinstance(path, int) else []
    elif event in _CHANGES:
        paths = [each for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
    elif event in _STARTS:
        if arguments[0] != "uname":  # MLflow asks for the processor when it is imported
            _touched.append(f"{event} {arguments}")
        return
    else:
        return
    for path in paths:
        place = Path(os.fsdecode(path)).absolute()
        inside = place.is_relative_to(_watched[0]) or "__pycache__" in place.parts
        if not inside and place != Path(os.devnull):
            _touched.append(f"{event} {place}")


sys.addaudithook(_watch)  # cannot be taken off again


class Hang(BaseException):
    """Past all handlers of the code under test."""


def _interrupt(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def _limited(folder: Path) -> Iterator[None]:
    """Ends what takes too long, and watches what it writes outside `folder`."""
    _touched.clear()
    _watched.append(folder)
    before = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watched.clear()


def fuzz(
    name: str,
    folder: Path,
    attempt: Callable[[int], str | None],
    refusals: tuple[type[Exception], ...] = (),
) -> None:
    """Runs `attempt` on the seeds of `NUM_INPUTS` inputs; prints and checks the counts.

    `attempt` makes the input, gives it to the code under test, asserts that the result is whole,
    and may return a name for what became of it. It may raise one of `refusals` with a message of
    one line; warnings are errors, as everywhere in the tests. All that it imports must have been
    imported before: a module whose import was cut off at the limit stays broken.
    """
    counts = Counter[str]()
    faults: list[str] = []
    slowest = 0.0
    for seed in range(NUM_INPUTS):
        start, fault = time.perf_counter(), ""
        try:
            with _limited(folder):
                outcome = attempt(seed) or "accepted"
        except Hang:
            outcome, fault = "hangs", traceback.format_exc(limit=-8)
        except refusals as error:
            outcome = "refused"
            if "\n" in str(error) or not str(error):
                fault = f"not one line: {error!r}"
        except Exception:
            outcome, fault = "wrong", traceback.format_exc(limit=-4)
        if _touched:
            outcome, fault = "outside", f"{fault}{_touched[:3]}"
        slowest = max(slowest, time.perf_counter() - start)
        counts[outcome] += 1
        if fault:
            faults.append(f"{name}, input {seed}: {fault}")
            print(faults[-1], flush=True)
        if (seed + 1) % 500 == 0 or seed + 1 == NUM_INPUTS:
            line = f"{name}: {seed + 1} inputs, {dict(counts)}, slowest {slowest:.2f} s"
            print(line, flush=True)
    assert not faults, "\n".join([line, *faults[:5]])
    assert len(counts) > 1, line  # or nothing was tried but the first check
