"""The loop: a run that ends anywhere and is resumed equals one that was never interrupted."""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting import Counting, InMemory, nothing

from experiments.runtime import loop
from experiments.runtime.checkpoint import CheckpointMetadata
from experiments.runtime.files import SaveError
from experiments.runtime.targets import ConfigError
from experiments.runtime.task import Diverged
from experiments.trackers import Csv, Row, read_rows

Stores = dict[str, dict[int, Any]]


class Killed(BaseException):
    """Ends the loop where a kill would."""


class EventCsv(Csv):
    def __init__(self, path: Path, event: Callable[[str], None]) -> None:
        super().__init__(path)
        self._event = event

    def resume_from(self, rows: Sequence[Row]) -> None:
        self._event("before cut")
        super().resume_from(rows)
        self._event("after cut")

    def log(self, rows: Sequence[Row]) -> None:
        self._event("before log")
        super().log(rows)
        self._event("after log")


def two_stages(**changes: Any) -> list[Counting]:
    return [Counting("first", **changes), Counting("second", begins_from="first", **changes)]


def train(
    stages: Sequence[Counting],
    folder: Path,
    stores: Stores,
    event: Callable[[str], None] = nothing,
    **arguments: Any,
) -> bool:
    planned = loop.plan(stages, lambda name: InMemory(stores[name], event))
    metrics = folder / "metrics.csv"
    return loop.train(planned, metrics, [EventCsv(metrics, event)], **{"every": 4, **arguments})


def one_chunk(stages: Sequence[Counting], folder: Path, stores: Stores) -> bool:
    return train(stages, folder, stores, should_stop=lambda: any(stage.chunks for stage in stages))


def new_stores() -> Stores:
    return defaultdict(dict)


def without_times(path: Path) -> list[str]:
    """The lines of metrics.csv without the columns time/*, header included."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    kept = [i for i, column in enumerate(lines[0]) if not column.startswith("time/")]
    return ["|".join(line[i] for i in kept) for line in lines]


def final_states(stores: Stores) -> dict[str, Any]:
    return {name: store[max(store)][1] for name, store in stores.items()}


def assert_same_run(folder: Path, stores: Stores, other: Path, other_stores: Stores) -> None:
    assert without_times(folder / "metrics.csv") == without_times(other / "metrics.csv")
    np.testing.assert_equal(final_states(stores), final_states(other_stores))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stores, list[str]]:
    """An uninterrupted run, and the names of all moments at which it could have been killed."""
    folder, stores, events = tmp_path_factory.mktemp("whole"), new_stores(), []
    assert train(two_stages(event=events.append), folder, stores, events.append)
    return folder, stores, events


def test_rows_of_a_whole_run(whole: tuple[Path, Stores, list[str]]) -> None:
    folder, stores, _ = whole
    lines = without_times(folder / "metrics.csv")
    assert lines[0] == "stage|step|seed|x|late|note|final"
    rows = read_rows(folder / "metrics.csv")
    assert [row["step"] for row in rows] == 2 * [2, 2, 4, 4, 6, 6, 7, 7, 7]
    assert rows[-1]["note"] == 'a, "b"'
    assert rows[-1]["final"] == float(stores["second"][7][1]["x"][2])
    assert list(stores["first"]) == [4, 7]  # every 4 steps and at the end


def test_killed_at_any_moment_and_resumed(
    whole: tuple[Path, Stores, list[str]], tmp_path: Path
) -> None:
    whole_folder, whole_stores, events = whole
    assert len(events) > 40
    for moment in range(len(events)):
        folder, stores, seen = tmp_path / str(moment), new_stores(), []
        folder.mkdir()

        def event(name: str, moment: int = moment, seen: list[str] = seen) -> None:
            seen.append(name)
            if len(seen) == moment + 1:
                raise Killed

        with pytest.raises(Killed):
            train(two_stages(event=event), folder, stores, event)
        assert train(two_stages(), folder, stores)
        assert_same_run(folder, stores, whole_folder, whole_stores)


def test_killed_within_a_line_of_metrics(
    whole: tuple[Path, Stores, list[str]], tmp_path: Path
) -> None:
    stores = new_stores()
    one_chunk(two_stages(), tmp_path, stores)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write('first,4,0,"1.2')
    (tmp_path / "metrics.csv.new").write_text("stage,st")
    assert train(two_stages(), tmp_path, stores)
    assert_same_run(tmp_path, stores, *whole[:2])


def test_stopped_after_every_chunk(whole: tuple[Path, Stores, list[str]], tmp_path: Path) -> None:
    stores, chunks = new_stores(), []
    for chunk in range(8):
        stages = two_stages()
        assert one_chunk(stages, tmp_path, stores) == (chunk == 7)
        new = [each for stage in stages for each in stage.chunks]
        assert len(new) == 1
        chunks += new
    assert chunks == 2 * [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert_same_run(tmp_path, stores, *whole[:2])


def test_finished_stages_are_not_run_again(
    whole: tuple[Path, Stores, list[str]], tmp_path: Path
) -> None:
    stores = new_stores()
    first = Counting("first")
    assert train([first], tmp_path, stores)
    events: list[str] = []
    assert train([Counting("first", event=events.append)], tmp_path, stores)
    assert events == []
    # Its final state is read only when a later stage asks for it.
    assert train([Counting("first", event=events.append), Counting("alone")], tmp_path, stores)
    assert events == []
    later = Counting("second", begins_from="first")
    assert train([Counting("first", event=events.append), later], tmp_path, stores)
    assert events == ["init"]  # for the structure of what is restored
    np.testing.assert_equal(final_states(stores)["second"], final_states(whole[1])["second"])


def test_longer_run_continues_on_the_same_grid(tmp_path: Path) -> None:
    stores, longer = new_stores(), Counting("first", num_steps=12)
    train([Counting("first", num_steps=7)], tmp_path, stores)
    assert train([longer], tmp_path, stores)
    assert longer.chunks == [(7, 1), (8, 2), (10, 2)]
    direct = new_stores()
    (tmp_path / "direct").mkdir()
    train([Counting("first", num_steps=12)], tmp_path / "direct", direct)
    np.testing.assert_equal(final_states(stores), final_states(direct))


def test_shorter_than_what_is_done(tmp_path: Path) -> None:
    stores = new_stores()
    one_chunk([Counting("first")], tmp_path, stores)  # to step 2
    with pytest.raises(ConfigError, match=r"first must have at least 3 steps, .* got 2"):
        train([Counting("first", num_steps=2)], tmp_path, stores)
    assert train([Counting("first", num_steps=3)], tmp_path, stores)
    assert train([Counting("first", num_steps=3)], tmp_path, stores)
    with pytest.raises(ConfigError, match="at least 3 steps"):
        train([Counting("first", num_steps=2)], tmp_path, stores)


def test_longer_pretraining_after_others_began_from_it(tmp_path: Path) -> None:
    stores = new_stores()
    train(two_stages(), tmp_path, stores)
    stages = [Counting("first", num_steps=9), Counting("second", begins_from="first")]
    with pytest.raises(ConfigError, match="first must keep its 7 steps, as second began from"):
        train(stages, tmp_path, stores)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Counting("a"), Counting("a")], "unique"),
        ([Counting("a/b")], "letters"),
        ([Counting("..")], "letters"),
        ([Counting("a", num_steps=0)], "num_steps of stage a must be >= 1, got 0"),
        ([Counting("a", steps_per_chunk=0)], "steps_per_chunk of stage a must be >= 1"),
    ],
)
def test_bad_stages(stages: list[Counting], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(stages, tmp_path, new_stores())


def test_lost_rows_are_an_error(tmp_path: Path) -> None:
    stores = new_stores()
    train([Counting("first")], tmp_path, stores)
    lines = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.csv").write_text("".join(lines[:-1]))
    with pytest.raises(SaveError, match="has 8 rows, but had 9"):
        train([Counting("first")], tmp_path, stores)


def test_full_disk_is_a_save_error(tmp_path: Path) -> None:
    def event(name: str) -> None:
        if name == "before log":
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"cannot write metrics: .*No space left"):
        train([Counting("first")], tmp_path, new_stores(), event)


def test_mark_is_json_with_the_iterator(tmp_path: Path) -> None:
    stores = new_stores()
    train(two_stages(), tmp_path, stores, every=1)
    metadata = InMemory(stores["second"]).latest()
    expected = CheckpointMetadata(7, 18, metadata.seconds, True, {"first": 7}, {"next": 7})
    assert metadata == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32("nan")])
@pytest.mark.parametrize("where", ["advance", "finish"])
def test_a_metric_that_is_not_finite_ends_the_run_unsaved(
    where: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, stage = new_stores(), Counting("first")
    original = getattr(stage, where)

    def broken(*arguments: Any) -> Any:
        if where == "finish":
            return [*original(*arguments), {"seed": 1, "loss": value}]
        state, rows = original(*arguments)
        return state, [{**row, "loss": value} if "late" in row else row for row in rows]

    monkeypatch.setattr(stage, where, broken)
    step = 7 if where == "finish" else 6
    with pytest.raises(
        Diverged, match=rf"stage first: loss of seed 1 is \w+ at step {step}; last .* step 4 of "
    ):
        train([stage], tmp_path, stores)
    assert list(stores["first"]) == [4]
    assert train([Counting("first")], tmp_path, stores)


def test_learned_arrays_are_looked_at_before_they_are_saved(tmp_path: Path) -> None:
    class Learning(Counting):
        def learned(self, state: Any) -> Any:
            return {"a": state["x"], "b": [state["x"] / (len(self.chunks) < 3)]}

    stores = new_stores()
    with pytest.raises(Diverged, match=r"stage first: b.0 is not finite at step 7; last"):
        train([Learning("first")], tmp_path, stores)
    assert list(stores["first"]) == [4]
