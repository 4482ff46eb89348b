"""Rows of metrics, and the protocol of a tracker that records them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

Row = dict[str, float | int | str]  # one line of metrics.csv


class Tracker(Protocol):
    """Records the rows of a run."""

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Called once, before `log`: the run continues after `rows`, and later ones are void."""

    def log(self, rows: Sequence[Row]) -> None:
        """Records rows. `Csv` has them on disk when this returns; other trackers may lag."""

    def close(self) -> None:
        """Writes what is left, and frees files and connections."""


class Point(NamedTuple):
    """The mean over seeds of every metric of a stage at one step."""

    stage: str
    step: int
    means: dict[str, float]

    def prefixed(self) -> dict[str, float]:
        """The means under the names `stage/metric`."""
        return {f"{self.stage}/{metric}": mean for metric, mean in self.means.items()}


def seed_means(rows: Sequence[Row]) -> Iterator[Point]:
    """The means over the rows of each stage and step, which differ in the seed; without text."""
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        values = groups.setdefault((str(row["stage"]), int(row["step"])), {})
        for column, value in row.items():
            if column not in ("stage", "step", "seed") and not isinstance(value, str):
                values.setdefault(column, []).append(float(value))
    for (stage, step), values in groups.items():
        yield Point(stage, step, {k: sum(each) / len(each) for k, each in values.items()})
