"""How orthogonal the updates of AuON, Hybrid-AuON and Muon are, and what they cost.

The experiment repeats the figures of orthogonality error and of time in Maity, arXiv:2509.24320
(v1): a random n x n matrix becomes an update U, whose error is ||U'U - I|| in the Frobenius norm.
The measured errors are compared with those that the singular values of a large Gaussian matrix,
which follow the quarter-circle law, lead to.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary, Table
from experiments.tasks.once import Once
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.geometry import MUON_COEFFICIENTS
from trustjax.optim import scale_by_auon


@jax.jit
def _orthogonality_error(update: jax.Array) -> jax.Array:
    error: jax.Array = jnp.linalg.norm(
        update.T @ update - jnp.eye(update.shape[0], dtype=update.dtype)
    )
    return error


def expected_error(size: int, newton_schulz_steps: int) -> float:
    r"""The error of a large normalised Gaussian matrix after some Newton-Schulz steps.

    .. math:: \sqrt{n \int_0^2 \left(p(x / \sqrt n)^2 - 1\right)^2 \frac{\sqrt{4 - x^2}}{\pi} dx}

    p(s) is the singular value that the steps make of s; the density is the quarter-circle law.
    """
    a, b, c = MUON_COEFFICIENTS
    # Midpoints in the angle x = 2 sin t, where the density is 4 cos(t)^2 / pi.
    count = 20_000
    angle = (np.arange(count) + 0.5) * (np.pi / 2 / count)
    value = 2 * np.sin(angle) / np.sqrt(size)
    for _ in range(newton_schulz_steps):
        value = a * value + b * value**3 + c * value**5
    density = 4 * np.cos(angle) ** 2 / np.pi * (np.pi / 2 / count)
    return float(np.sqrt(size * np.sum((value**2 - 1) ** 2 * density)))


@dataclass(frozen=True)
class Orthogonality:
    """Random matrices of several sizes, with one stage per size.

    Attributes:
      methods: Keyword arguments of `trustjax.optim.scale_by_auon` by method, `ns_steps` among them;
        there is no momentum.
      sizes: Sizes n of the n x n matrices, >= 2.
      seed: Root of all randomness.
      num_seeds: Number of matrices per size.
      repeats: Number of timed updates of each matrix.
      precision: Dtype of the matrices, float32 or float64.
    """

    methods: Mapping[str, Mapping[str, Any]]
    sizes: Sequence[int]
    seed: int
    num_seeds: int
    repeats: int
    precision: str = "float32"

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "repeats"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        if self.precision not in ("float32", "float64"):
            raise FieldError("precision", "be float32 or float64", repr(self.precision))
        if not self.sizes or min(self.sizes) < 2 or len(set(self.sizes)) < len(self.sizes):
            raise FieldError("sizes", "be different numbers >= 2", list(self.sizes))
        for name, arguments in self.methods.items():
            if "ns_steps" not in arguments:
                raise FieldError(f"methods.{name}", "have ns_steps", dict(arguments))
            try:
                self.transform(name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"methods.{name}: {error}") from error

    def transform(self, name: str) -> optax.GradientTransformation:
        """The method called `name`, without momentum."""
        return scale_by_auon(0.0, nesterov=False, **self.methods[name])

    def stages(self) -> list[Once]:
        """One stage per size."""
        return [Once(f"size_{size}", partial(self._measure, size)) for size in self.sizes]

    def _measure(self, size: int) -> list[Row]:
        """One row per matrix: the errors, and the median seconds of an update."""
        shape, key = (size, size), jax.random.key(self.seed)
        programs = {name: self._program(name) for name in self.methods}
        for update in programs.values():  # compile before anything is timed
            jax.block_until_ready(update(jnp.ones(shape, self.precision)))
        rows = []
        for seed in range(self.num_seeds):
            matrix = jax.random.normal(jax.random.fold_in(key, seed), shape, self.precision)
            row: Row = {"seed": seed}
            for name, update in programs.items():
                row[f"error/{name}"] = float(_orthogonality_error(update(matrix)))
            seconds: dict[str, list[float]] = {name: [] for name in programs}
            for _ in range(self.repeats):  # in turns, so that noise of the machine hits all alike
                for name, update in programs.items():
                    started = time.perf_counter()
                    jax.block_until_ready(update(matrix))
                    seconds[name].append(time.perf_counter() - started)
            row |= {f"seconds/{name}": float(np.median(s)) for name, s in seconds.items()}
            rows.append(row)
        return rows

    def _program(self, name: str) -> Callable[[jax.Array], jax.Array]:
        method = self.transform(name)
        return jax.jit(lambda matrix: method.update(matrix, method.init(matrix))[0])

    def summarize(self, rows: list[Row]) -> Summary:
        """Measured and expected errors, and milliseconds, by size and method."""
        values: dict[str, Any] = {}
        cells = []
        for size in self.sizes:
            values[str(size)] = found = {
                name: {
                    "error": _median(rows, size, f"error/{name}"),
                    "expected": expected_error(size, self.methods[name]["ns_steps"]),
                    "milliseconds": 1e3 * _median(rows, size, f"seconds/{name}"),
                }
                for name in self.methods
            }
            texts = ("{error:.2f} ({expected:.2f})\n{milliseconds:.3g} ms".format(**one)
                     for one in found.values())  # fmt: skip
            cells.append([str(size), *texts, f"{np.sqrt(size):.2f}"])
        title = "||U'U - I||: measured (quarter-circle law), and the time of an update"
        return Summary(values, Table(title, ("n", *self.methods, "U = 0"), cells))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes orthogonality.png: error against n, beside the theory, and time against n."""
        from experiments.analysis import plots

        style = plots.styles(self.methods)
        sizes = np.array(sorted(self.sizes))
        figure, (errors, seconds) = plots.panels(2)
        for name in self.methods:
            steps = self.methods[name]["ns_steps"]
            points = {**style[name], "linestyle": ""}
            measured = [_median(rows, size, f"error/{name}") for size in sizes]
            errors.plot(sizes, measured, label=name, **points)
            expected = [expected_error(size, steps) for size in sizes]
            errors.plot(sizes, expected, color=style[name]["color"], linewidth=1)
            taken = [_median(rows, size, f"seconds/{name}") for size in sizes]
            seconds.plot(sizes, taken, **style[name])
            power = 3 if steps else 2
            slope = taken[-1] * (sizes / sizes[-1]) ** power
            seconds.plot(sizes, slope, color=style[name]["color"], linewidth=1, linestyle=":")
        errors.plot(sizes, np.sqrt(sizes), color="grey", linestyle="--", label="U = 0")
        errors.set(
            title="Distance from orthogonal\n(lines: quarter-circle law)", ylabel="||U'U - I||"
        )
        seconds.set(title="Time of an update\n(dotted: $n^2$, and $n^3$)", ylabel="seconds")
        for axis in (errors, seconds):
            axis.set(xscale="log", yscale="log", xlabel="n")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        errors.set_yticks(ticks := [3, 10, 30], [str(tick) for tick in ticks])
        plots.legend(figure, errors)
        plots.save(figure, folder / "orthogonality.png")


def _median(rows: Sequence[Row], size: int, metric: str) -> float:
    """Median of a metric over the matrices of one size."""
    from experiments.analysis import plots

    return float(np.median(plots.last(plots.curve(rows, f"size_{size}", metric))))
