"""The part that SAC and off-policy MDPO share: a replay, two critics, and the gradient steps.

An iteration ("update") steps `num_envs` environments `num_steps` times. Each of these steps is
followed by `gradient_steps` gradient steps on minibatches of the replay, which update the critics,
the policy, the temperature and the target critics, in this order. Termination and truncation are
kept apart: a target bootstraps from the observation before the reset unless the episode terminated.

With continuous actions, losses are evaluated at one sample of the policy, through which gradients
flow; with discrete actions, at all of them, weighted by their probabilities.
"""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trustjax._sharding import AxisName
from trustjax.agents import replay as replays
from trustjax.agents import rollout as rollouts
from trustjax.agents.action_samples import ActionSamples, expectation, sample_actions
from trustjax.agents.algorithm import Algorithm, Metrics, PyTree, no_episodes, partition_specs
from trustjax.agents.config import OffPolicyConfig
from trustjax.agents.off_policy_state import Learner as Learner
from trustjax.agents.off_policy_state import State as State
from trustjax.agents.replay import Replayed
from trustjax.agents.running_statistics import (
    initial_observation_statistics,
    merged_observations,
)
from trustjax.distributions import batched_index
from trustjax.losses import sac_critic_loss, temperature_loss
from trustjax.models.actor_critic import ActionValue, Actor, default_float


class OffPolicy(Algorithm[State]):
    """An off-policy algorithm; see `Algorithm` for how it is used.

    >>> import jax
    >>> from trustjax.agents import sac
    >>> agent = sac.SAC(
    ...     sac.Config(env="gymnax:Pendulum-v1", total_steps=1024, learning_starts=512, hidden=(8,))
    ... )
    >>> state, history = jax.jit(agent.train)(jax.random.key(0))
    >>> history["loss/critic"].shape
    (8,)
    """

    config: OffPolicyConfig

    def __init__(self, config: OffPolicyConfig, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration and builds the networks."""
        super().__init__(config, axis_name=axis_name)
        self.actor = Actor(
            **self.torso_kwargs, **self.action_kwargs, squashed=True,
            initial_log_std=config.initial_log_std, log_std_range=config.log_std_range,
        )  # fmt: skip
        num_actions = self.action_kwargs["num_actions"]
        self.critic = ActionValue(**self.critic_torso_kwargs, num_actions=num_actions)
        rate = config.learning_rate
        self._actor_tx, self._critic_tx, self._temperature_tx = (
            config.optimizer(rate if own is None else own)
            for own in (rate, config.critic_learning_rate, config.temperature_learning_rate)
        )

    # What an algorithm implements.

    @abc.abstractmethod
    def init_old_actor(self, actor: PyTree) -> PyTree | None:
        """The first old policy, made of the initial policy's parameters; None if none is kept."""

    @abc.abstractmethod
    def policy_losses(
        self, actor: PyTree, batch: Replayed, keys: jax.Array, learner: Learner, critics: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """Losses of the policy, [batch], and log pi of its actions, [batch].

        `keys` [group] sample the actions; `learner` and `critics` are constants for gradients.
        """

    @property
    def tanh_epsilon(self) -> float:
        """The `epsilon` of `TanhGaussian.log_prob_before_tanh` in all losses."""
        return 0.0

    def entropy_log(self, log_prob: jax.Array) -> jax.Array:
        """The log pi [...] in the critics' targets, from the one of each dimension, [..., d]."""
        return jnp.sum(log_prob, -1)

    def refresh_old_actor(self, learner: Learner, actor: PyTree) -> Learner:
        """The learner with its old policy replaced by `actor` where that is due."""
        del actor
        return learner

    def policy_update_metrics(
        self, state: State, batch: Replayed, keys: jax.Array, before: PyTree
    ) -> Metrics:
        """Distances that the policy moved in one iteration, from the parameters `before`."""
        del keys
        new = self.distribution(state.params["actor"], batch.observation)
        old = self.distribution(before, batch.observation)
        return {"kl/new_old": self.mean(new.kl_divergence(old))}

    # Training.

    def init(self, key: jax.Array) -> State:
        """The state after the initial steps with random actions."""
        config = self.config
        key_actor, *key_critics, key_env, key_random, key = jax.random.split(key, 6)
        prepare = rollouts.prepared_for(self.actor)
        runner = rollouts.start(
            self.env, config.env_params, key_env, config.num_envs, ((), ()), prepare
        )
        example = rollouts.example(self.env, config.env_params, runner, prepare)
        observation = jax.tree.map(lambda x: x[None], example.observation)
        action = None if self.env.num_actions is not None else example.action[None]
        params = {
            "actor": self.actor.init(key_actor, observation),
            "critics": tuple(self.critic.init(key, observation, action) for key in key_critics),
        }
        replay = replays.init(example, config.num_envs, config.buffer_length)
        observations = (
            initial_observation_statistics(example.observation)
            if config.normalize_observations
            else None
        )
        if config.first_update:
            runner, transitions = rollouts.act_randomly(
                self.env, config.env_params, runner, key_random,
                config.first_update * config.num_steps, config.discount, prepare,
            )  # fmt: skip
            replay = replays.add(replay, transitions)
            if observations is not None:
                observations = merged_observations(observations, transitions.observation)
        return State(
            params=params,
            learner=self._init_learner(params),
            runner=runner,
            replay=replay,
            observations=observations,
            key=key,
            iteration=jnp.asarray(config.first_update, jnp.int32),
            episodes=no_episodes(runner.sums.episode_return.dtype),
        )

    def update(self, state: State) -> tuple[State, Metrics]:
        """One iteration: steps of the environments, each followed by gradient steps."""
        config, observations = self.config, state.observations
        key, key_rollout, key_learn, key_end = jax.random.split(state.key, 4)
        each = (
            jnp.arange(config.num_steps),
            rollouts.draw_keys(key_rollout, state.runner.env_index, config.num_steps),
            jax.random.split(key_learn, (config.num_steps, config.gradient_steps)),
        )

        def step(state: State, each: tuple[jax.Array, ...]) -> tuple[State, Any]:
            time, (keys_action, keys_step), keys_gradient = each
            action = self._training_action(state, keys_action)
            runner, transition = rollouts.step_envs(
                self.env, config.env_params, state.runner, action, keys_step, time, squashed=True,
                prepare=rollouts.prepared_for(self.actor),
            )  # fmt: skip
            transition = jax.tree.map(lambda x: x[None], transition)
            state = state._replace(runner=runner, replay=replays.add(state.replay, transition))
            state, metrics = jax.lax.scan(self._gradient_step, state, keys_gradient)
            return state, (jax.tree.map(lambda x: x[0], transition), metrics)

        before = state
        state, (transitions, metrics) = jax.lax.scan(step, state, each)
        metrics = {name: jnp.mean(x) for name, x in metrics.items()}
        sums, _, episodes = self.accumulate_episode_stats(before, transitions)
        batch, group_keys = self._sample_batch(state, key_end)
        metrics |= self.policy_update_metrics(
            state, batch, group_keys[:, 0], before.params["actor"]
        )
        # Only now, so that the whole iteration normalises with the same statistics.
        if observations is not None:
            observations = merged_observations(
                observations, transitions.observation, axis_name=self.axis_name
            )
        state = state._replace(
            runner=state.runner._replace(sums=sums),
            observations=observations,
            key=key,
            iteration=state.iteration + 1,
            episodes=episodes,
        )
        return state, episodes | metrics

    @staticmethod
    def state_specs(axis_name: str, *, batch_axes: int = 0) -> State:
        """See `Algorithm`."""
        whole, split = partition_specs(axis_name, batch_axes)
        rows = replays.replay_specs(split)
        return State(whole, whole, split, rows, whole, whole, whole, whole)  # type: ignore[arg-type]

    # Pieces that algorithms are made of.

    def distribution(self, actor: PyTree, observation: Any) -> Any:
        """The policy's distribution at normalised observations [batch, features].

        It is a `Categorical` or a `TanhGaussian`.
        """
        return self.actor.apply(actor, observation)[0]

    def q_values(
        self, critics: Sequence[PyTree], observation: Any, samples: ActionSamples
    ) -> jax.Array:
        """The smallest of the critics' values of the samples, [batch, action]."""
        if samples.before_tanh is None:
            values = [self._apply_critic(critic, observation) for critic in critics]
        else:
            action = jnp.tanh(samples.before_tanh)
            values = [
                self._apply_critic(critic, observation, action)[:, None] for critic in critics
            ]
        return values[0] if len(values) == 1 else jnp.minimum(values[0], values[1])

    def policy_q_values(
        self, critics: Sequence[PyTree], observation: Any, samples: ActionSamples
    ) -> jax.Array:
        """The values that the policy maximises, [batch, action]; see `actor_critic` of Config."""
        used = critics if self.config.actor_critic == "smallest" else critics[:1]
        return self.q_values(used, observation, samples)

    def temperature(self, learner: Learner) -> jax.Array:
        """The temperature lambda, float []; a constant for gradients."""
        if learner.log_temperature is None:
            return jnp.asarray(self.config.temperature, default_float())
        return jax.lax.stop_gradient(jnp.exp(learner.log_temperature))

    # Steps.

    def _init_learner(self, params: dict[str, PyTree]) -> Learner:
        log_temperature = None
        if self.config.learn_temperature:
            log_temperature = jnp.log(jnp.asarray(self.config.temperature, default_float()))
        return Learner(
            actor=self._actor_tx.init(params["actor"]),
            critics=self._critic_tx.init(params["critics"]),
            temperature=(
                () if log_temperature is None else self._temperature_tx.init(log_temperature)
            ),
            log_temperature=log_temperature,
            target_critics=jax.tree.map(jnp.copy, params["critics"]),
            old_actor=self.init_old_actor(params["actor"]),
            gradient_steps=jnp.zeros([], jnp.int32),
        )

    def _gradient_step(self, state: State, key: jax.Array) -> tuple[State, Metrics]:
        """One gradient step of everything that is learned, on one minibatch."""
        batch, keys = self._sample_batch(state, key)
        temperature = self.temperature(state.learner)
        state, critic_metrics = self._update_critics(state, batch, keys[:, 0])
        state, actor_metrics, log_prob = self._update_actor(state, batch, keys[:, 1])
        learner = self._update_temperature(state.learner, log_prob)
        # Moving averages of the critics, with the rate tau.
        target_critics = optax.incremental_update(
            state.params["critics"], learner.target_critics, self.config.target_rate
        )
        learner = learner._replace(
            target_critics=target_critics, gradient_steps=learner.gradient_steps + 1
        )
        learner = self.refresh_old_actor(learner, state.params["actor"])
        metrics = critic_metrics | actor_metrics | {"temperature": temperature}
        metrics = {name: self.mean(x) for name, x in metrics.items()}
        return state._replace(learner=learner), metrics

    def _update_critics(
        self, state: State, batch: Replayed, keys: jax.Array
    ) -> tuple[State, Metrics]:
        """A step of both critics on the soft Bellman error, SAC's Eq. 5 and 6."""
        config, learner, critics = self.config, state.learner, state.params["critics"]
        temperature = self.temperature(learner)
        # V(s') = E[min Q'(s', a') - lambda log pi(a' | s')], with a' from the current policy.
        next_ = sample_actions(
            self.distribution(state.params["actor"], batch.final_observation), keys,
            epsilon=self.tanh_epsilon,
        )  # fmt: skip
        next_q = self.q_values(learner.target_critics, batch.final_observation, next_)
        next_log_prob = expectation(next_, self.entropy_log(next_.log_prob))
        next_q = expectation(next_, next_q)

        def loss_fn(critics: Sequence[PyTree], batch: Replayed) -> tuple[jax.Array, jax.Array]:
            values = [self._value_of_action(critic, batch) for critic in critics]
            losses = [
                sac_critic_loss(
                    value, batch.reward, next_q, next_log_prob, batch.terminated,
                    discount=config.discount, temperature=temperature,
                )
                for value in values
            ]  # fmt: skip
            return jnp.mean(losses[0]) + jnp.mean(losses[1]), jnp.mean(values[0])

        def output_fn(critics: Sequence[PyTree], batch: Replayed) -> jax.Array:
            return jnp.stack([self._value_of_action(critic, batch) for critic in critics], -1)

        step = self.make_train_step(loss_fn, self._critic_tx, output_fn)
        critics, opt_state, loss, value = step(critics, learner.critics, batch)
        state = state._replace(
            params=state.params | {"critics": critics}, learner=learner._replace(critics=opt_state)
        )
        return state, {"loss/critic": loss, "value/mean": value}

    def _update_actor(
        self, state: State, batch: Replayed, keys: jax.Array
    ) -> tuple[State, Metrics, jax.Array]:
        """A step of the policy on `policy_losses`; also log pi of its actions, [batch]."""
        learner, critics = state.learner, state.params["critics"]

        def loss_fn(actor: PyTree, batch: Replayed) -> tuple[jax.Array, jax.Array]:
            losses, log_prob = self.policy_losses(actor, batch, keys, learner, critics)
            return jnp.mean(losses), log_prob

        def output_fn(actor: PyTree, batch: Replayed) -> jax.Array:
            return jnp.asarray(self.distribution(actor, batch.observation)[0])

        step = self.make_train_step(loss_fn, self._actor_tx, output_fn)
        actor, opt_state, loss, log_prob = step(state.params["actor"], learner.actor, batch)
        state = state._replace(
            params=state.params | {"actor": actor}, learner=learner._replace(actor=opt_state)
        )
        return state, {"loss/actor": loss, "entropy": -jnp.mean(log_prob)}, log_prob

    def _update_temperature(self, learner: Learner, log_prob: jax.Array) -> Learner:
        """A step of a learned temperature towards the target entropy, SAC's Eq. 18."""
        if learner.log_temperature is None:
            return learner
        form, target = self.config.temperature_form, self.config.target_entropy_or_default

        def loss_fn(log_temperature: jax.Array) -> tuple[jax.Array, None]:
            losses = temperature_loss(log_temperature, log_prob, target_entropy=target, form=form)
            return jnp.mean(losses), None

        step = self.make_train_step(loss_fn, self._temperature_tx)
        log_temperature, opt_state, _, _ = step(learner.log_temperature, learner.temperature)
        return learner._replace(log_temperature=log_temperature, temperature=opt_state)

    def _apply_critic(
        self, critic: PyTree, observation: Any, action: jax.Array | None = None
    ) -> jax.Array:
        values: jax.Array = self.critic.apply(critic, observation, action)  # type: ignore[assignment]
        return values

    def _value_of_action(self, critic: PyTree, batch: Replayed) -> jax.Array:
        if self.env.num_actions is None:
            return self._apply_critic(critic, batch.observation, batch.action)
        return batched_index(self._apply_critic(critic, batch.observation), batch.action)

    def _training_action(self, state: State, keys: jax.Array) -> jax.Array:
        """Actions [environment, ...] for the runner's observations, by `explore` of Config."""
        distribution = self.distribution(
            state.params["actor"], self.normalize(state.observations, state.runner.observation)
        )
        if self.config.explore == "mode":
            return distribution.mode()  # type: ignore[no-any-return]
        return jax.vmap(lambda one, key: one.sample(key))(distribution, keys)  # type: ignore[no-any-return]

    def _sample_batch(self, state: State, key: jax.Array) -> tuple[Replayed, jax.Array]:
        """A minibatch [batch, ...] and keys [group, 2] to sample actions with.

        Rewards are scaled. Observations before and after a step are normalised with the statistics
        of this iteration for all networks, the target critics and the old policy included, so that
        equal weights are equal policies.
        """
        config = self.config
        keys = replays.group_keys(key, config.num_groups, axis_name=self.axis_name)
        size = config.batch_size // config.num_groups
        groups = replays.sample(state.replay, keys[:, 0], size)
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
        normalize = functools.partial(self.normalize, state.observations)
        return batch._replace(
            observation=normalize(batch.observation),
            final_observation=normalize(batch.final_observation),
            reward=batch.reward * jnp.asarray(self.config.reward_scale, batch.reward.dtype),
        ), keys[:, 1:]
