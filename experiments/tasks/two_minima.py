"""A loss in the plane with a sharp and a flat minimum: where do noisy SGD and SAM end?

The sharp minimum is the lower one. Noisy SGD stays in whichever it meets first; SAM's attack of
length rho reaches over the rim of the sharp well, where the gradient points to the flat one.
"""

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


@dataclass(frozen=True)
class Walk:
    """The stage of one method with one radius."""

    task: "TwoMinima"
    name: str
    radius: float
    make: MakeTransform

    @property
    def num_steps(self) -> int:
        """Length of the walk."""
        return self.task.steps

    @property
    def steps_per_chunk(self) -> int:
        """Steps between two rows."""
        return self.task.steps_per_chunk

    def init(self, final: Mapping[str, Any]) -> Walkers:
        """Walkers at their starts."""
        del final
        position = self.task.starts()
        return Walkers(position, jax.vmap(jax.vmap(self.make(self.radius).init))(position))

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: Walkers, batches: None, step: int, num_steps: int
    ) -> tuple[Walkers, list[Row]]:
        """Walks; logs one row per seed."""
        state, _ = self.walk(state, step, num_steps)
        measures = measure(state.position, landscape=self.task.landscape)
        columns = {name: np.asarray(values, float) for name, values in measures.items()}
        return state, [
            {"seed": seed, **{name: values[seed] for name, values in columns.items()}}
            | {"trust/radius": self.radius}
            for seed in range(self.task.num_seeds)
        ]

    def learned(self, state: Walkers) -> jax.Array:
        """Where the walkers are."""
        return state.position

    def finish(self, state: Walkers) -> list[Row]:
        """The last rows of `advance` say it all."""
        del state
        return []

    def walk(self, state: Walkers, step: int, num_steps: int) -> tuple[Walkers, jax.Array]:
        """`walk` with the numbers of the task."""
        num_seeds, num_starts, _ = state.position.shape
        moved: tuple[Walkers, jax.Array] = walk(
            state,
            self.task.keys()[:num_seeds, :num_starts],
            step,
            self.radius,
            self.task.noise,
            landscape=self.task.landscape,
            make=self.make,
            num_steps=num_steps,
        )
        return moved

    def paths(self, count: int) -> np.ndarray:
        """Paths of the first walkers of the first seed from their starts, [count, steps + 1, 2]."""
        start = jax.tree.map(lambda leaf: leaf[:1, :count], self.init({}))
        _, paths = self.walk(start, 0, self.num_steps)
        return np.concatenate([start.position[0, :, None], paths[0]], axis=1)


@dataclass(frozen=True)
class TwoMinima:
    """Walkers from random starts, one stage a method and radius.

    Attributes:
      optimizer: an Optax transform, trained alone as "sgd" and behind every method.
      methods: by name, `radius -> transform`.
      radii: the radii of every method, > 0.
      seed: root of all randomness.
      num_seeds: groups of starts.
      precision: dtype of the positions.
      num_starts: walkers of one seed.
      steps: length of a walk.
      steps_per_chunk: steps between two rows of metrics.
      noise: standard deviation of the noise in each component of the gradient, >= 0.
      sharp_width: standard deviation of the sharp well, > 0.
      flat_width: standard deviation of the flat well, > 0.
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
        """Raises ValueError, which names the field, for numbers out of range."""
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
        """Uniform starts [num_seeds, num_starts, 2], the same ones for every method."""
        corner = jnp.array(CORNER, self.precision)
        shape = (self.num_seeds, self.num_starts, 2)
        return jax.random.uniform(self._key(0), shape, corner.dtype, -corner, corner)

    def keys(self) -> jax.Array:
        """The keys of the noise, one a walker [num_seeds, num_starts]."""
        return jax.random.split(self._key(1), (self.num_seeds, self.num_starts))

    def _key(self, salt: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), salt)

    def stages(self) -> list[Walk]:
        """The optimizer alone, then every method with every radius."""
        alone = Walk(self, "sgd", 0.0, lambda radius: self.optimizer)
        makers = {name: self._behind(method) for name, method in self.methods.items()}
        return [alone] + [
            Walk(self, f"{name}_{radius:g}", float(radius), make)
            for name, make in makers.items()
            for radius in self.radii
        ]

    def _behind(self, method: MakeTransform) -> MakeTransform:
        return lambda radius: optax.chain(method(radius), self.optimizer)

    # Matplotlib is imported at the end of a run: a wrong configuration need not wait for it.

    def summarize(self, rows: list[Row]) -> Summary:
        """Share of walkers that end in the flat minimum, with its interval, by stage."""
        from experiments.tasks import two_minima_report

        return two_minima_report.summarize(self._ends(rows))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """share.png: share against radius; landscape.png: the loss and some paths."""
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
