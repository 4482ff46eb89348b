r"""Losses of preferences without a reference policy, to be minimised.

    nll_loss      -log pi(y_w | x), per token
    cpo_loss      -log S(beta (log pi(y_w) - log pi(y_l))) + alpha nll
    simpo_loss    -log S(beta (m_w - m_l) - gamma)
    alphapo_loss  the same with (1 - exp(-alpha m)) / alpha for m
    orpo_loss     -beta log S(log odds(y_w) - log odds(y_l)) + nll

m is the mean log-probability per token and S the logistic function. Nothing but the likelihood of
the chosen answers, or a margin, keeps the policy near where it started. Losses have one value per
pair, in float32 at least, as described in `preference`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_number, check_scalar
from trustjax._sharding import AxisName, summed
from trustjax.losses._pairs import both_or_none, bounded_expm1, length_normalised, rows, smoothed
from trustjax.losses.dpo import dpo_loss


def nll_loss(
    policy_chosen: jax.Array,
    chosen_lengths: jax.Array,
    *,
    reduction: str = "batch_token",
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Negative log-likelihood of the chosen answers per token, "sft" of TRL.

    .. math:: -\frac{\log\pi(y_i)}{n_i} \;(\text{sequence}), \qquad
              -\frac{B \log\pi(y_i)}{\sum_j n_j} \;(\text{batch token})

    The mean over the B answers is the mean of the means per answer, or the mean over all tokens.

    Args:
      policy_chosen: log pi(y_w | x), summed over the tokens of the answer, float [...].
      chosen_lengths: Numbers n of tokens, same shape.
      reduction: "batch_token" (TRL), in which longer answers weigh more, or "sequence".
      where: Answers to include, bool, same shape.
      axis_name: Axes of the mesh over which the answers are split, for "batch_token".

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, or `reduction` is unknown or does not read `axis_name`.

    Source: arXiv:2404.19733, Eq. 1 ("sequence"); TRL ("batch_token").
    """
    check_choice("reduction", reduction, ("batch_token", "sequence"))
    included, (log_prob,) = rows(where, policy_chosen=policy_chosen)
    if reduction == "sequence":
        if axis_name is not None:
            raise FieldError("axis_name", "be left out with reduction 'sequence'", axis_name)
        return -length_normalised(log_prob, chosen_lengths, "chosen_lengths")
    _, (lengths,) = rows(included, chosen_lengths=chosen_lengths)
    rows(None, policy_chosen=policy_chosen, chosen_lengths=chosen_lengths)  # checks the shapes
    check_number("chosen_lengths", chosen_lengths, at_least=0)
    tokens = summed(jnp.sum(lengths), axis_name).astype(log_prob.dtype)
    answers = summed(jnp.sum(included.astype(log_prob.dtype)), axis_name)
    return -log_prob * (answers / jnp.maximum(tokens, 1))


def cpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    beta: jax.typing.ArrayLike = 0.1,
    variant: str = "sigmoid",
    cpo_alpha: jax.typing.ArrayLike = 1.0,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Contrastive preference optimisation: `dpo_loss` with a flat reference, and a likelihood.

    .. math:: -\log\sigma(\beta (\log\pi(y_w) - \log\pi(y_l))) + \alpha L_{NLL}

    Args:
      policy_chosen: log pi(y_w | x), summed over the tokens of the answer, float [...].
      policy_rejected: log pi(y_l | x), same shape.
      beta: Temperature beta, > 0.
      variant: "sigmoid", "hinge" or "ipo", as in `dpo_loss`; "ipo" takes means per token.
      cpo_alpha: Weight alpha of `nll_loss`, the mean over all chosen tokens, >= 0.
      label_smoothing: Share of labels that are wrong, for "sigmoid".
      chosen_lengths: Numbers of tokens of y_w, [...]; needed unless alpha is 0, and for "ipo".
      rejected_lengths: Numbers of tokens of y_l, for "ipo".
      where: Pairs to include, bool, same shape.
      axis_name: Axes of the mesh over which the pairs are split: tokens are counted over all.

    Returns:
      Losses [...] in float32 at least, whose mean is the loss.

    Raises:
      ValueError: The shapes differ, a name is unknown, a number is out of range, or lengths are
        missing or not read.

    Source: Xu et al., arXiv:2401.08417; forms and defaults of TRL.
    """
    check_choice("variant", variant, ("sigmoid", "hinge", "ipo"))
    check_scalar("cpo_alpha", cpo_alpha, at_least=0.0)
    lengths: dict[str, Any] = {}
    if variant == "ipo":
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        for name, array in lengths.items():
            if array is None:
                raise FieldError(name, "be given for variant 'ipo'", array)
    elif rejected_lengths is not None:
        raise FieldError("rejected_lengths", f"be left out for variant {variant!r}", "an array")
    preference = dpo_loss(
        policy_chosen, policy_rejected, None, None, beta=beta, variant=variant,
        label_smoothing=label_smoothing, where=where, **lengths,
    )  # fmt: skip
    if not isinstance(cpo_alpha, jax.core.Tracer) and np.all(np.asarray(cpo_alpha) == 0):
        unread = {"axis_name": axis_name, "chosen_lengths": None if lengths else chosen_lengths}
        for name, value in unread.items():
            if value is not None:
                raise FieldError(name, "be left out with cpo_alpha=0", value)
        return preference
    if chosen_lengths is None:
        raise FieldError("chosen_lengths", "be given unless cpo_alpha is 0", chosen_lengths)
    nll = nll_loss(policy_chosen, chosen_lengths, where=where, axis_name=axis_name)
    return preference + jnp.asarray(cpo_alpha, nll.dtype) * nll


def simpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    beta: jax.typing.ArrayLike = 2.0,
    gamma: jax.typing.ArrayLike = 0.5,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Simple preference optimisation: mean log-probabilities per token, with a margin.

    .. math:: -\log\sigma(\beta (m_w - m_l) - \gamma), \qquad m = \log\pi(y | x) / n

    The arguments are those of `alphapo_loss`, without alpha. The defaults are those of the authors'
    configuration, gamma / beta = 0.25; TRL's (beta 0.1, gamma 0.5) demand a margin of 5 nats per
    token. With a likelihood it is CPO-SimPO: add `nll_loss`.

    Args:
      policy_chosen, policy_rejected, label_smoothing, where: As in `alphapo_loss`.
      beta: Scale beta of the reward, > 0; the authors' runs have 2 to 10.
      gamma: Margin gamma of the reward, in units of beta m.
      chosen_lengths, rejected_lengths: As in `alphapo_loss`.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: As `alphapo_loss`.

    Source: Meng et al., arXiv:2405.14734, Eq. 6.
    """
    return alphapo_loss(
        policy_chosen, policy_rejected, alpha=0.0, beta=beta, gamma=gamma, where=where,
        label_smoothing=label_smoothing, chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )  # fmt: skip


def alphapo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    alpha: jax.typing.ArrayLike = 0.25,
    beta: jax.typing.ArrayLike = 2.5,
    gamma: jax.typing.ArrayLike = 0.1,
    label_smoothing: jax.typing.ArrayLike = 0.0,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""SimPO with a reward whose shape alpha decides.

    .. math:: -\log\sigma(\beta (r_w - r_l) - \gamma), \qquad
              r = \frac{1 - \exp(-\alpha m)}{\alpha}, \quad m = \log\pi(y | x) / n

    Args:
      policy_chosen: log pi(y_w | x), float [...]: sums over tokens with lengths, means without.
      policy_rejected: log pi(y_l | x), same shape.
      alpha: Shape alpha of the reward; 0 is SimPO, where r = m.
      beta: Scale beta of the reward, > 0.
      gamma: Margin gamma, in units of beta r.
      label_smoothing: Share of labels that are wrong, in [0, 1].
      chosen_lengths: Numbers n of tokens of y_w, [...]; None if the log-probabilities are means per
        token already.
      rejected_lengths: The same of y_l.
      where: Pairs to include, bool, same shape.

    Returns:
      Losses [...] in float32 at least.

    Raises:
      ValueError: The shapes differ, a number is out of range, or only one of the lengths is given.

    Source: Gupta et al., arXiv:2501.03884; TRL's "alphapo".
    """
    check_scalar("beta", beta, above=0.0)
    check_scalar("label_smoothing", label_smoothing, at_least=0.0, at_most=1.0)
    included, mean_w, mean_l = _means(
        policy_chosen, policy_rejected, chosen_lengths, rejected_lengths, where
    )
    beta, gamma, alpha, epsilon = (
        jnp.asarray(x, mean_w.dtype) for x in (beta, gamma, alpha, label_smoothing)
    )

    def reward(mean: jax.Array) -> jax.Array:
        safe = jnp.where(alpha == 0, jnp.ones_like(alpha), alpha)
        return jnp.where(alpha == 0, mean, -bounded_expm1(-safe * mean) / safe)

    losses = smoothed(beta * (reward(mean_w) - reward(mean_l)) - gamma, epsilon)
    return jnp.where(included, losses, jnp.zeros_like(losses))


def orpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    *,
    beta: jax.typing.ArrayLike = 0.1,
    nll_reduction: str = "batch_token",
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Odds-ratio preference optimisation: a likelihood and the odds of both answers.

    .. math:: L_{NLL} - \beta \log\sigma\left(
              \log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l}\right),
              \qquad p = \exp(\log\pi(y | x) / n)

    Args:
      policy_chosen: log pi(y_w | x), float [...]: sums over tokens with lengths, means without.
      policy_rejected: log pi(y_l | x), same shape.
      beta: Weight of the odds (lambda of the paper), >= 0.
      nll_reduction: "batch_token" or "sequence" as in `nll_loss`, or "none" for the odds alone, to
        which another likelihood may be added: TRL's has the tokens of the prompt too.
      chosen_lengths: Numbers n of tokens of y_w, [...]; None if the log-probabilities are means per
        token already, which "batch_token" cannot do without.
      rejected_lengths: The same of y_l.
      where: Pairs to include, bool, same shape.
      axis_name: Axes of the mesh over which the pairs are split, for "batch_token".

    Returns:
      Losses [...] in float32 at least, whose mean is the loss. A probability of 1 counts as 1 - eps
      of the dtype, where the odds are finite.

    Raises:
      ValueError: The shapes differ, a number is out of range, a name is unknown, or lengths are
        missing.

    Source: Hong et al., arXiv:2403.07691, Eq. 6 and 7.
    """
    check_choice("nll_reduction", nll_reduction, ("batch_token", "sequence", "none"))
    check_scalar("beta", beta, at_least=0.0)
    included, mean_w, mean_l = _means(
        policy_chosen, policy_rejected, chosen_lengths, rejected_lengths, where
    )
    odds = jax.nn.log_sigmoid(_log_odds(mean_w) - _log_odds(mean_l))
    losses = -jnp.asarray(beta, odds.dtype) * odds
    if nll_reduction == "batch_token":
        if chosen_lengths is None:
            raise FieldError("chosen_lengths", "be given for 'batch_token'", chosen_lengths)
        losses += nll_loss(policy_chosen, chosen_lengths, where=where, axis_name=axis_name)
    elif axis_name is not None:
        raise FieldError("axis_name", f"be left out with {nll_reduction!r}", axis_name)
    elif nll_reduction == "sequence":
        losses -= mean_w
    return jnp.where(included, losses, jnp.zeros_like(losses))


def _log_odds(log_prob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) with p at most 1 - eps of the dtype."""
    log_prob = jnp.minimum(log_prob, -float(np.finfo(log_prob.dtype).eps))
    return log_prob - jax.nn.log1mexp(-log_prob)


def _means(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    chosen_lengths: jax.Array | None,
    rejected_lengths: jax.Array | None,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which pairs are included, and the mean log-probabilities per token of both answers."""
    both_or_none(chosen_lengths, rejected_lengths)
    included, (chosen, rejected) = rows(
        where, policy_chosen=policy_chosen, policy_rejected=policy_rejected
    )
    chosen = length_normalised(chosen, chosen_lengths, "chosen_lengths")
    return included, chosen, length_normalised(rejected, rejected_lengths, "rejected_lengths")
