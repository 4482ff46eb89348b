"""Functions that the trackers of online services share.

A service only appends rows and cannot remove any. So `resume_from` begins a new run of the service,
and logs all rows up to the point from which training continues. The service's run of an earlier
start may lack its last rows, or have rows that are computed again. It has another name, and is
deleted if the service can do that.
"""

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def require(*packages: str) -> None:
    """Raises ImportError, which names the extra to install, unless all `packages` are there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'needs {package}: pip install "trustjax[trackers]"')


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in `folder`, which is written before trackers are made."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config


class Starts:
    """The starts of a run that a service has seen, as the ids of the service's runs.

    A file in the run's folder lists them, so that the folder may be moved.

    Attributes:
      earlier: Ids of the starts before this one, the oldest first.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "starts.txt"
        self.earlier = self._file.read_text().split() if self._file.exists() else []

    def name(self, folder: Path) -> str:
        """A name for this start: the folder's name, with a number from the second start on."""
        return f"{folder.name}-{len(self.earlier) + 1}" if self.earlier else folder.name

    def add(self, identity: str) -> None:
        """Writes down the id of this start."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(f"{identity}\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what a package prints, and its warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def environment_default(name: str, value: Path) -> Iterator[None]:
    """A context in which an environment variable has this value, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]
