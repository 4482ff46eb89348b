"""Calls of `experiments.run` that end before their folder is taken."""

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import pytest

from experiments import run
from experiments.runtime import session
from experiments.runtime.targets import ROOMS


def _before_training(*_: object) -> None:
    raise SystemExit(0)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Every command in here ends before its folder is taken, and Hydra writes below `folder`."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for a user
        patch.chdir(folder)
        # What comes after is as much work as a task was asked for, such as a million seeds.
        patch.setattr(session, "_locked", _before_training)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(tempfile, "tempdir", str(folder))
        for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
            patch.setenv(name, os.environ.get(name, ""))
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            patch.setenv(name, "1")
        _import_rooms()
        yield
    jax.config.update("jax_enable_x64", False)


def _import_rooms() -> None:
    """All that a config may name."""
    for room in ROOMS:
        module = importlib.import_module(room.removesuffix(".*"))
        for each in pkgutil.iter_modules(module.__path__) if room.endswith(".*") else ():
            importlib.import_module(f"{module.__name__}.{each.name}")


def call(*arguments: str) -> str:
    """The exit code of `experiments.run`, after a look at what it printed."""
    output, error, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, ["run", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            run.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before
    printed = error.getvalue()
    assert "Traceback" not in printed, printed
    assert not code or output.getvalue() or _is_one_line(printed.splitlines()), printed
    return f"exit code {code}"


def _is_one_line(lines: Sequence[str]) -> bool:
    usage = bool(lines) and lines[0].startswith("usage: ")  # of an option that there is not
    return usage or (len(lines) == 1 and lines[0].startswith("error: "))
