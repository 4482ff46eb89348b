r"""Losses of rankings: the Plackett-Luce likelihood, and the DPO loss of a whole ranking.

A ranking draws the best candidate by a softmax over all of them, the second best by a softmax over
the rest, and so on. With scores u in the order from best to worst:

.. math:: -\log p(\mathrm{ranking}) = \sum_{k=1}^{P-1}
          \left[\log \sum_{j \ge k} e^{u_{(j)}} - u_{(k)}\right]

Its first term is `adpo_loss` with a one-hot target. Ties have no order. With rewards of 0 and 1,
where almost all positions of a ranking are arbitrary, take `adpo_loss` with `reward_targets`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_count, check_scalar
from trustjax.losses._candidates import candidates
from trustjax.losses._ratio import log_ratio
from trustjax.losses._shapes import check_shape


def ranking_of(rewards: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The candidates of each group from the highest reward to the lowest.

    Args:
      rewards: Rewards of the candidates, float [..., P].
      where: Candidates to include, bool, broadcastable to [..., P]; the others come last.

    Returns:
      Indices along the last axis, int32 [..., P]. Ties keep their order; NaN comes last.

    Raises:
      ValueError: There are no candidates, or groups are split over devices.

    >>> import jax.numpy as jnp
    >>> print(ranking_of(jnp.array([0.6, -0.2, 0.6, 0.9])))
    [3 0 2 1]
    """
    kept, rewards = candidates(where, rewards=rewards)
    falling = jnp.where(kept, -rewards, jnp.full_like(rewards, jnp.nan))
    return jnp.argsort(falling, -1, stable=True)


def plackett_luce_loss(
    scores: jax.Array,
    ranking: jax.Array,
    *,
    top_k: int | None = None,
    temperature: jax.typing.ArrayLike = 1.0,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    poly_epsilon: jax.typing.ArrayLike = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Negative log-likelihood of a ranking under the Plackett-Luce model (ListMLE).

    .. math::
        \ell_k &= Z_k - (1 - \epsilon) \frac{u_{(k)}}{T} - \epsilon \, \mathrm{mean}_{j \ge k}
                  \frac{u_{(j)}}{T}, \qquad Z_k = \log \sum_{j \ge k} e^{u_{(j)} / T} \\
        L &= \sum_k \ell_k + c \left(1 - e^{-\min(\ell_k, 20)}\right)

    The sum is over all positions but the last, which is certain. The defaults are the likelihood
    itself; the code released with ADPO (wk222/verlm) has a `top_k` of 3, a `label_smoothing` of
    0.1, a `poly_epsilon` of 1 and the mean over positions.

    Args:
      scores: Scores u, float [..., P]; for ADPO the log-ratios to the anchor over the temperature.
      ranking: The candidates from best to worst, int [..., P]: a permutation of 0 to P - 1, such as
        `ranking_of`. Candidates that `where` leaves out may stand anywhere.
      top_k: Number of positions that count, from the best one; None for all.
      temperature: T, > 0, a number.
      label_smoothing: Weight epsilon of the uniform distribution over the remaining candidates, in
        [0, 1].
      poly_epsilon: Weight c of the first polynomial term, >= 0.
      reduction: "sum" over the positions that count, or their "mean".
      where: Candidates to include, bool, broadcastable to [..., P]. The others have no gradient,
        whatever their scores.

    Returns:
      Loss per group [...] in float32 at least; 0, with gradient 0, for a group with fewer than two
      candidates.

    Raises:
      ValueError: The shapes differ, there are fewer than two candidates, `ranking` is no
        permutation, groups are split over devices, or an option is out of range.

    Source: Plackett (1975); Xia et al., Listwise approach to learning to rank (2008); PolyLoss:
    Leng et al., arXiv:2204.12511.

    >>> import jax.numpy as jnp
    >>> print(plackett_luce_loss(jnp.array([0.6, -0.2, 0.1, -0.9]), jnp.array([2, 0, 1, 3])))
    2.2412133
    """
    check_count("top_k", top_k, at_least=1)
    check_scalar("temperature", temperature, above=0.0)
    check_scalar("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    check_scalar("poly_epsilon", poly_epsilon, at_least=0.0)
    check_choice("reduction", reduction, ("sum", "mean"))
    _check_ranking(ranking, scores)
    kept, scores = candidates(where, at_least=2, scores=scores)
    smoothing, poly = (jnp.asarray(x, scores.dtype) for x in (label_smoothing, poly_epsilon))
    kept, ordered = (jnp.take_along_axis(x, jnp.asarray(ranking), -1) for x in (kept, scores))
    ordered = ordered / jnp.asarray(temperature, scores.dtype)

    zeros = jnp.zeros_like(ordered)
    lowest = jnp.full_like(ordered, float(np.finfo(ordered.dtype).min) / 2)
    # The logarithms of the sums of e^u over what is left at each position.
    remaining = jax.lax.cumlogsumexp(jnp.where(kept, ordered, lowest), ordered.ndim - 1, True)
    losses = remaining - ordered
    left = jax.lax.cumsum(kept.astype(ordered.dtype), ordered.ndim - 1, True)
    means = jax.lax.cumsum(ordered, ordered.ndim - 1, True) / jnp.maximum(left, 1)
    losses = losses + smoothing * (ordered - means)
    losses = losses + poly * -jnp.expm1(-jnp.minimum(losses, 20))

    positions = jnp.cumsum(kept, -1)
    counted = kept & (left > 1) & (positions <= (ordered.shape[-1] if top_k is None else top_k))
    total = jnp.sum(jnp.where(counted, losses, zeros), -1)
    if reduction == "sum":
        return total
    return total / jnp.sum(counted, -1).clip(1).astype(total.dtype)


def pl_dpo_loss(
    logits: jax.Array,
    reference_logits: jax.Array,
    ranking: jax.Array,
    *,
    beta: jax.typing.ArrayLike,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The DPO loss of a ranking of P responses; of two responses it is DPO.

    .. math:: -\sum_{k=1}^{P-1} \log \frac{e^{\beta a_{(k)}}}{\sum_{j \ge k} e^{\beta a_{(j)}}},
              \qquad a = \log\pi - \log\pi_{ref}

    Args:
      logits: Log-probabilities of the responses under the policy, summed over tokens, float
        [..., P].
      reference_logits: Those under the reference, same shape; a constant for gradients.
      ranking: The responses from best to worst, as in `plackett_luce_loss`.
      beta: Weight of the divergence from the reference, > 0, a number.
      where: Responses to include, as in `plackett_luce_loss`.

    Returns:
      Loss per group in nats, [...], float32 at least.

    Raises:
      ValueError: As `plackett_luce_loss`, or `beta` is not > 0.

    Source: Rafailov et al., arXiv:2305.18290, Appendix A.3.
    """
    check_scalar("beta", beta, above=0.0)
    reference_logits = jax.lax.stop_gradient(reference_logits)
    kept, logits, reference_logits = candidates(
        where, at_least=2, logits=logits, reference_logits=reference_logits
    )
    scores = log_ratio(logits, reference_logits) * jnp.asarray(beta, logits.dtype)
    return plackett_luce_loss(scores, ranking, where=kept)


def _check_ranking(ranking: jax.Array, scores: jax.Array) -> None:
    check_shape("ranking", ranking, scores)
    if not jnp.issubdtype(jnp.result_type(ranking), jnp.integer):
        raise FieldError("ranking", "hold integers", jnp.result_type(ranking))
    if isinstance(ranking, jax.core.Tracer):
        return
    given = np.asarray(ranking)
    if not np.array_equal(
        np.sort(given, -1), np.broadcast_to(np.arange(given.shape[-1]), given.shape)
    ):
        raise FieldError("ranking", "be a permutation of the candidates in each group", given)
