"""How a student policy learns from a teacher: plain distillation, and ADPO with four anchors.

Actions are those before the tanh where there is one, so that teacher and student are Gaussians, and
every candidate action u has densities pi_T(u) and pi_S(u). With q the teacher's distribution over
the candidates of a state, the optimum of ADPO on the group is (arXiv:2510.18913, Proposition 3.1)

    pi_S on the group is proportional to pi_anchor q^tau,

which for Gaussians adds precisions: an anchor of deviation s_A and a teacher of deviation s_T, with
q proportional to pi_T, lead to 1 / s^2 = 1 / s_A^2 + tau / s_T^2. A uniform anchor with tau = 1
gives back the teacher, exactly; so does the teacher as the anchor of a uniform target. The teacher
as anchor and target at once gives a student that is too sharp, s = s_T / sqrt(1 + tau), and an
anchor that follows the student sharpens it without end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_number
from trustjax.distributions import DiagonalGaussian
from trustjax.losses import Anchor, adpo_loss, adpo_metrics, fixed_anchor


class Seen(NamedTuple):
    """What a student's loss sees of a batch of states.

    Attributes:
      student: The student's policy at the states, of d actions, [states].
      teacher: The teacher's.
      anchor: The policy of the anchor's weights.
      candidates: Candidate actions of every state, float32 [states, P, d].
    """

    student: DiagonalGaussian
    teacher: DiagonalGaussian
    anchor: DiagonalGaussian
    candidates: jax.Array


class Student(Protocol):
    """A loss of students.

    Attributes:
      anchor: How the weights of the anchor move.
    """

    @property
    def anchor(self) -> Anchor:
        """How the weights of the anchor move; a fixed one if the loss reads none."""

    def __call__(self, seen: Seen) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss [] and metrics [] of a batch."""


def log_densities(policy: DiagonalGaussian, candidates: jax.Array) -> jax.Array:
    """Log-densities [states, P] of candidates [states, P, d] under a policy at the states."""
    mean, log_std = (jnp.broadcast_to(x[:, None], candidates.shape) for x in policy)
    return DiagonalGaussian(mean, log_std).log_prob(candidates)


@dataclass(frozen=True)
class Plain:
    """Plain distillation: the divergence of the two Gaussians, in closed form.

    Attributes:
      direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
    """

    direction: str = "forward"

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("forward", "reverse"))

    @property
    def anchor(self) -> Anchor:
        """It is not read."""
        return fixed_anchor()

    def __call__(self, seen: Seen) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean divergence."""
        pair = (seen.teacher, seen.student)
        first, second = pair if self.direction == "forward" else pair[::-1]
        return jnp.mean(first.kl_divergence(second)), {}


# The log-densities that a student is compared with, from those of the teacher and of the weights.
_REFERENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "uniform": lambda teacher, weights: jnp.zeros_like(teacher),
    "teacher": lambda teacher, weights: teacher,
    "weights": lambda teacher, weights: weights,
}
_TARGETS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "teacher": lambda teacher: jax.nn.softmax(teacher, -1),
    "uniform": lambda teacher: jnp.full_like(teacher, 1 / teacher.shape[-1]),
}


@dataclass(frozen=True)
class Anchored:
    """ADPO on the candidates of every state.

    Attributes:
      reference: The anchor: "uniform", "teacher", or "weights" for those that `anchor` moves.
      target: The distribution q over the candidates: "teacher", its densities normalised over the
        group, or "uniform".
      temperature: tau, > 0.
      anchor: How the weights of the anchor move, such as `trustjax.losses.ema_anchor()`; by default
        they stay the student's first ones. Only the reference "weights" reads them.
    """

    reference: str
    target: str = "teacher"
    temperature: float = 1.0
    anchor: Anchor = fixed_anchor()  # noqa: RUF009  # a pair of pure functions

    def __post_init__(self) -> None:
        check_choice("reference", self.reference, _REFERENCES)
        check_choice("target", self.target, _TARGETS)
        check_number("temperature", self.temperature, above=0.0)
        if self.anchor is not Anchored.anchor and self.reference != "weights":
            must = f"be left out with the reference {self.reference!r}"
            raise FieldError("anchor", must, "an anchor")

    def __call__(self, seen: Seen) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss, and the means of `adpo_metrics`."""
        student, teacher, weights = (
            log_densities(policy, seen.candidates)
            for policy in (seen.student, seen.teacher, seen.anchor)
        )
        group = (
            student,
            _REFERENCES[self.reference](teacher, weights),
            _TARGETS[self.target](teacher),
        )
        losses = adpo_loss(*group, temperature=self.temperature)
        metrics = adpo_metrics(*group, temperature=self.temperature)
        return jnp.mean(losses), {name: jnp.mean(value) for name, value in metrics.items()}


def ndcg(scores: jax.Array, gains: jax.Array) -> jax.Array:
    r"""Normalised discounted cumulative gain of rankings, [...].

    .. math:: \frac{\sum_k g_{(k)} / \log_2(k + 1)}{\sum_k g_{[k]} / \log_2(k + 1)}

    with the gains in the order of the scores above, in their own order below.

    Args:
      scores: Scores [..., P], the highest first in the ranking.
      gains: Gains [..., P], >= 0, not all 0.
    """
    discount = 1 / jnp.log2(jnp.arange(gains.shape[-1]) + 2.0)
    ranked = jnp.take_along_axis(gains, jnp.argsort(-scores, -1), -1)
    ideal = -jnp.sort(-gains, -1)
    return jnp.sum(ranked * discount, -1) / jnp.sum(ideal * discount, -1)
