"""What becomes of the rows of metrics: metrics.csv, TensorBoard."""

import csv
import io
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from experiments.files import write_text

Row = dict[str, float | int | str]  # one line of metrics.csv


class Tracker(Protocol):
    """Records the rows of a run."""

    def cut(self, rows: Sequence[Row]) -> None:
        """Called once, before any `log`: the run goes on after `rows`; forget what came later."""

    def log(self, rows: Sequence[Row]) -> None:
        """Records rows; when it returns, they outlive the process."""

    def close(self) -> None:
        """Frees what is held."""


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
    """The rows of a metrics.csv, numbers as numbers; empty cells are left out."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {column: _value(text) for column, text in line.items() if column and text}
            for line in csv.DictReader(file)
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


class TensorBoard:
    """TensorBoard events below `folder/tensorboard`, one run a stage so that methods overlay.

    Rows of the same step, which differ in the seed, are averaged. Events are on disk when `log`
    returns; tensorboardX's SummaryWriter would keep them for minutes in a thread of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[str, RecordWriter] = {}
        self._last_steps: dict[str, int] = {}

    def cut(self, rows: Sequence[Row]) -> None:
        """Remembers the last step of each stage: events after it will be purged."""
        self._last_steps = {str(row["stage"]): int(row["step"]) for row in rows}

    def log(self, rows: Sequence[Row]) -> None:
        """Writes the mean over the seeds for every step."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            groups.setdefault((str(row["stage"]), int(row["step"])), []).append(row)
        for (stage, step), group in groups.items():
            means = [Summary.Value(tag=k, simple_value=v) for k, v in _means(group).items()]
            _write(self._writer(stage), step=step, summary=Summary(value=means))
        for stage in {stage for stage, _ in groups}:
            self._writers[stage].flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str) -> RecordWriter:
        if stage not in self._writers:
            folder = self._folder / stage
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a run in the order of their names.
            name = f"events.out.tfevents.{int(time.time())}.{len(list(folder.iterdir())):04}"
            self._writers[stage] = writer = RecordWriter(str(folder / name))
            _write(writer, file_version="brain.Event:2")
            purge = self._last_steps.get(stage, -1) + 1
            _write(writer, step=purge, session_log=SessionLog(status=SessionLog.START))
        return self._writers[stage]


def _write(writer: RecordWriter, **fields: Any) -> None:
    writer.write(Event(wall_time=time.time(), **fields).SerializeToString())


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of every column of numbers over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for column, value in row.items():
            if column not in ("stage", "step", "seed") and not isinstance(value, str):
                values.setdefault(column, []).append(float(value))
    return {column: sum(numbers) / len(numbers) for column, numbers in values.items()}
