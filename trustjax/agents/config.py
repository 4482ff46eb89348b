"""What the Configs of the on-policy algorithms share."""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName
from trustjax.envs import Environment, make_once
from trustjax.models.actor_critic import check_network

if TYPE_CHECKING:  # which imports this module
    from trustjax.agents.on_policy import OnPolicy

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
        return self.env if isinstance(self.env, Environment) else make_once(self.env)

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
