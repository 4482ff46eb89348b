"""Step time, FLOPs and memory of SAM and TRAM, against AdamW and `optax.contrib.sam`.

python -m benchmarks.optimizers --out FILE [--model mlp vit vit_b16] [--repeats N]

All programs of a network are compiled first and then take turns, so that noise of the machine hits
all alike; a ratio is the median of the ratios within a turn. The forward pass F, the backward pass
B and AdamW's update O are timed among them: a step of f forward and b backward passes should take
f F + b B + O. docs/benchmarks.md has the results.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax.models import MLP, ViT
from trustjax.optim import asam, sam, tram, tram_fisher, two_pass_step

PyTree = Any
Numbers = dict[str, Any]


# ---- networks and optimizers


class Workload(NamedTuple):
    """A network, and the batch that it is trained on again and again.

    Attributes:
      model: Flax module.
      image_shape: Height, width and channels of an image.
      batch_size: Examples per step.
      repeats: Timed calls of every program.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    batch_size: int
    repeats: int


WORKLOADS = {
    "mlp": Workload(MLP(10, (1024,) * 4), (32, 32, 1), 128, 40),
    "vit": Workload(ViT(10, patch_size=4, width=128, depth=6, num_heads=4), (32, 32, 3), 64, 10),
    "vit_b16": Workload(  # for a GPU
        ViT(1000, patch_size=16, width=768, depth=12, num_heads=12, dtype=jnp.bfloat16),
        (224, 224, 3),
        64,
        40,
    ),
}


def optax_sam(rho: float, base: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax's SAM, adapted to our `grad_fn`: its own also takes the number of the inner step."""
    attack = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    tx = optax.contrib.sam(base, attack, opaque_mode=True)

    def update(
        updates: PyTree, state: PyTree, params: PyTree, *, grad_fn: Callable[..., PyTree], **_: Any
    ) -> tuple[PyTree, PyTree]:
        return tx.update(updates, state, params, grad_fn=lambda params, _: grad_fn(params))

    return optax.GradientTransformationExtraArgs(tx.init, update)


# With so low a rate the weights hardly change, so that all steps are of the same kind.
BASE = optax.adamw(1e-6)
OPTIMIZERS = {
    "adamw": BASE,
    "optax.contrib.sam": optax_sam(0.05, BASE),
    "sam": optax.chain(sam(0.05), BASE),
    "asam": optax.chain(asam(0.5), BASE),
    "tram_previous": optax.chain(tram("previous"), BASE),
    "tram_noise": optax.chain(tram("noise"), BASE),
    "tram_fisher": optax.chain(tram_fisher(), BASE),
}


class Passes(NamedTuple):
    """Numbers of passes through the network in one step."""

    forward: int
    backward: int


PASSES = {
    "adamw": Passes(1, 1),
    "optax.contrib.sam": Passes(2, 2),
    "sam": Passes(2, 2),
    "asam": Passes(2, 2),
    "tram_previous": Passes(3, 2),
    "tram_noise": Passes(3, 2),
    "tram_fisher": Passes(3, 3),
}


class Target(NamedTuple):
    """The aim that `row` takes at most `margin` times as long as its passes, or as row `peer`."""

    row: str
    margin: float
    peer: str | None = None


TARGETS = (
    Target("sam", 1.05),
    Target("sam", 1.03, peer="optax.contrib.sam"),
    Target("tram_previous", 1.05),
    Target("tram_noise", 1.05),
)


# ---- compiled programs


class Program:
    """A compiled `function(carry, *fixed) -> (carry, result)`; the carry's buffers are donated."""

    def __init__(self, function: Callable[..., Any], carry: PyTree, *fixed: PyTree) -> None:
        # A copy, as buffers are donated; without weak types, which the function does not return.
        self.carry = jax.tree.map(lambda x: jnp.array(x, x.dtype), carry)
        self._fixed = fixed
        self.compiled = jax.jit(function, donate_argnums=0).lower(self.carry, *fixed).compile()

    def __call__(self) -> float:
        """Runs the program once, and returns the seconds that it took."""
        started = time.perf_counter()
        self.carry, result = self.compiled(self.carry, *self._fixed)
        jax.block_until_ready((self.carry, result))
        return time.perf_counter() - started

    @property
    def flops(self) -> float:
        """Floating-point operations that XLA counts in the compiled program."""
        return float(self.compiled.cost_analysis()["flops"])

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of arguments, of results outside donated buffers, of temporaries, and their sum."""
        found = self.compiled.memory_analysis()
        parts = {
            "arguments": found.argument_size_in_bytes,
            "results": found.output_size_in_bytes - found.alias_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
        }
        return {**parts, "peak": sum(parts.values())}


def update_program(
    tx: optax.GradientTransformation, params: PyTree, gradient: PyTree, **extra_args: Any
) -> Program:
    """A program of `tx.update` and `optax.apply_updates` alone."""

    def update(carry: PyTree, gradient: PyTree) -> tuple[PyTree, None]:
        params, state = carry
        updates, state = tx.update(gradient, state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    return Program(update, (params, tx.init(params)), gradient)


def programs_of(
    workload: Workload, optimizers: Mapping[str, optax.GradientTransformation]
) -> dict[str, Program]:
    """Programs of the passes, of AdamW's update, and of a train step with each optimizer."""
    model, key, random = workload.model, jax.random.key(0), np.random.default_rng(0)
    images = random.random((workload.batch_size, *workload.image_shape), np.float32)
    labels = random.integers(model.num_classes, size=workload.batch_size)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    params = jax.jit(model.init)(key, batch["image"][:1])["params"]

    def output_fn(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, batch["image"])

    def loss_fn(params: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        logits = output_fn(params, batch, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {"outputs": logits}

    def noised(batch: PyTree, key: jax.Array) -> PyTree:
        noise = jax.random.normal(key, batch["image"].shape)
        return {**batch, "image": batch["image"] + 0.1 * noise}

    def train_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        two_passes = two_pass_step(
            loss_fn,
            tx,
            output_fn=output_fn,
            noisy_output_fn=lambda p, batch, key: output_fn(p, noised(batch, key), key),
            noisy_loss_fn=lambda p, batch, key: loss_fn(p, noised(batch, key), key)[0],
        )

        def step(carry: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, jax.Array]:
            params, state, loss, _ = two_passes(*carry, batch, key)
            return (params, state), loss

        return step

    def without_carry(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda carry, *arguments: (carry, function(*arguments))

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    return {
        "forward": Program(without_carry(loss_fn), (), params, batch, key),
        "forward and backward": Program(without_carry(value_and_grad), (), params, batch, key),
        "update": update_program(BASE, params, params),
        **{
            name: Program(train_step(tx), (params, tx.init(params)), batch, key)
            for name, tx in optimizers.items()
        },
    }


# ---- measurements


def take_turns(programs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds [repeats] of every program; every turn calls each once, in a new random order."""
    for program in [*programs.values()] * 2:  # the first calls of a program are slower
        program()
    seconds = {name: np.zeros(repeats) for name in programs}
    random = np.random.default_rng(0)
    for turn in range(repeats):
        # In a new order each turn, so that no program always runs on the caches of the same other.
        for name in random.permutation(list(programs)):
            seconds[name][turn] = programs[name]()
    return seconds


def cost_of_passes(costs: Mapping[str, Any], passes: Passes) -> Any:
    """The cost f F + b B + O, in seconds or FLOPs."""
    forward = costs["forward"]
    backward = costs["forward and backward"] - forward
    return passes.forward * forward + passes.backward * backward + costs["update"]


def measure(workload: Workload, optimizers: Mapping[str, optax.GradientTransformation]) -> Numbers:
    """All results for one network; ratios are to `optimizers["adamw"]`."""
    programs = programs_of(workload, optimizers)
    seconds = take_turns(programs, workload.repeats)
    flops = {name: program.flops for name, program in programs.items()}
    rows: dict[str, Numbers] = {}
    for name in optimizers:
        params, state = programs[name].carry
        rows[name] = {
            "milliseconds": quartiles(1000 * seconds[name]),
            "ratio": quartiles(seconds[name] / seconds["adamw"]),
            "gigaflops": flops[name] / 1e9,
            "parameter_bytes": num_bytes(params),
            "state_bytes": num_bytes(state),
            "memory_bytes": programs[name].memory,
        }
        if name in PASSES:  # ratios within a turn, as for the programs themselves
            ideal = cost_of_passes(seconds, PASSES[name]) / cost_of_passes(seconds, Passes(1, 1))
            rows[name]["of_passes"] = {
                **PASSES[name]._asdict(),
                "ratio": quartiles(ideal),
                "gigaflops": cost_of_passes(flops, PASSES[name]) / 1e9,
            }
    return {
        "batch": [workload.batch_size, *workload.image_shape],
        "dtype": jnp.dtype(workload.model.dtype).name,
        "repeats": workload.repeats,
        "passes": {
            "forward": quartiles(1000 * seconds["forward"]),
            "forward and backward": quartiles(1000 * seconds["forward and backward"]),
            "update": quartiles(1000 * seconds["update"]),
        },
        "rows": rows,
        "targets": [
            reached(target, rows, seconds)
            for target in TARGETS
            if {target.row, target.peer or "adamw"} <= rows.keys()
        ],
    }


def reached(
    target: Target, rows: Mapping[str, Numbers], seconds: Mapping[str, np.ndarray]
) -> Numbers:
    """The ratio of a target, its limit, and whether the target is met."""
    if target.peer is None:
        ratio = rows[target.row]["ratio"]["median"]
        limit = target.margin * rows[target.row]["of_passes"]["ratio"]["median"]
    else:
        ratio = float(np.median(seconds[target.row] / seconds[target.peer]))
        limit = target.margin
    to = target.peer or "adamw"
    return {"row": target.row, "to": to, "ratio": ratio, "limit": limit, "met": ratio <= limit}


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median, lower quartile and upper quartile."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def num_bytes(tree: PyTree) -> int:
    """Bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def environment() -> Numbers:
    """Device and versions."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "trustjax")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


# ---- output


def table(name: str, found: Numbers) -> str:
    """The results for one network as text."""
    setting = f"batch {found['batch']}, {found['dtype']}, {found['repeats']} repeats"
    passes = ", ".join(f"{k} {v['median']:.1f} ms" for k, v in found["passes"].items())
    lines = [
        f"{name}: {setting}; {passes}",
        f"{'':18}{'ms (quartiles)':>25}{'x AdamW':>9}{'passes':>8}"
        f"{'GFLOP':>9}{'passes':>9}{'state MiB':>11}{'peak MiB':>10}",
    ]
    for row, numbers in found["rows"].items():
        time, of_passes = numbers["milliseconds"], numbers.get("of_passes")
        line = (
            f"{row:18}{time['median']:9.1f} ({time['low']:6.1f}-{time['high']:6.1f})"
            f"{numbers['ratio']['median']:9.2f}"
            f"{of_passes['ratio']['median'] if of_passes else np.nan:8.2f}"
            f"{numbers['gigaflops']:9.2f}{of_passes['gigaflops'] if of_passes else np.nan:9.2f}"
            f"{numbers['state_bytes'] / 2**20:11.1f}{numbers['memory_bytes']['peak'] / 2**20:10.1f}"
        )
        lines.append(line)
    for target in found["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        line = f"{verdict}: {target['row']} takes {target['ratio']:.3f} times as long as "
        lines.append(f"{line}{target['to']}, allowed {target['limit']:.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", nargs="+", choices=WORKLOADS, default=["mlp", "vit"])
    parser.add_argument("--repeats", type=int, help="calls of every program, >= 1")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {options.repeats}")
    models = {}
    for name in options.model:
        workload = WORKLOADS[name]
        workload = workload._replace(repeats=options.repeats or workload.repeats)
        models[name] = measure(workload, OPTIMIZERS)
        print(table(name, models[name]), flush=True)
    numbers = {**environment(), "models": models}
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
