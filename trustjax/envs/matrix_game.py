"""Games in normal form, played once: the smallest multi-agent environments, with known equilibria.

A joint action (a_1, ..., a_n) pays r_i(a_1, ..., a_n) to agent i. A mixed profile pi_1, ..., pi_n
is an equilibrium if no agent gains by leaving it alone:

    gain_i = max_a r_i(a, pi_-i) - r_i(pi),    NashConv = sum_i gain_i = 0
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError


class Discrete(NamedTuple):
    """The space of the actions 0, ..., n - 1, with the attributes of JaxMARL's `Discrete`."""

    n: int
    shape: tuple[int, ...] = ()


class Vector(NamedTuple):
    """The space of real vectors of one shape, with the attribute `shape` of JaxMARL's `Box`."""

    shape: tuple[int, ...]


class Played(NamedTuple):
    """The state of a game.

    Attributes:
      done: Whether it has been played, bool [].
      step: Number of plays, int32 [].
    """

    done: jax.Array
    step: jax.Array


class MatrixGame:
    """A game in normal form with JaxMARL's conventions: one step, an observation of 1 for all.

    Args:
      payoffs: Payoffs, float [n, A_1, ..., A_n]; of one agent each along the first axis. An array
        [A_1, ..., A_n] is a common payoff of all agents, with `common=True`.
      common: Whether all agents have the same payoff.

    Raises:
      ValueError: The array does not have one axis of actions for each agent.

    >>> game = MatrixGame([[0.0, 1.0], [1.0, 0.0]], common=True)
    >>> game.num_agents, game.action_space("agent_0").n
    (2, 2)
    """

    def __init__(self, payoffs: Any, *, common: bool = False) -> None:
        """Checks the payoffs."""
        array = np.asarray(payoffs, np.float32)
        if common:
            array = np.stack([array] * array.ndim)
        if array.ndim < 2 or len(array) != array.ndim - 1:
            raise FieldError(
                "payoffs", "be [n, A_1, ..., A_n] for n agents", f"shape {array.shape}"
            )
        self.payoffs = array
        self.num_agents = len(array)
        self.agents = [f"agent_{index}" for index in range(self.num_agents)]
        self.name = "MatrixGame"

    def observation_space(self, agent: str) -> Vector:
        """The space of an observation."""
        self._index(agent)
        return Vector((1,))

    def action_space(self, agent: str) -> Discrete:
        """The space of an agent's actions."""
        return Discrete(self.payoffs.shape[1 + self._index(agent)])

    def reset(self, key: jax.Array) -> tuple[dict[str, jax.Array], Played]:
        """Observations and state before the play."""
        del key
        return self._observations(), Played(jnp.array(False), jnp.zeros([], jnp.int32))

    def step_env(
        self, key: jax.Array, state: Played, actions: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], Played, dict[str, jax.Array], dict[str, jax.Array], Any]:
        """Plays once: observations, state, rewards, dones and infos, without a reset."""
        del key
        chosen = tuple(actions[agent] for agent in self.agents)
        paid = jnp.asarray(self.payoffs)[(slice(None), *chosen)]
        done = jnp.array(True)
        rewards = {agent: paid[index] for index, agent in enumerate(self.agents)}
        dones = dict.fromkeys([*self.agents, "__all__"], done)
        return self._observations(), Played(done, state.step + 1), rewards, dones, {}

    def _observations(self) -> dict[str, jax.Array]:
        return {agent: jnp.ones(1, jnp.float32) for agent in self.agents}

    def _index(self, agent: str) -> int:
        if agent not in self.agents:
            raise FieldError("agent", f"be one of {', '.join(self.agents)}", repr(agent))
        return self.agents.index(agent)


def expected_payoffs(game: MatrixGame, profile: Sequence[Any]) -> np.ndarray:
    """The expected payoffs [n] of mixed policies, `profile[i]` being probabilities [A_i]."""
    letters = string.ascii_lowercase[: game.num_agents]
    formula = f"z{letters},{','.join(letters)}->z"
    operands = [np.asarray(policy, np.float64) for policy in profile]
    return np.asarray(np.einsum(formula, game.payoffs.astype(np.float64), *operands))


def deviation_gains(game: MatrixGame, profile: Sequence[Any]) -> np.ndarray:
    r"""What each agent gains by its best action while the others keep their policies, [n].

    .. math:: \max_a r_i(a, \pi_{-i}) - r_i(\pi) \ge 0

    Their sum is NashConv, which is 0 at an equilibrium alone.

    >>> game = MatrixGame([[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]])  # matching pennies
    >>> print(deviation_gains(game, [[0.5, 0.5], [0.5, 0.5]]))
    [0. 0.]
    """
    now = expected_payoffs(game, profile)
    gains = []
    for index in range(game.num_agents):
        pure = np.eye(game.payoffs.shape[1 + index])
        values = [
            expected_payoffs(game, [*profile[:index], action, *profile[index + 1 :]])[index]
            for action in pure
        ]
        gains.append(max(values) - now[index])
    return np.array(gains)
