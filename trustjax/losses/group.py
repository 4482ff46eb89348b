r"""Losses of language policies whose advantages come from a group of answers to the same prompt.

With r_it = pi / pi_old of token t in answer i, s_i = exp(mean_t log r_it), the advantage A, and the
reductions of `trustjax.losses.reduction`:

    grpo_loss                 -min(r A, clip(r, 1 - e, 1 + e) A) + beta k3     sequence_mean
    dr_grpo_loss              the same without KL                              constant
    dapo_loss                 -min(r A, clip(r, 1 - e, 1 + e_high) A)          token_mean
    reinforce_plus_plus_loss  -min(r A, clip(r, 1 - e, 1 + e) A)               token_mean
    gspo_loss                 -min(s A, clip(s, 1 - e, 1 + e_high) A)          sequence_mean
    rloo_loss                 -A sum_t log pi, or -min(R A, clip(R) A)         sequence_mean

R_i is the product of the r_it. `group_variants` has CISPO, SAPO, GMPO, VESPO and LUSPO,
`group_advantage` the advantages, and `trust_mask` the masks and weights for `weights=`.

Every loss takes log-probabilities [batch, time] of sampled tokens and a mask of the tokens of the
answers, and returns one number, or the losses [batch, time] for `reduction="none"`. Only the first
argument has a gradient. Sums are float32 at least. What stands in masked places is never read, and
rows without a token count for nothing. A ratio is bounded by e^20 (TRL: none; verl: e^20, without a
gradient beyond it) and keeps there the gradient that it has at the bound, so that log-ratios of any
size give finite numbers and drive the policy back. NaN in an unmasked place gives NaN.

At the first inner step after a rollout, pi = pi_old: all ratios are 1 and nothing is clipped.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice
from trustjax._sharding import AxisName
from trustjax.losses._shapes import zero_masked
from trustjax.losses._tokens import (
    Options,
    Tokens,
    finished,
    sequence_log_ratio,
    surrogate,
    tokens_of,
)
from trustjax.losses.group_advantage import (
    informative_groups as informative_groups,
)
from trustjax.losses.group_advantage import (
    reinforce_plus_plus_advantages as reinforce_plus_plus_advantages,
)
from trustjax.losses.group_advantage import (
    reinforce_plus_plus_baseline_advantages as reinforce_plus_plus_baseline_advantages,
)
from trustjax.losses.group_advantage import soft_overlong_penalty as soft_overlong_penalty
from trustjax.losses.group_advantage import trust_grpo_advantages as trust_grpo_advantages
from trustjax.losses.group_advantage import trust_weight as trust_weight
from trustjax.losses.reduction import masked_mean
from trustjax.losses.trust_mask import divergence_mask as divergence_mask
from trustjax.losses.trust_mask import sequence_trust_mask as sequence_trust_mask


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = None,
    dual_clip: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Group relative policy optimisation: PPO's clipped surrogate on tokens, with a KL term.

    .. math:: -\min\left(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_{high}) A\right)
              + \beta \, \hat{KL}(\pi \| \pi_{ref})

    With `dual_clip` = c the loss of a token with A < 0 is at most c abs(A), without a gradient
    beyond (verl's `clip_ratio_c`, 3 there; TRL's `delta`).

    Args:
      log_probs: log pi of the sampled tokens, float [batch, time].
      old_log_probs: log pi_old of the policy that the batch was drawn from, same shape; a constant.
      advantages: One per answer, [batch], or one per token, [batch, time]; constants.
      mask: True or nonzero on the tokens of the answers, [batch, time].
      clip: Half-width epsilon below 1, >= 0, and above it if `clip_high` is None. `jnp.inf` clips
        nothing.
      clip_high: Half-width above 1, >= 0; None means `clip`.
      dual_clip: Bound c of the ratio for A < 0, > 1; None means none.
      reference_log_probs: log pi_ref of the tokens, same shape, a constant; None means no KL term.
      beta: Weight of the KL term, >= 0: a number, or one per token [batch, time].
      kl: Estimate of the KL, a name of `kl_estimate`.
      weights: Factors of the surrogate, not of the KL, [batch] or [batch, time], constants: masks
        and weights of `trust_mask`. A token of weight 0 still counts in the denominator; to leave
        it out of that as well, put it into `mask`.
      reduction, normalizer, axis_name: As in `reduce_tokens`.

    Returns:
      Float [] in float32 at least, or [batch, time] for `reduction="none"`.

    Raises:
      ValueError: The shapes do not fit, a number is out of range, a name is unknown, or `beta` is
        not 0 without a reference.

    Source: Shao et al., arXiv:2402.03300, Eq. 3; dual clip: Ye et al., arXiv:1912.09729.

    >>> import jax.numpy as jnp
    >>> log_probs, mask = jnp.log(jnp.array([[0.5, 0.9], [0.4, 0.1]])), jnp.ones((2, 2))
    >>> print(grpo_loss(log_probs, log_probs, jnp.array([1.0, -1.0]), mask))
    0.0
    """
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return _clipped(tokens, clip, clip_high, dual_clip, options)


def dr_grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = None,
    dual_clip: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "constant",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""GRPO done right: token losses divided by a constant, so that length earns nothing.

    .. math:: \frac{1}{B L_{max}} \sum_{it} m_{it} l_{it}

    Its advantages are not divided by the deviation: `group_relative(rewards, scale="none")`.

    Args:
      log_probs, old_log_probs, advantages, mask, clip, clip_high, dual_clip, reference_log_probs,
        beta, kl, weights, axis_name: As in `grpo_loss`.
      reduction: As in `reduce_tokens`.
      normalizer: B L_max, the number of answers on all devices times the maximum length; None
        means the size of the padded arrays. verl counts only answers with a token in B.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: Liu et al., arXiv:2503.20783.
    """
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return _clipped(tokens, clip, clip_high, dual_clip, options)


def dapo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = 0.28,
    dual_clip: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "token_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Decoupled clip: a higher bound above 1, and the mean over all tokens of the batch.

    .. math:: -\frac{1}{\sum_i L_i} \sum_{it} \min\left(r A,
              \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A\right)

    The method also filters groups (`informative_groups`) and penalises overlong answers
    (`soft_overlong_penalty`).

    Args:
      log_probs, old_log_probs, advantages, mask, clip, clip_high, dual_clip, reference_log_probs,
        beta, kl, weights, reduction, normalizer, axis_name: As in `grpo_loss`.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: Yu et al., arXiv:2503.14476.
    """
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return _clipped(tokens, clip, clip_high, dual_clip, options)


def reinforce_plus_plus_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = None,
    dual_clip: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k2",
    weights: jax.Array | None = None,
    reduction: str = "token_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""REINFORCE++: PPO's clipped surrogate on whitened advantages, as a mean over all tokens.

    .. math:: -\frac{1}{\sum_i L_i} \sum_{it} \min\left(r A,
              \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A\right)

    The KL belongs into the rewards (`token_rewards`); the baseline form has it in the loss instead.

    Args:
      log_probs, old_log_probs, mask, clip, clip_high, dual_clip, reference_log_probs, beta, kl,
        weights, reduction, normalizer, axis_name: As in `grpo_loss`.
      advantages: `reinforce_plus_plus_advantages`, or those of its baseline form.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`.

    Source: Hu et al., arXiv:2501.03262.
    """
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return _clipped(tokens, clip, clip_high, dual_clip, options)


def gspo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 3e-4,
    clip_high: jax.typing.ArrayLike | None = 4e-4,
    level: str = "sequence",
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Group sequence policy optimisation: the surrogate with one ratio per answer.

    .. math::
        s_i &= \exp\Big(\frac{1}{L_i} \sum_t \log r_{it}\Big), \qquad
        s_{it} = \mathrm{sg}[s_i] \, \pi_{it} / \mathrm{sg}[\pi_{it}] \\
        l &= -\min\left(s A, \mathrm{clip}(s, 1 - \epsilon, 1 + \epsilon_{high}) A\right)

    Both levels have the same value, and with one advantage per answer and "sequence_mean" the same
    gradient A s / L_i; the token level is for advantages of tokens.

    Args:
      log_probs, old_log_probs, advantages, mask, clip, clip_high, reference_log_probs, beta, kl,
        weights, reduction, normalizer, axis_name: As in `grpo_loss`. Every token of an answer
        carries the answer's ratio.
      level: "sequence" for s_i (paper, TRL), "token" for s_it (GSPO-token, verl).

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`, or `level` is unknown.

    Source: Zheng et al., arXiv:2507.18071, Eqs. 5 and 13.
    """
    check_choice("level", level, ("sequence", "token"))
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    log_s = sequence_log_ratio(tokens.log_ratio, tokens.mask)
    if level == "token":
        moving = tokens.log_probs - jax.lax.stop_gradient(tokens.log_probs)
        log_s = jax.lax.stop_gradient(log_s) + moving
    losses = surrogate(log_s, tokens.advantages, clip, clip_high, None)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def rloo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike | None = None,
    clip_high: jax.typing.ArrayLike | None = None,
    reference_log_probs: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 0.0,
    kl: str = "k3",
    weights: jax.Array | None = None,
    reduction: str = "sequence_mean",
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""REINFORCE leave-one-out: an answer is one action, whose log-probability is a sum.

    .. math:: -A_i \sum_t \log\pi_{it} \quad \text{or} \quad
              -\min\left(R_i A_i, \mathrm{clip}(R_i, 1 - \epsilon, 1 + \epsilon) A_i\right), \quad
              R_i = \prod_t r_{it}

    Both have the gradient -A_i sum_t grad log pi where pi = pi_old; the second holds for further
    inner steps. The advantages are `leave_one_out` of rewards that include the KL, with one number
    per answer (their mean over tokens is taken if there is one per token).

    Args:
      log_probs, advantages, mask, reference_log_probs, beta, kl, weights, reduction, normalizer,
        axis_name: As in `grpo_loss`. Every token of an answer carries the answer's loss.
      old_log_probs: log pi_old as in `grpo_loss`, for the form with ratios (TRL); None for
        REINFORCE, the paper's.
      clip, clip_high: As in `grpo_loss`, for the form with ratios, where None means 0.2.

    Returns:
      As `grpo_loss`.

    Raises:
      ValueError: As `grpo_loss`, or `clip` is given without `old_log_probs`.

    Source: Ahmadian et al., arXiv:2402.14740.
    """
    given = log_probs if old_log_probs is None else old_log_probs
    tokens = tokens_of(log_probs, given, advantages, mask)
    advantage = masked_mean(tokens.advantages, tokens.mask, sequence=True)[:, None]
    if old_log_probs is None:
        if clip is not None or clip_high is not None:
            raise FieldError("clip", "be None where old_log_probs is None", clip)
        losses = -advantage * jnp.sum(tokens.log_probs, -1, keepdims=True)
    else:
        log_r = jnp.sum(tokens.log_ratio, -1, keepdims=True)
        losses = surrogate(log_r, advantage, 0.2 if clip is None else clip, clip_high, None)
    losses = zero_masked(losses, tokens.mask)
    options = Options(reference_log_probs, beta, kl, weights, reduction, normalizer, axis_name)
    return finished(losses, tokens, options)


def _clipped(
    tokens: Tokens,
    clip: jax.typing.ArrayLike,
    clip_high: jax.typing.ArrayLike | None,
    dual_clip: jax.typing.ArrayLike | None,
    options: Options,
) -> jax.Array:
    """PPO's surrogate of every token, reduced: the losses that differ only in their numbers."""
    losses = surrogate(tokens.log_ratio, tokens.advantages, clip, clip_high, dual_clip)
    return finished(losses, tokens, options)
