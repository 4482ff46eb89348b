"""The training loop: how the stages of a task are trained, logged and resumed.

The order of writes makes a run resumable after a kill at any moment. Each chunk of a stage writes
its rows first, and the checkpoint that follows stores how many rows there are. A resumed run
truncates metrics.csv to the rows of the newest checkpoint and computes the lost chunks again. They
end at the same steps as before, so the same programs see the same batches.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints
from experiments.runtime.files import SaveError
from experiments.runtime.targets import ConfigError
from experiments.runtime.task import Compiles, Diverged, Learns, Saves, Stage, State
from experiments.trackers import Row, Tracker, read_rows


class Planned(NamedTuple):
    """A stage, its checkpoints, and the metadata of the newest one, which says how far it is."""

    stage: Stage
    checkpoints: Checkpoints
    metadata: CheckpointMetadata


def plan(
    stages: Sequence[Stage],
    open_checkpoints: Callable[[str], Checkpoints],
    recover: Callable[[Mapping[str, Checkpoints]], None] = lambda opened: None,
) -> list[Planned]:
    """Finds out how far each stage is; `open_checkpoints` takes the name of a stage.

    `recover` gets the checkpoints of all stages before they are read, and may set some aside.
    Raises ConfigError for invalid names or lengths, and for lengths that contradict a checkpoint.
    """
    names = [stage.name for stage in stages]
    lengths = {stage.name: stage.num_steps for stage in stages}
    for stage in stages:
        if not re.fullmatch(r"\w[\w.-]*", stage.name) or names.count(stage.name) > 1:
            raise ConfigError(
                f"stage names must be unique and of letters, digits, . _ -, got {names}"
            )
        for length in ("num_steps", "steps_per_chunk"):
            if (number := getattr(stage, length)) < 1:
                raise ConfigError(f"{length} of stage {stage.name} must be >= 1, got {number}")
    opened = {name: open_checkpoints(name) for name in names}
    recover(opened)
    planned = []
    for stage in stages:
        metadata = opened[stage.name].latest()
        done = metadata.step if metadata.finished else metadata.step + 1
        if metadata.step and stage.num_steps < done:
            raise ConfigError(
                f"stage {stage.name} must have at least {done} steps, as it is at step "
                f"{metadata.step}, got {stage.num_steps}"
            )
        for name, step in metadata.began_from.items():
            if lengths.get(name) != step:
                raise ConfigError(
                    f"stage {name} must keep its {step} steps, as {stage.name} began from its end, "
                    f"got {lengths.get(name)}"
                )
        planned.append(Planned(stage, opened[stage.name], metadata))
    return planned


def _is_done(stage: Stage, metadata: CheckpointMetadata) -> bool:
    return metadata.finished and metadata.step == stage.num_steps


class FinalStates(Mapping[str, State]):
    """The final states of the finished stages, read from their last checkpoints on demand.

    Attributes:
      asked: Length of every stage whose state was asked for.
    """

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self._done: dict[str, Planned] = {}
        self._like: dict[str, State] = {}

    def add(self, planned: Planned) -> None:
        """Makes the final state of a stage available."""
        self._done[planned.stage.name] = planned

    def __getitem__(self, name: str) -> State:
        stage, checkpoints, _ = self._done[name]
        self.asked[name] = stage.num_steps
        if name not in self._like:
            self._like[name] = _abstract(stage.init(self))
        return checkpoints.restore(self._like[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)


class _Compiler:
    """Compiles a stage in another thread while the one before it trains.

    On CPU that halves the time of a short experiment.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._following = {stage.name: following for stage, following in pairwise(stages)}
        self._compiled: dict[str, Future[Stage]] = {}

    def start_after(self, stage: Stage) -> None:
        """Starts on the stage that follows `stage`."""
        following = self._following.get(stage.name)
        if following is not None and isinstance(following, Compiles):
            self._compiled[following.name] = self._pool.submit(following.compiled)

    def result(self, stage: Stage) -> Stage:
        """The stage with its program, once that is compiled; as it is if nothing was started."""
        compiled = self._compiled.pop(stage.name, None)
        return stage if compiled is None else compiled.result()

    def close(self) -> None:
        """Starts no more; what is being compiled goes on, and nobody waits for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def train(
    stages: Sequence[Planned],
    metrics: Path,
    trackers: Sequence[Tracker],
    *,
    every: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains what is left of the stages, and returns whether all are done.

    Args:
      stages: The stages with their checkpoints, from `plan`.
      metrics: Path of metrics.csv, which one of the trackers writes.
      trackers: Get the rows of metrics, in this order.
      every: Number of steps between two checkpoints, which are written at the end of a chunk.
        There is always one at the end of a stage.
      should_stop: Asked after every chunk; if it says yes, a checkpoint is written and training
        ends.

    Raises:
      SaveError: The folder of the run cannot be written.
      Diverged: A stage diverged. The message names its last checkpoint.
    """
    log = _Log(trackers, num_rows=max((metadata.num_rows for _, _, metadata in stages), default=0))
    log.resume_from(metrics)
    final = FinalStates()
    with contextlib.closing(_Compiler([planned.stage for planned in stages])) as compiler:
        for planned in stages:
            done = _is_done(planned.stage, planned.metadata)
            if not done and (
                should_stop()
                or not _train_stage(
                    planned, final, compiler, log, metrics.parent, every, should_stop
                )
            ):
                return False
            final.add(planned)
    return True


class _Log:
    """Hands rows to all trackers and counts them."""

    def __init__(self, trackers: Sequence[Tracker], num_rows: int) -> None:
        self._trackers = trackers
        self.num_rows = num_rows

    def resume_from(self, metrics: Path) -> None:
        rows = read_rows(metrics)
        if len(rows) < self.num_rows:
            raise SaveError(
                f"{metrics} has {len(rows)} rows, but had {self.num_rows} at the last checkpoint"
            )
        self._call("resume_from", rows[: self.num_rows])

    def __call__(self, rows: list[Row]) -> None:
        self._call("log", rows)
        self.num_rows += len(rows)

    def _call(self, method: str, rows: list[Row]) -> None:
        for tracker in self._trackers:
            try:
                getattr(tracker, method)(rows)
            except OSError as error:
                raise SaveError(f"cannot write metrics: {error}") from error


def _begin(planned: Planned, final: FinalStates) -> tuple[State, Any, dict[str, int]]:
    """The state of a stage, its batches, and the steps of the stages that it began from."""
    stage, checkpoints, metadata = planned
    final.asked = {}
    batches: Any = stage.batches()
    if metadata.step == 0:
        return stage.init(final), batches, final.asked
    state = checkpoints.restore(_abstract(stage.init(final)))
    if batches is not None:
        batches.set_state(metadata.batches)
    return state, batches, dict(metadata.began_from)


def _train_stage(
    planned: Planned,
    final: FinalStates,
    compiler: _Compiler,
    log: _Log,
    folder: Path,
    every: int,
    should_stop: Callable[[], bool],
) -> bool:
    """Trains one stage; returns False if it was stopped before its end."""
    stage, checkpoints, metadata = planned
    started = time.perf_counter() - metadata.seconds
    state, batches, began_from = _begin(planned, final)
    compiler.start_after(stage)
    stage = compiler.result(stage)
    step = saved = metadata.step
    compiled: set[int] = set()  # lengths of the chunks that have been trained
    while step < stage.num_steps:
        chunk_started = time.perf_counter()
        # Chunks end at multiples of their size, also after a resume in the middle of one.
        end = min((step // stage.steps_per_chunk + 1) * stage.steps_per_chunk, stage.num_steps)
        labels: Row = {"stage": stage.name, "step": end}
        with _naming(stage, saved, checkpoints):
            state, rows = stage.advance(state, batches, step, end - step)
            rows = _finite_rows(labels, rows)
        now = time.perf_counter()
        times: Row = {"time/seconds": now - started}
        if end - step in compiled:  # the first chunk of a length spends its time on compilation
            times["time/steps_per_second"] = (end - step) / (now - chunk_started)
        compiled.add(end - step)
        log([row | times for row in rows])  # before the checkpoint, which counts these rows
        finished, stop = end == stage.num_steps, should_stop()
        saves = finished or stop or end // every > saved // every
        with _naming(stage, saved, checkpoints):
            if saves and isinstance(stage, Learns):
                _check_finite(stage.learned(state), end)
            last = _finite_rows(labels, stage.finish(state)) if finished else []
        if finished:
            log(last)
            _save(stage, state, folder)
        if saves:
            seconds = time.perf_counter() - started
            iterator = None if batches is None else batches.get_state()
            checkpoints.save(
                state,
                CheckpointMetadata(end, log.num_rows, seconds, finished, began_from, iterator),
            )
            saved = end
        step = end
        if stop:
            break
    return step == stage.num_steps


@contextlib.contextmanager
def _naming(stage: Stage, saved: int, checkpoints: Checkpoints) -> Iterator[None]:
    """Adds the stage and its last checkpoint to the message of `Diverged`."""
    try:
        yield
    except Diverged as error:
        whole = f"step {saved} of {checkpoints.folder}" if saved else "none"
        raise Diverged(f"stage {stage.name}: {error}; last checkpoint: {whole}") from error


def _finite_rows(labels: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows with their labels, as plain numbers. Raises Diverged if one is not finite."""
    labelled = [labels | _plain(row) for row in rows]
    for row in labelled:
        for metric, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                seed = f" of seed {row['seed']}" if "seed" in row else ""
                raise Diverged(f"{metric}{seed} is {value} at step {row['step']}")
    return labelled


def _check_finite(learned: Any, step: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(learned):
        if not np.isfinite(np.asarray(leaf)).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise Diverged(f"{name or 'what is learned'} is not finite at step {step}")


def _save(stage: Stage, state: State, folder: Path) -> None:
    if not isinstance(stage, Saves):
        return
    try:
        stage.save(state, folder)
    except OSError as error:
        raise SaveError(f"cannot write in {folder}: {error}") from error


def _abstract(state: State) -> State:
    """The shapes, dtypes and shardings of a state, without its memory."""

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(describe, state)


def _plain(row: Mapping[str, Any]) -> Row:
    """A row with Python numbers in place of array scalars, for trackers and JSON."""
    items = ((key, value.item() if hasattr(value, "item") else value) for key, value in row.items())
    return {key: int(value) if isinstance(value, bool) else value for key, value in items}
