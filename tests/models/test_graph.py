"""Attention over graphs against numbers worked out in NumPy, and its invariances."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.models.actor_critic import Torso
from trustjax.models.graph import (
    GraphAttention,
    GraphCritic,
    attention_weights,
    gat_scores,
    gatv2_scores,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/multi_agent.json").read_text())["gat"]
KEY = jax.random.key(0)


def given(name):
    return jnp.asarray(GOLDEN[name])


def test_gat(strict, x64):
    z = given("features") @ given("kernel")
    scores = gat_scores(z, z, given("at_receiver"), given("at_sender"))
    np.testing.assert_allclose(scores, GOLDEN["scores"], rtol=1e-12)
    weights = attention_weights(scores, given("edges"))
    np.testing.assert_allclose(weights, GOLDEN["weights"], rtol=1e-12)
    np.testing.assert_allclose(weights @ z, GOLDEN["output"], rtol=1e-12)


def test_gatv2(strict, x64):
    z = given("features") @ given("kernel")
    scores = gatv2_scores(z, z, given("attention_v2"))
    np.testing.assert_allclose(scores, GOLDEN["scores_v2"], rtol=1e-12)
    weights = attention_weights(scores, given("edges"))
    np.testing.assert_allclose(weights, GOLDEN["weights_v2"], rtol=1e-12)
    np.testing.assert_allclose(weights @ z, GOLDEN["output_v2"], rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "output"), [("gat", "output"), ("gatv2", "output_v2"), ("mean", None)]
)
def test_a_layer_with_these_parameters(scores, output):
    """One head; in GATv2 both projections are the same."""
    h, kernel, edges = given("features"), given("kernel"), given("edges")
    layer = GraphAttention(heads=1, width=2, scores=scores)
    attention = {
        "gat": jnp.stack([given("at_receiver"), given("at_sender")])[:, None],
        "gatv2": given("attention_v2")[None, None],
    }
    params = {"senders": {"kernel": kernel}}
    if scores in attention:
        params["attention"] = attention[scores]
    if scores == "gatv2":
        params["receivers"] = {"kernel": kernel}
    found, weights = layer.apply({"params": params}, h, h, edges)
    equal = edges / jnp.sum(edges, 1, keepdims=True)
    expected = GOLDEN[output] if output else equal @ (h @ kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(weights, -1), 1, rtol=1e-6)
    assert weights.shape == (1, 3, 3)
    assert np.all(np.asarray(weights)[:, ~np.array(GOLDEN["edges"])] == 0)


def test_a_receiver_without_senders_and_huge_scores_are_finite():
    scores = jnp.array([[3e38, -3e38, 0.0], [1.0, 2.0, 3.0]])
    edges = jnp.array([[True, True, True], [False, False, False]])
    total = lambda s: jnp.sum(attention_weights(s, edges) * jnp.arange(3.0))
    value, slope = jax.value_and_grad(total)(scores)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(attention_weights(scores, edges)[1], 1 / 3, rtol=1e-6)


@pytest.fixture(scope="module")
def critic():
    """A recurrent critic of three agents, its variables, and an observation with a path graph."""
    network = GraphCritic(Torso(hidden=(8,), gru_size=4), GraphAttention(2, 3), num_agents=3)
    edges = jnp.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)
    observation = {"agents": jax.random.normal(KEY, (2, 3, 5)), "graph": jnp.stack([edges] * 2)}
    carry = jax.random.normal(KEY, (2, network.gru_size))
    return network, jax.jit(network.init)(KEY, observation, carry), observation, carry


def test_values_are_permuted_with_the_agents(critic):
    network, variables, observation, carry = critic
    order = jnp.array([2, 0, 1])
    moved = {
        "agents": observation["agents"][:, order],
        "graph": observation["graph"][:, order][:, :, order],
    }
    moved_carry = carry.reshape(2, 3, 4)[:, order].reshape(2, 12)
    values, after, alpha = network.apply(variables, observation, carry, method="attend")
    found, found_after, found_alpha = network.apply(variables, moved, moved_carry, method="attend")
    np.testing.assert_allclose(found, values[:, order], rtol=1e-5)
    np.testing.assert_allclose(
        found_after.reshape(2, 3, 4), after.reshape(2, 3, 4)[:, order], rtol=1e-5
    )
    np.testing.assert_allclose(found_alpha, alpha[:, :, order][..., order], rtol=1e-5)
    assert np.std(values) > 1e-3
    pooled = network.clone(pooled=True).apply(variables, observation, carry)[0]
    np.testing.assert_allclose(pooled, np.mean(values, -1, keepdims=True).repeat(3, -1), rtol=1e-5)


def test_an_agent_does_not_hear_who_is_out_of_reach(critic):
    network, variables, observation, carry = critic
    values = network.apply(variables, observation, carry)[0]
    other = observation | {"agents": observation["agents"].at[:, 2].add(1.0)}
    changed = network.apply(variables, other, carry)[0]
    np.testing.assert_array_equal(changed[:, 0], values[:, 0])
    assert np.all(np.abs(changed - values)[:, 1:] > 1e-6)


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"heads": 0}, "heads must be >= 1"), ({"scores": "dot"}, "scores must be one of 'gat'")],
)
def test_bad_input(fields, text):
    with pytest.raises(ValueError, match=text):
        GraphAttention(**fields)
