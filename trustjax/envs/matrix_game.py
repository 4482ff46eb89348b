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
from trustjax.envs.multi_agent import Actions, MultiAgentEnvironment, MultiAgentStep, Observations


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


class MatrixGame(MultiAgentEnvironment):
    """A game in normal form: one step, and an observation of 1 for all.

    Its end is its own, not that of a time limit. The world state is the number 1, too.

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

    name = "MatrixGame"

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

    @property
    def agents(self) -> list[str]:
        """See `MultiAgentEnvironment`."""
        return [f"agent_{index}" for index in range(len(self.payoffs))]

    @property
    def observation_spaces(self) -> dict[str, Any]:
        """Vectors of one number."""
        return dict.fromkeys(self.agents, Vector((1,)))

    @property
    def action_spaces(self) -> dict[str, Any]:
        """The actions 0, ..., A_i - 1 of each agent."""
        return dict(zip(self.agents, map(Discrete, self.payoffs.shape[1:]), strict=True))

    def reset(self, key: jax.Array) -> tuple[Observations, Played]:
        """Observations and state before the play."""
        del key
        state = Played(jnp.array(False), jnp.zeros([], jnp.int32))
        return self.get_obs(state), state

    def step_env(self, key: jax.Array, state: Played, actions: Actions) -> MultiAgentStep:
        """Plays once."""
        del key
        chosen = tuple(actions[agent] for agent in self.agents)
        paid = jnp.asarray(self.payoffs)[(slice(None), *chosen)]
        ends = jnp.ones(self.num_agents, bool)
        infos = {"terminated": ends, "truncated": ~ends}
        rewards = dict(zip(self.agents, paid, strict=True))
        dones = dict.fromkeys([*self.agents, "__all__"], jnp.array(True))
        after = Played(jnp.array(True), state.step + 1)
        return self.get_obs(after), after, rewards, dones, infos

    def get_obs(self, state: Played) -> Observations:
        """See `MultiAgentEnvironment`."""
        one = jnp.ones(1, jnp.float32)
        return dict.fromkeys(self.agents, one) | {"world_state": self.get_world_state(state)}

    def get_world_state(self, state: Played) -> jax.Array:
        """The number 1, float32 [1]."""
        del state
        return jnp.ones(1, jnp.float32)


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
