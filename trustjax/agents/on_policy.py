"""What PPO, TRPO and MDPO share: a rollout, advantages, and how a value is fitted.

An iteration ("update") steps `num_envs` environments `num_steps` times with the policy pi_k, takes
advantages with it as constants, and lets the algorithm move the policy. What is normalised, is so
with the statistics at the start of the iteration, for the rollout and for learning alike: the first
ratio is 1.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName, averaged
from trustjax.agents import rollout as rollouts
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
from trustjax.distributions import Distribution
from trustjax.envs import Environment, make
from trustjax.losses import gae, value_loss
from trustjax.models.actor_critic import (
    Actor,
    Carry,
    Critic,
    check_network,
    initial_carry,
    unroll,
)
from trustjax.optim import two_pass_step

PyTree = Any
Metrics = dict[str, jax.Array]
MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def static(default: Any) -> Any:
    """A field of a Config that decides what is compiled, and so is no number to be swept."""
    return dataclasses.field(default=default, metadata={"static": True})


def adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam with epsilon 1e-5, on one array: on CPU faster than on the dozen of small networks."""
    return optax.flatten(optax.adam(learning_rate, eps=1e-5))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(abc.ABC):
    """What the on-policy algorithms share.

    A pytree: numbers are leaves, which `jax.vmap` may sweep; fields that decide what is compiled
    are part of its structure. Those are marked "static".

    Attributes:
      env: an environment or its name; static.
      env_params: of the environment; None for its defaults.
      total_steps: of all environments together, rounded down to whole iterations; static.
      num_envs: environments side by side; static.
      num_steps: steps of each of them in an iteration; static.
      discount: gamma, in [0, 1].
      lambda_: of the advantages, in [0, 1]; 1 for returns without bootstrapping inside a rollout.
      normalize_observations: by running mean and standard deviation; static.
      clip_observations: bound of normalised observations, > 0.
      normalize_rewards: divides by the running standard deviation of the discounted return; static.
      clip_rewards: bound of normalised rewards, > 0.
      normalize_advantages: to mean 0 and standard deviation 1 over the "batch" of an iteration,
        over a "minibatch" (PPO alone), or "none"; static.
      hidden: widths of the layers of policy and value, which are separate networks; static.
      critic_hidden: those of the value, if they differ; static.
      activation: "tanh", "relu", "gelu" or "silu"; static.
      gru_size: units of a GRU behind them, for tasks that need memory; None for none; static.
      orthogonal: orthogonal first weights, with 0.01 in the head of the policy; static.
      initial_log_std: logarithm of the first standard deviation of continuous actions; static.
      dtype: of the networks' computation, None for that of their parameters; static.
      optimizer: `learning_rate -> optax transform`; static.
      learning_rate: > 0.
      anneal_learning_rate: lets it fall to 0 linearly over the iterations; static.
      max_grad_norm: longer gradients are cut to this global norm, > 0; None for none.
      value_clip: of `trustjax.losses.value_loss`, >= 0; None for the plain squared error.
      num_minibatches: into which `num_envs` environments are split, each whole in time; static.
      num_epochs: passes over an iteration's transitions; static.
      shuffle: "environments": minibatches are blocks of environments, one out of every
        `num_minibatches` neighbours, drawn anew each epoch; "transitions": single transitions,
        drawn from all; static.
    """

    env: str | Environment = static("gymnax:CartPole-v1")
    env_params: Any = None
    total_steps: int = static(1_000_000)
    num_envs: int = static(64)
    num_steps: int = static(128)
    discount: ArrayLike = 0.99
    lambda_: ArrayLike = 0.95
    normalize_observations: bool = static(False)
    clip_observations: ArrayLike = 10.0
    normalize_rewards: bool = static(False)
    clip_rewards: ArrayLike = 10.0
    normalize_advantages: Literal["batch", "minibatch", "none"] = static("batch")
    hidden: tuple[int, ...] = static((64, 64))
    critic_hidden: tuple[int, ...] | None = static(None)
    activation: str = static("tanh")
    gru_size: int | None = static(None)
    orthogonal: bool = static(True)
    initial_log_std: float = static(0.0)
    dtype: DTypeLike | None = static(None)
    optimizer: MakeOptimizer = static(adam)
    learning_rate: ArrayLike = 3e-4
    anneal_learning_rate: bool = static(True)
    max_grad_norm: ArrayLike | None = 0.5
    value_clip: ArrayLike | None = None
    num_minibatches: int = static(4)
    num_epochs: int = static(4)
    shuffle: Literal["environments", "transitions"] = static("environments")

    @property
    def steps_per_update(self) -> int:
        """Steps of all environments in an iteration."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Iterations."""
        return self.total_steps // self.steps_per_update

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return self.env if isinstance(self.env, Environment) else make(self.env)

    def __post_init__(self) -> None:
        """Makes the widths hashable when they come from a list."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.critic_hidden is not None:
            object.__setattr__(self, "critic_hidden", tuple(self.critic_hidden))

    @abc.abstractmethod
    def agent(self, *, axis_name: AxisName | None = None) -> "OnPolicy":
        """The algorithm with this configuration."""

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        for name in ("num_envs", "num_steps", "num_minibatches", "num_epochs"):
            check_number(name, getattr(self, name), at_least=1)
        for name in ("discount", "lambda_"):
            check_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
        for name in ("clip_observations", "clip_rewards", "learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("value_clip", self.value_clip, at_least=0.0)
        check_choice(
            "normalize_advantages", self.normalize_advantages, ("batch", "minibatch", "none")
        )
        check_choice("shuffle", self.shuffle, ("environments", "transitions"))
        check_network(self.hidden, self.activation, self.gru_size)
        check_network(self.critic_hidden or (), self.activation, self.gru_size)
        if self.total_steps < self.steps_per_update:
            raise ValueError(
                f"total_steps must be at least num_envs * num_steps, {self.steps_per_update}, "
                f"got {self.total_steps}"
            )
        among = self.num_envs if self.shuffle == "environments" else self.steps_per_update
        if among % self.num_minibatches:
            raise ValueError(
                f"num_minibatches must divide the {among} {self.shuffle} of an iteration, "
                f"got {self.num_minibatches}"
            )
        if self.shuffle == "transitions" and self.gru_size is not None:
            raise ValueError("shuffle must be 'environments' with a GRU, which needs whole time")
        if self.environment.num_actions is None and self.environment.action_low is None:
            raise ValueError(f"env must have actions of one kind, got {self.environment}")


def whole_batch(config: OnPolicyConfig) -> None:
    """Raises ValueError if advantages are left to minibatches that the policy does not have."""
    if config.normalize_advantages == "minibatch":
        raise ValueError(
            "normalize_advantages must be 'batch' or 'none' where the policy learns from the whole "
            "batch, got 'minibatch'"
        )


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


class Batch(NamedTuple):
    """An iteration's transitions, [time, environment, ...], and the carries before them.

    Attributes:
      observation: float [..., features], normalised.
      starts: bool, whether it is the first of an episode.
      old: distribution of pi_k, constants.
      action: drawn from it.
      log_prob: float, log pi_k of the action.
      advantage: float, of pi_k, normalised unless that is left to the minibatch.
      value: float, V_k of the observation.
      returns: float, what the value is to learn: advantage before normalisation + V_k.
      actor_carry: [environment, ...], memory of the policy before the first step.
      critic_carry: of the value.
    """

    observation: jax.Array
    starts: jax.Array
    old: Distribution
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    value: jax.Array
    returns: jax.Array
    actor_carry: Carry
    critic_carry: Carry

    def of(self, environments: jax.Array) -> Self:
        """The part of some environments, given by their places."""

        def take(x: jax.Array, axis: int) -> jax.Array:
            return jnp.take(x, environments, axis, mode="clip")

        carries = (self.actor_carry, self.critic_carry)
        actor_carry, critic_carry = jax.tree.map(lambda x: take(x, 0), carries)
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: take(x, 1), rest)
        return part._replace(actor_carry=actor_carry, critic_carry=critic_carry)

    def as_transitions(self) -> Self:
        """Every transition as an environment of its own, with a time of one step."""
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rest)
        return part


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
        """Scans `step(carry, minibatch)` over shuffled minibatches; results [epoch, minibatch].

        Environment n belongs to the group n // num_minibatches, and each minibatch has one of
        every group: it is made of the same environments however many devices hold the groups.
        """
        if self.config.shuffle == "transitions":
            batch = batch.as_transitions()
            size = batch.action.shape[1]
            draw = functools.partial(self._draw_transitions, size, num_minibatches)
        else:
            draw = functools.partial(self._draw_environments, batch, num_minibatches)

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

    def _draw_environments(self, batch: Batch, num_minibatches: int, key: jax.Array) -> jax.Array:
        """Places of environments, [minibatch, group]."""
        local = batch.action.shape[1]
        groups = jnp.arange(local // num_minibatches)
        first = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * len(groups)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + groups)
        order = jax.vmap(lambda key: jax.random.permutation(key, num_minibatches))(keys)
        return jnp.transpose(order + num_minibatches * groups[:, None])

    def _draw_transitions(self, size: int, num_minibatches: int, key: jax.Array) -> jax.Array:
        """Places of transitions, [minibatch, transition]."""
        return jax.random.permutation(key, size).reshape(num_minibatches, -1)


def select_seed(state: Any, index: int) -> Any:
    """One of the states (or histories) that `jax.vmap(agent.train)` returned side by side."""
    return jax.tree.map(lambda x: x[index], state)
