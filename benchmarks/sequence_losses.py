"""Losses of preferences and of groups against the torch functions of TRL, verl and authors.

bash benchmarks/peers/build.sh torch FOLDER                 once
python -m benchmarks.sequence_losses --peers FOLDER --out FILE [--repeats N] [--threads N]
    [--only NAME ...]

A program is the value and the gradient of a loss on 64 answers of up to 1024 tokens, or of 256
pairs, compiled; `advantages` and masks are values alone. The peer is a process that has the same
arrays in float32 and runs a program when it is told to; ours and the peer's take turns, and a ratio
is the median of the ratios within a turn. Values and gradients have to agree, or it is an error.
Peers that are not there are skipped, and the output says why. docs/benchmarks.md has the results.

FOLDER/trpa may be a checkout of XueruiSu/Trust-Region-Preference-Approximation at f372585, and
FOLDER/verlm one of wk222/verlm, for the authors' own losses of TRPA and ADPO.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import Numbers, Program, environment, quartiles, take_turns
from benchmarks.peer import PeerProcess
from benchmarks.sequence_loss_rows import (
    BATCH,
    GROUP,
    PAIRS,
    ROWS,
    TIME,
    WITH_METRICS,
    Arrays,
    Row,
    arrays,
)


class Peer:
    """The torch programs on the same arrays, if their environment is there.

    Attributes:
      about: What the process says: versions, what is missing and why, and results by program.
    """

    def __init__(self, folder: Path, inputs: Path, threads: int | None) -> None:
        python = folder / "torch" / "bin" / "python"
        self._process = None
        if not python.exists():
            why = f"{python} is not there; benchmarks/peers/build.sh makes it"
            self.about: Numbers = {"missing": {"torch": why}, "results": {}}
            return
        arguments: list[object] = [inputs]
        for name in ("trpa", "verlm"):
            arguments += [f"--{name}", folder / name]
        if threads is not None:
            arguments += ["--threads", threads]
        self._process = PeerProcess(python, "torch_sequence_losses.py", arguments)
        self.about = self._process.about

    def run(self, name: str) -> float:
        """Runs a program once, and returns the seconds that it took there."""
        assert self._process is not None
        return self._process.run(name)

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.close()


def program_of(row: Row, given: Arrays, with_metrics: Callable[..., Any] | None = None) -> Program:
    """The value and the gradient of a row, or its constants, compiled; `()` is the carry."""
    if not row.moving:
        return Program(lambda carry, given: (carry, (row.loss(given), ())), (), given)
    both = jax.value_and_grad(
        with_metrics or row.loss,
        argnums=tuple(range(len(row.moving))),
        has_aux=with_metrics is not None,
    )
    moving = [given[name] for name in row.moving]
    return Program(lambda carry, given, *moving: (carry, both(*moving, given)), (), given, *moving)


def check_agrees(label: str, row: Row, program: Program, given: Arrays, there: Numbers) -> None:
    """Raises RuntimeError unless the sum of the values and the norm of the gradient agree."""
    _, (value, slopes) = program.compiled((), given, *(given[name] for name in row.moving))
    value, *slopes = (np.asarray(each, np.float64) for each in (value, *slopes))
    norm = float(np.sqrt(sum(np.sum(np.square(each)) for each in slopes or [value])))
    found = {"value": float(np.sum(value)), "norm": norm}
    for kind, number in found.items():
        if not np.isclose(number, there[kind], rtol=2e-3, atol=2e-3 * there["norm"] + 1e-6):
            raise RuntimeError(f"{label}: {kind} is {number}, but the peer has {there[kind]}")


def calmly(run: Callable[[], float]) -> Callable[[], float]:
    """The program after a pause, in which the threads of the one before come to rest."""

    def call() -> float:
        time.sleep(0.002)
        return run()

    return call


def measure(
    names: Sequence[str], given: Mapping[str, np.ndarray], peer: Peer, repeats: int
) -> Numbers:
    """Milliseconds of ours and of each peer, and the ratio of ours to it, for every row."""
    arrays_here = {name: jnp.asarray(array) for name, array in given.items()}
    rows: Numbers = {}
    for name in names:
        row = ROWS[name]
        ours = {"ours": program_of(row, arrays_here)}
        if name in WITH_METRICS:
            ours["ours, with metrics"] = program_of(row, arrays_here, WITH_METRICS[name])
        others = {library: f"{library}/{name}" for library in row.peers}
        there = {k: v for k, v in others.items() if v in peer.about["results"]}
        for label in there.values():
            if row.agrees:
                result = peer.about["results"][label]
                check_agrees(label, row, ours["ours"], arrays_here, result)
        runs = {**ours, **{k: functools.partial(peer.run, v) for k, v in there.items()}}
        seconds = take_turns({key: calmly(run) for key, run in runs.items()}, repeats)
        rows[name] = {
            "milliseconds": {k: quartiles(1000 * v) for k, v in seconds.items()},
            "fastest": {k: float(1000 * v.min()) for k, v in seconds.items()},
            "ratio": {
                mine: {k: quartiles(seconds[mine] / seconds[k]) for k in there} for mine in ours
            },
        }
        print(line(name, rows[name]), flush=True)
    return rows


def line(name: str, row: Numbers) -> str:
    """The results of a row as text."""
    parts = [f"{k} {v['median']:.3f} ms" for k, v in row["milliseconds"].items()]
    for mine, ratios in row["ratio"].items():
        for k, ratio in ratios.items():
            fastest = row["fastest"][mine] / row["fastest"][k]
            parts.append(f"{mine} / {k} {ratio['median']:.2f} (of the fastest {fastest:.2f})")
    return f"{name:40}" + ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one line per loss and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequence_losses")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the peers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=60, help="calls of every program, >= 1")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    given = arrays()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", **given)
        peer = Peer(options.peers.absolute(), Path(folder) / "inputs.npz", options.threads)
    for library, why in peer.about["missing"].items():
        print(f"without {library}: {why}")
    rows = measure(options.only, given, peer, options.repeats)
    peer.close()
    about = {key: value for key, value in peer.about.items() if key != "results"}
    sizes = {"batch": BATCH, "time": TIME, "group": GROUP, "pairs": PAIRS}
    numbers = {**environment(), "peer": about, "sizes": sizes, "rows": rows}
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
