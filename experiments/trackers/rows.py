"""Rows of metrics, and what a tracker of them must offer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

Row = dict[str, float | int | str]  # one line of metrics.csv


class Tracker(Protocol):
    """Records the rows of a run."""

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Called once, before any `log`: the run goes on after `rows`; forget what came later."""

    def log(self, rows: Sequence[Row]) -> None:
        """Records rows. Those of `Csv`, the record, outlive the process when it returns."""

    def close(self) -> None:
        """Frees what is held."""


class Point(NamedTuple):
    """The mean over seeds of every metric of a stage at one step."""

    stage: str
    step: int
    means: dict[str, float]

    def prefixed(self) -> dict[str, float]:
        """The means by `stage/metric`."""
        return {f"{self.stage}/{metric}": mean for metric, mean in self.means.items()}


def seed_means(rows: Sequence[Row]) -> Iterator[Point]:
    """Averages rows of the same stage and step, which differ in the seed; text is left out."""
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        values = groups.setdefault((str(row["stage"]), int(row["step"])), {})
        for column, value in row.items():
            if column not in ("stage", "step", "seed") and not isinstance(value, str):
                values.setdefault(column, []).append(float(value))
    for (stage, step), values in groups.items():
        yield Point(stage, step, {k: sum(each) / len(each) for k, each in values.items()})
