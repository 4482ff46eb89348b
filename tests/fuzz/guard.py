"""What a fuzzed command may do: end well or with one line, soon, and write in its own folder."""

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import run, session

COUNT = int(os.environ.get("TRUSTJAX_FUZZ", "300"))
_SECONDS = 20
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
_STARTS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
}

_watched: list[Path] = []  # the folder, while one is watched
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not (flags or 0) & _WRITES:
            return
        paths = [path]
    elif event in _CHANGES:
        paths = [each for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
    elif event in _STARTS:
        if arguments[0] != "uname":  # MLflow asks for the processor when it is imported
            _seen.append(f"{event} {arguments}")
        return
    else:
        return
    for path in paths:
        place = Path(os.fsdecode(path)).absolute()
        inside = place.is_relative_to(_watched[0]) or "__pycache__" in place.parts
        if not inside and place != Path(os.devnull):
            _seen.append(f"{event} {place}")


sys.addaudithook(_hook)


class _Slow(BaseException):
    """An input took too long."""


def _stop(*_: object) -> None:
    raise _Slow


def _before_training(*_: object) -> None:
    raise SystemExit(0)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Every command in here ends before its folder is taken, and Hydra writes below `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(session, "_locked", _before_training)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(tempfile, "tempdir", str(folder))
        for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
            patch.setenv(name, os.environ.get(name, ""))
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            patch.setenv(name, "1")
        yield
    jax.config.update("jax_enable_x64", False)


def call(arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """The exit code of `experiments.run`, what it printed, and what was wrong with that if any."""
    output, error = io.StringIO(), io.StringIO()
    code, wrong = 0, ""
    before, sys.argv = sys.argv, ["run", *arguments]
    handler = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(_SECONDS)
    started = time.perf_counter()
    _seen.clear()
    _watched.append(folder)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            run.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except _Slow:
        wrong = f"takes more than {_SECONDS} s"
    except BaseException as fault:  # what a user would see as a traceback
        wrong = f"{type(fault).__name__}: {str(fault)[:200]}"
    finally:
        _watched.clear()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = before
    lines = error.getvalue().splitlines()
    if "Traceback" in error.getvalue():
        wrong = f"traceback: {lines[-1]} after {lines[-3:-1]}"
    elif code and not wrong and not output.getvalue() and not _is_one_line(lines):
        wrong = f"exit code {code} with {lines[:3]}"
    if _seen and not wrong:
        wrong = f"touched {_seen[:3]}"
    if time.perf_counter() - started > _SECONDS and not wrong:
        wrong = f"took {time.perf_counter() - started:.0f} s"
    return code, error.getvalue(), wrong


def _is_one_line(lines: Sequence[str]) -> bool:
    usage = bool(lines) and lines[0].startswith("usage: ")  # of an option that there is not
    return usage or (len(lines) == 1 and lines[0].startswith("error: "))


class Report:
    """Counts what became of the inputs; a fault says how to have it again."""

    def __init__(self, name: str) -> None:
        self.name, self.counts, self.faults = name, Counter[str](), []  # type: ignore[var-annotated]

    def add(self, index: int, what: object, code: int, error: str, wrong: str) -> None:
        self.counts["wrong" if wrong else f"exit code {code}"] += 1
        if wrong:
            self.faults.append(f"{index}: {what!r}: {wrong}")
            print(f"{self.name} {self.faults[-1][:1000]}", flush=True)
        if (index + 1) % 500 == 0:
            print(f"{self.name}: {dict(self.counts)}", flush=True)

    def close(self) -> None:
        print(f"{self.name}: {dict(self.counts)}", flush=True)
        assert not self.faults, f"{len(self.faults)} faults, the first: {self.faults[:3]}"


def generator(index: int) -> random.Random:
    """The source of randomness of one input."""
    return random.Random(f"trustjax {index}")
