"""metrics.csv, the record from which a resumed run continues."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.runtime.files import write_text
from experiments.trackers.rows import Row


class Csv:
    """The tracker that writes metrics.csv: one line per row, columns in order of appearance.

    Numbers are written with `repr`, so that the same numbers are read back. A new column extends
    the header: a new file is written beside the old one and renamed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = RowsDigest()
        self._columns: list[str] = []

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Makes the file hold exactly `rows`."""
        self._columns = []
        self._write_anew(rows)
        self.digest = RowsDigest()
        self.digest.update(rows)

    def log(self, rows: Sequence[Row]) -> None:
        """Appends the rows: all of them, or none if that raises OSError."""
        if all(column in self._columns for row in rows for column in row):
            size = self.path.stat().st_size
            try:
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    file.write(self._lines(rows))
            except OSError:
                os.truncate(self.path, size)  # a part of the rows may have been written
                raise
        else:
            self._write_anew([*read_rows(self.path), *rows])
        self.digest.update(rows)

    def close(self) -> None:
        """Nothing is held."""

    def _write_anew(self, rows: Sequence[Row]) -> None:
        self._columns = list(dict.fromkeys([*self._columns, *(c for row in rows for c in row)]))
        header: Row = dict(zip(self._columns, self._columns, strict=True))
        write_text(self.path, self._lines([header, *rows] if header else []))

    def _lines(self, rows: Iterable[Row]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        for row in rows:
            writer.writerow({column: _text(value) for column, value in row.items()})
        return text.getvalue()


class RowsDigest:
    """SHA-256 of rows, the same whether they come from training or are read from a file."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, rows: Iterable[Row]) -> None:
        """Adds rows to the digest."""
        for row in rows:
            cells = sorted((column, _text(value)) for column, value in row.items())
            text = json.dumps([cell for cell in cells if cell[1]])
            self._sha256.update(f"{text}\n".encode())

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv, with numbers as Python numbers and without empty cells.

    A last line without a newline, which a run is still writing, is left out. Raises ValueError,
    which names the file, if it is not a metrics.csv.
    """
    if not path.is_file():
        return []
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    try:
        lines = list(csv.reader(io.StringIO((whole + end).decode(), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    header, *lines = lines or [[]]
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: row {number} has {len(line)} cells, but there are {len(header)} columns"
            )
    return [
        {column: _value(text) for column, text in zip(header, line, strict=True) if text}
        for line in lines
    ]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else repr(value)


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if repr(value) == text:  # writing it again gives the same text
            return value
    return text
