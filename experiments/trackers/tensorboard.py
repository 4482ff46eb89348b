"""TensorBoard events."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from experiments.trackers.rows import Row, seed_means


class TensorBoard:
    """TensorBoard events below `folder/tensorboard`: one run per stage, so that curves overlay.

    Rows of the same step are averaged over the seeds. Events are on disk when `log` returns;
    tensorboardX's SummaryWriter would keep them in a thread for minutes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[str, RecordWriter] = {}
        self._last_steps: dict[str, int] = {}

    def resume_from(self, rows: Sequence[Row]) -> None:
        """Stores the last step of each stage: TensorBoard drops the events after it."""
        self._last_steps = {str(row["stage"]): int(row["step"]) for row in rows}

    def log(self, rows: Sequence[Row]) -> None:
        """Writes the mean over seeds of every step."""
        points = list(seed_means(rows))
        for stage, step, means in points:
            values = [Summary.Value(tag=k, simple_value=v) for k, v in means.items()]
            _write(self._writer(stage), step=step, summary=Summary(value=values))
        for stage in {point.stage for point in points}:
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
