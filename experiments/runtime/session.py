"""One run in its folder: from a checked configuration to the final table."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import platformdirs
import rich.table
from rich.console import Console

from experiments.runtime import loop, recovery
from experiments.runtime.building import argument_error, build, key_of_argument
from experiments.runtime.checkpoint import Checkpoints
from experiments.runtime.config import groups, save_config
from experiments.runtime.digests import unsealed
from experiments.runtime.files import SaveError, write_text
from experiments.runtime.overrides import fixed_part
from experiments.runtime.progress import make_progress
from experiments.runtime.stopping import StopSignals
from experiments.runtime.targets import ConfigError
from experiments.runtime.task import Table, Task
from experiments.trackers import Csv, Tracker, read_rows
from trustjax._checks import InputError
from trustjax.data import DataError
from trustjax.models import CheckpointError

_PACKAGES = ("trustjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LIBRARIES = ("optax", "flax")  # what they refuse is a value of the configuration


def train_in_folder(
    folder: Path, config: dict[str, Any], *, resumed: bool, edited: bool = False
) -> int:
    """Trains the task of `config` in `folder`, or continues to; returns the exit code.

    The exit code is 0 when all is done, and 128 plus the number of the signal after SIGINT or
    SIGTERM.

    Raises:
      ConfigError: The configuration has invalid values; the folder is in use or holds a run
        already; or config.yaml was changed, unless `edited` says that this is meant.
      SaveError: The folder cannot be written, or none of its checkpoints is intact.
      Diverged: The training diverged.
    """
    if resumed and not edited:
        try:
            unsealed(folder / "config.yaml")
        except ValueError as error:
            raise recovery.edited(folder, str(error)) from error
    _set_up_jax(config["precision"])
    task: Task = build(config["task"], "task")
    makers: dict[str, Callable[[Path], Tracker]] = build(config["tracker"], "tracker")
    try:
        task.validate()
    except ValueError as error:
        raise _wrong_argument(error, config, resumed=resumed) from error
    console = Console(width=None if sys.stdout.isatty() else 120)
    with _locked(folder), StopSignals() as signals, _input_errors(config, resumed=resumed):
        if not resumed:
            environment = _environment(folder)
        try:
            stages = task.stages()
        # A value that does not fit the data is one line; any other error keeps its traceback.
        except ValueError as error:
            if not isinstance(error, InputError) and _raised_in(error) not in _LIBRARIES:
                raise
            raise _wrong_argument(error, config, resumed=resumed) from error
        metrics = Csv(folder / "metrics.csv")
        # What is measured at once does not go on: another length would reach some stages alone.
        at_once = all(stage.num_steps == 1 for stage in stages)
        record = recovery.Record(folder, fixed_part(config, lengths=at_once), edited=edited)
        planned = loop.plan(
            stages,
            lambda stage: Checkpoints(
                folder / "checkpoints" / stage,
                config["checkpoint"]["keep"],
                lambda: record.facts(metrics.digest),
            ),
            lambda opened: record.recover(opened, functools.partial(_say, console)),
        )
        if edited:
            recovery.check_effect(folder, planned, functools.partial(_say, console))
        with _writing(folder):
            if not resumed:
                write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
            save_config(config, folder / "config.yaml")
        progress = make_progress({stage.name: stage.num_steps for stage in stages}, console)
        trackers = [metrics, *(make(folder) for make in makers.values()), progress]
        with contextlib.ExitStack() as stack:
            for tracker in trackers:
                stack.callback(tracker.close)
            for _, checkpoints, _ in planned:
                stack.callback(checkpoints.close)
            done = loop.train(
                planned,
                metrics.path,
                trackers,
                every=config["checkpoint"]["every"],
                should_stop=lambda: signals.received is not None,
            )
            seconds = sum(checkpoints.latest().seconds for _, checkpoints, _ in planned)
        if done:
            with _writing(folder):
                _conclude(task, folder, config["exp"], seconds, console)
        else:
            _say(console, f"stopped; continue with: {resume_command(folder)}")
    return 0 if done else 128 + (signals.received or 0)


@contextlib.contextmanager
def _input_errors(config: Mapping[str, Any], *, resumed: bool) -> Iterator[None]:
    """Makes one line of errors about data and checkpoints, whenever a stage reads them."""
    try:
        yield
    except (InputError, DataError, CheckpointError) as error:
        raise _wrong_argument(error, config, resumed=resumed) from error


def _wrong_argument(error: Exception, config: Mapping[str, Any], *, resumed: bool) -> ConfigError:
    """The error for an argument that the task, or an object that it holds, refused.

    It names the key to override. For a value from a config group that key is in the root, unless
    the run is resumed from its own config.yaml.
    """
    key = key_of_argument(error, config["task"], "task")
    _, _, below = key.partition(".")
    if not resumed and below.partition(".")[0] in groups():
        key = below
    return argument_error(key, error)


def _raised_in(error: Exception) -> str:
    """The package whose code raised the error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0]


def resume_command(folder: Path) -> str:
    """The command that continues the run in `folder`."""
    return f"python -m experiments.run {shlex.quote(f'resume={_short(folder)}')}"


def _short(folder: Path) -> Path:
    inside = folder.absolute().is_relative_to(Path.cwd())
    return folder.absolute().relative_to(Path.cwd()) if inside else folder.absolute()


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _set_up_jax(precision: str) -> None:
    jax.config.update("jax_enable_x64", precision == "float64")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = platformdirs.user_cache_path("trustjax") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX compiles a program again if its cache entry was written only in part.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(f"{folder} is in use by another run") from error
    except OSError as error:
        raise SaveError(f"cannot lock {folder}: {error}") from error
    try:
        yield
    finally:
        if not (folder / "config.yaml").exists():  # nothing began: leave nothing behind
            (folder / ".lock").unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write in {folder}: {error}") from error


def _environment(folder: Path) -> dict[str, Any]:
    """What environment.json says of a run that starts now.

    Raises ConfigError if the folder holds another run.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} holds a run already; continue it with: {resume_command(folder)}"
        )
    return {
        "command": shlex.join([Path(sys.executable).name, "-m", "experiments.run", *sys.argv[1:]]),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "versions": _versions(),
    }


def _commit() -> dict[str, str | bool] | None:
    """The commit of the code, and whether files were changed since; None without a checkout."""
    root = Path(__file__).parents[2]
    answers = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            found = subprocess.run(
                ("git", "-C", str(root), *command), capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(found.stdout.strip())
    return {"hash": answers[0], "changed": bool(answers[1])}


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _conclude(task: Task, folder: Path, name: str, seconds: float, console: Console) -> None:
    """Writes summary.json and the plots, and prints the table."""
    rows = read_rows(folder / "metrics.csv")
    summary = task.summarize(rows)
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    task.plot(rows, plots)
    content = {
        "exp": name,
        "result": _finite(summary.values),
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "versions": _versions(),
    }
    write_text(folder / "summary.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    console.print(_drawn(summary.table))
    _say(console, str(_short(folder)))


def _drawn(table: Table) -> rich.table.Table:
    """The table, in which columns of words such as names stay whole while the others get narrow."""
    drawn = rich.table.Table(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        words = "".join([column, *(row[index] for row in table.rows)])
        drawn.add_column(column, no_wrap=not {" ", "\n"} & {*words})
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
