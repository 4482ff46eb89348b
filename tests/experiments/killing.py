"""Kills an experiment at random moments and resumes it, as tests of any experiment may."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of an experiment."""
    return [sys.executable, "-m", "experiments.run", *arguments]


def environment() -> dict[str, str]:
    """The environment of a user: one CPU device, not the eight of the tests."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def train_to_end(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs an experiment to its end."""
    return subprocess.run(
        command(arguments), env=environment(), capture_output=True, text=True, check=False
    )


def assert_survives_kills(overrides: Sequence[str], folder: Path, num_kills: int = 10) -> None:
    """Asserts that a run killed `num_kills` times at random moments equals an uninterrupted one.

    `overrides` is the command line of the experiment ("+exp=NAME", ...), without hydra.run.dir.
    Compared are the newest checkpoint of every stage, bit by bit, metrics.csv without time/*, and
    the results in summary.json. Three kills in ten come before the first new row of metrics.
    """
    whole, killed = folder / "whole", folder / "killed"
    result = train_to_end([*overrides, f"hydra.run.dir={whole}"])
    assert result.returncode == 0, result.stderr
    training = json.loads((whole / "summary.json").read_text())["seconds"]
    moments = random.Random(0)
    for _ in range(num_kills):
        process = subprocess.Popen(
            command(_start_or_resume(overrides, killed)),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        wait_for_rows, before = moments.random() > 0.3, _num_lines(killed)
        while wait_for_rows and process.poll() is None and _num_lines(killed) <= before:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0, training / num_kills))
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr.decode()
    result = train_to_end(_start_or_resume(overrides, killed))
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", result.stderr
    assert_same_runs(whole, killed)


def _num_lines(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _start_or_resume(overrides: Sequence[str], folder: Path) -> list[str]:
    if (folder / "config.yaml").exists():
        return [f"resume={folder}"]
    return [*overrides, f"hydra.run.dir={folder}"]


def assert_same_runs(folder: Path, other: Path) -> None:
    """Asserts that two runs ended in the same states and logged the same metrics."""
    assert metrics(folder) == metrics(other)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (folder, other)]
    assert summaries[0]["result"] == summaries[1]["result"]
    stages = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert stages == sorted(path.name for path in (other / "checkpoints").iterdir())
    for stage in stages:
        state, other_state = (
            newest_state(each / "checkpoints" / stage) for each in (folder, other)
        )
        np.testing.assert_equal(state, other_state)


def metrics(folder: Path) -> list[list[str]]:
    """The lines of metrics.csv, header included, without the columns time/*."""
    with (folder / "metrics.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    kept = [i for i, column in enumerate(lines[0]) if not column.startswith("time/")]
    return [[line[i] for i in kept] for line in lines]


def newest_state(stage: Path) -> Any:
    """The state in the newest checkpoint of a stage, as NumPy arrays."""
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(stage.absolute(), item_handlers=handlers) as manager:
        step = manager.latest_step()
        tree = manager.item_metadata(step)["state"].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restore = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return manager.restore(step, args=restore)["state"]
