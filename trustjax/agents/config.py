"""Configurations that families of algorithms share: on-policy and off-policy ones."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_choice, check_number
from trustjax.agents.algorithm import AgentConfig, MakeOptimizer, adam, static
from trustjax.models.actor_critic import check_network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(AgentConfig):
    """What the on-policy algorithms add to `AgentConfig`.

    Attributes:
      lambda_: of the advantages, in [0, 1]; 1 for returns without bootstrapping inside a rollout.
      normalize_rewards: divides by the running standard deviation of the discounted return; static.
      clip_rewards: bound of normalised rewards, > 0.
      normalize_advantages: to mean 0 and standard deviation 1 over the "batch" of an iteration,
        over a "minibatch" (PPO alone), to 0 where they differ by rounding alone, or "none"; static.
      gru_size: units of a GRU behind the layers, for tasks that need memory; None for none; static.
      anneal_learning_rate: lets it fall to 0 linearly over the iterations; static.
      value_clip: of `trustjax.losses.value_loss`, >= 0; None for the plain squared error.
      num_minibatches: into which `num_envs` environments are split; static.
      num_epochs: passes over an iteration's transitions; static.
      shuffle: "environments": a minibatch has one of every `num_minibatches` neighbouring
        environments, drawn for each epoch and, without a GRU, for each step; "transitions": drawn
        from all transitions; static.
    """

    lambda_: ArrayLike = 0.95
    normalize_rewards: bool = static(False)
    clip_rewards: ArrayLike = 10.0
    normalize_advantages: Literal["batch", "minibatch", "none"] = static("batch")
    gru_size: int | None = static(None)
    anneal_learning_rate: bool = static(True)
    value_clip: ArrayLike | None = None
    num_minibatches: int = static(4)
    num_epochs: int = static(4)
    shuffle: Literal["environments", "transitions"] = static("environments")

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        for name in ("num_minibatches", "num_epochs"):
            check_number(name, getattr(self, name), at_least=1)
        check_network(self.hidden, self.activation, self.gru_size)
        check_number("lambda_", self.lambda_, at_least=0.0, at_most=1.0)
        check_number("clip_rewards", self.clip_rewards, above=0.0)
        check_number("value_clip", self.value_clip, at_least=0.0)
        check_choice(
            "normalize_advantages", self.normalize_advantages, ("batch", "minibatch", "none")
        )
        check_choice("shuffle", self.shuffle, ("environments", "transitions"))
        among = self.num_envs if self.shuffle == "environments" else self.steps_per_update
        if among % self.num_minibatches:
            raise FieldError(
                "num_minibatches",
                f"divide the {among} {self.shuffle} of an iteration",
                self.num_minibatches,
            )
        if self.shuffle == "transitions" and self.gru_size is not None:
            raise FieldError(
                "shuffle", "be 'environments' with a GRU, which needs whole time", "'transitions'"
            )

    def check_devices(self, num_devices: int) -> None:
        """Raises ValueError if so many devices, more than one, cannot share the environments."""
        if self.shuffle != "environments":
            raise FieldError("shuffle", "be 'environments' on several devices", "'transitions'")
        if self.num_envs % (num_devices * self.num_minibatches):
            raise FieldError(
                "num_envs",
                f"be a multiple of {num_devices} devices times num_minibatches, "
                f"{self.num_minibatches}",
                self.num_envs,
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(AgentConfig):
    """What the off-policy algorithms add to `AgentConfig`.

    Attributes:
      gradient_steps: after each step of the environments; divided by `num_envs` it is the ratio of
        updates to data; static.
      batch_size: transitions of a minibatch; static.
      buffer_size: transitions of all environments that are kept; static.
      learning_starts: steps with random actions before the first gradient, rounded up to whole
        iterations; they count to `total_steps`; static.
      target_rate: tau in (0, 1], of the moving average that the target critics are.
      temperature: lambda >= 0, weight of the entropy; the first one if it is learned.
      learn_temperature: moves it until the policy has the target entropy; static.
      target_entropy: None for less the number of action dimensions, or 0.98 log A of A actions.
      temperature_form: of `trustjax.losses.temperature_loss`; static.
      actor_critic: which critic the policy climbs, "smallest" of the two or the "first"; static.
      explore: how it acts in training: a "sample" of the policy or its "mode"; static.
      log_std_range: lowest and highest log standard deviation of continuous actions; with the -20
        of the paper's code the KL to an old policy can be beyond all measure; static.
    """

    num_envs: int = static(1)
    num_steps: int = static(64)
    hidden: tuple[int, ...] = static((256, 256))
    activation: str = static("relu")
    orthogonal: bool = static(False)
    optimizer: MakeOptimizer = static(functools.partial(adam, eps=1e-8))
    max_grad_norm: ArrayLike | None = None
    gradient_steps: int = static(1)
    batch_size: int = static(256)
    buffer_size: int = static(1_000_000)
    learning_starts: int = static(10_000)
    target_rate: ArrayLike = 0.005
    temperature: ArrayLike = 0.2
    learn_temperature: bool = static(False)
    target_entropy: ArrayLike | None = None
    temperature_form: Literal["log", "exponential"] = static("exponential")
    actor_critic: Literal["smallest", "first"] = static("smallest")
    explore: Literal["sample", "mode"] = static("sample")
    log_std_range: tuple[float, float] = static((-5.0, 2.0))

    @property
    def first_update(self) -> int:
        """Iterations of random steps."""
        return -(-self.learning_starts // self.steps_per_update)

    @property
    def num_groups(self) -> int:
        """Groups of environments that give as many transitions to every minibatch."""
        return math.gcd(self.num_envs, self.batch_size)

    @property
    def buffer_length(self) -> int:
        """Transitions of one environment that are kept."""
        return min(self.buffer_size, self.total_steps) // self.num_envs

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        for name in ("gradient_steps", "batch_size"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("learning_starts", self.learning_starts, at_least=0)
        check_number("target_rate", self.target_rate, above=0.0, at_most=1.0)
        check_number("temperature", self.temperature, at_least=0.0)
        if self.learn_temperature:
            check_number("temperature", self.temperature, above=0.0)
        check_choice("temperature_form", self.temperature_form, ("log", "exponential"))
        check_choice("actor_critic", self.actor_critic, ("smallest", "first"))
        check_choice("explore", self.explore, ("sample", "mode"))
        untyped: Any = self.log_std_range
        pair = isinstance(untyped, tuple) and len(untyped) == 2
        if not pair or not untyped[0] < self.initial_log_std < untyped[1]:
            raise FieldError(
                "log_std_range",
                f"be two numbers with initial_log_std, {self.initial_log_std:g}, between them",
                untyped,
            )
        first = max(self.first_update, 1) * self.steps_per_update
        if self.buffer_size < first:
            raise FieldError(
                "buffer_size",
                f"be at least learning_starts in whole iterations, {first}",
                self.buffer_size,
            )
        if self.num_updates <= self.first_update:
            raise FieldError(
                "total_steps",
                "be more than learning_starts by an iteration, at least "
                f"{(self.first_update + 1) * self.steps_per_update}",
                self.total_steps,
            )
        env = self.environment
        bounds = [bound for bound in (env.action_low, env.action_high) if bound is not None]
        if not all(np.all(np.isfinite(bound)) for bound in bounds):
            raise FieldError("env", "have bounded actions", env)

    def check_devices(self, num_devices: int) -> None:
        """Raises ValueError if so many devices, more than one, cannot share the environments."""
        super().check_devices(num_devices)
        if self.num_groups % num_devices:
            raise FieldError(
                "batch_size", f"be a multiple of {num_devices} devices", self.batch_size
            )


def whole_batch(config: OnPolicyConfig) -> None:
    """Raises ValueError if advantages are left to minibatches that the policy does not have."""
    if config.normalize_advantages == "minibatch":
        raise FieldError(
            "normalize_advantages",
            "be 'batch' or 'none' where the policy learns from the whole batch",
            "'minibatch'",
        )
