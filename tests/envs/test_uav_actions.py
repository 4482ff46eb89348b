"""What actions mean, by hand."""

import jax.numpy as jnp
import numpy as np

from trustjax.envs.uav_actions import BoxActions, DiscreteActions, Limits

ALL = Limits(
    num_users=2, max_speed=10.0, max_climb=3.0, max_power=0.3, power_control=True,
    num_channels=2, bandwidth="tilted",
)  # fmt: skip
LEAST = ALL._replace(max_climb=0.0, power_control=False, num_channels=1, bandwidth="equal")


def test_discrete(strict):
    """Moves come first: hover, 5 m/s to four sides, 10 m/s; then climb, power, channel, tilt."""
    code = DiscreteActions(ALL, num_speeds=2, num_headings=4, num_levels=3)
    assert code.space().n == code.num_actions == 9 * 3 * 3 * 2 * 3
    digits = np.array([[0, 0, 0, 0, 0], [2, 1, 2, 1, 2], [7, 2, 1, 0, 1]])
    actions = np.ravel_multi_index(tuple(digits.T), (9, 3, 3, 2, 3))
    found = code.decode(jnp.asarray(actions, jnp.int32))
    np.testing.assert_allclose(found.velocity, [[0, 0, -3], [0, 5, 0], [-10, 0, 3]], atol=1e-6)
    np.testing.assert_allclose(found.power, [0.1, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(found.channel, [0, 1, 0])
    np.testing.assert_array_equal(found.tilt, [-1, 1, 0])
    np.testing.assert_array_equal(found.preference, np.zeros((3, 2)))


def test_discrete_without_choices(strict):
    code = DiscreteActions(LEAST, num_speeds=1, num_headings=2, num_levels=3)
    assert code.num_actions == 3
    found = code.decode(jnp.arange(3))
    np.testing.assert_allclose(found.velocity, [[0, 0, 0], [10, 0, 0], [-10, 0, 0]], atol=1e-5)
    np.testing.assert_allclose(found.power, 0.3, rtol=1e-6)
    np.testing.assert_array_equal(found.channel, [0, 0, 0])


def test_box(strict):
    code = BoxActions(ALL)
    assert code.space().shape == (code.size,) == (7,)
    actions = jnp.array([[0.6, 0.8, -1, 0, 0.1, 0.2, 0.5], [2.0, -3.0, 5, 9, 0.2, 0.1, -7]])
    found = code.decode(actions)
    long = 10 / np.sqrt(2)
    np.testing.assert_allclose(found.velocity, [[6, 8, -3], [long, -long, 3]], rtol=1e-6)
    np.testing.assert_allclose(found.power, [0.15, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(found.channel, [1, 0])
    np.testing.assert_array_equal(found.tilt, [0.5, -1])


def test_box_without_choices(strict):
    code = BoxActions(LEAST)
    assert code.size == 2
    found = code.decode(jnp.array([[0.0, 0.5]]))
    np.testing.assert_allclose(found.velocity, [[0, 5, 0]])
    np.testing.assert_allclose(found.power, [0.3])
    per_user = BoxActions(LEAST._replace(bandwidth="per_user"))
    found = per_user.decode(jnp.array([[0.0, 0.5, 1.0, -2.0]]))
    np.testing.assert_array_equal(found.preference, [[3, -3]])
    assert found.channel.tolist() == [0]
