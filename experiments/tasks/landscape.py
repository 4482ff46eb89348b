"""The landscape of `two_minima`: a loss in the plane with two wells, and walkers on it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    """The state of all walkers.

    Attributes:
      position: Positions, [num_seeds, num_starts, 2].
      optimizer: State of each walker's optimizer, with the same leading axes.
    """

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
    """Moves all walkers `num_steps` steps; also returns their paths [seeds, starts, num_steps, 2].

    Args:
      walkers: The walkers.
      keys: Random keys of the noise, [seeds, starts].
      step: Number of steps that they have done.
      radius: Radius of the method, passed to `make`.
      noise: Standard deviation of the noise in each component of the gradient.
      landscape: The loss.
      make: Makes the transform from the radius.
      num_steps: Number of steps to do.
    """
    transform = optax.with_extra_args_support(make(radius))

    def walk_one(walker: Walkers, key: jax.Array) -> tuple[Walkers, jax.Array]:
        def one_step(walker: Walkers, index: Any) -> tuple[Walkers, jax.Array]:
            position, optimizer = walker
            # Drawn once per step: both gradients of a SAM step see the same noise, as both see the
            # same batch in training.
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
    """Mean loss of positions [..., num_starts, 2], and their share in the flat minimum's basin.

    The basin of a position is that of the minimum to which gradient descent without noise leads.
    """
    height = jnp.vectorize(landscape, signature="(d)->()")
    slope = jnp.vectorize(jax.grad(landscape), signature="(d)->(d)")
    rate = 0.1 * landscape.sharp**2  # the curvature of the sharp well is about 1 / sharp^2
    end = jax.lax.fori_loop(0, 1000, lambda _, w: w - rate * slope(w), position)
    to_flat, to_sharp = (jnp.linalg.norm(end - jnp.array(c), axis=-1) for c in (FLAT, SHARP))
    return {
        "flat": jnp.mean(to_flat < to_sharp, axis=-1),
        "loss": jnp.mean(height(position), axis=-1),
    }
