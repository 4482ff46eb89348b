"""The progress of a run: bars on a terminal, lines elsewhere."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.trackers import Row, Tracker


def make_progress(lengths: Mapping[str, int], console: Console) -> Tracker:
    """A tracker that shows the progress of the stages; `lengths` are their numbers of steps."""
    return Bars(lengths, console) if console.is_terminal else Lines(lengths, console)


class Bars:
    """One bar per stage; the bar of the next stage appears when one is full."""

    def __init__(self, lengths: Mapping[str, int], console: Console) -> None:
        self._lengths = lengths
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metric]}"),
            console=console,
        )

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Starts to draw, from what is done already."""
        steps = dict(_position(row, self._lengths) for row in rows)
        self._progress.start()
        for stage in self._lengths:
            done = steps.get(stage, 0)
            self._add(stage, done)
            if done < self._lengths[stage]:
                break

    def log(self, rows: Sequence[Row]) -> None:
        """Moves the bar of the rows' stage."""
        if not rows:
            return
        stage, step = _position(rows[-1], self._lengths)
        self._add(stage, step)
        self._progress.update(self._bars[stage], completed=step)
        if _is_timed(rows):
            self._progress.update(self._bars[stage], metric=_metric(rows), speed=_speed(rows))
        waiting = [name for name in self._lengths if name not in self._bars]
        if step == self._lengths[stage] and waiting:
            self._add(waiting[0], 0)

    def close(self) -> None:
        """Stops drawing; the bars stay."""
        self._progress.stop()

    def _add(self, stage: str, step: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(
                stage,
                total=self._lengths[stage],
                completed=step,
                speed="" if step == self._lengths[stage] else _COMPILING,
                metric="",
            )


class Lines:
    """One line when a stage begins and one when it ends; between them one per `seconds` at most."""

    def __init__(self, lengths: Mapping[str, int], console: Console, seconds: float = 30.0) -> None:
        self._lengths = lengths
        self._console = console
        self._seconds = seconds
        self._shown = time.monotonic()

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Names the stage that comes next."""
        steps = dict(_position(row, self._lengths) for row in rows)
        self._begin([name for name, length in self._lengths.items() if steps.get(name) != length])

    def log(self, rows: Sequence[Row]) -> None:
        """Prints the stage, its step, the speed and the first metric."""
        if not rows or not _is_timed(rows):
            return
        stage, step = _position(rows[-1], self._lengths)
        if step < self._lengths[stage] and time.monotonic() - self._shown < self._seconds:
            return
        self._shown = time.monotonic()
        parts = [f"{stage} {step}/{self._lengths[stage]}", _clock(rows), _speed(rows)]
        self._print("  ".join(part for part in (*parts, _metric(rows)) if part))
        if step == self._lengths[stage]:
            names = list(self._lengths)
            self._begin(names[names.index(stage) + 1 :])

    def close(self) -> None:
        """Nothing is held."""

    def _begin(self, stages: Sequence[str]) -> None:
        if stages:
            self._print(f"{stages[0]}: {_COMPILING}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


_COMPILING = "compiling ..."


def _position(row: Row, lengths: Mapping[str, int]) -> tuple[str, int]:
    """The stage of a row, and its step, at most the stage's length.

    Some stages count days or rounds in their rows.
    """
    stage = str(row["stage"])
    return stage, min(int(row["step"]), lengths.get(stage, 0))


def _is_timed(rows: Sequence[Row]) -> bool:
    """Whether the rows are from training: those of the final evaluation have no times."""
    return "time/seconds" in rows[-1]


def _clock(rows: Sequence[Row]) -> str:
    """The time spent on the stage as minutes:seconds, compilation included."""
    minutes, seconds = divmod(round(float(rows[-1]["time/seconds"])), 60)
    return f"{minutes}:{seconds:02d}"


def _speed(rows: Sequence[Row]) -> str:
    """Steps per second, without an exponent; empty if the time includes compilation."""
    speed = rows[-1].get("time/steps_per_second", "")
    if speed == "":
        return ""
    digits = 0 if float(speed) >= 100 else 1 if float(speed) >= 10 else 2
    return f"{float(speed):,.{digits}f} steps/s"


def _metric(rows: Sequence[Row]) -> str:
    """The first metric of the rows, averaged over the rows of the last step."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    for column, value in last[0].items():
        if column in ("stage", "step", "seed") or column.startswith("time/"):
            continue
        if not isinstance(value, str):
            values = [float(row[column]) for row in last if column in row]
            mean = sum(values) / len(values)
            style = ",.0f" if 1e4 <= abs(mean) < 1e12 else ".4g"  # no exponent for a large return
            return f"{column} {mean:{style}}"
    return ""
