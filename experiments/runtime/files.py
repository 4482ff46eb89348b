"""Files that are written whole or not at all, and the error if that fails."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class SaveError(RuntimeError):
    """The run folder cannot be written or read. The text is the one line that the user sees."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`; at the end the file there is renamed to `path`.

    After an error the new file is deleted, and `path` stays as it was.
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
    """Writes `text` as UTF-8, without changing its newlines."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")
