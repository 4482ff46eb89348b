"""The base of all algorithms: a configuration, and pure functions of a state."""

import abc
import dataclasses
import math
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
from trustjax.agents.own_networks import check_key, check_modules, hashable, torso_kwargs
from trustjax.agents.policy import Evaluation, Policy
from trustjax.agents.rollout import EpisodeStats, Rollout, Runner, Transition
from trustjax.agents.running_statistics import normalized_observations
from trustjax.envs import Environment, as_environment
from trustjax.envs.checking import check_environment, check_params
from trustjax.models.actor_critic import Actor, Carry, check_network, initial_carry
from trustjax.models.observations import Key
from trustjax.optim import two_pass_step

PyTree = Any
Metrics = dict[str, jax.Array]

_EPISODES = ("episode/return", "episode/length")


class TrainState(Protocol):
    """The fields of a state that `Algorithm` reads.

    Attributes:
      params: Variables of the networks, {"actor": ..., ...}.
      runner: The environments.
      observations: Running statistics of the observations, a dict for each part of a dict; None
        where they are not normalised.
      iteration: Number of iterations done so far, int32 [].
      episodes: Mean return and length from the last iteration in which an episode ended; 0 before.
    """

    @property
    def params(self) -> dict[str, PyTree]: ...  # noqa: D102
    @property
    def runner(self) -> Runner: ...  # noqa: D102
    @property
    def observations(self) -> Any: ...  # noqa: D102
    @property
    def iteration(self) -> jax.Array: ...  # noqa: D102
    @property
    def episodes(self) -> Metrics: ...  # noqa: D102


S = TypeVar("S", bound=TrainState)


MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def static(default: Any) -> Any:
    """A field of a Config that decides what is compiled, so that `jax.vmap` cannot sweep it."""
    return dataclasses.field(default=default, metadata={"static": True})


def adam(learning_rate: optax.ScalarOrSchedule, eps: float = 1e-5) -> optax.GradientTransformation:
    """Adam on all parameters as one array, which on CPU is faster than on a dozen small ones."""
    return optax.flatten(optax.adam(learning_rate, eps=eps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgentConfig(abc.ABC):
    """The configuration fields of all algorithms.

    A Config is a pytree. Its hyperparameters are leaves, which `jax.vmap` may sweep; the fields
    that decide what is compiled are part of its structure and are marked "static".

    Attributes:
      env: Environment, or its name for `trustjax.envs.make`; static.
      env_params: Parameters of the environment; None for its defaults.
      total_steps: Environment steps of the whole training, summed over all environments and rounded
        down to whole iterations; static.
      num_envs: Number of environments that are stepped side by side, >= 1; static.
      num_steps: Steps of each environment in one iteration, >= 1; static.
      discount: Discount factor gamma per step, in [0, 1].
      normalize_observations: Whether observations are normalised by their running mean and standard
        deviation, each part by its own. Parts that are not floating, such as pixels, are not where
        `network` or `critic_network` takes observations as they are; flattened they become floats,
        and are. Static.
      clip_observations: Largest absolute value of a normalised observation, > 0.
      network: Flax linen module in front of the hidden layers, which maps observations
        [batch, *shape], not flattened and of their own dtype, to features, float [batch, width];
        with `hidden=()` the output layer follows. Policy and critics have parameters of their own.
        None for the observations themselves, flattened and side by side. Static.
      critic_network: The same for the critics, whose action follows the features; None for the same
        as `network`. Static.
      policy_obs_key: Name of the part that the policy sees of observations that are dicts, or names
        of several; None for all but "action_mask". Static.
      value_obs_key: The same for the critics, which may see more. Static.
      hidden: Widths of the hidden layers of all networks, each >= 1; the networks share no layers.
        Static.
      critic_hidden: Widths of the hidden layers of the critics; None for the same as `hidden`.
        Static.
      activation: Activation of the hidden layers, "tanh", "relu", "gelu" or "silu"; static.
      orthogonal: Whether weights are initialised orthogonal, scaled by 0.01 in the output layer of
        the policy; otherwise by LeCun's rule. Static.
      initial_log_std: Natural logarithm of the initial standard deviation of continuous actions;
        static.
      dtype: Dtype in which the networks compute; None for the dtype of their parameters. Static.
      optimizer: Factory `learning_rate -> optax.GradientTransformation`; static.
      learning_rate: Learning rate of the optimizer, > 0.
      max_grad_norm: Global norm to which gradients are clipped, > 0; None for no clipping.
    """

    env: str | Environment = static("gymnax:CartPole-v1")
    env_params: Any = None
    total_steps: int = static(1_000_000)
    num_envs: int = static(64)
    num_steps: int = static(128)
    discount: ArrayLike = 0.99
    normalize_observations: bool = static(False)
    clip_observations: ArrayLike = 10.0
    network: Any = static(None)
    critic_network: Any = static(None)
    policy_obs_key: Key = static(None)
    value_obs_key: Key = static(None)
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
        """Steps of all environments together in one iteration."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Number of iterations of the whole training, including those that `init` takes."""
        return self.total_steps // self.steps_per_update

    @property
    def first_update(self) -> int:
        """Number of iterations that `init` takes, without learning."""
        return 0

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return as_environment(self.env)

    def __post_init__(self) -> None:
        """Turns lists, which configuration files have in place of tuples, into tuples."""
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            is_list = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str)
            if field.metadata.get("static") and is_list:
                object.__setattr__(self, field.name, tuple(given))
        for name in ("network", "critic_network"):
            object.__setattr__(self, name, hashable(getattr(self, name)))

    def check_devices(self, num_devices: int) -> None:
        """Raises ValueError unless the environments can be split over `num_devices` > 1 devices."""
        if self.num_envs % num_devices:
            raise FieldError("num_envs", f"be a multiple of {num_devices} devices", self.num_envs)

    @abc.abstractmethod
    def agent(self, *, axis_name: AxisName | None = None) -> "Algorithm[Any]":
        """The algorithm with this configuration."""

    def validate(self) -> None:
        """Raises ValueError, which names the field, for a Config that cannot work.

        This happens on the host, before anything is compiled; traced values pass.
        """
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise FieldError(field.name, "be True or False", repr(getattr(self, field.name)))
        for name in ("num_envs", "num_steps"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("discount", self.discount, at_least=0.0, at_most=1.0)
        for name in ("clip_observations", "learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("learning_rate", self.learning_rate, below=math.inf)
        check_network(self.hidden, self.activation)
        check_network(self.critic_hidden or (), self.activation)
        if self.total_steps < self.steps_per_update:
            raise FieldError(
                "total_steps",
                f"be at least num_envs * num_steps, {self.steps_per_update}",
                self.total_steps,
            )
        env = self.environment
        if isinstance(self.env, Environment):
            check_environment(env, self.env_params)
        check_params(env, self.env_params)
        for name in ("policy_obs_key", "value_obs_key"):
            check_key(name, getattr(self, name), env.observation_shape)
        check_modules(self)


def clipped(grads: PyTree, max_norm: ArrayLike | None) -> PyTree:
    """Gradients whose global norm is at most `max_norm`; None clips nothing."""
    if max_norm is None:
        return grads
    return optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]


class Algorithm(abc.ABC, Generic[S]):
    """An algorithm as pure functions, which `jax.jit` and `jax.vmap` can transform.

    Args:
      config: Configuration of the algorithm. It is validated; its hyperparameters may be traced.
      axis_name: Mesh axis over which the environments are split, inside `jax.shard_map`; None on
        one device.

    Raises:
      ValueError: A field is out of range or the environment is unknown; the field is named.
    """

    actor: Actor

    def __init__(self, config: AgentConfig, *, axis_name: AxisName | None = None) -> None:
        """Checks the configuration."""
        config.validate()
        self.config: Any = config
        self.axis_name = axis_name
        self.env: Environment = config.environment
        self.torso_kwargs, self.critic_torso_kwargs = torso_kwargs(config, self.env)
        self.action_kwargs: dict[str, Any] = {
            "num_actions": _as_ints(self.env.num_actions),
            "action_size": None if self.env.action_low is None else len(self.env.action_low),
        }

    # Training.

    @abc.abstractmethod
    def init(self, key: jax.Array) -> S:
        """The state before the first iteration that learns; `key` is that of the whole training."""

    @abc.abstractmethod
    def update(self, state: S) -> tuple[S, Metrics]:
        """The state after one iteration, and its metrics, which are scalars.

        `episode/return` and `episode/length` are means over the episodes that ended in this
        iteration or, if none did, in the last iteration in which one did. Before any episode has
        ended both are 0, a length that no episode has; `mask_missing_episodes` turns them into NaN.
        """

    @staticmethod
    @abc.abstractmethod
    def state_specs(axis_name: str, *, batch_axes: int = 0) -> S:
        """Partition specs of a state: what is split over `axis_name`, and what is replicated.

        `batch_axes` is the number of leading batch axes, such as one for seeds.
        """

    def train(self, key: jax.Array) -> tuple[S, Metrics]:
        """The last state of a whole training, and the metrics of each iteration that learns.

        The training is one scan; metrics have a leading axis of iterations.
        """
        return self.advance(self.init(key), self.config.num_updates - self.config.first_update)

    def advance(self, state: S, num_updates: int) -> tuple[S, Metrics]:
        """The state after `num_updates` iterations in one scan, and the metrics of each."""
        return jax.lax.scan(lambda state, _: self.update(state), state, length=num_updates)

    # Acting.

    def policy(self, state: S) -> Policy:
        """The trained policy alone, which acts and can be saved."""
        return Policy(
            state.params["actor"], state.observations, jnp.asarray(self.config.clip_observations),
            self.actor, self.config.env, self.config.env_params,
        )  # fmt: skip

    def act(
        self,
        state: S,
        observation: Any,
        key: jax.Array,
        carry: Carry | None = None,
        *,
        deterministic: bool = False,
    ) -> tuple[jax.Array, Carry]:
        """Actions and the next carry; see `Policy.act`."""
        return self.policy(state).act(observation, key, carry, deterministic=deterministic)

    def initial_carry(self, batch_shape: tuple[int, ...] = ()) -> Carry:
        """The carry of the policy at the start of an episode; () without a GRU."""
        return initial_carry(self.actor, batch_shape)

    def evaluate(
        self,
        state: S,
        key: jax.Array,
        num_episodes: int,
        *,
        deterministic: bool = True,
        max_steps: ArrayLike | None = None,
    ) -> Evaluation:
        """Returns and lengths of whole episodes of the policy; see `Policy.evaluate`."""
        return self.policy(state).evaluate(
            key, num_episodes, deterministic=deterministic, max_steps=max_steps
        )

    # Pieces that algorithms are made of.

    def make_train_step(
        self,
        loss_fn: Callable[..., tuple[jax.Array, Any]],
        tx: optax.GradientTransformation,
        output_fn: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """A `two_pass_step` on the mean loss of all devices, with clipped gradients."""
        max_norm = self.config.max_grad_norm

        # Averaged before they are clipped, so that the devices together clip as one device would.
        def map_grads(grads: PyTree) -> PyTree:
            return clipped(averaged(grads, self.axis_name), max_norm)

        return two_pass_step(loss_fn, tx, output_fn=output_fn, map_grads=map_grads)

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean of all entries of `x` on all devices, []."""
        mean: jax.Array = averaged(jnp.mean(x), self.axis_name)
        return mean

    def normalize(self, statistics: Any, observation: Any) -> Any:
        """The normalised observations, which are the inputs of the networks."""
        return normalized_observations(observation, statistics, self.config.clip_observations)

    def accumulate_episode_stats(
        self, before: S, steps: Rollout | Transition
    ) -> tuple[EpisodeStats, EpisodeStats, Metrics]:
        """Continues the episode statistics of the state `before` over steps [time, environment].

        Returns:
          The sums after the last step, [environment].
          The sums after every step, [time, environment].
          Mean return and length of the episodes that ended, [], or those of `before` if none did.
        """
        ended = steps.terminated | steps.truncated
        sums, every = rollouts.accumulate_episode_stats(
            before.runner.sums, steps.reward, ended, self.config.discount
        )
        share = self.mean(ended.astype(every.episode_return.dtype))

        def mean(x: jax.Array, last: jax.Array) -> jax.Array:
            # As a ratio of two means over all devices, of which some may see no episode end.
            total = self.mean(jnp.where(ended, x, jnp.zeros_like(x)).astype(last.dtype))
            return jnp.where(share > 0, total / jnp.where(share > 0, share, 1), last)

        last = before.episodes
        episodes = {
            "episode/return": mean(every.episode_return, last["episode/return"]),
            "episode/length": mean(every.episode_length, last["episode/length"]),
        }
        return sums, every, episodes


def _as_ints(num_actions: Any) -> Any:
    """Python's ints, which are saved as JSON and hashed, in place of NumPy's and of lists."""
    if isinstance(num_actions, Sequence):
        return tuple(map(int, num_actions))
    return None if num_actions is None else int(num_actions)


def no_episodes(dtype: Any) -> Metrics:
    """Episode metrics before any episode has ended: 0, because NaN would stop `jax_debug_nans`."""
    return {name: jnp.zeros([], dtype) for name in _EPISODES}


def mask_missing_episodes(metrics: Mapping[str, ArrayLike]) -> dict[str, np.ndarray[Any, Any]]:
    """Metrics of iterations as float64 NumPy arrays, with NaN where there is no episode yet.

    No episode had ended where `episode/length` is 0; `episode/return` and `episode/length` become
    NaN there.
    """
    found = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
    ended = found["episode/length"] > 0
    return found | {name: np.where(ended, found[name], np.nan) for name in _EPISODES}


known = mask_missing_episodes  # its name in earlier versions; deprecated


def partition_specs(axis_name: str, batch_axes: int) -> tuple[PartitionSpec, PartitionSpec]:
    """The partition specs of the replicated and of the environment-sharded parts of a state.

    The sharded axis is the first one after `batch_axes` leading axes.
    """
    return PartitionSpec(), PartitionSpec(*[None] * batch_axes, axis_name)


def select_seed(state: Any, index: int) -> Any:
    """The state (or history) of one seed out of those that `jax.vmap(agent.train)` returned."""
    return jax.tree.map(lambda x: x[index], state)
