"""The protocols of an experiment: a task, and the stages that it consists of."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from experiments.trackers import Row

State = Any  # a pytree of arrays


class Stage(Protocol):
    """A resumable part of an experiment, such as the training of one method from all seeds.

    Attributes:
      name: Name of the stage in metrics.csv, and of its folder below checkpoints/.
      num_steps: Number of steps, at least 1.
      steps_per_chunk: Number of steps in one call of `advance`; the last chunk may be shorter.
    """

    name: str
    num_steps: int
    steps_per_chunk: int

    def init(self, final: Mapping[str, State]) -> State:
        """The state before the first step; `final[name]` is the final state of an earlier stage.

        A resumed run calls it too: the result gives the structure, the shapes and the shardings of
        the state to restore.
        """

    def batches(self) -> Iterator[Any] | None:
        """A new iterator over batches, or None if the stage needs none.

        Its `get_state()` returns JSON, and `set_state` continues from there.
        """

    def advance(
        self, state: State, batches: Any, step: int, num_steps: int
    ) -> tuple[State, list[Row]]:
        """Trains `num_steps` steps from `step` on; returns the new state and rows of metrics.

        Everything that changes is in `state` and `batches`. A row holds `seed` and metrics, the
        main metric first. The loop adds `stage`, `time/*` and, unless the row has a `step`, the
        step at the end of the chunk. A metric that is undefined is left out: NaN or infinity ends
        the run.
        """

    def finish(self, state: State) -> list[Row]:
        """Rows of the final evaluation, logged at step `num_steps`."""


class Table(NamedTuple):
    """A table for the console."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Summary(NamedTuple):
    """The result of an experiment: `values`, which go to summary.json, and a table."""

    values: dict[str, Any]
    table: Table


class Task(Protocol):
    """An experiment: a dataclass whose fields are its configuration."""

    def validate(self) -> None:
        """Raises `FieldError` for an invalid value, before data is loaded or compiled."""

    def stages(self) -> Sequence[Stage]:
        """The stages in the order of training; data is loaded here or later."""

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
    """A stage that saves more than rows, such as trained policies."""

    def save(self, state: State, folder: Path) -> None:
        """Writes files below the run's `folder`, at the end of the stage."""


@runtime_checkable
class Learns(Protocol):
    """A stage whose state holds arrays that must stay finite, such as parameters."""

    def learned(self, state: State) -> Any:
        """These arrays as a pytree, which is checked before every checkpoint."""


class Diverged(RuntimeError):  # noqa: N818
    """Training led to a number that is not finite. The message says which, and at which step."""
