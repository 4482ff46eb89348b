r"""Losses of language policies that learn from preferences, to be minimised.

A pair is an answer y_w that was chosen and an answer y_l that was rejected for the same prompt.
With log pi(y | x) the sum over the tokens of the answer, the losses of DPO's family see

    a_w = log pi(y_w | x) - log pi_ref(y_w | x),    a_l likewise,    D = a_w - a_l.

They keep the policy near the reference pi_ref: a larger beta keeps it nearer. The variants of DPO
are in `dpo`, the losses without a reference in `reference_free`, those of answers that a rule sorts
into levels in `trpa`. This file adds DPO with a likelihood (`cr_dpo_loss`) and single
answers that are labelled good or bad (`kto_loss`); all of them can be imported from here.

Every loss returns one value per pair or example, in float32 at least; the caller takes the mean.
Log-probabilities of the reference and labels are constants for gradients. Rows that `where`
excludes have neither value nor gradient, whatever they hold; the mean of the others is
`jnp.mean(losses, where=where)`.

No finite argument gives NaN. Exponentials of log-ratios are clipped where their square would
overflow (e^39 in float32) and keep the gradient that they have there, so that a policy that went
too far is driven back.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._sharding import AxisName, summed
from trustjax.losses._pairs import rows
from trustjax.losses.dpo import dpo_loss as dpo_loss
from trustjax.losses.reference_free import alphapo_loss as alphapo_loss
from trustjax.losses.reference_free import cpo_loss as cpo_loss
from trustjax.losses.reference_free import nll_loss as nll_loss
from trustjax.losses.reference_free import orpo_loss as orpo_loss
from trustjax.losses.reference_free import simpo_loss as simpo_loss
from trustjax.losses.trpa import pairs_from_levels as pairs_from_levels
from trustjax.losses.trpa import preference_levels as preference_levels
from trustjax.losses.trpa import trpa_loss as trpa_loss
from trustjax.losses.trpa import trpa_metrics as trpa_metrics
from trustjax.losses.trpa import trpa_trust_region as trpa_trust_region


def cr_dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    chosen_lengths: jax.Array,
    *,
    beta: jax.typing.ArrayLike,
    rpo_alpha: jax.typing.ArrayLike = 1.0,
    weighted: str = "nll",
    nll_reduction: str = "batch_token",
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""DPO with the negative log-likelihood of the chosen answers: RPO, which CR-DPO trains with.

    .. math:: L_{DPO} + \alpha L_{NLL} \quad\text{or}\quad \alpha L_{DPO} + L_{NLL}

    CR-DPO is new in its pairs, not in its loss. Its code pins TRL 0.9.6, which multiplies the
    preference; later versions multiply the likelihood. Both agree at alpha = 1.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: As in `dpo_loss`.
      chosen_lengths: Numbers of tokens of the chosen answers, [...].
      rpo_alpha: Weight alpha, >= 0.
      weighted: The term that alpha multiplies: "nll" (TRL since 0.10) or "preference" (0.9.6).
      nll_reduction, where, axis_name: As in `nll_loss`.

    Returns:
      Losses [...] in float32 at least, whose mean is the loss.

    Raises:
      ValueError: As `dpo_loss` and `nll_loss`, or `weighted` is unknown.

    Source: CR-DPO, Huang et al., arXiv:2410.14675; per sequence: iterative RPO, arXiv:2404.19733.
    """
    check_choice("weighted", weighted, ("nll", "preference"))
    check_scalar("rpo_alpha", rpo_alpha, at_least=0.0)
    preference = dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta, where=where
    )
    nll = nll_loss(
        policy_chosen, chosen_lengths, reduction=nll_reduction, where=where, axis_name=axis_name
    )
    alpha = jnp.asarray(rpo_alpha, nll.dtype)
    return preference + alpha * nll if weighted == "nll" else alpha * preference + nll


def kto_loss(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    policy_kl: jax.Array | None = None,
    reference_kl: jax.Array | None = None,
    *,
    beta: jax.typing.ArrayLike = 0.1,
    desirable_weight: jax.typing.ArrayLike = 1.0,
    undesirable_weight: jax.typing.ArrayLike = 1.0,
    variant: str = "kto",
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Kahneman-Tversky optimisation: single answers that are good or bad, without pairs.

    .. math::
        z &= \max\left(0, \mathrm{mean}(\log\pi(y' | x) - \log\pi_{ref}(y' | x))\right) \\
        \text{good:}\quad & w_D \left(1 - \sigma(\beta (a - z))\right), \qquad
        \text{bad:}\quad w_U \left(1 - \sigma(\beta (z - a))\right)

    y' is the answer of another example of the batch, such as the next one; z estimates the KL from
    the reference and is a constant for gradients.

    Args:
      policy: log pi(y | x), summed over the tokens of the answer, float [...].
      reference: log pi_ref(y | x), same shape; a constant for gradients.
      desirable: Whether the answer is good, bool, same shape.
      policy_kl: log pi(y' | x) of the mismatched answers, same shape; a constant for gradients.
      reference_kl: log pi_ref(y' | x), same shape; a constant for gradients.
      beta: Weight beta of the reference, > 0.
      desirable_weight: Weight w_D of good answers, >= 0; the paper keeps w_D n_D : w_U n_U between
        1:1 and 4:3, where n are the numbers of examples.
      undesirable_weight: Weight w_U of bad answers, >= 0.
      variant: "kto", or "apo_zero_unpaired" with z = 0, which takes no mismatched answers.
      where: Examples to include, in z too, bool, same shape.
      axis_name: Axes of the mesh over which the examples are split: z is the mean over all devices.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, a number is out of range, the mismatched answers are missing or
        not read, or the batch has a single example, whose y' would be its own answer.

    Source: Ethayarajh et al., arXiv:2402.01306, Eq. 7; the estimate of z is that of the authors'
    code and TRL; APO, arXiv:2408.06266, Eq. 7.
    """
    check_choice("variant", variant, ("kto", "apo_zero_unpaired"))
    check_scalar("beta", beta, above=0.0)
    check_scalar("desirable_weight", desirable_weight, at_least=0.0)
    check_scalar("undesirable_weight", undesirable_weight, at_least=0.0)
    included, (log_prob, log_ref, *kl) = rows(
        where, policy=policy, reference=reference, **_mismatched(variant, policy_kl, reference_kl)
    )
    log_ratio = log_prob - jax.lax.stop_gradient(log_ref)
    z = jnp.zeros([], log_ratio.dtype)
    if kl:
        count = summed(jnp.sum(included.astype(log_ratio.dtype)), axis_name)
        mean = summed(jnp.sum(kl[0] - kl[1]), axis_name) / jnp.maximum(count, 1)
        z = jax.lax.stop_gradient(jnp.maximum(mean, 0))
        if axis_name is None and log_ratio.size == 1:
            raise FieldError("policy", "have at least two examples", "one")
    elif axis_name is not None:
        raise FieldError("axis_name", "be left out", axis_name, advice="no mean is taken")
    good = rows(None, policy=policy, desirable=desirable)[1][1] != 0
    beta, better, worse = (
        jnp.asarray(x, z.dtype) for x in (beta, desirable_weight, undesirable_weight)
    )
    x = beta * (log_ratio - z)
    losses = jnp.where(good, better * jax.nn.sigmoid(-x), worse * jax.nn.sigmoid(x))
    return jnp.where(included, losses, jnp.zeros_like(losses))


def _mismatched(
    variant: str, policy_kl: jax.Array | None, reference_kl: jax.Array | None
) -> dict[str, jax.Array]:
    """The mismatched answers by name, empty if the variant takes none."""
    given = {"policy_kl": policy_kl, "reference_kl": reference_kl}
    for name, array in given.items():
        if variant == "kto" and array is None:
            raise FieldError(name, "be given for variant 'kto'", array)
        if variant != "kto" and array is not None:
            raise FieldError(name, f"be left out for variant {variant!r}", "an array")
    return {name: array for name, array in given.items() if array is not None}


def preference_metrics(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: jax.typing.ArrayLike,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, jax.Array]:
    r"""The implicit rewards beta a of the pairs, which are the figures to watch in training.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected: As in `dpo_loss`.
      beta: Weight beta of the reference, > 0.
      where: Pairs to include, bool, the shape of the first argument.
      axis_name: Axes of the mesh over which the pairs are split.

    Returns:
      Means over the pairs, [] each: "rewards/chosen", "rewards/rejected", "rewards/margins", and
      "rewards/accuracies", the share of pairs whose chosen answer has the higher reward.

    Raises:
      ValueError: The shapes differ, or `beta` is not > 0.

    Source: the names are those of TRL.
    """
    check_scalar("beta", beta, above=0.0)
    included, (policy_w, policy_l, reference_w, reference_l) = rows(
        where,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    factor = jnp.asarray(beta, policy_w.dtype)
    chosen, rejected = factor * (policy_w - reference_w), factor * (policy_l - reference_l)
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "margins": chosen - rejected,
        "accuracies": ((chosen > rejected) & included).astype(chosen.dtype),
    }
    count = jnp.maximum(summed(jnp.sum(included.astype(chosen.dtype)), axis_name), 1)
    return {f"rewards/{k}": summed(jnp.sum(x), axis_name) / count for k, x in values.items()}
