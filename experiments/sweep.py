"""A list of runs that survives being stopped: the same command goes on where it ended.

python -m experiments.sweep FOLDER +exp=NAME [key=value ...] key=1,2,3 [key=a,b]

Every combination of the values is a job: one run in a folder of its own below FOLDER, in a process
of its own. A job that is done is skipped, one that was stopped is resumed, one that failed is tried
again. `--workers N` runs N jobs side by side. Two machines that share FOLDER may share the list: a
run's folder is locked, so each job is taken by one of them.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, from the values that differ between the jobs.
      overrides: its command line, without the folder.
    """

    name: str
    overrides: tuple[str, ...]

    def command(self, folder: Path) -> list[str] | None:
        """What is left to do in the run's `folder`; None if that is nothing."""
        if (folder / "summary.json").is_file():
            return None
        begun = (folder / "config.yaml").is_file()
        arguments = [] if begun else [*self.overrides, f"hydra.run.dir={_quoted(folder)}"]
        resume = [f"resume={folder}"] if begun else []
        return [sys.executable, "-m", "experiments.run", *resume, *arguments]


def jobs(overrides: Sequence[str]) -> list[Job]:
    """Every combination of the swept values, the first override varying slowest.

    Raises HydraException for an override that cannot be read, ValueError for two jobs of one name.
    """
    parser = OverridesParser.create()
    choices: list[list[tuple[str, str]]] = []  # of each override: part of the name, and the text
    for text in overrides:
        override = parser.parse_override(text)
        if not override.is_discrete_sweep():
            choices.append([("", text)])
            continue
        key = override.get_key_element()
        short = key.lstrip("+").rpartition(".")[2]
        values = list(override.sweep_string_iterator())
        choices.append([(_plain(f"{short}_{value}"), f"{key}={value}") for value in values])
    found = []
    for combination in itertools.product(*choices):
        name = "-".join(part for part, _ in combination if part)
        found.append(Job(name or "run", tuple(text for _, text in combination)))
    names = [job.name for job in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"swept values must differ in letters and digits, got twice: {repeated}")
    return found


def _plain(text: str) -> str:
    """`text` with what a folder's name should not hold left out."""
    return re.sub(r"[^\w.+-]+", "_", text.replace("[", "")).strip("_")


def _quoted(path: Path) -> str:
    text = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def sweep(
    folder: Path, listed: Sequence[Job], *, workers: int = 1, say: Callable[[str], None] = print
) -> int:
    """Runs what is left of the jobs; returns how many are not done.

    The output of a job goes to `FOLDER/NAME.log`, `say` gets one line a job. After Ctrl-C, which
    the running jobs get too, no further job is begun.
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
    """The command line; exit code 2 for a wrong one, 1 if a job is not done."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="+", metavar="key=value")
    parser.add_argument("--workers", type=int, default=1, help="jobs side by side (default 1)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, allowed: an integer >= 1")
    if "=" in str(arguments.folder):
        parser.error(f"FOLDER: got {str(arguments.folder)!r}, which looks like an override")
    try:
        listed = jobs(arguments.overrides)
    except (HydraException, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    left = sweep(arguments.folder, listed, workers=arguments.workers)
    print(f"{len(listed) - left} of {len(listed)} jobs done in {arguments.folder}")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
