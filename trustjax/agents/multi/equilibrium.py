r"""How far several policies are from an equilibrium: what each agent gains by leaving alone.

    gain_i = max(0, J_i(b_i, pi_-i) - J_i(pi)),    NashConv = sum_i gain_i

where b_i is a best response, trained with PPO while the policies of the others stay as they are.
The training starts from the agent's own policy. It finds a lower bound of the gain, since a longer
training may find more: a small gain is evidence for an equilibrium within the budget, no proof.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_number
from trustjax.agents import ppo
from trustjax.agents.multi.base import MultiAgent
from trustjax.agents.policy import Policy
from trustjax.agents.running_statistics import normalized
from trustjax.envs.environment import Environment, EnvParams, Observation, Step
from trustjax.envs.joint import Joint
from trustjax.models.actor_critic import reset_carry


class Others(NamedTuple):
    """Who deviates, and from what; the parameters of `Deviation`.

    Attributes:
      policy: The joint policy, by which all others act.
      index: Index of the agent that deviates, int32 [].
    """

    policy: Any
    index: Any


class _State(NamedTuple):
    inner: Any
    observation: Any
    carry: Any


class Deviation(Environment):
    """One agent of a joint environment, whose others act by frozen policies.

    The agent sees its own observation, normalised as its policy normalises it, and gets its own
    reward. The frozen policies and the index of the agent are parameters, so that `jax.vmap` maps
    over agents and over seeds.

    Args:
      env: The joint environment.
      others: Who deviates, or arrays of these shapes.
    """

    def __init__(self, env: Joint, others: Others) -> None:
        """Takes the spaces of one agent."""
        self.joint = env
        self.default_params = others
        numbers: Any = env.num_actions
        self._masks = None
        if numbers is not None:
            self.num_actions = max(numbers)
            if len({*numbers}) > 1:
                self._masks = jnp.arange(max(numbers)) < jnp.array(numbers)[:, None]
        else:
            assert env.action_low is not None
            assert env.action_high is not None
            # Wide enough for all; each deviator's action is clipped to its own bounds.
            self.action_low = np.min(env.action_low, 0)
            self.action_high = np.max(env.action_high, 0)
        self.observation_shape: Any = (env.width,)
        if self._masks is not None:
            self.observation_shape = {"own": (env.width,), "action_mask": (self.num_actions,)}

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, _State]:
        """See `Environment`."""
        others = self.default_params if params is None else params
        observation, inner = self.joint.reset(key)
        state = _State(inner, observation, others.policy.initial_carry())
        return self._own(observation, others), state

    def step(
        self, key: jax.Array, state: _State, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        others = self.default_params if params is None else params
        key_others, key_step = jax.random.split(key)
        joint_action, carry = others.policy.act(state.observation, key_others, state.carry)
        if self.joint.action_low is not None and self.joint.action_high is not None:
            bounds = jnp.asarray(self.joint.action_low), jnp.asarray(self.joint.action_high)
            action = jnp.clip(action, *(each[others.index] for each in bounds))
        joint_action = joint_action.at[others.index].set(action.astype(joint_action.dtype))
        observation, inner, reward, terminated, truncated, info = self.joint.step(
            key_step, state.inner, joint_action
        )
        carry = reset_carry(carry, terminated | truncated)
        final = self._own(info["final_observation"], others)
        return (
            self._own(observation, others), _State(inner, observation, carry),
            reward[others.index], terminated, truncated, {"final_observation": final},
        )  # fmt: skip

    def _own(self, observation: Any, others: Others) -> Any:
        policy = others.policy
        statistics = None if policy.statistics is None else policy.statistics["agents"]
        seen = normalized(observation["agents"], statistics, policy.clip_observations)
        own = seen[others.index]
        if self._masks is None:
            return own
        return {"own": own, "action_mask": self._masks[others.index]}


class Gains(NamedTuple):
    """What agents gain by leaving alone.

    Attributes:
      returns: J_i of the joint policy, float [n].
      responses: J_i of the trained response, float [n].
      gains: max(0, responses - returns), float [n].
      nash_conv: Sum of the gains, float [].
    """

    returns: jax.Array
    responses: jax.Array
    gains: jax.Array
    nash_conv: jax.Array


def nash_conv(
    agent: MultiAgent, state: Any, key: jax.Array, *, num_episodes: int, **options: Any
) -> Gains:
    r"""NashConv of trained policies, with a response trained for every agent.

    .. math:: \sum_i \max\left(0, J_i(b_i, \pi_{-i}) - J_i(\pi)\right)

    A pure function of state and key, which `jax.vmap` maps over seeds.

    Args:
      agent: The algorithm. Its policies must not hear each other (`actor_graph`).
      state: State of its training.
      key: Random key.
      num_episodes: Episodes of each evaluation, >= 1. Both returns are means over episodes that
        begin with the same random keys. Of the response, whichever is better counts: its samples
        or its modes.
      **options: Fields of `trustjax.agents.ppo.Config` for the training of a response, such as
        `total_steps`, its budget in steps of the environment.

    Returns:
      `Gains`; the returns are undiscounted.

    Raises:
      ValueError: `num_episodes` or an option is out of range, or policies hear each other.
    """
    check_number("num_episodes", num_episodes, at_least=1)
    if agent.config.actor_graph is not None:
        raise FieldError("agent", "have policies that do not hear each other", agent.config)

    def of_agent(index: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return best_response(agent, state, index, key, num_episodes=num_episodes, **options)

    indices = jnp.arange(agent.env.num_agents)
    returns, responses = jax.vmap(of_agent)(indices, jax.random.split(key, len(indices)))
    gains = jnp.maximum(responses - returns, 0)
    return Gains(returns, responses, gains, jnp.sum(gains))


def best_response(
    agent: MultiAgent,
    state: Any,
    index: jax.Array,
    key: jax.Array,
    *,
    num_episodes: int,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """The mean return of one agent before and after it is trained against the others; see above."""
    config = agent.config
    others = Others(agent.policy(state), index)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), others)
    fields: dict[str, Any] = {
        "hidden": config.hidden, "activation": config.activation, "gru_size": config.gru_size,
        "initial_log_std": config.initial_log_std, "discount": config.discount,
        "normalize_observations": False,
    }  # fmt: skip
    learner = ppo.Config(
        env=Deviation(agent.env, shapes), env_params=others, **fields | options
    ).agent()
    key_train, key_play = jax.random.split(key)
    before = learner.init(key_train)
    member = own_parameters(agent, state, index)
    before = before._replace(params=before.params | {"actor": {"params": member}})
    after, _ = learner.advance(before, learner.config.num_updates)

    def play(policy: Policy, deterministic: bool) -> jax.Array:
        found = policy.evaluate(key_play, num_episodes, deterministic=deterministic)
        return jnp.mean(found.returns)

    response = learner.policy(after)
    best = jnp.maximum(play(response, False), play(response, True))
    return play(learner.policy(before), False), best


def own_parameters(agent: MultiAgent, state: Any, index: jax.Array) -> Any:
    """The parameters of one agent's policy.

    Args:
      agent: The algorithm.
      state: Its state, with the parameters of all policies.
      index: Index of the agent, int32 []; without effect where all agents share their parameters.

    Returns:
      The variables of the network of one agent, without an axis of agents.
    """
    members = agent.members(state.params)
    if agent.actor.shared:
        return members
    return agent.executed(jax.tree.map(lambda x: x[index], members), index)
