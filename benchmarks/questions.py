"""The command line of benchmarks of several questions, whose answers are kept one by one."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.optimizers import environment
from experiments.runtime.files import write_text

Numbers = dict[str, Any]


def answer(
    name: str,
    description: str | None,
    questions: Mapping[str, Callable[[Path, int], Numbers]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Answers the questions that the command line names, and adds the numbers to its file.

    Args:
      name: Name of the benchmark's module.
      description: What `--help` says.
      questions: Functions of the folder of the peers and the number of rounds, by name.
      arguments: The command line; None for that of the process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=questions, default=list(questions))
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, allowed: an integer >= 1")
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for question in given.only:
        print(f"== {question}", flush=True)
        numbers = questions[question](given.peers.absolute(), given.rounds)
        found |= {"environment": environment(), question: numbers}
        write_text(given.out, json.dumps(found, indent=2) + "\n")
        print(json.dumps(numbers, indent=1))
