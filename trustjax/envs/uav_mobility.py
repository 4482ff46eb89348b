"""How vehicles and users move: limits, closest approaches, random waypoints."""

import jax
import jax.numpy as jnp

_TINY = 1e-30


def limited(velocity: jax.Array, max_speed: float) -> jax.Array:
    """Velocities float [..., 2] of at most `max_speed`, with their directions."""
    squared = jnp.sum(velocity**2, -1, keepdims=True)
    # A root that has a gradient at 0, where it is not used.
    speed = jnp.sqrt(jnp.where(squared > 0, squared, 1))
    factor = jnp.where(squared > max_speed**2, max_speed / speed, 1)
    return velocity * factor


def closest_approach(before: jax.Array, after: jax.Array) -> jax.Array:
    """The smallest distance of each two vehicles that fly straight at constant speed.

    Args:
      before: Places at the start, float [N, 3].
      after: Places at the end, float [N, 3].

    Returns:
      Squared distances, float [N, N].
    """
    gap = before[:, None] - before[None]
    drift = (after[:, None] - after[None]) - gap
    # |gap + t drift|^2 is smallest at this t; t is 0 where the two do not move towards each other.
    t = -jnp.sum(gap * drift, -1) / jnp.maximum(jnp.sum(drift**2, -1), _TINY)
    nearest = gap + jnp.clip(t, 0, 1)[..., None] * drift
    return jnp.sum(nearest**2, -1)


def random_waypoint(
    key: jax.Array, places: jax.Array, waypoints: jax.Array, reach: float, area: float
) -> tuple[jax.Array, jax.Array]:
    """Moves users straight to their waypoints; those who arrive draw a new one.

    The rest of the step in which a user arrives is a pause. The speed is the same at all times, so
    that it does not decay as in the random waypoint model with uniformly drawn speeds.

    Args:
      key: Random key.
      places: Places, m, float [K, 2].
      waypoints: Where the users go, m, float [K, 2].
      reach: Distance of one step, m, >= 0.
      area: Side of the square in which waypoints are drawn, m.

    Returns:
      The new places and waypoints.
    """
    way = waypoints - places
    left = jnp.sqrt(jnp.sum(way**2, -1, keepdims=True))
    arrives = left <= reach
    step = way * (reach / jnp.where(arrives, 1, left))
    drawn = jax.random.uniform(key, places.shape, places.dtype, 0, area)
    return jnp.where(arrives, waypoints, places + step), jnp.where(arrives, drawn, waypoints)
