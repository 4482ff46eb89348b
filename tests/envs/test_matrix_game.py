"""Games in normal form, alone and as a joint environment."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.envs.joint import Joint, joint
from trustjax.envs.matrix_game import MatrixGame, deviation_gains, expected_payoffs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/multi_agent.json").read_text())
KEY = jax.random.key(0)
DILEMMA = [[[3, 0], [5, 1]], [[3, 5], [0, 1]]]  # cooperate, defect


def test_gains_of_a_common_payoff():
    golden = GOLDEN["deviation"]
    game = MatrixGame(golden["payoffs"], common=True)
    found = expected_payoffs(game, golden["profile"])
    np.testing.assert_allclose(found, golden["value"], rtol=1e-6)
    found = deviation_gains(game, golden["profile"])
    np.testing.assert_allclose(found, golden["gains"], rtol=1e-6)


def test_equilibria_have_no_gains():
    """Both defect; rock, paper and scissors are equally likely."""
    np.testing.assert_array_equal(deviation_gains(MatrixGame(DILEMMA), [[0, 1], [0, 1]]), 0)
    np.testing.assert_array_equal(deviation_gains(MatrixGame(DILEMMA), [[1, 0], [1, 0]]), 2)
    rps = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    uniform = np.full(3, 1 / 3)
    found = deviation_gains(MatrixGame([rps, -rps]), [uniform, uniform])
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_a_joint_step_pays_and_ends():
    env = joint(MatrixGame(np.arange(12.0).reshape(2, 2, 3)))
    assert env.num_actions == (2, 3)
    assert env.observation_shape == {"agents": (2, 1), "state": (1,), "graph": (2, 2)}
    step = jax.jit(lambda action: env.step(KEY, env.reset(KEY)[1], action))
    _, state, reward, terminated, truncated, info = step(jnp.array([1, 2]))
    np.testing.assert_array_equal(reward, [5.0, 11.0])
    assert terminated
    assert not truncated
    assert state.step == 0  # of the next game
    assert set(info) >= {"final_observation"}


class Chain:
    """Two agents with observations of one and two numbers, which a limit of three steps truncates.

    Agent 1 hears agent 0 after the first step alone; the reward of agent i is i.
    """

    agents = ("a", "b")

    def observation_space(self, agent):
        return jax.ShapeDtypeStruct((1 + (agent == "b"),), jnp.float32)

    def action_space(self, agent):
        from gymnax.environments.spaces import Box

        return Box(-1.0, 2.0, (2,))

    def reset(self, key):
        return self.look(jnp.zeros([], jnp.int32)), jnp.zeros([], jnp.int32)

    def look(self, time):
        one = time.astype(jnp.float32)[None]
        return {"a": one, "b": jnp.tile(one + 10, 2), "world_state": 2 * one}

    def adjacency(self, state):
        return jnp.array([[True, True], [False, False]]).at[1, 0].set(state == 1)

    def step_env(self, key, state, actions):
        assert actions["a"].shape == (2,)
        end = state + 1 >= 3
        rewards = {"a": 0.0, "b": 1.0}
        infos = {"truncated": jnp.stack([end, end]), "load": jnp.ones(2)}
        return self.look(state + 1), state + 1, rewards, {"__all__": end}, infos


def test_observations_are_padded_and_time_limits_truncate():
    env = Joint(Chain())
    np.testing.assert_array_equal(env.action_low, -np.ones((2, 2)))
    np.testing.assert_array_equal(env.action_high, 2 * np.ones((2, 2)))
    observation, state = env.reset(KEY)
    step = jax.jit(env.step)
    for time in (1, 2, 3):
        observation, state, reward, terminated, truncated, info = step(
            KEY, state, jnp.zeros((2, 2))
        )
        np.testing.assert_array_equal(reward, [0, 1])
        assert not terminated
        assert truncated == (time == 3)
        final = info["final_observation"]
        np.testing.assert_array_equal(final["agents"], [[time, 0], [time + 10, time + 10]])
        np.testing.assert_array_equal(final["state"], [2 * time])
        np.testing.assert_array_equal(final["graph"], [[True, True], [time == 1, True]])
        if time < 3:
            np.testing.assert_array_equal(observation["graph"], final["graph"])
    np.testing.assert_array_equal(observation["agents"], [[0, 0], [10, 10]])
    np.testing.assert_array_equal(observation["graph"], [[True, True], [False, True]])
    assert info["load"].shape == (2,)


def test_bad_input():
    with pytest.raises(ValueError, match=r"payoffs must be \[n, A_1, ..., A_n\]"):
        MatrixGame(np.eye(2))
    with pytest.raises(ValueError, match=r"agent must be one of 'agent_0', 'agent_1', got 'x'"):
        MatrixGame(DILEMMA).action_space("x")
    with pytest.raises(ValueError, match="it lacks agents"):
        joint(3)

    class Mixed(Chain):
        def action_space(self, agent):
            discrete = MatrixGame(DILEMMA).action_space("agent_0")
            return super().action_space(agent) if agent == "a" else discrete

    with pytest.raises(ValueError, match="env must have discrete actions for all agents, or"):
        Joint(Mixed())
