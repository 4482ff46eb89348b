"""What a language policy learns from its groups, by the losses of `trustjax.losses`.

An objective has two methods. `advantages` sees all groups of an update, once, before they are
shared out to minibatches; `loss` sees a minibatch of whole groups at every step. Every loss of
`trustjax.losses.group` and `group_variants` fits `PolicyGradient`, whatever its further arguments:

    PolicyGradient(dapo_loss)
    PolicyGradient(functools.partial(grpo_loss, beta=0.04), needs_reference=True)
    PolicyGradient(dr_grpo_loss, functools.partial(group_relative, scale="none"))
    PolicyGradient(rloo_loss, leave_one_out)
    PolicyGradient(functools.partial(cispo_loss, clip_high=19.0),
                   weights=functools.partial(divergence_mask, radius=0.15))       DPPO
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_number
from trustjax.agents.algorithm import Metrics
from trustjax.agents.language.answers import Answers, rows
from trustjax.losses import (
    dpo_loss,
    group_relative,
    grpo_loss,
    trpa_loss,
    trust_grpo_advantages,
    trust_weight,
)

_DPO = functools.partial(dpo_loss, beta=0.1)


class Objective(Protocol):
    """What a language policy learns from.

    Attributes:
      needs_reference: Whether `loss` reads `Answers.reference_log_probs`.
      radius: The KL per token to the old policy that counts as allowed in `trust/radius`, unless
        the agent has a target for it.

    An objective that can learn nothing from one answer to a prompt also has `smallest_group`, the
    fewest answers that it takes.
    """

    @property
    def needs_reference(self) -> bool: ...  # noqa: D102
    @property
    def radius(self) -> float: ...  # noqa: D102

    def advantages(self, answers: Answers) -> jax.Array:
        """Advantages [prompts, n] of all groups of an update, constants for gradients."""

    def loss(self, log_probs: jax.Array, answers: Answers) -> jax.Array:
        """The loss [] of whole groups, from log pi of their tokens [prompts, n, time]."""

    def clip_bounds(self) -> tuple[float, float] | None:
        """By how much the ratio may fall below and rise above 1; None where nothing is clipped."""

    def metrics(self, answers: Answers) -> Metrics:
        """What the objective alone knows of the answers of an iteration, numbers [] by name."""


@dataclass(frozen=True)
class PolicyGradient:
    """A loss of the GRPO family on advantages of groups.

    Attributes:
      loss_fn: A loss of `trustjax.losses`: `loss_fn(log_probs, old_log_probs, advantages, mask)`,
        which takes `weights` and `reference_log_probs` if the fields below ask for them.
      advantage: Function of rewards [prompts, n] that returns advantages of the same shape.
      weights: Function `weights(log_probs, old_log_probs, advantages, mask)` of the masks and
        weights that the loss takes; None for none.
      penalty: Function of the lengths of answers that is added to their rewards, such as
        `soft_overlong_penalty`; None for none.
      needs_reference: Whether the loss gets the log-probabilities of the reference.
      radius: KL per token to the old policy that counts as allowed, > 0.
    """

    loss_fn: Callable[..., jax.Array] = grpo_loss
    advantage: Callable[[jax.Array], jax.Array] = group_relative
    weights: Callable[..., jax.Array] | None = None
    penalty: Callable[[jax.Array], jax.Array] | None = None
    needs_reference: bool = False
    radius: float = 0.2

    def __post_init__(self) -> None:
        """Checks the radius, and that the loss takes what it is to be given."""
        check_number("radius", self.radius, above=0.0)
        takes = inspect.signature(self.loss_fn).parameters
        given = {"weights": self.weights is not None, "reference_log_probs": self.needs_reference}
        for name in (name for name, is_given in given.items() if is_given and name not in takes):
            raise FieldError("loss_fn", f"take {name}", getattr(self.loss_fn, "__name__", "not"))

    @property
    def smallest_group(self) -> int:
        """2 where one answer alone has no advantage, as answers to a prompt are compared; or 1."""
        with jax.ensure_compile_time_eval():
            return 1 if bool(jnp.any(self.advantage(jnp.array([[0.0], [1.0]])))) else 2

    def rewards(self, answers: Answers) -> jax.Array:
        """The rewards that advantages are computed from, [prompts, n]."""
        if self.penalty is None:
            return answers.rewards
        return answers.rewards + self.penalty(jnp.sum(answers.mask, -1))

    def advantages(self, answers: Answers) -> jax.Array:
        """See `Objective`."""
        return self.advantage(self.rewards(answers))

    def loss(self, log_probs: jax.Array, answers: Answers) -> jax.Array:
        """See `Objective`."""
        arguments = (
            rows(log_probs), rows(answers.old_log_probs), rows(answers.advantages),
            rows(answers.mask),
        )  # fmt: skip
        options: dict[str, Any] = {}
        if self.weights is not None:
            options["weights"] = self.weights(*arguments)
        if self.needs_reference:
            options["reference_log_probs"] = rows(answers.reference_log_probs)
        return self.loss_fn(*arguments, **options)

    def clip_bounds(self) -> tuple[float, float] | None:
        """The `clip` and `clip_high` of the loss; those of GSPO are for the ratio of an answer."""
        takes = inspect.signature(self.loss_fn).parameters
        if "clip" not in takes or takes["clip"].default is None:
            return None
        low = takes["clip"].default
        high = takes["clip_high"].default
        return low, low if high is None else high

    def metrics(self, answers: Answers) -> Metrics:
        """Nothing beyond what all objectives have."""
        del answers
        return {}


@dataclass(frozen=True)
class TrustGRPO(PolicyGradient):
    """Trust-GRPO: outcomes of 0 or 1, with thinking rewards that are trusted and fade out.

    An answer of level 1 has the outcome 1, and all others 0. `advantage` and `penalty` are not
    read, and must be left out.

    Attributes:
      shaped: `trust_grpo_advantages`, with its options; its steps are the share of the training.
    """

    shaped: Callable[..., jax.Array] = trust_grpo_advantages

    def __post_init__(self) -> None:
        """Refuses what would not be read."""
        super().__post_init__()
        must = "be left out, as `shaped` makes the advantages from outcomes"
        if self.advantage is not group_relative:
            raise FieldError("advantage", must, self.advantage)
        if self.penalty is not None:
            raise FieldError("penalty", must, self.penalty)

    @property
    def smallest_group(self) -> int:
        """2, as a reward is compared with those of the other answers."""
        return 2

    def advantages(self, answers: Answers) -> jax.Array:
        """See `Objective`."""
        outcome = _outcomes(answers)
        return self.shaped(outcome, answers.thinking, step=answers.progress, total_steps=1.0)

    def metrics(self, answers: Answers) -> Metrics:
        """The mean of gamma over groups, and the share of groups where it is below 1."""
        takes = inspect.signature(self.shaped).parameters
        if {"form", "use_trust", "threshold"} - {*takes}:  # a function of one's own
            return {}
        used = takes["use_trust"].default and takes["form"].default == "paper"
        gamma = jnp.ones(len(answers.levels))  # that of the code is 1 for outcomes of 0 or 1
        if used:
            threshold = takes["threshold"].default
            gamma = trust_weight(_outcomes(answers), answers.thinking, threshold=threshold)
        return {"thinking/trust": jnp.mean(gamma), "thinking/distrusted": jnp.mean(gamma < 1)}


def _outcomes(answers: Answers) -> jax.Array:
    """1 for an answer of level 1, 0 for others, [prompts, n]."""
    return (answers.levels == 1).astype(jnp.float32)


@dataclass(frozen=True)
class _ComparesAnswers:
    """What `TRPA` and `OnlineDPO` share: no advantages, no clip, and a reference that is read.

    Attributes:
      loss_fn: The loss of pairs, with its options.
      radius: KL per token to the old policy that counts as allowed, > 0.
      needs_reference: Always.
    """

    loss_fn: Callable[..., jax.Array]
    radius: float = 0.2
    needs_reference: bool = True

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_number("radius", self.radius, above=0.0)
        if not self.needs_reference:
            must = f"be True, as {type(self).__name__} compares with it"
            raise FieldError("needs_reference", must, False)

    @property
    def smallest_group(self) -> int:
        """2, the answers of a pair."""
        return 2

    def advantages(self, answers: Answers) -> jax.Array:
        """Zeros: there are no advantages."""
        return jnp.zeros_like(answers.rewards)

    def clip_bounds(self) -> None:
        """None: there is no ratio."""
        return

    def metrics(self, answers: Answers) -> Metrics:
        """Nothing beyond what all objectives have."""
        del answers
        return {}


@dataclass(frozen=True)
class TRPA(_ComparesAnswers):
    """Trust-region preference approximation: all pairs of levels within a group.

    Attributes:
      loss_fn: `trpa_loss`, with its options.
      radius: KL per token to the old policy that counts as allowed, > 0.
      needs_reference: Always.
    """

    loss_fn: Callable[..., jax.Array] = trpa_loss

    def loss(self, log_probs: jax.Array, answers: Answers) -> jax.Array:
        """See `Objective`."""
        return self.loss_fn(
            rows(log_probs), rows(answers.old_log_probs), rows(answers.reference_log_probs),
            rows(answers.levels), answers.group_ids, rows(answers.mask),
        )  # fmt: skip


@dataclass(frozen=True)
class OnlineDPO(_ComparesAnswers):
    """Online DPO: one pair of each group, its best and its worst answer.

    Guo et al., Direct Language Model Alignment from Online AI Feedback, arXiv:2402.04792. A group
    of equal rewards has no pair. Of several answers with the same reward, the first is taken.

    Attributes:
      loss_fn: `dpo_loss`, with its options.
      radius: KL per token to the old policy that counts as allowed, > 0.
      needs_reference: Always.
    """

    loss_fn: Callable[..., jax.Array] = _DPO

    def loss(self, log_probs: jax.Array, answers: Answers) -> jax.Array:
        """See `Objective`."""
        rewards = answers.rewards
        chosen, rejected = jnp.argmax(rewards, -1), jnp.argmin(rewards, -1)

        def of(log_probs: jax.Array, place: jax.Array) -> jax.Array:
            sums = jnp.sum(jnp.where(answers.mask, log_probs, 0), -1)
            return jnp.take_along_axis(sums, place[:, None], -1)[:, 0]

        pairs = jnp.max(rewards, -1) > jnp.min(rewards, -1)
        losses = self.loss_fn(
            of(log_probs, chosen), of(log_probs, rejected),
            of(answers.reference_log_probs, chosen), of(answers.reference_log_probs, rejected),
            where=pairs,
        )  # fmt: skip
        return jnp.sum(losses) / jnp.maximum(jnp.sum(pairs), 1)
