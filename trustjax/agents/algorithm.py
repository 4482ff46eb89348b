"""What every algorithm is: a configuration, pure functions of a state, and a policy at the end."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from trustjax._checks import FieldError, check_number
from trustjax._sharding import AxisName, averaged
from trustjax.agents import rollout as rollouts
from trustjax.agents.policy import Evaluation, Policy
from trustjax.agents.rollout import EpisodeStats, Rollout, Runner, Transition
from trustjax.agents.running_statistics import Statistics, normalized
from trustjax.envs import Environment, make_once
from trustjax.models.actor_critic import Actor, Carry, check_network, initial_carry
from trustjax.optim import two_pass_step

PyTree = Any
Metrics = dict[str, jax.Array]

_EPISODES = ("episode/return", "episode/length")


class TrainState(Protocol):
    """What `Algorithm` reads of a state.

    Attributes:
      params: {"actor": ..., ...}, variables of the networks.
      runner: the environments.
      observations: statistics of observations, or None.
      episodes: the means of the last iteration in which an episode ended; 0 before.
    """

    @property
    def params(self) -> dict[str, PyTree]: ...  # noqa: D102
    @property
    def runner(self) -> Runner: ...  # noqa: D102
    @property
    def observations(self) -> Statistics | None: ...  # noqa: D102
    @property
    def episodes(self) -> Metrics: ...  # noqa: D102


S = TypeVar("S", bound=TrainState)


MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def static(default: Any) -> Any:
    """A field of a Config that decides what is compiled, and so is no number to be swept."""
    return dataclasses.field(default=default, metadata={"static": True})


def adam(learning_rate: optax.ScalarOrSchedule, eps: float = 1e-5) -> optax.GradientTransformation:
    """Adam on one array: on CPU faster than on the dozen of small networks."""
    return optax.flatten(optax.adam(learning_rate, eps=eps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig(abc.ABC):
    """What the Configs of all algorithms share.

    A pytree: numbers are leaves, which `jax.vmap` may sweep; fields that decide what is compiled
    are part of its structure. Those are marked "static".

    Attributes:
      env: an environment or its name; static.
      env_params: of the environment; None for its defaults.
      total_steps: of all environments together, rounded down to whole iterations; static.
      num_envs: environments side by side; static.
      num_steps: steps of each of them in an iteration; static.
      discount: gamma, in [0, 1].
      normalize_observations: by running mean and standard deviation; static.
      clip_observations: bound of normalised observations, > 0.
      hidden: widths of the layers of policy and value, which are separate networks; static.
      critic_hidden: those of the value, if they differ; static.
      activation: "tanh", "relu", "gelu" or "silu"; static.
      orthogonal: orthogonal first weights, with 0.01 in the head of the policy; static.
      initial_log_std: logarithm of the first standard deviation of continuous actions; static.
      dtype: of the networks' computation, None for that of their parameters; static.
      optimizer: `learning_rate -> optax transform`; static.
      learning_rate: > 0.
      max_grad_norm: gradients are clipped to this global norm, > 0; None for no clipping.
    """

    env: str | Environment = static("gymnax:CartPole-v1")
    env_params: Any = None
    total_steps: int = static(1_000_000)
    num_envs: int = static(64)
    num_steps: int = static(128)
    discount: ArrayLike = 0.99
    normalize_observations: bool = static(False)
    clip_observations: ArrayLike = 10.0
    hidden: tuple[int, ...] = static((64, 64))
    critic_hidden: tuple[int, ...] | None = static(None)
    activation: str = static("tanh")
    orthogonal: bool = static(True)
    initial_log_std: float = static(0.0)
    dtype: DTypeLike | None = static(None)
    optimizer: MakeOptimizer = static(adam)
    learning_rate: ArrayLike = 3e-4
    max_grad_norm: ArrayLike | None = 0.5

    @property
    def steps_per_update(self) -> int:
        """Steps of all environments in an iteration."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Iterations, those that `init` has done among them."""
        return self.total_steps // self.steps_per_update

    @property
    def first_update(self) -> int:
        """Iterations whose steps `init` takes, without learning."""
        return 0

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return self.env if isinstance(self.env, Environment) else make_once(self.env)

    def __post_init__(self) -> None:
        """Makes lists, which files have for tuples, hashable."""
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            several = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str)
            if field.metadata.get("static") and several:
                object.__setattr__(self, field.name, tuple(given))

    def check_devices(self, num_devices: int) -> None:
        """Raises ValueError if so many devices, more than one, cannot share the environments."""
        if self.num_envs % num_devices:
            raise FieldError("num_envs", f"be a multiple of {num_devices} devices", self.num_envs)

    @abc.abstractmethod
    def agent(self, *, axis_name: AxisName | None = None) -> "Algorithm[Any]":
        """The algorithm with this configuration."""

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        for name in ("num_envs", "num_steps"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("discount", self.discount, at_least=0.0, at_most=1.0)
        for name in ("clip_observations", "learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0.0)
        check_network(self.hidden, self.activation)
        check_network(self.critic_hidden or (), self.activation)
        if self.total_steps < self.steps_per_update:
            raise FieldError(
                "total_steps",
                f"be at least num_envs * num_steps, {self.steps_per_update}",
                self.total_steps,
            )
        if self.environment.num_actions is None and self.environment.action_low is None:
            raise FieldError("env", "have actions of one kind", self.environment)


class Algorithm(abc.ABC, Generic[S]):
    """An algorithm as pure functions; `jax.jit` and `jax.vmap` go around them.

    Args:
      config: of the algorithm; it is validated, and its numbers may be traced.
      axis_name: devices that share the environments, inside `jax.shard_map`.

    Raises:
      ValueError: a field out of range, an unknown environment; the field is named.
    """

    actor: Actor

    def __init__(self, config: AgentConfig, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration."""
        config.validate()
        self.config: Any = config
        self.axis_name = axis_name
        self.env: Environment = config.environment
        self.torso_kwargs: dict[str, Any] = {
            name: getattr(config, name) for name in ("hidden", "activation", "orthogonal", "dtype")
        }
        self.critic_torso_kwargs = self.torso_kwargs | {
            "hidden": config.critic_hidden or config.hidden
        }
        self.action_kwargs: dict[str, Any] = {
            "num_actions": self.env.num_actions,
            "action_size": None if self.env.action_low is None else len(self.env.action_low),
        }

    # Training.

    @abc.abstractmethod
    def init(self, key: jax.Array) -> S:
        """The state before the first iteration that learns."""

    @abc.abstractmethod
    def update(self, state: S) -> tuple[S, Metrics]:
        """One iteration; the metrics are scalars.

        `episode/return` and `episode/length` are means over the episodes that ended in it, or in
        the last iteration in which one did. Before there is one both are 0, a length that no
        episode has; `known` leaves them out.
        """

    @staticmethod
    @abc.abstractmethod
    def state_specs(axis_name: str, *, batch_axes: int = 0) -> S:
        """How a state lies on a mesh: what is split over `axis_name`, and what is everywhere.

        `batch_axes` counts leading axes, such as one of seeds.
        """

    def train(self, key: jax.Array) -> tuple[S, Metrics]:
        """All iterations in one scan; the history has a leading axis of those that learn."""
        return self.advance(self.init(key), self.config.num_updates - self.config.first_update)

    def advance(self, state: S, num_updates: int) -> tuple[S, Metrics]:
        """`num_updates` iterations in one scan."""
        return jax.lax.scan(lambda state, _: self.update(state), state, length=num_updates)

    # Acting.

    def policy(self, state: S) -> Policy:
        """What acts, without what trains it; it can be saved."""
        return Policy(
            state.params["actor"], state.observations, jnp.asarray(self.config.clip_observations),
            self.actor, self.config.env,
        )  # fmt: skip

    def act(
        self,
        state: S,
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
        self, state: S, key: jax.Array, num_episodes: int, *, deterministic: bool = True
    ) -> Evaluation:
        """Whole episodes of the policy; see `Policy.evaluate`."""
        return self.policy(state).evaluate(
            key, num_episodes, deterministic=deterministic, env_params=self.config.env_params
        )

    # Pieces that algorithms are made of.

    def make_train_step(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Any]],
        tx: optax.GradientTransformation,
        output_fn: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """A training step on the mean loss of all devices, with clipped gradients."""
        max_norm = self.config.max_grad_norm

        def map_grads(grads: PyTree) -> PyTree:
            grads = averaged(grads, self.axis_name)
            if max_norm is None:
                return grads
            return optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]

        return two_pass_step(loss_fn, tx, output_fn=output_fn, map_grads=map_grads)

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean of all numbers of all devices."""
        mean: jax.Array = averaged(jnp.mean(x), self.axis_name)
        return mean

    def normalize(self, statistics: Statistics | None, observation: jax.Array) -> jax.Array:
        """Observations as the networks see them."""
        return normalized(observation, statistics, self.config.clip_observations)

    def accumulate_episode_stats(
        self, before: S, steps: Rollout | Transition
    ) -> tuple[EpisodeStats, EpisodeStats, Metrics]:
        """What the steps [time, environment] after the state `before` add to its episodes.

        Returns the sums at their end, those after every step, and the means over the episodes that
        ended, else those that were known.
        """
        ended = steps.terminated | steps.truncated
        sums, every = rollouts.accumulate_episode_stats(
            before.runner.sums, steps.reward, ended, self.config.discount
        )
        share = self.mean(ended.astype(every.episode_return.dtype))

        def mean(x: jax.Array, known: jax.Array) -> jax.Array:
            total = self.mean(jnp.where(ended, x, jnp.zeros_like(x)).astype(known.dtype))
            return jnp.where(share > 0, total / jnp.where(share > 0, share, 1), known)

        known = before.episodes
        episodes = {
            "episode/return": mean(every.episode_return, known["episode/return"]),
            "episode/length": mean(every.episode_length, known["episode/length"]),
        }
        return sums, every, episodes


def no_episodes(dtype: Any) -> Metrics:
    """The means before an episode has ended: 0, as NaN would stop `jax_debug_nans`."""
    return {name: jnp.zeros([], dtype) for name in _EPISODES}


def known(metrics: Mapping[str, ArrayLike]) -> dict[str, np.ndarray[Any, Any]]:
    """Metrics of iterations as float64 on the host, NaN where there is no number yet.

    That is where no episode had ended: at an `episode/length` of 0.
    """
    found = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    ended = found["episode/length"] > 0
    return found | {name: np.where(ended, found[name], np.nan) for name in _EPISODES}


def specs(axis_name: str, batch_axes: int) -> tuple[PartitionSpec, PartitionSpec]:
    """Of what is everywhere, and of what is split along the first axis after the batch axes."""
    return PartitionSpec(), PartitionSpec(*[None] * batch_axes, axis_name)


def select_seed(state: Any, index: int) -> Any:
    """One of the states (or histories) that `jax.vmap(agent.train)` returned side by side."""
    return jax.tree.map(lambda x: x[index], state)
