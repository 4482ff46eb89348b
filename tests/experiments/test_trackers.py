"""metrics.csv and TensorBoard."""

import math
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.trackers import Csv, Row, TensorBoard, read_rows

ROWS: list[Row] = [
    {"stage": "sam", "step": 10, "seed": 0, "loss": 0.1 + 0.2},
    {"stage": "sam", "step": 10, "seed": 1, "loss": 1e-300},
    {"stage": "sam", "step": 20, "seed": 0, "loss": 3.0, "note": 'a "b",\nc'},
]


def test_rows_round_trip(tmp_path: Path) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    assert read_rows(tracker.path) == []
    tracker.log(ROWS[:2])
    tracker.log(ROWS[2:])
    assert read_rows(tracker.path) == ROWS
    assert tracker.path.read_text().splitlines()[0] == "stage,step,seed,loss,note"


@pytest.mark.parametrize(
    "value",
    [0, -3, 2**70, 1.0, 0.1, -0.0, 1e22, 5e-324, math.inf, "007", "1e5", "1_0", "é", "True"],
)
def test_values_keep_their_type(value: float | int | str, tmp_path: Path) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    tracker.log([{"value": value}])
    (row,) = read_rows(tracker.path)
    assert repr(row["value"]) == repr(value)


def test_nan_is_read_as_nan(tmp_path: Path) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    tracker.log([{"value": math.nan}])
    (row,) = read_rows(tracker.path)
    assert math.isnan(float(row["value"]))


def test_new_columns_extend_the_header(tmp_path: Path) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    tracker.log([{"a": 1}])
    tracker.log([{"b": 2.5}, {"c": 3, "a": 4}])
    tracker.log([{"c": 5}])
    assert tracker.path.read_text() == "a,b,c\n1,,\n,2.5,\n4,,3\n,,5\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    tracker.log(ROWS)
    whole = tracker.path.read_bytes()
    for written in ("sam,30,0,0.1", "sam,30,0,0.1,é"):
        tracker.path.write_bytes(whole + written.encode()[:-1])
        assert read_rows(tracker.path) == ROWS
    tracker.path.write_bytes(b"stage,st")
    assert read_rows(tracker.path) == []


def test_cut_forgets_rows_and_their_columns(tmp_path: Path) -> None:
    first = Csv(tmp_path / "metrics.csv")
    first.resume_from([])
    first.log(ROWS[:2])
    before = first.path.read_text()
    first.log(ROWS[2:])
    resumed = Csv(first.path)
    resumed.resume_from(read_rows(first.path)[:2])
    assert first.path.read_text() == before
    resumed.log(ROWS[2:])
    assert read_rows(first.path) == ROWS


def test_a_file_that_cannot_be_renamed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Csv(tmp_path / "metrics.csv")
    tracker.resume_from([])
    tracker.log([{"a": 1}])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tracker.log([{"b": 2}])
    assert tracker.path.read_text() == "a\n1\n"


def events(folder: Path) -> list[Event]:
    """The events of all files in a folder, in the order in which they were written."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int(np.frombuffer(data[:8], np.uint64)[0])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_averages_over_seeds(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path)
    tracker.resume_from([])
    tracker.log([*ROWS[:2], {"stage": "sgd", "step": 10, "seed": 0, "loss": 7}])
    values = [v for e in events(tmp_path / "tensorboard" / "sam") for v in e.summary.value]
    assert [(v.tag, v.simple_value) for v in values] == [("loss", pytest.approx(0.15))]
    values = [v for e in events(tmp_path / "tensorboard" / "sgd") for v in e.summary.value]
    assert [(v.tag, v.simple_value) for v in values] == [("loss", 7.0)]
    tracker.close()


def test_tensorboard_purges_what_was_cut(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    first.resume_from([])
    first.log(ROWS)
    first.close()
    resumed = TensorBoard(tmp_path)
    resumed.resume_from(ROWS[:2])
    resumed.log(ROWS[2:])
    resumed.log([{"stage": "sgd", "step": 1, "loss": 0}])
    resumed.close()
    purges = [
        event.step
        for event in events(tmp_path / "tensorboard" / "sam")
        if event.session_log.status == SessionLog.START
    ]
    assert purges[-1] == 11  # the first step that was not kept
    assert [e.step for e in events(tmp_path / "tensorboard" / "sgd") if e.summary.value] == [1]
