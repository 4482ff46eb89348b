"""The channel against the fact sheet's numbers, and what must hold of it whatever the numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.envs import uav_channel as channel

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/uav.json").read_text())
N, K = 3, 5
PLACES = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize(
    "case", GOLDEN["losses"], ids=lambda c: f"{c['scene']}-{c['height']}-{c['distance']}"
)
def test_losses(case, strict):
    scene = channel.SCENES[case["scene"]]
    h, r = jnp.float32(case["height"]), jnp.float32(case["distance"])
    in_sight = channel.line_of_sight_probability(h, r, scene)
    np.testing.assert_allclose(in_sight, case["in_sight"], rtol=1e-5)
    np.testing.assert_allclose(channel.path_loss(h, r, scene, 2e9), case["loss"], rtol=1e-6)


@pytest.mark.parametrize(("disturbed", "expected"), [(False, "alone"), (True, "disturbed")])
def test_link(disturbed, expected, strict):
    """One vehicle 100 m away from a user; a second one at 300 m disturbs it or does not."""
    case = GOLDEN["link"]
    scene = channel.SCENES[case["scene"]]
    noise = channel.decibels_to_watts(case["noise_density"]) * case["bandwidth"]

    @jax.jit
    def link(vehicles, user, power):
        gains = channel.channel_gains(vehicles, user, scene, case["carrier"])
        serving = channel.associate(power, gains)
        ratio = channel.signal_to_interference(
            power, gains, serving, noise, None if disturbed else jnp.arange(2)
        )
        return gains, serving, ratio, case["bandwidth"] * channel.spectral_efficiency(ratio)

    vehicles = jnp.array([[r, 0.0, case["height"]] for r in case["distances"]])
    gains, serving, ratio, rate = link(vehicles, jnp.zeros((1, 2)), jnp.full(2, case["power"]))
    np.testing.assert_allclose(-10 * np.log10(gains[:, 0]), case["losses"], rtol=1e-6)
    assert serving.tolist() == [0]
    decibels = 10 * np.log10(ratio)
    np.testing.assert_allclose([decibels[0], rate[0] / 1e6], case[expected], rtol=2e-6)


def test_fairness(strict):
    case = GOLDEN["fairness"]
    few, rates = np.array([0.0, 3.0, 0.0, 0.0]), np.array(case["rates"])
    # Squares of the second leave the range of float32, and nobody has anything in the third.
    table = np.stack([rates, 1e30 * rates, 0 * rates, few, [1.0, np.nan, 1.0, 1.0]])
    found = jax.jit(channel.jain_index)(jnp.asarray(table, jnp.float32))
    np.testing.assert_allclose(found, [case["jain"], case["jain"], 1, 0.25, np.nan], rtol=1e-6)


@jax.jit
def network(key, power, channels):
    """Ratios and shares of a random network."""
    key_vehicles, key_heights, key_users, key_logits = jax.random.split(key, 4)
    heights = jax.random.uniform(key_heights, (N, 1), minval=30, maxval=300)
    vehicles = jnp.concatenate([1000 * jax.random.uniform(key_vehicles, (N, 2)), heights], 1)
    users = 1000 * jax.random.uniform(key_users, (K, 2))
    gains = channel.channel_gains(vehicles, users, channel.SCENES["urban"], 2e9)
    serving = channel.associate(power, gains)
    ratio = channel.signal_to_interference(power, gains, serving, 1e-14, channels)
    shares = channel.bandwidth_shares(serving, 10 * jax.random.normal(key_logits, (K,)))
    return gains, serving, ratio, shares


@settings(max_examples=30, deadline=None, derandomize=True)
@given(PLACES, st.floats(0.1, 10), st.lists(st.integers(0, 2), min_size=N, max_size=N))
def test_what_holds_of_every_network(seed, factor, channels):
    key, power, channels = jax.random.key(seed), jnp.full(N, 0.1), jnp.array(channels)
    gains, serving, ratio, shares = (np.asarray(x) for x in network(key, power, channels))
    assert ((gains > 0) & (gains < 1) & (ratio > 0)).all()
    # The strongest serves, and shares of each vehicle's users sum to 1.
    assert (serving == (0.1 * gains).argmax(0)).all()
    sums = np.bincount(serving, shares, minlength=N)
    np.testing.assert_allclose(sums, np.bincount(serving, minlength=N) > 0, rtol=1e-5)
    # Interference only takes away, and only that of the same channel.
    alone = np.asarray(network(key, power, jnp.arange(N))[2])
    assert (ratio <= alone * (1 + 1e-6)).all()
    same = channels[:, None] == channels[serving][None]
    disturbed = (same & (np.arange(N)[:, None] != serving[None])).any(0)
    np.testing.assert_allclose(ratio[~disturbed], alone[~disturbed], rtol=1e-6)
    # Without interference more power is better, in proportion.
    more = np.asarray(network(key, factor * power, jnp.arange(N))[2])
    np.testing.assert_allclose(more, factor * alone, rtol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(channel.SCENES)), st.floats(20, 500), st.floats(0, 3000))
def test_farther_is_worse(name, height, distance):
    scene = channel.SCENES[name]
    h, r = jnp.float32(height), jnp.array([distance, distance + 10], jnp.float32)
    in_sight = channel.line_of_sight_probability(h, r, scene)
    loss = channel.path_loss(h, r, scene, 2e9)
    assert 0 < in_sight[1] <= in_sight[0] <= 1
    assert loss[0] < loss[1]


def test_extremes():
    """Right below, far away, and without power: values and gradients are finite."""
    vehicles = jnp.array([[0.0, 0.0, 100.0], [1e6, 0.0, 1.0]])
    users = jnp.array([[0.0, 0.0], [1.0, 1.0]])

    def total(vehicles, power):
        gains = channel.channel_gains(vehicles, users, channel.SCENES["high_rise"], 2e9)
        serving = channel.associate(power, gains)
        ratio = channel.signal_to_interference(power, gains, serving, 1e-15)
        efficiency = channel.spectral_efficiency(ratio)
        return jnp.sum(channel.bandwidth_shares(serving, -efficiency) * efficiency)

    for power in (jnp.array([0.1, 0.1]), jnp.zeros(2)):
        value, gradients = jax.value_and_grad(total, (0, 1))(vehicles, power)
        assert np.isfinite(value)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert value == 0
    assert np.isnan(total(vehicles.at[0, 0].set(jnp.nan), jnp.ones(2)))
