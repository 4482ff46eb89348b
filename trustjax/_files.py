"""Files from other sources: folders or hub downloads, JSON objects, and errors about them."""

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trustjax._checks import InputError, MissingPackageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A context in which a failed import says which extra to install."""
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f'{error}; run: pip install "trustjax[{name}]"', name=error.name
        ) from error


experiments_extra = functools.partial(extra, "experiments")


def one_line(error: object) -> str:
    """The text of an error from another library, on one line and of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:500]}..."


def local_folder(
    argument: str,
    given: str | os.PathLike[str],
    error_type: type[InputError],
    kind: str,
    **download: Any,
) -> Path:
    """The folder itself, or the local copy of a repository on the Hugging Face hub.

    Args:
      argument: Name of the argument, for messages.
      given: A folder, or a hub id `owner/name`.
      error_type: Type of the error to raise.
      kind: "model" or "dataset", for messages.
      **download: Arguments of `huggingface_hub.snapshot_download`.

    Raises:
      error_type: `given` is neither a folder nor the id of a repository that can be reached.
      ImportError: huggingface_hub is missing.
    """
    if not isinstance(given, str | os.PathLike) or given == "":  # "" would be the current folder
        raise error_type(
            f"{argument} must be a folder or a hub id owner/name, got {given!r}", argument
        )
    try:
        folder = Path(given).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a long name, an unknown ~user
        raise error_type(
            f"{argument} must be a folder or a hub id owner/name, got {str(given)!r}: "
            f"{one_line(error)}",
            argument,
        ) from error
    if exists:
        raise error_type(f"{argument} must be a folder, but {str(given)!r} is a file", argument)
    if not _HUB_ID.fullmatch(str(given)):
        raise error_type(
            f"{argument} must be a folder or a hub id owner/name; no folder {str(given)!r}",
            argument,
        )
    with experiments_extra():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    try:
        return Path(snapshot_download(str(given), **download))
    except (OSError, HFValidationError) as error:  # every network and hub error is an OSError
        raise error_type(
            f"{argument} must be a folder or a hub id: no folder {str(given)!r} here, and the "
            f"Hugging Face hub gave no {kind} of that name (offline? then set {argument} to a "
            f"folder that holds its files): {one_line(error)}",
            argument,
        ) from error


def read_json(path: Path, error_type: type[InputError]) -> dict[str, Any]:
    """The JSON object in a file. Raises `error_type`, which names the file, for anything else."""
    if not path.is_file():  # reading a pipe would not end
        problem = "it is a folder or a device" if path.exists() else "no such file"
        raise error_type(f"{path} must be a JSON file: {problem}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} must be a JSON file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise error_type(f"{path} must be a JSON object, got {type(content).__name__}")
    return content
