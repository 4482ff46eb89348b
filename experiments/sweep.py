"""A sweep of runs that can be stopped: the same command continues where it ended.

python -m experiments.sweep FOLDER +exp=NAME [key=value ...] key=1,2,3 [key=a,b]

Every combination of the values is a job: one run, in its own folder below FOLDER and its own
process. A finished job is skipped, a stopped job is resumed, and a failed job is tried again. The
overrides of all jobs are checked before the first one begins, and a folder with a run of another
configuration is an error. `--workers N` runs N jobs side by side. Two machines that share FOLDER
may share the sweep: a run locks its folder, so only one of them takes a job.
"""

import argparse
import collections
import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.runtime.config import check_config, flat, read_config
from experiments.runtime.overrides import check_overrides, composed, one_line, parse
from experiments.runtime.targets import ConfigError, shown


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: Name of its folder, made of the values that differ between the jobs.
      overrides: Its command line without the folder.
    """

    name: str
    overrides: tuple[str, ...]

    def command(self, folder: Path) -> list[str] | None:
        """The command that starts or resumes the run in `folder`; None if the run is finished."""
        if (folder / "summary.json").is_file():
            return None
        begun = (folder / "config.yaml").is_file()
        arguments = [] if begun else [*self.overrides, f"hydra.run.dir={_quoted(folder)}"]
        resume = [f"resume={folder}"] if begun else []
        return [sys.executable, "-m", "experiments.run", *resume, *arguments]


def jobs(overrides: Sequence[str]) -> list[Job]:
    """Every combination of the swept values; the first override varies slowest.

    A name ends in a hash of its values if it is longer than 120 characters, or if two names differ
    only in characters that a folder's name should not have. Raises ConfigError for an override that
    cannot be parsed, for a key or value that is given twice, and for more than 10,000 jobs.
    """
    check_overrides(overrides)
    keys = [parse(override).get_key_element() for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key}: given twice")
    choices: list[list[str]] = []
    several = []  # indices of the overrides that vary
    for index, override in enumerate(map(parse, overrides)):
        choices.append([overrides[index]])
        if override.is_discrete_sweep():
            key = override.get_key_element()
            choices[index] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            several.append(index)
        if len({*choices[index]}) < len(choices[index]):
            raise ConfigError(f"{override.key_or_group}: got a value twice: {choices[index]}")
    found = {}
    for combination in itertools.product(*choices):
        own = [combination[index] for index in several]
        found[combination] = own, "-".join(map(_plain, own)) or "run"
    counts = collections.Counter(name.lower() for _, name in found.values())
    return [
        Job(_hashed(name, own) if len(name) > 120 or counts[name.lower()] > 1 else name, each)
        for each, (own, name) in found.items()
    ]


def _plain(text: str) -> str:
    """`key=value` as part of a folder's name, without special characters."""
    key, _, value = text.partition("=")
    short = f"{key.lstrip('+').rpartition('.')[2]}_{value}"
    return re.sub(r"[^\w.+-]+", "_", short.replace("[", "")).strip("_")


def _hashed(name: str, own: Sequence[str]) -> str:
    return f"{name[:100]}-{hashlib.sha256(chr(10).join(own).encode()).hexdigest()[:10]}"


def check(folder: Path, listed: Sequence[Job]) -> None:
    """Raises ConfigError, which names the job, unless all jobs can begin or continue.

    The overrides of a job are composed and checked as `experiments.run` does, and compared with the
    config.yaml in its folder. Trackers and devices may differ, as in a resumed run.
    """
    for job in listed:
        try:
            config = check_config(composed(job.overrides))
            path = folder / job.name / "config.yaml"
            if path.exists():
                _compare(config, read_config(path).config, path)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"job {job.name}: {one_line(error)}") from error


def _compare(config: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    plain = OmegaConf.to_container(OmegaConf.create(dict(config)))  # tuples are lists in a file
    ours, theirs = flat(cast("dict[str, Any]", plain)), flat(saved)
    for key in dict.fromkeys([*ours, *theirs]):
        if re.match(r"(tracker|task\.mesh)(\.|$)", key) or ours.get(key, ()) == theirs.get(key, ()):
            continue
        here, there = (shown(each[key]) if key in each else "nothing" for each in (ours, theirs))
        raise ConfigError(
            f"{key}: got {here}, but {path} has {there}; take another FOLDER, or delete that one"
        )


def _quoted(path: Path) -> str:
    text = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def sweep(
    folder: Path, listed: Sequence[Job], *, workers: int = 1, say: Callable[[str], None] = print
) -> int:
    """Runs the jobs that are not finished; returns the number that remain unfinished.

    The output of a job goes to `FOLDER/NAME.log`, and `say` gets one line per job. After Ctrl-C,
    which the running jobs receive too, no further job begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stopped = False

    def work(job: Job) -> bool:
        nonlocal stopped
        command = job.command(folder / job.name)
        if command is None:
            say(f"{job.name}: done before")
            return True
        if stopped:
            return False
        started = time.perf_counter()
        with (folder / f"{job.name}.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        seconds = f"{time.perf_counter() - started:.0f} s"
        done = code == 0 and (folder / job.name / "summary.json").is_file()
        if code in (130, 143, -2, -15):
            stopped = True
            say(f"{job.name}: stopped after {seconds}; the same command goes on")
        else:
            say(f"{job.name}: {'done' if done else f'failed, see {log.name}'} after {seconds}")
        return done

    with ThreadPoolExecutor(workers) as pool:
        results = [pool.submit(work, job) for job in listed]
        while True:
            try:
                return sum(not result.result() for result in results)
            except KeyboardInterrupt:
                stopped = True  # the jobs got the signal as well and write their checkpoints


def main() -> None:
    """Runs the command line; the exit code is 2 if it is wrong, and 1 if a job is unfinished."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="+", metavar="key=value")
    parser.add_argument(
        "--workers", type=int, default=1, help="number of jobs side by side (default: 1)"
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, allowed: an integer >= 1")
    if "=" in str(arguments.folder):
        parser.error(f"FOLDER: got {str(arguments.folder)!r}, which looks like an override")
    try:
        listed = jobs(arguments.overrides)
        check(arguments.folder, listed)
    except (ConfigError, HydraException, OSError) as error:
        parser.error(" ".join(str(error).split()))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    left = sweep(arguments.folder, listed, workers=arguments.workers)
    print(f"{len(listed) - left} of {len(listed)} jobs done in {arguments.folder}")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
