"""The configurations that on-policy algorithms share, and those that off-policy ones share."""

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
    """The fields that all on-policy algorithms add to `AgentConfig`.

    Attributes:
      lambda_: The lambda of generalised advantage estimation, in [0, 1]; 1 takes the whole return
        of the rollout without bootstrapping inside it.
      normalize_rewards: Whether rewards are divided by the running standard deviation of the
        discounted return; static.
      clip_rewards: Largest absolute value of a normalised reward, > 0.
      normalize_advantages: Set over which advantages are normalised to mean 0 and standard
        deviation 1: the "batch" of an iteration, a "minibatch" (PPO only), or "none". Advantages
        that differ by rounding alone become 0. Static.
      gru_size: Units of a GRU after the dense layers, for tasks that need memory; None for no GRU.
        Static.
      anneal_learning_rate: Whether the learning rate falls linearly to 0 over the iterations of
        `total_steps`. Iterations past the last one have the rate 0: they go on collecting
        transitions and statistics, but train nothing except the policy of TRPO, which has a radius
        in place of a rate. Static.
      value_clip: The `clip` of `trustjax.losses.value_loss`, in units of the value, >= 0; None for
        the plain squared error.
      num_minibatches: Number of minibatches per epoch, >= 1; it divides `num_envs`, or all
        transitions of an iteration, as `shuffle` says. Static.
      num_epochs: Passes over the transitions of an iteration, >= 1; static.
      entropy_coefficient: Weight of the mean entropy of the policy in nats, which is added to the
        objective that the policy maximises, >= 0.
      shuffle: How minibatches are drawn. "environments": one of every `num_minibatches`
        neighbouring environments, drawn anew for each epoch and, without a GRU, for each step.
        "transitions": uniformly from all transitions. Static.
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
    entropy_coefficient: ArrayLike = 0.0
    shuffle: Literal["environments", "transitions"] = static("environments")

    @property
    def is_recurrent(self) -> bool:
        """Whether a network has a memory, so that it needs whole sequences in time."""
        return self.gru_size is not None

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        for name in ("num_minibatches", "num_epochs"):
            check_number(name, getattr(self, name), at_least=1)
        check_network(self.hidden, self.activation, self.gru_size)
        check_number("lambda_", self.lambda_, at_least=0.0, at_most=1.0)
        check_number("clip_rewards", self.clip_rewards, above=0.0)
        check_number("value_clip", self.value_clip, at_least=0.0)
        check_number("entropy_coefficient", self.entropy_coefficient, at_least=0.0)
        check_choice(
            "normalize_advantages", self.normalize_advantages, ("batch", "minibatch", "none")
        )
        check_choice("shuffle", self.shuffle, ("environments", "transitions"))
        self._check_minibatches()
        if self.shuffle == "transitions" and self.is_recurrent:
            raise FieldError(
                "shuffle",
                "be 'environments' with a GRU, which needs whole sequences in time",
                "'transitions'",
            )

    def _check_minibatches(self) -> None:
        among = self.num_envs if self.shuffle == "environments" else self.steps_per_update
        if among % self.num_minibatches == 0:
            return
        advice, all_steps = "", self.steps_per_update
        if not self.is_recurrent and all_steps % self.num_minibatches == 0:
            advice = f"shuffle='transitions' divides its {all_steps} transitions instead"
        raise FieldError(
            "num_minibatches",
            f"divide the {among} {self.shuffle} of an iteration",
            self.num_minibatches,
            advice=advice,
        )

    def check_devices(self, num_devices: int) -> None:
        """See `AgentConfig`."""
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
    """The fields that all off-policy algorithms add to `AgentConfig`.

    `learning_rate` is that of the policy, and of the critics and the temperature as well where they
    have none of their own.

    Attributes:
      critic_learning_rate: Learning rate of the critics, > 0; None for `learning_rate`.
      temperature_learning_rate: Learning rate of a learned temperature, > 0; None for
        `learning_rate`.
      reward_scale: Factor on the rewards in the targets of the critics, > 0. The replay and
        `episode/return` keep the rewards as they are. A larger scale weighs the entropy less, as a
        temperature divided by it would.
      gradient_steps: Gradient steps after each step of the environments, >= 1. Divided by
        `num_envs` it is the ratio of updates to data. Static.
      batch_size: Transitions in a minibatch, >= 1; static.
      buffer_size: Transitions that the replay holds for all environments together; static.
      learning_starts: Steps of all environments together with random actions before the first
        gradient step, >= 0, rounded up to whole iterations. They count towards `total_steps`.
        Static.
      target_rate: Rate tau of the moving averages that make the target critics, in (0, 1].
      temperature: Weight lambda of the entropy, >= 0; the first one, > 0, if it is learned.
      learn_temperature: Whether the temperature is learned so that the policy reaches the target
        entropy; static.
      target_entropy: Target entropy in nats; None means minus the number of action dimensions, or
        0.98 log A for A discrete actions.
      temperature_form: The `form` of `trustjax.losses.temperature_loss`, "exponential" or "log";
        static.
      actor_critic: Critic that the policy maximises, the "smallest" of the two or the "first";
        static.
      explore: Actions in training, a "sample" of the policy or its "mode"; static.
      log_std_range: Lowest and highest logarithm of the standard deviation of continuous actions,
        before tanh. With the -20 of the paper's code the KL to an old policy can grow without
        useful bound. Static.
    """

    num_envs: int = static(1)
    num_steps: int = static(64)
    hidden: tuple[int, ...] = static((256, 256))
    activation: str = static("relu")
    orthogonal: bool = static(False)
    optimizer: MakeOptimizer = static(functools.partial(adam, eps=1e-8))
    max_grad_norm: ArrayLike | None = None
    critic_learning_rate: ArrayLike | None = None
    temperature_learning_rate: ArrayLike | None = None
    reward_scale: ArrayLike = 1.0
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
        """Number of iterations with random actions, which `init` takes."""
        return -(-self.learning_starts // self.steps_per_update)

    @property
    def num_groups(self) -> int:
        """Number of groups of environments, which give equally many transitions to a minibatch."""
        return math.gcd(self.num_envs, self.batch_size)

    @property
    def target_entropy_or_default(self) -> ArrayLike:
        """The target entropy in nats, with the default of the environment for None."""
        if self.target_entropy is not None:
            return self.target_entropy
        env = self.environment
        if env.num_actions is not None:
            return 0.98 * math.log(np.sum(env.num_actions))
        return -float(0 if env.action_low is None else len(env.action_low))

    @property
    def buffer_length(self) -> int:
        """Number of transitions that the replay holds for each environment."""
        return min(self.buffer_size, self.total_steps) // self.num_envs

    def validate(self) -> None:
        """Raises ValueError, which names the field, before anything is compiled."""
        super().validate()
        for name in ("gradient_steps", "batch_size"):
            check_number(name, getattr(self, name), at_least=1)
        check_number("learning_starts", self.learning_starts, at_least=0)
        for name in ("critic_learning_rate", "temperature_learning_rate", "reward_scale"):
            check_number(name, getattr(self, name), above=0.0)
        check_number("target_rate", self.target_rate, above=0.0, at_most=1.0)
        check_number("temperature", self.temperature, at_least=0.0)
        if self.learn_temperature:
            check_number("temperature", self.temperature, above=0.0)
        else:
            for name in ("temperature_learning_rate", "target_entropy"):
                if getattr(self, name) is not None:
                    must = "be None where the temperature is fixed"
                    raise FieldError(name, must, getattr(self, name))
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
                "exceed learning_starts by at least one iteration, and so be at least "
                f"{(self.first_update + 1) * self.steps_per_update}",
                self.total_steps,
            )
        env = self.environment
        if np.ndim(env.num_actions or 0):
            raise FieldError(
                "env", "have one discrete action or continuous ones off-policy", env.num_actions,
                advice="PPO, TRPO and on-policy MDPO take several discrete actions at once",
            )  # fmt: skip
        bounds = [bound for bound in (env.action_low, env.action_high) if bound is not None]
        if not all(np.all(np.isfinite(bound)) for bound in bounds):
            raise FieldError("env", "have bounded actions", env)

    def check_devices(self, num_devices: int) -> None:
        """See `AgentConfig`."""
        super().check_devices(num_devices)
        if self.num_groups % num_devices:
            raise FieldError(
                "batch_size", f"be a multiple of {num_devices} devices", self.batch_size
            )


def check_whole_batch(config: OnPolicyConfig) -> None:
    """Raises ValueError if advantages are normalised per minibatch, which the policy lacks."""
    if config.normalize_advantages == "minibatch":
        raise FieldError(
            "normalize_advantages",
            "be 'batch' or 'none' where the policy learns from the whole batch",
            "'minibatch'",
        )
