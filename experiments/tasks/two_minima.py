"""A loss in the plane with a sharp and a flat minimum: where do noisy SGD and SAM end?

The sharp minimum is the lower one. Noisy SGD stays in the minimum that it meets first. SAM's attack
of length rho reaches over the rim of the sharp well, where the gradient points to the flat one.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary
from experiments.tasks.landscape import CORNER, Landscape, MakeTransform, Walkers, measure, walk
from experiments.trackers import Row
from trustjax._checks import FieldError


@dataclass(frozen=True, eq=False)
class Walk:
    """The stage of one method with one radius.

    Attributes:
      name: Name of the stage.
      num_steps: Length of the walk.
      steps_per_chunk: Steps between two rows of metrics.
      radius: Radius of the method; 0 for the optimizer alone.
      make: Makes the transform from the radius.
      landscape: The loss.
      noise: Standard deviation of the noise in each component of the gradient.
      starts: Positions before the first step, [seeds, starts, 2].
      keys: Random keys of the noise, [seeds, starts].
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    radius: float
    make: MakeTransform
    landscape: Landscape
    noise: float
    starts: jax.Array
    keys: jax.Array

    def init(self, final: Mapping[str, Any]) -> Walkers:
        """The walkers at their starts."""
        del final
        return self._begin(self.starts)

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: Walkers, batches: None, step: int, num_steps: int
    ) -> tuple[Walkers, list[Row]]:
        """Walks `num_steps` further; returns one row per seed."""
        del batches
        state, _ = self.walk(state, step, num_steps)
        measures = measure(state.position, landscape=self.landscape)
        columns = {name: np.asarray(values, float) for name, values in measures.items()}
        return state, [
            {"seed": seed, **{name: values[seed] for name, values in columns.items()}}
            | {"trust/radius": self.radius}
            for seed in range(len(self.starts))
        ]

    def learned(self, state: Walkers) -> jax.Array:
        """The positions of the walkers."""
        return state.position

    def finish(self, state: Walkers) -> list[Row]:
        """No rows, as the last ones of `advance` tell where the walkers end."""
        del state
        return []

    def walk(self, state: Walkers, step: int, num_steps: int) -> tuple[Walkers, jax.Array]:
        """The walkers after `num_steps` more steps, and their paths; see `landscape.walk`."""
        num_seeds, num_starts, _ = state.position.shape
        moved: tuple[Walkers, jax.Array] = walk(
            state,
            self.keys[:num_seeds, :num_starts],
            step,
            self.radius,
            self.noise,
            landscape=self.landscape,
            make=self.make,
            num_steps=num_steps,
        )
        return moved

    def paths(self, count: int) -> np.ndarray:
        """Paths of the first walkers of the first seed from their starts, [count, steps + 1, 2]."""
        start = self._begin(self.starts[:1, :count])
        _, paths = self.walk(start, 0, self.num_steps)
        return np.concatenate([start.position[0, :, None], paths[0]], axis=1)

    def _begin(self, position: jax.Array) -> Walkers:
        return Walkers(position, jax.vmap(jax.vmap(self.make(self.radius).init))(position))


@dataclass(frozen=True)
class TwoMinima:
    """Walkers from random starts, with one stage for each method and radius.

    Attributes:
      optimizer: Optax transform that is trained alone, as "sgd", and behind every method.
      methods: Methods by name, each a function `radius -> transform`.
      radii: Radii that every method is tried with, > 0.
      seed: Root of all randomness.
      num_seeds: Number of groups of starts.
      precision: Dtype of the positions.
      num_starts: Number of walkers per seed.
      steps: Length of a walk.
      steps_per_chunk: Steps between two rows of metrics.
      noise: Standard deviation of the noise in each component of the gradient, >= 0.
      sharp_width: Standard deviation of the sharp well, > 0.
      flat_width: Standard deviation of the flat well, > 0.
    """

    optimizer: optax.GradientTransformation
    methods: Mapping[str, MakeTransform]
    radii: Sequence[float]
    seed: int = 0
    num_seeds: int = 5
    precision: str = "float32"
    num_starts: int = 200
    steps: int = 400
    steps_per_chunk: int = 50
    noise: float = 1.0
    sharp_width: float = 0.3
    flat_width: float = 1.0

    def validate(self) -> None:
        """Raises ValueError, which names the field, for a number out of range."""
        for name in ("num_starts", "steps", "steps_per_chunk"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        if self.noise < 0:
            raise FieldError("noise", "be >= 0", self.noise)
        for name in ("sharp_width", "flat_width"):
            if not getattr(self, name) > 0:
                raise FieldError(name, "be > 0", getattr(self, name))
        if not self.radii or min(self.radii) <= 0 or len(set(self.radii)) < len(self.radii):
            raise FieldError("radii", "be different numbers > 0", self.radii)
        for name, method in self.methods.items():
            try:
                method(self.radii[0])
            except (TypeError, ValueError) as error:
                raise ValueError(f"methods.{name}: {error}") from error

    @property
    def landscape(self) -> Landscape:
        """The loss."""
        return Landscape(self.sharp_width, self.flat_width)

    def starts(self) -> jax.Array:
        """Uniform starts, the same ones for every method, [num_seeds, num_starts, 2]."""
        corner = jnp.array(CORNER, self.precision)
        shape = (self.num_seeds, self.num_starts, 2)
        return jax.random.uniform(self._key(0), shape, corner.dtype, -corner, corner)

    def keys(self) -> jax.Array:
        """Random keys of the noise, one per walker, [num_seeds, num_starts]."""
        return jax.random.split(self._key(1), (self.num_seeds, self.num_starts))

    def _key(self, salt: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), salt)

    def stages(self) -> list[Walk]:
        """The optimizer alone, then every method with every radius."""
        stage = functools.partial(
            Walk,
            num_steps=self.steps,
            steps_per_chunk=self.steps_per_chunk,
            landscape=self.landscape,
            noise=self.noise,
            starts=self.starts(),
            keys=self.keys(),
        )
        alone = stage(name="sgd", radius=0.0, make=lambda radius: self.optimizer)
        makers = {name: self._behind(method) for name, method in self.methods.items()}
        return [alone] + [
            stage(name=f"{name}_{radius:g}", radius=float(radius), make=make)
            for name, make in makers.items()
            for radius in self.radii
        ]

    def _behind(self, method: MakeTransform) -> MakeTransform:
        return lambda radius: optax.chain(method(radius), self.optimizer)

    # Matplotlib is imported only at the end of a run, so that errors in a configuration show early.

    def summarize(self, rows: list[Row]) -> Summary:
        """Share of the walkers that end in the flat minimum, with its interval, by stage."""
        from experiments.tasks import two_minima_report

        return two_minima_report.summarize(self._ends(rows))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes share.png (share against radius) and landscape.png (the loss and some paths)."""
        from experiments.tasks import two_minima_report

        found = self._ends(rows)
        stages = {stage.name: stage for stage in self.stages()}
        shown = ("sgd", two_minima_report.best(found))
        paths = {name: stages[name].paths(two_minima_report.NUM_PATHS) for name in shown}
        two_minima_report.plot(found, paths, self.landscape, folder)

    def _ends(self, rows: list[Row]) -> dict[str, Any]:
        from experiments.tasks.two_minima_report import ends

        radii = {stage.name: stage.radius for stage in self.stages()}
        return ends(rows, radii, self.num_seeds * self.num_starts)
