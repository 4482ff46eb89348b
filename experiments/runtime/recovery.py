"""What a resumed run starts from: whole checkpoints of one moment, and the rows up to it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints
from experiments.runtime.files import SaveError
from experiments.runtime.targets import ConfigError
from experiments.trackers import Row, RowsDigest, read_rows


class Record:
    """The facts about a run that every checkpoint stores, and that a resumed run must match.

    Attributes:
      folder: Folder of the run.
      config: Values of the configuration that must not change, as JSON, by their full keys.
      edited: Whether the user says that the configuration was changed on purpose.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, edited: bool) -> None:
        self.folder = folder
        self.config = {key: json.dumps(value) for key, value in config.items()}
        self.edited = edited

    def facts(self, rows: RowsDigest) -> dict[str, Any]:
        """The facts that a checkpoint stores; `rows` is the digest of the rows written so far."""
        return {"config": self.config, "rows": str(rows)}

    def recover(
        self, stages: Mapping[str, Checkpoints], say: Callable[[str], None] = print
    ) -> None:
        """Finds the newest moment that all stages can continue from, and drops what came later.

        Newer checkpoints are set aside. `say` gets one line if a checkpoint is damaged.

        Raises:
          SaveError: No checkpoint can be used, or metrics.csv was changed.
          ConfigError: config.yaml was changed.
        """
        damaged = [
            f"{checkpoints.folder / str(step)} ({reason})"
            for checkpoints in stages.values()
            for step, reason in checkpoints.damaged.items()
        ]
        saved = [
            (metadata.num_rows, metadata.step, name)
            for name, checkpoints in stages.items()
            for metadata in checkpoints.all_metadata()
        ]
        rows = self._rows()
        if saved:
            num_rows, step, name = max(saved)
            self._compare(stages[name].facts(step), rows[:num_rows], num_rows)
        for moment in sorted({num_rows for num_rows, _, _ in saved}, reverse=True):
            # A moment is a number of rows: the stages at it must have written these and no more.
            chosen = {name: _newest(each, moment) for name, each in stages.items()}
            if _belong_together(chosen, rows[:moment]):
                break
        else:
            if damaged:
                raise SaveError(f"no checkpoint to continue from; damaged: {', '.join(damaged)}")
            return
        for name, checkpoints in reversed(list(stages.items())):
            for step in (
                *(metadata.step for metadata in checkpoints.all_metadata()),
                *checkpoints.damaged,
            ):
                if step > chosen[name].step:
                    checkpoints.set_aside(step)
        if damaged:
            used = ", ".join(f"step {metadata.step} of {name}" for name, metadata in chosen.items())
            say(f"damaged: {', '.join(damaged)}; continuing from {used}")

    def _rows(self) -> list[Row]:
        try:
            return read_rows(self.folder / "metrics.csv")
        except (OSError, ValueError) as error:
            raise SaveError(str(error)) from error

    def _compare(self, facts: Mapping[str, Any], rows: Sequence[Row], num_rows: int) -> None:
        digest = RowsDigest()
        digest.update(rows)
        if len(rows) < num_rows or str(digest) != facts["rows"]:
            raise SaveError(
                f"{self.folder / 'metrics.csv'} was changed: the {num_rows} rows at the last "
                "checkpoint were others; put them back"
            )
        if self.edited:
            return
        for key, value in facts["config"].items():
            if (now := self.config.get(key, "missing")) != value:
                raise edited(self.folder, f"{key} was {value} at the last checkpoint, is {now}")


def edited(folder: Path, what: str) -> ConfigError:
    """The error for a config.yaml that is not what a run wrote."""
    return ConfigError(
        f"{folder / 'config.yaml'} was changed: {what}; put it back, or add edited=config.yaml if "
        "the change is meant"
    )


def check_effect(folder: Path, planned: Sequence[Any], say: Callable[[str], None]) -> None:
    """Says which stages were finished before config.yaml was changed, as they stay as they are.

    Raises ConfigError if all were: the folder would say of them what is not so.
    """
    done = [
        stage.name
        for stage, _, metadata in planned
        if metadata.finished and metadata.step == stage.num_steps
    ]
    if len(done) == len(planned):
        raise ConfigError(
            f"{folder / 'config.yaml'} was changed after all was done, which nothing is trained "
            "with; put it back, or start a new run"
        )
    if done:
        say(f"finished before config.yaml was changed, and not trained again: {', '.join(done)}")


def _newest(checkpoints: Checkpoints, num_rows: int) -> CheckpointMetadata:
    """The metadata of the newest checkpoint that was written after at most `num_rows` rows."""
    return max(
        (metadata for metadata in checkpoints.all_metadata() if metadata.num_rows <= num_rows),
        key=lambda metadata: metadata.step,
        default=CheckpointMetadata(),
    )


def _belong_together(chosen: Mapping[str, CheckpointMetadata], rows: Sequence[Row]) -> bool:
    """Whether no stage wrote any of `rows` after its checkpoint; it would write them twice."""
    return all(
        row["stage"] != name
        for name, metadata in chosen.items()
        for row in rows[metadata.num_rows :]
    )
