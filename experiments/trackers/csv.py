"""metrics.csv, the record that a resumed run starts from."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.files import write_text
from experiments.trackers.rows import Row


class Csv:
    """metrics.csv: one line a row, columns in the order in which they first appear.

    Numbers are written with `repr`, which reads back as the same number. A new column extends the
    header: the file is written anew beside the old one and renamed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []

    def cut(self, rows: Sequence[Row]) -> None:
        """Makes the file hold exactly `rows`."""
        self._columns = []
        self._write_anew(rows)

    def log(self, rows: Sequence[Row]) -> None:
        """Appends rows."""
        if all(column in self._columns for row in rows for column in row):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._lines(rows))
        else:
            self._write_anew([*read_rows(self.path), *rows])

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
            writer.writerow({c: v if isinstance(v, str) else repr(v) for c, v in row.items()})
        return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv, numbers as numbers; empty cells are left out.

    A last line that lacks its end, as while a run writes it, is left out too.
    """
    if not path.is_file():
        return []
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    text = io.StringIO((whole + end).decode(), newline="")
    return [
        {column: _value(text) for column, text in line.items() if column and text}
        for line in csv.DictReader(text)
    ]


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if repr(value) == text:  # writing it again gives the same text
            return value
    return text
