"""Files that are there whole or not at all, and the error where they cannot be."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class SaveError(RuntimeError):
    """The run folder cannot be written or read. Its text is the one line that the user sees."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; the file is renamed to `path` at a clean end.

    Where that fails, what was written is deleted.
    """
    beside = path.with_name(f"{path.name}.new")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, line ends as they are."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")
