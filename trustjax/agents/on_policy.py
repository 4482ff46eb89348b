"""The part that PPO, TRPO and MDPO share: a rollout, advantages, and the fit of the value.

An iteration ("update") steps `num_envs` environments `num_steps` times with the policy pi_k,
computes the advantages of pi_k as constants, and lets the algorithm update the policy. The rollout
and the gradient steps normalise observations with the same statistics, those from the start of the
iteration, so that the first probability ratio is 1.
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
from trustjax.agents.algorithm import (
    Algorithm,
    MakeOptimizer,
    Metrics,
    PyTree,
    no_episodes,
    partition_specs,
)
from trustjax.agents.batch import Batch, draw_environments, draw_transitions
from trustjax.agents.config import OnPolicyConfig
from trustjax.agents.rollout import Rollout, Runner
from trustjax.agents.running_statistics import (
    Statistics,
    explained_variance,
    initial_observation_statistics,
    initial_statistics,
    merged,
    merged_observations,
    scaled,
    standardized,
)
from trustjax.losses import gae, value_loss
from trustjax.losses._ratio import log_ratio
from trustjax.models.actor_critic import Actor, Carry, Critic, initial_carry, unroll


class State(NamedTuple):
    """The whole state of training.

    Attributes:
      params: Variables of the networks, {"actor": ..., "critic": ...}.
      learner: State of the algorithm itself, such as the states of its optimizers.
      runner: The environments; the only part that is split over devices.
      observations: Running statistics of the observations, a dict for each part of a dict; None
        where they are not normalised.
      returns: Running statistics of the discounted returns, which scale the rewards; None if
        rewards are not normalised.
      key: Random key for everything that is drawn from here on.
      iteration: Number of iterations done so far, int32 [].
      episodes: Mean return and length from the last iteration in which an episode ended; 0 before.
    """

    params: dict[str, PyTree]
    learner: Any
    runner: Runner
    observations: Any
    returns: Statistics | None
    key: jax.Array
    iteration: jax.Array
    episodes: Metrics


class OnPolicy(Algorithm[State]):
    """An on-policy algorithm; see `Algorithm` for how it is used.

    >>> import jax
    >>> from trustjax.agents import ppo
    >>> agent = ppo.PPO(ppo.Config(env="gymnax:CartPole-v1", total_steps=4096))
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> states, history = jax.jit(jax.vmap(agent.train))(keys)  # both seeds at once
    >>> history["episode/return"].shape
    (2, 4)
    """

    config: OnPolicyConfig

    def __init__(self, config: OnPolicyConfig, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration and builds the networks."""
        super().__init__(config, axis_name=axis_name)
        self.actor = Actor(
            **self.torso_kwargs, **self.action_kwargs, initial_log_std=config.initial_log_std,
            gru_size=config.gru_size,
        )  # fmt: skip
        self.critic = Critic(**self.critic_torso_kwargs, gru_size=config.gru_size)

    # What an algorithm implements.

    @abc.abstractmethod
    def init_learner(self, params: dict[str, PyTree]) -> Any:
        """The first state of the algorithm itself, such as the states of its optimizers."""

    @abc.abstractmethod
    def learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, PyTree], Any, Metrics]:
        """Updates policy and value; returns the parameters, the learner and the metrics."""

    # Training.

    def init(self, key: jax.Array) -> State:
        """The state before the first iteration."""
        config = self.config
        key_actor, key_critic, key_env, key = jax.random.split(key, 4)
        num_envs = config.num_envs
        carries = (initial_carry(self.actor, (num_envs,)), initial_carry(self.critic, (num_envs,)))
        runner = rollouts.start(
            self.env, config.env_params, key_env, num_envs, carries,
            rollouts.prepared_for(self.actor),
        )  # fmt: skip
        example, memory = jax.tree.map(lambda x: x[:1], (runner.observation, carries))
        params = {
            "actor": self.actor.init(key_actor, example, memory[0]),
            "critic": self.critic.init(key_critic, example, memory[1]),
        }
        return State(
            params=params,
            learner=self.init_learner(params),
            runner=runner,
            observations=(
                initial_observation_statistics(jax.tree.map(lambda x: x[0], example))
                if config.normalize_observations
                else None
            ),
            returns=initial_statistics(()) if config.normalize_rewards else None,
            key=key,
            iteration=jnp.zeros([], jnp.int32),
            episodes=no_episodes(runner.sums.episode_return.dtype),
        )

    def update(self, state: State) -> tuple[State, Metrics]:
        """One iteration: a rollout, and the update of policy and value on it."""
        config = self.config
        key, key_rollout, key_learn = jax.random.split(state.key, 3)
        runner, rollout = rollouts.collect(
            self.env, config.env_params, self.actor, state.params["actor"],
            functools.partial(self.normalize, state.observations), state.runner, key_rollout,
            config.num_steps,
        )  # fmt: skip
        sums, every, episodes = self.accumulate_episode_stats(state, rollout)
        # Rewards are scaled by statistics that include this iteration, unlike observations.
        returns = state.returns
        if returns is not None:
            returns = merged(returns, every.discounted_return, axis_name=self.axis_name)
        batch, critic_carry = self._batch(state, rollout, returns)
        params, learner, metrics = self.learn(state, batch, key_learn)
        # Only now, so that the whole iteration normalises with the same statistics.
        observations = state.observations
        if observations is not None:
            observations = merged_observations(
                observations, rollout.observation, axis_name=self.axis_name
            )
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

    @staticmethod
    def state_specs(axis_name: str, *, batch_axes: int = 0) -> State:
        """See `Algorithm`."""
        whole, split = partition_specs(axis_name, batch_axes)
        return State(whole, whole, split, whole, whole, whole, whole, whole)  # type: ignore[arg-type]

    # Pieces that algorithms are made of.

    def distributions(self, actor_params: PyTree, batch: Batch) -> Any:
        """The policy's distributions at the batch's observations."""
        return unroll(
            self.actor, actor_params, batch.observation, batch.is_first, batch.actor_carry
        )[0]

    def entropy_bonus(self, distributions: Any) -> jax.Array:
        """The weighted mean entropy, [], which an algorithm adds to what its policy maximises."""
        entropy = jnp.mean(distributions.entropy())
        return jnp.asarray(self.config.entropy_coefficient * entropy)

    def values(self, critic_params: PyTree, batch: Batch) -> jax.Array:
        """The values of the batch's observations."""
        observations, is_first, carry = batch.observation, batch.is_first, batch.critic_carry
        values: jax.Array = unroll(self.critic, critic_params, observations, is_first, carry)[0]
        return values

    def make_optimizer(
        self, make: MakeOptimizer, learning_rate: ArrayLike, steps_per_update: int
    ) -> optax.GradientTransformation:
        """The optimizer with its learning rate, annealed if the configuration says so.

        An annealed rate is constant within each iteration of `steps_per_update` gradient steps, and
        falls with the iterations k:

            rate max(1 - k / K, 0)

        Past the last of the K iterations of `total_steps` it is 0, so that training on from there
        changes nothing that this optimizer trains.
        """
        if not self.config.anneal_learning_rate:
            return make(learning_rate)

        def schedule(count: ArrayLike) -> jax.Array:
            return jnp.asarray(self.annealed(learning_rate, jnp.asarray(count) // steps_per_update))

        return make(schedule)

    def annealed(self, learning_rate: ArrayLike, iteration: jax.Array) -> ArrayLike:
        """The learning rate in an iteration; it falls linearly to 0 over them if it is annealed."""
        if not self.config.anneal_learning_rate:
            return learning_rate
        # Past the end a negative rate would ascend the loss.
        return learning_rate * jnp.maximum(1 - iteration / self.config.num_updates, 0)

    def epochs(
        self,
        batch: Batch,
        key: jax.Array,
        num_epochs: int,
        num_minibatches: int,
        step: Callable[[Any, Batch], tuple[Any, Any]],
        carry: Any,
    ) -> tuple[Any, Any]:
        """Scans `step(carry, minibatch)` over shuffled minibatches.

        Returns the last carry and the results of all steps, [epoch, minibatch, ...].
        """
        if self.config.shuffle == "transitions":
            batch = batch.as_transitions()
            size = batch.action.shape[1]
            draw = functools.partial(draw_transitions, size, num_minibatches)
        else:
            num_steps, num_envs = batch.is_first.shape
            # A GRU needs whole sequences. Without one, every time step is shuffled by itself.
            draw = functools.partial(
                draw_environments, 1 if self.config.is_recurrent else num_steps, num_envs,
                num_minibatches, axis_name=self.axis_name,
            )  # fmt: skip

        # Drawn for all epochs at once: on CPU the overhead of a small draw exceeds its work.
        indices = jax.vmap(draw)(jax.random.split(key, num_epochs))

        def epoch(carry: Any, indices: jax.Array) -> tuple[Any, Any]:
            return jax.lax.scan(lambda c, indices: step(c, batch.select(indices)), carry, indices)

        return jax.lax.scan(epoch, carry, indices)

    def value_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of a critic whose only gradient steps are those of `fit_values`."""
        config = self.config
        steps = config.num_epochs * config.num_minibatches
        return self.make_optimizer(config.optimizer, config.learning_rate, steps)

    def fit_values(
        self,
        tx: optax.GradientTransformation,
        critic_params: PyTree,
        opt_state: optax.OptState,
        batch: Batch,
        key: jax.Array,
    ) -> tuple[PyTree, optax.OptState, jax.Array]:
        """Fits the critic by epochs of minibatches on `value_loss`.

        Returns the parameters, the optimizer state and the mean loss of the last epoch.
        """

        def loss_fn(params: PyTree, part: Batch) -> tuple[jax.Array, None]:
            values = self.values(params, part)
            losses = value_loss(values, part.value, part.returns, clip=self.config.value_clip)
            return jnp.mean(losses), None

        step = self.make_train_step(loss_fn, tx)

        def minibatch(carry: tuple[PyTree, Any], part: Batch) -> tuple[Any, jax.Array]:
            params, opt_state, loss, _ = step(*carry, part)
            return (params, opt_state), loss

        (critic_params, opt_state), losses = self.epochs(
            batch, key, self.config.num_epochs, self.config.num_minibatches, minibatch,
            (critic_params, opt_state),
        )  # fmt: skip
        return critic_params, opt_state, averaged(jnp.mean(losses[-1]), self.axis_name)

    def policy_update_metrics(self, actor_params: PyTree, batch: Batch) -> Metrics:
        """Metrics of an update: distances between new and old policy, and the estimated gain."""
        new = self.distributions(actor_params, batch)
        mean = self.mean
        # Ratios are capped at e^60: sums of larger ones overflow, and their differences are NaN.
        # Such ratios are no error where the loss is clipped and has no gradient.
        ratio = jnp.exp(jnp.minimum(log_ratio(new.log_prob(batch.action), batch.log_prob), 60))
        return {
            "kl/new_old": mean(new.kl_divergence(batch.old)),
            "kl/old_new": mean(batch.old.kl_divergence(new)),
            "ratio/distance": mean(jnp.abs(ratio - 1)),
            "gain": mean((ratio - 1) * batch.advantage),
            "entropy": mean(new.entropy()),
            "value/mean": mean(batch.value),
            "value/explained": explained_variance(
                batch.value, batch.returns, axis_name=self.axis_name
            ),
        }

    def _batch(
        self, state: State, rollout: Rollout, returns: Statistics | None
    ) -> tuple[Batch, Carry]:
        """The transitions with their advantages, and the carry of the critic after the rollout."""
        config = self.config
        observation = self.normalize(state.observations, rollout.observation)
        final = self.normalize(state.observations, rollout.final_observation)
        critic, carry = state.params["critic"], state.runner.critic_carry
        value, carries = unroll(self.critic, critic, observation, rollout.is_first, carry)
        # V(s'_t) of the observation before any reset, for every t: targets of a truncated episode
        # bootstrap from it.
        next_value, _ = jax.vmap(functools.partial(self.critic.apply, critic))(final, carries)
        advantage = gae(
            scaled(rollout.reward, returns, config.clip_rewards),
            value,
            next_value,
            rollout.terminated,
            rollout.truncated,
            discount=config.discount,
            lambda_=config.lambda_,
        )
        targets = advantage + value  # the lambda returns
        if config.normalize_advantages == "batch":
            advantage = standardized(advantage, differences_of=targets, axis_name=self.axis_name)
        batch = Batch(
            observation=observation,
            is_first=rollout.is_first,
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
