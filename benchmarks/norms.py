"""Time of `trustjax.geometry.global_norm` against the plain root of the sum of squares.

python -m benchmarks.norms --out FILE [--size 256 1024 2048] [--repeats N]

Every tree has four square matrices. The two programs take turns; a ratio is the median of the
ratios within a turn. docs/benchmarks.md has the results.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import Numbers, Program, environment, quartiles, take_turns
from trustjax.geometry import global_norm


def plain_norm(tree: Any) -> jax.Array:
    """The norm by its formula, whose squares may underflow and overflow."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def measure(size: int, repeats: int) -> Numbers:
    """Milliseconds of the plain norm, and the ratio of our time to it."""
    random = np.random.default_rng(0)
    tree = [jnp.asarray(random.standard_normal((size, size), np.float32)) for _ in range(4)]
    # An empty carry: the trees are not donated, and both programs read the same one.
    plain = Program(lambda carry, tree: (carry, plain_norm(tree)), (), tree)
    ours = Program(lambda carry, tree: (carry, global_norm(tree)), (), tree)
    seconds = take_turns({"plain": plain, "global_norm": ours}, repeats)
    return {
        "parameters": 4 * size**2,
        "repeats": repeats,
        "plain_milliseconds": quartiles(1000 * seconds["plain"]),
        "ratio": quartiles(seconds["global_norm"] / seconds["plain"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one line per size and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=80, help="calls of every program, >= 1")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or min(options.size) < 1:
        parser.error(f"--repeats and --size must be >= 1, got {options.repeats}, {options.size}")
    found = {f"{size} x {size}": measure(size, options.repeats) for size in options.size}
    for name, row in found.items():
        time, ratio = row["plain_milliseconds"]["median"], row["ratio"]
        print(
            f"4 of {name}: plain {time:.2f} ms, ours {ratio['median']:.2f} times as long "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    numbers = {**environment(), "norms": found}
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
