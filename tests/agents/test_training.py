"""Evaluations during training: the same training, a curve, and the best policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agent_table import small_config

from trustjax.agents import (
    Best,
    evaluate_and_keep_best,
    initial_best,
    load_policy,
    train_with_evaluations,
)
from trustjax.agents.policy import Evaluation

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def agent():
    """Learns the probe's reward, +1 for one action and -1 for the other, in a few iterations."""
    return small_config(
        "ppo", env="probe:action", learning_rate=0.1, normalize_observations=True,
        orthogonal=False, total_steps=5 * 32,
    ).agent()  # fmt: skip


@pytest.mark.slow
def test_evaluations_leave_the_training_as_it_is(agent, tmp_path):
    """For two seeds at once, with an evaluation after a rest that is shorter."""
    keys = jax.random.split(KEY, 2)

    def train(key):
        return train_with_evaluations(agent, key, updates_per_evaluation=2, num_episodes=4)

    state, history, best = jax.jit(jax.vmap(train))(keys)
    expected, metrics = jax.jit(jax.vmap(agent.train))(keys)
    for found, plain in ((state.params, expected.params), ({**history}, metrics)):
        found = {name: found[name] for name in plain}
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, 1e-4, 1e-5), found, plain)
    np.testing.assert_array_equal(history["evaluation/steps"], [[64, 128, 160]] * 2)
    returns = np.asarray(history["evaluation/return"])
    assert returns.shape == (2, 3)
    np.testing.assert_array_equal(returns[:, -1], 1)  # all have learnt it
    np.testing.assert_array_equal(history["evaluation/length"], 1)
    np.testing.assert_array_equal(best.mean_return, returns.max(1))
    one = jax.tree.map(lambda x: x[0], best)
    agent.policy(one).save(tmp_path / "best.npz")
    action, _ = load_policy(tmp_path / "best.npz").act(jnp.ones((3, 1)), KEY, deterministic=True)
    np.testing.assert_array_equal(action, 1)


def test_the_best_policy_stays(agent, monkeypatch):
    """Through equal and lower returns, and through NaN."""
    first = jax.jit(agent.init)(KEY)
    best = initial_best(first)
    assert best.mean_return == -jnp.inf
    assert best.params["actor"] is not first.params["actor"]  # which the next chunk overwrites
    kept = []
    for count, value in enumerate([np.nan, 1.0, 1.0, 0.0, 2.0, np.nan]):
        monkeypatch.setattr(
            agent,
            "evaluate",
            lambda *_, value=value: Evaluation(
                jnp.full(2, value), jnp.ones(2, jnp.int32), jnp.ones(2, bool)
            ),
        )
        state = first._replace(params=jax.tree.map(lambda x, c=count: x * 0 + c, first.params))
        best, found = evaluate_and_keep_best(agent, state, best, KEY, 2)
        assert isinstance(best, Best)
        np.testing.assert_array_equal(found["evaluation/return"], value)
        kept.append(
            (float(best.mean_return), float(best.params["actor"]["params"]["head"]["bias"][0]))
        )
    initial = float(first.params["actor"]["params"]["head"]["bias"][0])
    assert kept == [(-np.inf, initial), (1, 1), (1, 1), (1, 1), (2, 4), (2, 4)]


def test_bad_numbers(agent):
    for options, message in [
        ({"updates_per_evaluation": 0, "num_episodes": 1}, "updates_per_evaluation must be >= 1"),
        ({"updates_per_evaluation": 1, "num_episodes": 0}, "num_episodes must be >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_with_evaluations(agent, KEY, **options)
