"""What PPO, TRPO and MDPO share: a rollout, advantages, and how a value is fitted.

An iteration ("update") steps `num_envs` environments `num_steps` times with the policy pi_k, takes
advantages with it as constants, and lets the algorithm move the policy. What is normalised, is so
with the statistics at the start of the iteration, for the rollout and for learning alike: the first
ratio is 1.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from trustjax._sharding import AxisName, averaged
from trustjax.agents import rollout as rollouts
from trustjax.agents.batch import Batch, draw_environments, draw_transitions
from trustjax.agents.config import MakeOptimizer
from trustjax.agents.policy import Evaluation, Policy
from trustjax.agents.rollout import Rollout, Runner
from trustjax.agents.statistics import (
    Statistics,
    initial_statistics,
    merged,
    normalized,
    scaled,
    standardized,
)
from trustjax.envs import Environment
from trustjax.losses import gae, value_loss
from trustjax.models.actor_critic import Actor, Carry, Critic, initial_carry, unroll
from trustjax.optim import two_pass_step

PyTree = Any
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that changes in training.

    Attributes:
      params: {"actor": ..., "critic": ...}, variables of the networks.
      learner: what the algorithm keeps, such as states of optimizers.
      runner: the environments, the only part that is split over devices.
      observations: statistics of observations, or None.
      returns: statistics of discounted returns, which scale the rewards, or None.
      key: of all that is drawn from here on.
      iteration: int32 [], how many are done.
      episodes: the means of the last iteration in which an episode ended; NaN before.
    """

    params: dict[str, PyTree]
    learner: Any
    runner: Runner
    observations: Statistics | None
    returns: Statistics | None
    key: jax.Array
    iteration: jax.Array
    episodes: Metrics


class OnPolicy(abc.ABC):
    """An on-policy algorithm as pure functions; `jax.jit` and `jax.vmap` go around them.

    Args:
      config: of the algorithm; it is validated, and its numbers may be traced.
      axis_name: devices that share the environments, inside `jax.shard_map`.

    Raises:
      ValueError: a field out of range, an unknown environment; the field is named.

    >>> import jax
    >>> from trustjax.agents import ppo
    >>> agent = ppo.PPO(ppo.Config(env="gymnax:CartPole-v1", total_steps=10_000))
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> states, history = jax.jit(jax.vmap(agent.train))(keys)  # both seeds at once
    >>> history["episode/return"].shape
    (2, 1)
    """

    def __init__(self, config: Any, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration and builds the networks."""
        config.validate()
        self.config = config
        self.axis_name = axis_name
        self.env: Environment = config.environment
        torso = {
            name: getattr(config, name)
            for name in ("hidden", "activation", "gru_size", "orthogonal", "dtype")
        }
        self.actor = Actor(
            **torso,
            num_actions=self.env.num_actions,
            action_size=None if self.env.action_low is None else len(self.env.action_low),
            initial_log_std=config.initial_log_std,
        )
        if config.critic_hidden is not None:
            torso["hidden"] = config.critic_hidden
        self.critic = Critic(**torso)

    # What an algorithm adds.

    @abc.abstractmethod
    def init_learner(self, params: dict[str, PyTree]) -> Any:
        """What the algorithm keeps beside the parameters."""

    @abc.abstractmethod
    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Any, Metrics]:
        """Moves the policy: new parameters, learner and metrics."""

    # Training.

    def init(self, key: jax.Array) -> State:
        """The state before the first iteration."""
        config = self.config
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        num_envs = config.num_envs
        carries = (initial_carry(self.actor, (num_envs,)), initial_carry(self.critic, (num_envs,)))
        runner = rollouts.start(self.env, config.env_params, key_env, num_envs, carries)
        example, memory = runner.observation[:1], jax.tree.map(lambda x: x[:1], carries)
        params = {
            "actor": self.actor.init(key_actor, example, memory[0]),
            "critic": self.critic.init(key_critic, example, memory[1]),
        }
        unknown = jnp.full([], jnp.nan, runner.sums.episode_return.dtype)
        return State(
            params=params,
            learner=self.init_learner(params),
            runner=runner,
            observations=(
                initial_statistics(example.shape[1:]) if config.normalize_observations else None
            ),
            returns=initial_statistics(()) if config.normalize_rewards else None,
            key=key,
            iteration=jnp.zeros([], jnp.int32),
            episodes={"episode/return": unknown, "episode/length": unknown},
        )

    def update(self, state: State) -> tuple[State, Metrics]:
        """One iteration: a rollout, and what the algorithm learns from it.

        Metrics are scalars; `episode/return` and `episode/length` are means over the episodes that
        ended in the iteration.
        """
        config = self.config
        key, key_rollout, key_learn = jax.random.split(state.key, 3)
        runner, rollout = rollouts.collect(
            self.env, config.env_params, self.actor, state.params["actor"],
            functools.partial(self._normalize, state), state.runner, key_rollout, config.num_steps,
        )  # fmt: skip
        ended = rollout.terminated | rollout.truncated
        sums, every = rollouts.sum_up(state.runner.sums, rollout.reward, ended, config.discount)
        returns = state.returns
        if returns is not None:
            returns = merged(returns, every.discounted_return, axis_name=self.axis_name)
        batch, critic_carry = self._batch(state, rollout, returns)
        params, learner, metrics = self.learn(state, batch, key_learn)
        observations = state.observations
        if observations is not None:
            observations = merged(observations, rollout.observation, axis_name=self.axis_name)
        episodes = self._episodes(state, every, ended)
        state = State(
            params=params,
            learner=learner,
            runner=runner._replace(critic_carry=critic_carry, sums=sums),
            observations=observations,
            returns=returns,
            key=key,
            iteration=state.iteration + 1,
            episodes=episodes,
        )
        return state, episodes | metrics

    def train(self, key: jax.Array) -> tuple[State, Metrics]:
        """All iterations in one scan; the history has a leading axis of iterations."""
        return self.advance(self.init(key), self.config.num_updates)

    def advance(self, state: State, num_updates: int) -> tuple[State, Metrics]:
        """`num_updates` iterations in one scan."""
        return jax.lax.scan(lambda state, _: self.update(state), state, length=num_updates)

    # Acting.

    def policy(self, state: State) -> Policy:
        """What acts, without what trains it; it can be saved."""
        return Policy(
            state.params["actor"], state.observations, jnp.asarray(self.config.clip_observations),
            self.actor, self.config.env,
        )  # fmt: skip

    def act(
        self,
        state: State,
        observation: jax.Array,
        key: jax.Array,
        carry: Carry | None = None,
        *,
        deterministic: bool = False,
    ) -> tuple[jax.Array, Carry]:
        """Actions and the next carry; see `Policy.act`."""
        return self.policy(state).act(observation, key, carry, deterministic=deterministic)

    def initial_carry(self, batch_shape: tuple[int, ...] = ()) -> Carry:
        """The policy's memory at the start of an episode."""
        return initial_carry(self.actor, batch_shape)

    def evaluate(
        self, state: State, key: jax.Array, num_episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Whole episodes of the policy; see `Policy.evaluate`."""
        return self.policy(state).evaluate(
            key, num_episodes, deterministic=deterministic, env_params=self.config.env_params
        )

    # Pieces that algorithms are made of.

    def distributions(self, actor_params: PyTree, batch: Batch) -> Any:
        """The policy's distributions at the batch's observations."""
        return unroll(self.actor, actor_params, batch.observation, batch.starts, batch.actor_carry)[
            0
        ]

    def values(self, critic_params: PyTree, batch: Batch) -> jax.Array:
        """The values of the batch's observations."""
        observations, starts, carry = batch.observation, batch.starts, batch.critic_carry
        values: jax.Array = unroll(self.critic, critic_params, observations, starts, carry)[0]
        return values

    def make_optimizer(
        self, make: MakeOptimizer, learning_rate: ArrayLike, steps_per_update: int
    ) -> optax.GradientTransformation:
        """The optimizer at its rate, constant within an iteration of so many steps."""
        if not self.config.anneal_learning_rate:
            return make(learning_rate)
        num_updates = self.config.num_updates

        def schedule(count: ArrayLike) -> jax.Array:
            done = jnp.asarray(count) // steps_per_update / num_updates
            return jnp.asarray(learning_rate * (1 - done))

        return make(schedule)

    def step(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Any]],
        tx: optax.GradientTransformation,
        output_fn: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """A step of any optimizer on the mean loss of all devices, with its gradients cut."""
        max_norm = self.config.max_grad_norm

        def map_grads(grads: PyTree) -> PyTree:
            grads = averaged(grads, self.axis_name)
            if max_norm is None:
                return grads
            return optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]

        return two_pass_step(loss_fn, tx, output_fn=output_fn, map_grads=map_grads)

    def epochs(
        self,
        batch: Batch,
        key: jax.Array,
        num_epochs: int,
        num_minibatches: int,
        step: Callable[[Any, Batch], tuple[Any, Any]],
        carry: Any,
    ) -> tuple[Any, Any]:
        """Scans `step(carry, minibatch)` over shuffled minibatches; results [epoch, minibatch]."""
        if self.config.shuffle == "transitions":
            batch = batch.as_transitions()
            size = batch.action.shape[1]
            draw = functools.partial(draw_transitions, size, num_minibatches)
        else:
            draw = functools.partial(
                draw_environments, batch.action.shape[1], num_minibatches, axis_name=self.axis_name
            )

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, Any]:
            return jax.lax.scan(lambda c, places: step(c, batch.of(places)), carry, draw(key))

        return jax.lax.scan(epoch, carry, jax.random.split(key, num_epochs))

    def fit_values(
        self,
        tx: optax.GradientTransformation,
        critic_params: PyTree,
        opt_state: optax.OptState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[PyTree, optax.OptState, jax.Array]:
        """Epochs of minibatches on the squared error of the values; the last one's mean loss."""

        def loss_fn(params: PyTree, part: Batch) -> tuple[jax.Array, None]:
            values = self.values(params, part)
            losses = value_loss(values, part.value, part.returns, clip=self.config.value_clip)
            return jnp.mean(losses), None

        step = self.step(loss_fn, tx)

        def minibatch(carry: tuple[PyTree, Any], part: Batch) -> tuple[Any, jax.Array]:
            params, opt_state, loss, _ = step(*carry, part)
            return (params, opt_state), loss

        (critic_params, opt_state), losses = self.epochs(
            batch, key, self.config.num_epochs, self.config.num_minibatches, minibatch,
            (critic_params, opt_state),
        )  # fmt: skip
        return critic_params, opt_state, averaged(jnp.mean(losses[-1]), self.axis_name)

    def moved(self, actor_params: PyTree, batch: Batch) -> Metrics:
        """How far the new policy is from the old one, and what the transitions say of its gain."""
        new = self.distributions(actor_params, batch)
        log_ratio = new.log_prob(batch.action) - batch.log_prob
        ratio = jnp.exp(log_ratio)
        error = batch.returns - batch.value
        mean = self._mean
        variance = mean(jnp.square(batch.returns - mean(batch.returns)))
        unexplained = mean(jnp.square(error - mean(error)))
        return {
            "kl/new_old": mean(new.kl_divergence(batch.old)),
            "kl/old_new": mean(batch.old.kl_divergence(new)),
            "ratio/distance": mean(jnp.abs(ratio - 1)),
            "gain": mean((ratio - 1) * batch.advantage),
            "entropy": mean(new.entropy()),
            "value/mean": mean(batch.value),
            "value/explained": 1 - unexplained / jnp.maximum(variance, 1e-8),
        }

    def _mean(self, x: jax.Array) -> jax.Array:
        mean: jax.Array = averaged(jnp.mean(x), self.axis_name)
        return mean

    def _normalize(self, state: State, observation: jax.Array) -> jax.Array:
        return normalized(observation, state.observations, self.config.clip_observations)

    def _batch(
        self, state: State, rollout: Rollout, returns: Statistics | None
    ) -> tuple[Batch, Carry]:
        """What is learned from, and the carry of the value after the rollout."""
        config = self.config
        observation = self._normalize(state, rollout.observation)
        final = self._normalize(state, rollout.final_observation)
        critic, carry = state.params["critic"], state.runner.critic_carry
        value, carries = unroll(self.critic, critic, observation, rollout.starts, carry)
        next_value, _ = self.critic.apply(critic, final, carries)
        advantage = gae(
            scaled(rollout.reward, returns, config.clip_rewards),
            value,
            next_value,
            rollout.terminated,
            rollout.truncated,
            discount=config.discount,
            lambda_=config.lambda_,
        )
        targets = advantage + value
        if config.normalize_advantages == "batch":
            advantage = standardized(advantage, axis_name=self.axis_name)
        batch = Batch(
            observation=observation,
            starts=rollout.starts,
            old=rollout.distribution,
            action=rollout.action,
            log_prob=rollout.distribution.log_prob(rollout.action),
            advantage=advantage,
            value=value,
            returns=targets,
            actor_carry=state.runner.actor_carry,
            critic_carry=carry,
        )
        return batch, jax.tree.map(lambda x: x[-1], carries)

    def _episodes(self, state: State, every: rollouts.Sums, ended: jax.Array) -> Metrics:
        """Means over the episodes that ended, else those that were known."""
        share = self._mean(ended.astype(every.episode_return.dtype))

        def mean(x: jax.Array, known: jax.Array) -> jax.Array:
            total = self._mean(jnp.where(ended, x, jnp.zeros_like(x)).astype(known.dtype))
            return jnp.where(share > 0, total / jnp.where(share > 0, share, 1), known)

        known = state.episodes
        return {
            "episode/return": mean(every.episode_return, known["episode/return"]),
            "episode/length": mean(every.episode_length, known["episode/length"]),
        }


def trust(radius: jax.Array, distance: jax.Array) -> Metrics:
    """How far an iteration was allowed to go, how far it went, and the ratio; 0 if not at all."""
    used = jnp.where(radius > 0, distance / jnp.where(radius > 0, radius, 1), 0)
    return {"trust/radius": radius, "trust/distance": distance, "trust/used": used}


def select_seed(state: Any, index: int) -> Any:
    """One of the states (or histories) that `jax.vmap(agent.train)` returned side by side."""
    return jax.tree.map(lambda x: x[index], state)
