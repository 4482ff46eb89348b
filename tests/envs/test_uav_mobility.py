"""Limits of speed, closest approaches and random waypoints, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from trustjax.envs.uav_mobility import closest_approach, limited, random_waypoint


def test_limited(strict):
    velocity = jnp.array([[3.0, 4.0], [30.0, -40.0], [0.0, 0.0]])
    np.testing.assert_allclose(limited(velocity, 5.0), [[3, 4], [3, -4], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda v: limited(v, 5.0).sum())(velocity)).all()
    assert np.isnan(limited(jnp.array([[jnp.nan, 1.0]]), 5.0)).any()


def test_closest_approach(strict):
    """They cross, pass at 3 m in height, fly together, or part."""
    before = jnp.array([[0.0, 0, 50], [10, 0, 50], [10, 0, 53], [0, 4, 50]])
    after = jnp.array([[10.0, 0, 50], [0, 0, 50], [0, 0, 53], [10, 4, 50]])
    distance = np.sqrt(closest_approach(before, after))
    np.testing.assert_allclose(distance[0], [0, 0, 3, 4], atol=1e-5)
    np.testing.assert_allclose(distance, distance.T)
    parting = closest_approach(before[:2], jnp.array([[-5.0, 0, 50], [20, 0, 50]]))
    np.testing.assert_allclose(parting[0, 1], 100)


def test_random_waypoint(strict):
    places, waypoints = jnp.array([[0.0, 0], [100, 100]]), jnp.array([[30.0, 40], [103, 104]])
    new, following = random_waypoint(jax.random.key(0), places, waypoints, 10.0, 500.0)
    np.testing.assert_allclose(new, [[6, 8], [103, 104]], rtol=1e-6)
    np.testing.assert_array_equal(following[0], waypoints[0])
    assert (following[1] != waypoints[1]).all()
    assert ((following[1] >= 0) & (following[1] <= 500)).all()


def test_users_fill_the_area():
    """Long after the start they are all over, more often in the middle, and never outside."""

    def step(carry, key):
        carry = random_waypoint(key, *carry, 50.0, 400.0)
        return carry, carry[0]

    start = jnp.zeros((50, 2)), jnp.full((50, 2), 200.0)
    keys = jax.random.split(jax.random.key(1), 200)
    seen = np.asarray(jax.jit(lambda: jax.lax.scan(step, start, keys)[1])())
    assert ((seen >= 0) & (seen <= 400)).all()
    late = seen[50:].reshape(-1, 2)
    np.testing.assert_allclose(late.mean(0), 200, atol=10)
    inner = (np.abs(late - 200) < 100).all(1).mean()
    assert 0.3 < inner < 0.5  # a quarter of the area
    legs = np.linalg.norm(np.diff(seen, axis=0), axis=-1)
    assert legs.max() < 50.01
