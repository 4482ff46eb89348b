"""What the trackers of other services share.

Services only append, and none of them can drop rows that it has. So `resume_from` begins a new run
of the service and logs all rows that the run goes on after. A run of an earlier start, which may
lack its last rows and have rows that are computed again, is deleted where the service can do that,
and has another name.
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
    """Raises ImportError, which names the extra, unless all `packages` are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'needs {package}: pip install "trustjax[trackers]"')


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in `folder`, which it wrote before its trackers were made."""
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config


class Starts:
    """The starts of a run that a service has seen: for each the id of the service's run.

    They are kept in a file of the run's folder, so that a folder may be moved.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "starts.txt"
        self.earlier = self._file.read_text().split() if self._file.exists() else []

    def name(self, folder: Path) -> str:
        """A name for the next one: that of the run's folder, with a number from the second on."""
        return f"{folder.name}-{len(self.earlier) + 1}" if self.earlier else folder.name

    def add(self, identity: str) -> None:
        """Remembers the id of this start."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(f"{identity}\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what a package prints or warns of from the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def environment_default(name: str, value: Path) -> Iterator[None]:
    """Sets an environment variable meanwhile, unless the user has."""
    if name in os.environ:
        yield
        return
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]
