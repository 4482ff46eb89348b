"""A loss in the plane with a sharp and a flat minimum: where do noisy SGD and SAM end?

The sharp minimum is the lower one. Noisy SGD stays in whichever it meets first; SAM's attack of
length rho reaches over the rim of the sharp well, where the gradient points to the flat one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import Row, Summary

MakeTransform = Callable[[Any], optax.GradientTransformation]  # radius -> transform

SHARP, FLAT = (-1.0, 0.0), (1.0, 0.0)
CORNER = (2.0, 1.5)  # starts are uniform between -CORNER and CORNER


@dataclass(frozen=True)
class Landscape:
    """Two Gaussian wells in a shallow bowl, w [2] -> [].

    L(w) = 1 + 0.03 |w|^2 - exp(-|w - SHARP|^2 / 2 sharp^2) - 0.8 exp(-|w - FLAT|^2 / 2 flat^2)
    """

    sharp: float
    flat: float

    def __call__(self, w: jax.Array) -> jax.Array:
        """The loss at w."""

        def well(center: tuple[float, float], width: float) -> jax.Array:
            return jnp.exp(-jnp.sum((w - jnp.array(center, w.dtype)) ** 2) / (2 * width**2))

        bowl = 1 + 0.03 * jnp.sum(w**2)
        return bowl - well(SHARP, self.sharp) - 0.8 * well(FLAT, self.flat)


class Walkers(NamedTuple):
    """All walkers: `position` [num_seeds, num_starts, 2], and the optimizer's state of each."""

    position: jax.Array
    optimizer: Any


@functools.partial(jax.jit, static_argnames=("landscape", "make", "num_steps"))
def walk(
    walkers: Walkers,
    keys: jax.Array,
    step: jax.typing.ArrayLike,
    radius: jax.typing.ArrayLike,
    noise: jax.typing.ArrayLike,
    *,
    landscape: Landscape,
    make: MakeTransform,
    num_steps: int,
) -> tuple[Walkers, jax.Array]:
    """Moves all walkers by `num_steps`; also returns their paths [seeds, starts, num_steps, 2].

    Both gradients of a SAM step see the same noise, as both see the same batch in training.
    """
    transform = optax.with_extra_args_support(make(radius))

    def walk_one(walker: Walkers, key: jax.Array) -> tuple[Walkers, jax.Array]:
        def one_step(walker: Walkers, index: Any) -> tuple[Walkers, jax.Array]:
            position, optimizer = walker
            push = jax.random.normal(jax.random.fold_in(key, index), (2,), position.dtype)

            def gradient(w: jax.Array) -> jax.Array:
                slope: jax.Array = jax.grad(landscape)(w)
                return slope + jnp.asarray(noise * push, w.dtype)

            updates, optimizer = transform.update(
                gradient(position), optimizer, position, grad_fn=gradient
            )
            position = optax.apply_updates(position, updates)
            return Walkers(position, optimizer), position

        return jax.lax.scan(one_step, walker, step + jnp.arange(num_steps))

    return jax.vmap(jax.vmap(walk_one))(walkers, keys)


@functools.partial(jax.jit, static_argnames="landscape")
def measure(position: jax.Array, *, landscape: Landscape) -> dict[str, jax.Array]:
    """Mean loss of positions [..., num_starts, 2], and the share of them in the flat basin.

    The basin is found by descent without noise, at a tenth of the stable rate in the sharp well.
    """
    height = jnp.vectorize(landscape, signature="(d)->()")
    slope = jnp.vectorize(jax.grad(landscape), signature="(d)->(d)")
    rate = 0.1 * landscape.sharp**2
    end = jax.lax.fori_loop(0, 1000, lambda _, w: w - rate * slope(w), position)
    to_flat, to_sharp = (jnp.linalg.norm(end - jnp.array(c), axis=-1) for c in (FLAT, SHARP))
    return {
        "flat": jnp.mean(to_flat < to_sharp, axis=-1),
        "loss": jnp.mean(height(position), axis=-1),
    }


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
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.noise < 0:
            raise ValueError(f"noise must be >= 0, got {self.noise}")
        for name in ("sharp_width", "flat_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.radii or min(self.radii) <= 0 or len(set(self.radii)) < len(self.radii):
            raise ValueError(f"radii must be different numbers > 0, got {self.radii}")
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
        from experiments.tasks.two_minima_report import summarize

        return summarize(self, rows)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """share.png: share against radius; landscape.png: the loss and some paths."""
        from experiments.tasks.two_minima_report import plot

        plot(self, rows, folder)
