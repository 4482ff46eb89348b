"""What an experiment must offer: a task, and the stages that it consists of."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from experiments.trackers import Row

State = Any  # a pytree of arrays


class Stage(Protocol):
    """A resumable piece of an experiment: pre-training, or one method's training, seeds at once.

    Attributes:
      name: the `stage` column of metrics.csv and the folder below checkpoints/.
      num_steps: its length, at least 1.
      steps_per_chunk: steps of one call of `advance`; the last chunk may be shorter.
    """

    name: str
    num_steps: int
    steps_per_chunk: int

    def init(self, final: Mapping[str, State]) -> State:
        """The state before the first step.

        `final[name]` is the final state of an earlier stage. Called on resume too, where its result
        gives the structure and the placement of the restored state.
        """

    def batches(self) -> Iterator[Any] | None:
        """A new iterator, whose `get_state()` is JSON-able and undone by `set_state`, or None."""

    def advance(
        self, state: State, batches: Any, step: int, num_steps: int
    ) -> tuple[State, list[Row]]:
        """Trains `num_steps` further, after `step`.

        All that changes is in `state` and `batches`. Rows hold `seed` and metrics, the main one
        first; they get `stage`, `step` (that of the end of the chunk unless given) and `time/*`. A
        row leaves out a metric that is undefined: one that is NaN or infinite ends the run.
        """

    def finish(self, state: State) -> list[Row]:
        """Rows of the final evaluation, logged at step `num_steps`."""


class Table(NamedTuple):
    """A table for the console."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Summary(NamedTuple):
    """What an experiment found: `values` are JSON-able and go to summary.json."""

    values: dict[str, Any]
    table: Table


class Task(Protocol):
    """An experiment: a dataclass whose fields are its configuration."""

    def validate(self) -> None:
        """Raises ValueError ("NAME must be ..., got ...") before data is loaded or compiled."""

    def stages(self) -> Sequence[Stage]:
        """The stages in the order in which they are trained; data is loaded here or later."""

    def summarize(self, rows: list[Row]) -> Summary:
        """The result, from all rows of metrics.csv."""

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes PNG files into `folder`."""


@runtime_checkable
class Compiles(Protocol):
    """A stage whose program can be compiled while the stage before it trains."""

    def compiled(self) -> Stage:
        """The same stage with its program compiled; called in another thread than the rest."""


@runtime_checkable
class Saves(Protocol):
    """A stage that leaves more behind than rows, such as trained policies."""

    def save(self, state: State, folder: Path) -> None:
        """Writes below the run's `folder`, at the end of the stage."""


@runtime_checkable
class Learns(Protocol):
    """A stage whose state holds arrays that must stay finite, such as parameters."""

    def learned(self, state: State) -> Any:
        """These arrays, a pytree; looked at before every checkpoint."""


class Diverged(RuntimeError):  # noqa: N818
    """Training came to numbers that are not finite; says what, and at which step."""
