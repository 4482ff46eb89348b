"""Time of an optimizer's update alone: AuON and Hybrid-AuON against Muon, AdamW and SGD.

python -m benchmarks.matrix_updates --out FILE [--size 256 512 ...] [--transformer] [--repeats N]
    [--only adamw auon ...]

A program is `tx.update` and `optax.apply_updates`, compiled, with donated buffers, on one square
matrix or on the weights of a transformer with 12 layers of width 768. The programs take turns; a
ratio is the median of the ratios within a turn. docs/benchmarks.md has the results.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.optimizers import (
    environment,
    num_bytes,
    quartiles,
    take_turns,
    update_program,
)
from trustjax.optim import auon, hybrid_auon

Numbers = dict[str, Any]

# With so low a rate the weights hardly change, so that all updates are of the same kind.
RATE = 1e-6
OPTIMIZERS = {
    "sgd": optax.sgd(RATE, momentum=0.95, nesterov=True),
    "adamw": optax.adamw(RATE),
    "auon": auon(RATE, other=optax.adamw(RATE)),
    "hybrid_auon": hybrid_auon(RATE, other=optax.adamw(RATE)),
    "optax.contrib.muon": optax.contrib.muon(RATE),
}
# Bytes of memory traffic per float32 parameter: read g and m, write m, read m and g again for
# Nesterov, read and write p. FEWEST_BYTES is without the second reading, if caches hold m and g.
BYTES = 28
FEWEST_BYTES = 20


def square(size: int) -> dict[str, Any]:
    """Shape of one square matrix, as a tree."""
    return {"kernel": (size, size)}


def transformer(depth: int = 12, width: int = 768) -> dict[str, Any]:
    """Shapes of the blocks of GPT-2 small, without embeddings."""
    block = {
        "attention": {"qkv": (width, 3 * width), "out": (width, width), "bias": (4 * width,)},
        "mlp": {"up": (width, 4 * width), "down": (4 * width, width), "bias": (5 * width,)},
        "norms": (4 * width,),
    }
    return {f"block_{index}": block for index in range(depth)}


def measure(shapes: Any, repeats: int, names: Sequence[str] = tuple(OPTIMIZERS)) -> Numbers:
    """Milliseconds, ratio to AdamW, size of the state and bandwidth of the optimizers `names`."""
    random = np.random.default_rng(0)

    def drawn() -> Any:
        return jax.tree.map(
            lambda shape: jnp.asarray(random.standard_normal(shape, np.float32)),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, gradient = drawn(), drawn()
    programs = {name: update_program(OPTIMIZERS[name], params, gradient) for name in names}
    seconds = take_turns(programs, repeats)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = {}
    for name, program in programs.items():
        _, state = program.carry
        median = float(np.median(seconds[name]))  # one slow turn does not count
        rows[name] = {
            "milliseconds": quartiles(1000 * seconds[name]),
            "ratio": quartiles(seconds[name] / seconds["adamw"]),
            "state_per_parameter_byte": num_bytes(state) / num_bytes(params),
            "gigabytes_per_second": {
                str(each): each * count / median / 1e9 for each in (BYTES, FEWEST_BYTES)
            },
        }
    found = {"parameters": count, "repeats": repeats, "rows": rows}
    if len(rows) < len(OPTIMIZERS):
        return found
    muon, hybrid, plain = (seconds[name] for name in ("optax.contrib.muon", "hybrid_auon", "auon"))
    # The time that Newton-Schulz adds to AuON: one step in Hybrid-AuON, five in Muon.
    newton_schulz = float(np.median(hybrid - plain) / np.median(muon - plain))
    return {
        **found,
        "muon_to_auon": quartiles(muon / plain),
        "newton_schulz_hybrid_to_muon": newton_schulz,
    }


def table(name: str, found: Mapping[str, Any]) -> str:
    """The results for one tree of parameters as text."""
    lines = [
        f"{name}: {found['parameters'] / 1e6:.2f} million parameters, {found['repeats']} repeats",
        f"{'':18}{'ms (quartiles)':>28}{'x AdamW':>9}{'state':>7}{'GB/s at 28':>12}{'at 20':>8}",
    ]
    for row, numbers in found["rows"].items():
        time, speed = numbers["milliseconds"], numbers["gigabytes_per_second"]
        lines.append(
            f"{row:18}{time['median']:10.2f} ({time['low']:7.2f}-{time['high']:7.2f})"
            f"{numbers['ratio']['median']:9.2f}{numbers['state_per_parameter_byte']:7.2f}"
            f"{speed[str(BYTES)]:12.1f}{speed[str(FEWEST_BYTES)]:8.1f}"
        )
    if "muon_to_auon" in found:
        lines.append(
            f"Muon / AuON {found['muon_to_auon']['median']:.1f}; Newton-Schulz part of Hybrid / "
            f"Muon {found['newton_schulz_hybrid_to_muon']:.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix_updates")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--transformer", action="store_true", help="also 12 layers of width 768")
    parser.add_argument("--repeats", type=int, default=10, help="calls of every program, >= 1")
    parser.add_argument(
        "--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="with adamw"
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    if min(options.size) < 2:
        parser.error(f"--size must be >= 2, got {options.size}")
    if "adamw" not in options.only:
        parser.error(
            f"--only must name adamw, which the others are compared with, got {options.only}"
        )
    workloads = {f"{size} x {size}": square(size) for size in options.size}
    if options.transformer:
        workloads["transformer"] = transformer()
    found = {}
    for name, shapes in workloads.items():
        found[name] = measure(shapes, options.repeats, options.only)
        print(table(name, found[name]), flush=True)
    numbers = {**environment(), "parameters": found}
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
