"""Trackers of other services, offline, with the real packages: what was logged is read back."""

import importlib
import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from experiments.runtime.config import flat
from experiments.runtime.targets import ConfigError, locate
from experiments.trackers import Row, services

CONFIG = {"exp": "two_minima", "seed": 3, "task": {"_target_": "x.Task", "unseen": ["a", "b"]}}
ROWS: list[Row] = [
    {"stage": stage, "step": step, "seed": seed, "loss": loss + seed, "accuracy/noise:3": 0.5}
    for stage, losses in (("sam", (4.0, 2.0)), ("tram_0.5", (3.0, math.nan)))
    for step, loss in zip((10, 20), losses, strict=True)
    for seed in (0, 1)
]
FINAL: list[Row] = [{"stage": "tram_0.5", "step": 20, "seed": 0, "final/loss": 7.0, "note": "x"}]
MEANS = {
    "sam/loss": {10: 4.5, 20: 2.5},
    "sam/accuracy/noise:3": {10: 0.5, 20: 0.5},
    "tram_0.5/loss": {10: 3.5, 20: math.nan},
    "tram_0.5/accuracy/noise:3": {10: 0.5, 20: 0.5},
    "tram_0.5/final/loss": {20: 7.0},
}


class Found(NamedTuple):
    """A run in a service's store."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, dict[int, float]]


def add(metrics: dict[str, dict[int, float]], key: str, step: int, value: float) -> None:
    assert step not in metrics.setdefault(key, {}), f"{key} is twice at step {step}"
    metrics[key][step] = value


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: chunks with checksum, length, kind, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read_wandb(folder: Path) -> list[Found]:
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        metrics: dict[str, dict[int, float]] = {}
        name, config, axes = "", {}, {}
        for record in wandb_records(path):
            if record.HasField("run"):
                name = record.run.display_name
                config = {u.key: yaml.safe_load(u.value_json) for u in record.run.config.update}
            if record.HasField("metric") and record.metric.step_metric:
                axes[record.metric.glob_name] = record.metric.step_metric
            if record.HasField("history"):
                items = {
                    ".".join(item.nested_key): float(item.value_json)
                    for item in record.history.item
                }
                assert axes == {"*": "step"}
                for key in items:
                    if key[0] != "_" and key != "step":
                        add(metrics, key, int(items["step"]), items[key])
        config.pop("_wandb", None)
        found.append(Found(name, flat(config), metrics))
    return sorted(found, key=lambda run: run.name)


def read_mlflow(folder: Path) -> list[Found]:
    with services.quiet():
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{folder.absolute()}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("two_minima")
        assert experiment is not None
        found = []
        for run in client.search_runs([experiment.experiment_id]):
            metrics: dict[str, dict[int, float]] = {}
            for key in run.data.metrics:
                for each in client.get_metric_history(run.info.run_id, key):
                    add(metrics, key, each.step, each.value)
            config = {key: yaml.safe_load(text) for key, text in run.data.params.items()}
            found.append(Found(run.info.run_name, config, metrics))
    return found


def read_trackio(folder: Path) -> list[Found]:
    with services.environment_default("TRACKIO_DIR", folder.absolute() / "trackio"):
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
    found = []
    for run in trackio.Api().runs("trustjax"):
        metrics: dict[str, dict[int, float]] = {}
        for values in SQLiteStorage.get_logs("trustjax", run.name, run_id=run.id):
            for key, value in values.items():
                if key not in ("step", "timestamp"):
                    add(metrics, key, values["step"], value)
        config = {key: value for key, value in run.config.items() if key[0] != "_"}
        found.append(Found(run.name, flat(config), metrics))
    return found


READ: dict[str, Callable[[Path], list[Found]]] = {
    "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio
}  # fmt: skip

KILLED = """
import os, pathlib, signal, time
from experiments.trackers.{name} import {kind} as Kind
tracker = Kind(pathlib.Path("../runs/one"))
tracker.resume_from([])
tracker.log({rows})
time.sleep(1)  # for the threads and processes that write
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home and working folder of a user who is offline and has set nothing else."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "XDG_", "HF_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(home)
    return home


def begin(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_killed_and_resumed(name: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(name, reason="needs the extra trackers")
    one = begin(home.parent / "runs" / "one")
    code = KILLED.format(name=name, kind=name.capitalize(), rows=ROWS[:6])
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout + killed.stderr == ""

    kind = getattr(importlib.import_module(f"experiments.trackers.{name}"), name.capitalize())
    tracker = kind(one)
    tracker.resume_from(ROWS[:4])  # the checkpoint was before the last rows
    tracker.log(ROWS[4:6])
    tracker.log(ROWS[6:])
    tracker.log(FINAL)
    tracker.close()
    *earlier, found = READ[name](one)
    assert (found.name, found.config) == ("one-2", flat(CONFIG))
    np.testing.assert_equal(found.metrics, MEANS)
    assert len(earlier) == (name == "wandb")  # which keeps what was killed

    assert capfd.readouterr() == ("", "")
    assert not list(home.iterdir())
    assert {path.name for path in one.iterdir()} == {"config.yaml", name}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_a_sweep_have_their_own_folders(name: str, home: Path) -> None:
    """Though both packages take theirs from the environment once a process."""
    pytest.importorskip(name, reason="needs the extra trackers")
    kind = getattr(importlib.import_module(f"experiments.trackers.{name}"), name.capitalize())
    folders = [begin(home.parent / "runs" / each) for each in ("one", "two")]
    for folder in folders:
        tracker = kind(folder)
        tracker.resume_from([])
        tracker.log(ROWS[:4])
        tracker.close()
    for folder in folders:
        (found,) = READ[name](folder)
        assert found.name == folder.name
        assert found.metrics == {key: MEANS[key] for key in list(MEANS)[:2]}


def test_what_fails_there_is_an_error_of_the_system(home: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb", reason="needs the extra trackers")
    from experiments.trackers.wandb import Wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = Wandb(begin(home.parent / "run"))
    with pytest.raises(OSError, match="Weights & Biases: No API key"):
        tracker.resume_from([])
    tracker.close()


@pytest.mark.parametrize("name", READ)
def test_a_tracker_that_was_never_begun_can_be_closed(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name, reason="needs the extra trackers")
    module = importlib.import_module(f"experiments.trackers.{name}")
    getattr(module, name.capitalize())(tmp_path).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", READ)
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, f"experiments.trackers.{name}", raising=False)
    monkeypatch.delattr(f"experiments.trackers.{name}", raising=False)
    with pytest.raises(ConfigError, match=rf"tracker: .* needs {name}: .*trustjax\[trackers\]"):
        locate(f"experiments.trackers.{name}.{name.capitalize()}", "tracker")
