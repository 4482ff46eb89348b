r"""ADPO: cross-entropy over a group of candidates, on log-ratios to an anchor policy.

A prompt has candidates :math:`y_1, \dots, y_P`. With their log-probabilities :math:`\ell` under the
policy and :math:`\ell^{ref}` under the anchor, a target distribution q over the group and a
temperature :math:`\tau`:

.. math::
    u_i &= (\ell_i - \ell^{ref}_i) / \tau, \qquad \tilde p = \mathrm{softmax}(u) \\
    L &= -\sum_i q_i \log \tilde p_i, \qquad
    \partial L / \partial \ell_i = (\tilde p_i - q_i) / \tau

The minimum over the group is :math:`\pi^* \propto \pi_{ref} \, q^\tau`: a larger temperature makes
the first step from the anchor smaller, by 1 / tau, but moves the optimum further away from it. The
Hessian is :math:`(\mathrm{diag}(\tilde p) - \tilde p \tilde p^T) / \tau^2`, the Fisher metric of
the softmax times 1 / tau^2.

Wang, arXiv:2510.18913. What differs from it is in `docs/methods/preference.md`. Other losses are
special cases, of which the first three need the group to be the whole set of actions:

    supervised          q one-hot, uniform anchor, tau = 1
    distillation        q = softmax(teacher / T), uniform anchor, tau = T
    maximum entropy     q = softmax(Q / alpha), uniform anchor, tau = 1
    DPO, cDPO           two candidates, q = (1, 0) or (1 - eps, eps), tau = 1 / beta

The targets and adaptive temperatures are in `anchored_targets`, anchors as states in `anchor`, and
losses of rankings in `ranking`. The last axis of all arrays is the group, which must be whole on
one device: `jax.shard_map` may split the batch, but not the group.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from trustjax._checks import check_choice, check_number
from trustjax._dtypes import reduction_dtype
from trustjax.geometry import kl_divergence
from trustjax.losses._candidates import candidates, masked_log_softmax, per_group
from trustjax.losses._ratio import log_ratio, times
from trustjax.losses._shapes import same_shape
from trustjax.losses.anchored_targets import bradley_terry_targets as bradley_terry_targets
from trustjax.losses.anchored_targets import hard_targets as hard_targets
from trustjax.losses.anchored_targets import kde_targets as kde_targets
from trustjax.losses.anchored_targets import reward_targets as reward_targets
from trustjax.losses.ranking import pl_dpo_loss as pl_dpo_loss
from trustjax.losses.ranking import plackett_luce_loss as plackett_luce_loss
from trustjax.trust import trust_metrics


def adpo_loss(
    logits: jax.Array,
    anchor_logits: jax.Array,
    target: jax.Array,
    *,
    temperature: jax.typing.ArrayLike,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy of a target with the softmax of anchored log-ratios, over each group.

    .. math:: -\sum_i q_i \log \mathrm{softmax}\left((\ell - \ell^{ref}) / \tau\right)_i

    Minus the entropy of q, this is :math:`KL(q \| \tilde p) \ge 0`, which `adpo_metrics` reports.
    Where policy and anchor agree, the loss is log P, with gradient (1 / P - q) / tau, not 0.

    Args:
      logits: Log-probabilities of the candidates under the policy that is trained, float [..., P].
        A constant may be added to each group. For sequences take `sequence_log_ratios`, with an
        anchor of zeros.
      anchor_logits: Those under the anchor, same shape; a constant for gradients.
      target: Probabilities q of the candidates, same shape; a constant for gradients. They are not
        normalised again, so weights that sum to w give w times the loss.
      temperature: tau, > 0, a number or one per group, [...] or [..., 1]; a constant for gradients.
        The paper has 0.8.
      where: Candidates to include, bool, broadcastable to [..., P]. The others have no gradient,
        whatever their numbers.

    Returns:
      Loss per group in nats, [...], float32 at least; 0, with gradient 0, for a group without
      candidates, which the mean over groups should leave out. A candidate that policy and anchor
      both exclude has a log-ratio of 0; where only the anchor excludes one, the loss is NaN.

    Raises:
      ValueError: The shapes differ, there are no candidates, groups are split over devices, or
        `temperature` is not > 0.

    Source: arXiv:2510.18913, Eq. 1 and 2.

    >>> import jax.numpy as jnp
    >>> policy, anchor = jnp.log(jnp.array([0.4, 0.6])), jnp.log(jnp.array([0.5, 0.5]))
    >>> print(adpo_loss(policy, anchor, jnp.array([1.0, 0.0]), temperature=1.0).round(4))
    0.9163
    """
    anchor_logits, target = jax.lax.stop_gradient((anchor_logits, target))
    kept, logits, anchor_logits, target = candidates(
        where, logits=logits, anchor_logits=anchor_logits, target=target
    )
    scores = _anchored_scores(logits, anchor_logits, temperature)
    return -jnp.sum(times(target, masked_log_softmax(scores, kept)), -1)


def adpo_pairwise_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    temperature: jax.typing.ArrayLike,
    target: jax.typing.ArrayLike = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""ADPO on pairs: `adpo_loss` of two candidates.

    .. math:: -s \log\sigma(D / \tau) - (1 - s) \log\sigma(-D / \tau), \qquad
              D = (\ell_w - \ell^{ref}_w) - (\ell_l - \ell^{ref}_l)

    With s = 1 and tau = 1 / beta this is DPO, and with s = 1 - eps it is cDPO.

    Args:
      policy_chosen: Log-probabilities of the preferred responses under the policy, float [...].
      policy_rejected: Those of the other responses, same shape.
      reference_chosen, reference_rejected: The same under the anchor; constants for gradients.
      temperature: tau, > 0, a number or one per pair; a constant for gradients.
      target: Probability s that the preferred response is better, in [0, 1], a number or one per
        pair, such as `bradley_terry_targets`; a constant for gradients.
      where: Pairs to include, bool, broadcastable to [...]. The others are 0, with gradient 0.

    Returns:
      Loss per pair in nats, [...], float32 at least.

    Raises:
      ValueError: The shapes differ, or `temperature` or `target` is out of range.

    Source: arXiv:2510.18913; DPO: Rafailov et al., arXiv:2305.18290, Eq. 7.
    """
    check_number("target", target, at_least=0.0, at_most=1.0)
    same_shape(
        policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    dtype = reduction_dtype((policy_chosen, policy_rejected, reference_chosen, reference_rejected))

    def pair(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return jnp.stack([jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype)], -1)

    logits = pair(policy_chosen, policy_rejected)
    better = jnp.broadcast_to(jnp.asarray(target).astype(dtype), logits.shape[:-1])
    return adpo_loss(
        logits,
        pair(reference_chosen, reference_rejected),
        pair(better, 1 - better),
        temperature=temperature,
        where=None if where is None else jnp.asarray(where)[..., None],
    )


def adpo_optimum(
    anchor_logits: jax.Array,
    target: jax.Array,
    *,
    temperature: jax.typing.ArrayLike,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The distribution over the group at which `adpo_loss` is least.

    .. math:: \log \pi^*, \qquad \pi^* \propto \pi_{ref} \, q^\tau

    Args:
      anchor_logits, target, temperature, where: As in `adpo_loss`.

    Returns:
      Log-probabilities [..., P] in float32 at least, constants for gradients; -inf for candidates
      that are not included.

    Raises:
      ValueError: As `adpo_loss`.

    Source: arXiv:2510.18913, Proposition 3.1.
    """
    kept, anchor_logits, target = candidates(where, anchor_logits=anchor_logits, target=target)
    moved = _optimal_logits(anchor_logits, target, temperature)
    log_probs = masked_log_softmax(moved, kept)
    return jax.lax.stop_gradient(jnp.where(kept, log_probs, jnp.full_like(log_probs, -jnp.inf)))


def adpo_metrics(
    logits: jax.Array,
    anchor_logits: jax.Array,
    target: jax.Array,
    *,
    temperature: jax.typing.ArrayLike,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""How far the policy is from the anchor, and how far the optimum of `adpo_loss` is.

    All distributions are those within the group, :math:`\pi = \mathrm{softmax}(\ell)`:

        trust/distance   KL(pi || pi_ref)
        trust/radius     KL(pi* || pi_ref), with pi* of `adpo_optimum`
        trust/used       distance / radius
        adpo/target_kl   KL(q || softmax(u)): the loss minus the entropy of q, 0 at the optimum

    Args:
      logits, anchor_logits, target, temperature, where: As in `adpo_loss`; all are constants for
        gradients.

    Returns:
      Metrics in nats, each [...] in float32 at least, 0 for a group without candidates. Take the
      means over groups, then `trustjax.trust.means_of_trust`.

    Raises:
      ValueError: As `adpo_loss`.
    """
    logits, anchor_logits, target = jax.lax.stop_gradient((logits, anchor_logits, target))
    kept, logits, anchor_logits, target = candidates(
        where, logits=logits, anchor_logits=anchor_logits, target=target
    )
    optimum = _optimal_logits(anchor_logits, target, temperature)
    scores = _anchored_scores(logits, anchor_logits, temperature)
    return {
        **trust_metrics(
            radius=kl_divergence(optimum, anchor_logits, where=kept),
            distance=kl_divergence(logits, anchor_logits, where=kept),
        ),
        "adpo/target_kl": kl_divergence(jnp.log(target), scores, where=kept),
    }


def sequence_log_ratios(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    mask: jax.Array,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> jax.Array:
    r"""Log-ratios of whole responses from those of their tokens.

    .. math:: \frac{1}{T} \sum_t \left(\log\pi(y_t) - \log\pi_{ref}(y_t)\right),
              \quad \text{or the sum}

    The difference is taken per token, where it has more digits than that of two long sums. Reshaped
    to [prompts, P], the result is the `logits` of `adpo_loss`, with an anchor of zeros.

    Args:
      log_probs: Log-probabilities of the tokens under the policy, float [batch, time].
      reference_log_probs: Those under the anchor, same shape; a constant for gradients.
      mask: Tokens of the response, bool, same shape.
      reduction: "mean" over the tokens, as the paper assumes, or "sum", as the code released with
        it. A sum makes the scale of the log-ratios grow with the length.

    Returns:
      Log-ratios [batch] in float32 at least; 0, with gradient 0, for a row without tokens.

    Raises:
      ValueError: The shapes differ, or `reduction` is unknown.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    same_shape(log_probs, reference_log_probs=reference_log_probs, mask=mask)
    dtype = reduction_dtype((log_probs, reference_log_probs))
    mask = jnp.asarray(mask).astype(bool)
    policy, reference = (
        jnp.where(mask, jnp.asarray(x).astype(dtype), jnp.zeros(mask.shape, dtype))
        for x in (log_probs, jax.lax.stop_gradient(reference_log_probs))
    )
    total = jnp.sum(log_ratio(policy, reference), -1)
    if reduction == "sum":
        return total
    return total / jnp.sum(mask, -1).clip(1).astype(dtype)


def _anchored_scores(
    logits: jax.Array, anchor_logits: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """The log-ratios over the temperature, u of Eq. 1."""
    return log_ratio(logits, anchor_logits) / per_group("temperature", temperature, logits)


def _optimal_logits(
    anchor_logits: jax.Array, target: jax.Array, temperature: jax.typing.ArrayLike
) -> jax.Array:
    """log(pi_ref q^tau) of Proposition 3.1, up to a constant."""
    return anchor_logits + per_group("temperature", temperature, target) * jnp.log(target)
