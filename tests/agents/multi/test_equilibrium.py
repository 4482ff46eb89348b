"""NashConv by trained responses, on games whose gains are known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents.multi import Graph, hatrpo
from trustjax.agents.multi.equilibrium import Deviation, Others, nash_conv
from trustjax.envs.joint import joint
from trustjax.envs.matrix_game import MatrixGame, deviation_gains

KEY = jax.random.key(0)
DILEMMA = MatrixGame([[[3, 0], [5, 1]], [[3, 5], [0, 1]]])  # cooperate, defect
PENNIES = MatrixGame([[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]])
UNEQUAL = MatrixGame(np.asarray(jax.random.normal(KEY, (2, 2, 3))))
BUDGET = {
    "num_episodes": 4096, "total_steps": 20 * 128, "num_envs": 32, "num_steps": 4,
    "num_epochs": 4, "num_minibatches": 1, "learning_rate": 0.03,
}  # fmt: skip


def agent_of(game, **options):
    fields = {"hidden": (8,), "num_envs": 32, "num_steps": 4, "total_steps": 80 * 128}
    return hatrpo.Config(env=game, reward="individual", **fields | options).agent()


def profile(agent, state):
    """The probabilities of all agents' actions."""
    observation = jax.tree.map(lambda x: x[None], agent.env.reset(KEY)[0])
    observation = agent.normalize(state.observations, observation)
    distribution = agent.actor.apply(state.params["actor"], observation)[0]
    probabilities = np.exp(np.asarray(distribution.log_probs()[0], np.float64))
    return [p[:number] for p, number in zip(probabilities, agent.num_actions, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("game", [UNEQUAL, PENNIES], ids=["unequal", "pennies"])
def test_gains_of_untrained_policies(game):
    """Nearly uniform, which is an equilibrium of matching pennies and not of the other game."""
    agent = agent_of(game)

    def measure(key):
        state = agent.init(key)
        return state, nash_conv(agent, state, key, **BUDGET)

    state, found = jax.jit(measure)(KEY)
    expected = deviation_gains(game, profile(agent, state))
    np.testing.assert_allclose(found.gains, expected, atol=0.06)  # 4 deviations of 4096 plays
    np.testing.assert_allclose(found.nash_conv, np.sum(found.gains), rtol=1e-5)


@pytest.mark.slow
def test_the_equilibrium_of_a_dilemma_is_found():
    """Both defect: NashConv is below 1e-2 by trained responses, and by enumeration."""
    agent = agent_of(DILEMMA, total_steps=300 * 128, radius=0.05)

    def measure(key):
        state, _ = agent.train(key)
        return state, nash_conv(agent, state, key, **BUDGET | {"num_episodes": 65536})

    states, found = jax.jit(jax.vmap(measure))(jax.random.split(KEY, 2))
    assert np.all(found.nash_conv < 1e-2)
    np.testing.assert_allclose(found.returns, 1, atol=1e-2)
    for seed in range(2):
        each = jax.tree.map(lambda x, i=seed: x[i], states)
        assert np.sum(deviation_gains(DILEMMA, profile(agent, each))) < 1e-2


def test_bad_input():
    agent = agent_of(DILEMMA, actor_graph=Graph(gru_size=None))
    state = jax.eval_shape(agent.init, KEY)
    with pytest.raises(ValueError, match="agent must have policies that do not hear each other"):
        nash_conv(agent, state, KEY, num_episodes=1)
    with pytest.raises(ValueError, match="num_episodes must be >= 1"):
        nash_conv(agent, state, KEY, num_episodes=0)


class Box(NamedTuple):
    low: float
    high: float
    shape: tuple[int, ...] = (1,)


class Targets(MatrixGame):
    """Each agent is paid the more, the closer its own action is to 3, which one cannot reach."""

    def __init__(self):
        super().__init__(np.zeros((2, 2, 2)))

    @property
    def action_spaces(self):
        return {"agent_0": Box(-1.0, 1.0), "agent_1": Box(-5.0, 5.0)}

    def step_env(self, key, state, actions):
        none = {agent: jnp.int32(0) for agent in self.agents}
        seen, after, _, done, info = super().step_env(key, state, none)
        paid = {agent: -jnp.sum(jnp.square(actions[agent] - 3)) for agent in self.agents}
        return seen, after, paid, done, info


def test_a_deviator_has_its_own_bounds():
    """With those of the first agent, the second could not play what it has learned."""
    env = Deviation(joint(Targets()), None)
    assert (env.action_low[0], env.action_high[0]) == (-5, 5)
    agent = agent_of(Targets(), critic="local", total_steps=128)
    state = agent.init(KEY)
    for index, expected in ((0, -4.0), (1, 0.0)):
        others = Others(agent.policy(state), jnp.int32(index))
        game = Deviation(agent.env, others)
        _, start = game.reset(KEY)
        _, _, reward, *_ = game.step(KEY, start, jnp.array([3.0]))
        np.testing.assert_allclose(reward, expected, atol=1e-6)
