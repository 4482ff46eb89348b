r"""Trust regions of tokens and answers, as masks and weights for `weights=` of the losses.

    divergence_mask       tokens that stay near, or move back: DPPO
    sequence_trust_mask   answers that stay near as a whole: trust-region masking
    off_policy_mask       answers that are good or near: DeepSeek-V3.2
    rollout_weights       pi_train / pi_sampler, truncated or masked

`covariance_mask` has Clip-Cov and KL-Cov. All are constants for gradients. As `weights` they scale
the surrogate of a token, which still counts in the denominator of the reduction; as part of `mask`
it does not. Several are combined by their product. `trust_metrics` tells how far the policy moved
and how much was masked.
"""

import jax
import jax.numpy as jnp

from trustjax import trust
from trustjax._checks import check_choice, check_scalar
from trustjax._dtypes import widened
from trustjax._sharding import AxisName
from trustjax.losses._ratio import bounded_log_ratio, clipped_sides
from trustjax.losses._shapes import check_shape, zero_masked
from trustjax.losses._tokens import per_token, tokens_of
from trustjax.losses.kl_estimator import KL_ESTIMATORS, kl_estimate
from trustjax.losses.reduction import masked_mean, token_mask

BINARY = ("tv", "kl")
CRITERIA = ("token", "mean", "sum", "max")


def token_divergence(log_probs: jax.Array, old_log_probs: jax.Array, kind: str = "tv") -> jax.Array:
    r"""How far the policy moved from the old one, estimated from each sampled token alone.

    .. math::
        \mathrm{tv} &= |p - q|, \qquad \mathrm{kl} = q \log\frac{q}{p}
                       + (1 - q) \log\frac{1 - q}{1 - p}, \qquad p = \pi(a), \; q = \pi_{old}(a) \\
        k_1, k_2, k_3 &= \text{estimates of } KL(\pi_{old} \| \pi) \text{ as in } kl\_estimate

    "tv" and "kl" are the divergences of the distributions over two outcomes, this token or another;
    they bound those over the vocabulary from below.

    Args:
      log_probs: log pi of the sampled tokens, float [...].
      old_log_probs: log pi_old of the policy that drew them, same shape.
      kind: "tv", "kl", or a name of `kl_estimate`.

    Returns:
      Divergences [...] in nats ("tv" without unit), in float32 at least, constants for gradients.

    Raises:
      ValueError: The shapes differ, or `kind` is unknown.

    Source: Qi et al., arXiv:2602.04879, the binary approximation; 1e-8 in the logarithm as in verl.
    """
    check_choice("divergence", kind, (*BINARY, *KL_ESTIMATORS))
    new = widened(jax.lax.stop_gradient(log_probs))
    old = widened(jax.lax.stop_gradient(old_log_probs))
    if kind not in BINARY:
        return kl_estimate(old, new, kind)
    zeros = jnp.zeros_like(new)
    p, q = jnp.exp(jnp.minimum(new, zeros)), jnp.exp(jnp.minimum(old, zeros))
    if kind == "tv":
        return jnp.abs(p - q)
    same = jnp.where(q > 0, q * (old - new), zeros)
    return same + (1 - q) * jnp.log((1 - q + 1e-8) / (1 - p + 1e-8))


def divergence_mask(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    radius: jax.typing.ArrayLike,
    radius_high: jax.typing.ArrayLike | None = None,
    divergence: str = "tv",
) -> jax.Array:
    r"""Divergence proximal policy optimisation: which tokens may move on.

    .. math:: M = 0 \text{ where } D > \delta \text{ and } A \, (\pi - \pi_{old}) > 0,
              \text{ else } 1

    A token beyond the radius is left out only if its advantage would drive it further away. PPO
    asks the same of r, which is noisy for rare tokens and blind for frequent ones.

    Args:
      log_probs, old_log_probs, advantages, mask: As in `grpo_loss`. The paper measures from the
        policy that sampled, not from one that recomputed its log-probabilities.
      radius: Radius delta where A <= 0, > 0; verl's `clip_ratio_low`.
      radius_high: Radius where A > 0, > 0; None means `radius`.
      divergence: "tv" or "kl" over the outcomes "this token" and "another".

    Returns:
      Bool [batch, time], True where the token is kept; False in masked places.

    Raises:
      ValueError: The shapes do not fit, a radius is not > 0, or `divergence` is unknown.

    Source: Qi et al., arXiv:2602.04879.

    >>> import jax.numpy as jnp
    >>> new, old = jnp.log(jnp.array([[0.9, 0.3, 0.02]])), jnp.log(jnp.array([[0.6, 0.6, 0.01]]))
    >>> print(divergence_mask(new, old, jnp.array([1.0]), jnp.ones((1, 3)), radius=0.2))
    [[False  True  True]]
    """
    check_choice("divergence", divergence, BINARY)
    check_scalar("radius", radius, above=0.0)
    check_scalar("radius_high", radius_high, above=0.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    moved = jax.lax.stop_gradient(tokens.log_ratio)
    distance = _criterion(log_probs, old_log_probs, tokens.mask, "token", divergence)
    gained = tokens.advantages > 0
    allowed = jnp.where(
        gained,
        jnp.asarray(radius if radius_high is None else radius_high, distance.dtype),
        jnp.asarray(radius, distance.dtype),
    )
    further = jnp.where(gained, moved > 0, moved < 0)
    return tokens.mask & ~(further & (distance > allowed))


def sequence_trust_mask(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    mask: jax.Array,
    *,
    radius: jax.typing.ArrayLike,
    criterion: str = "max",
    divergence: str = "k2",
) -> jax.Array:
    r"""Trust-region masking: an answer counts only if it lies within the trust region as a whole.

    .. math:: M_i = 1 \text{ where } \max_t D_{it} \le \delta, \text{ else } 0

    Bounds of the error of the surrogate depend on the largest divergence among the tokens of an
    answer, which no clip of single tokens controls.

    Args:
      log_probs: log pi of the sampled tokens, float [batch, time].
      old_log_probs: log-probabilities under the policy that sampled, same shape.
      mask: True or nonzero on the tokens of the answers, [batch, time].
      radius: Radius delta > 0 of the criterion, in the unit of the divergence.
      criterion: "max", "mean" or "sum" over the tokens of an answer, or "token" for each token by
        itself.
      divergence: A name of `token_divergence`: "k2" is symmetric and belongs to "max", "k3" is
        unbiased and belongs to "mean". The absolute value is compared, so that "k1" bounds the mean
        log-ratio on both sides.

    Returns:
      Bool [batch, time], the same on all tokens of an answer except for "token"; False in masked
      places.

    Raises:
      ValueError: The shapes do not fit, `radius` is not > 0, or a name is unknown.

    Source: Li et al., arXiv:2512.23075; verl's `rollout_rs`.
    """
    check_choice("criterion", criterion, CRITERIA)
    check_scalar("radius", radius, above=0.0)
    keep = token_mask(log_probs, mask)
    distance = _criterion(log_probs, old_log_probs, keep, criterion, divergence)
    return keep & (jnp.abs(distance) <= jnp.asarray(radius, distance.dtype))


def off_policy_mask(
    log_probs: jax.Array,
    sampler_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    radius: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Answers with a negative advantage count only if the policy would still have given them.

    .. math:: M_i = 1 \text{ where } A_i \ge 0 \text{ or }
              \frac{1}{L_i} \sum_t (\log\pi_{sampler} - \log\pi) \le \delta, \text{ else } 0

    Args:
      log_probs, advantages, mask: As in `grpo_loss`.
      sampler_log_probs: log-probabilities under the policy that sampled, [batch, time].
      radius: Radius delta, in nats per token.

    Returns:
      Bool [batch, time]; False in masked places.

    Raises:
      ValueError: The shapes do not fit.

    Source: DeepSeek-V3.2, arXiv:2512.02556, Eq. 9; TRL's `off_policy_mask_threshold`.
    """
    tokens = tokens_of(log_probs, sampler_log_probs, advantages, mask)
    gone = -jax.lax.stop_gradient(masked_mean(tokens.log_ratio, tokens.mask, sequence=True))
    near = gone <= jnp.asarray(radius, gone.dtype)
    return tokens.mask & ((tokens.advantages >= 0) | near[:, None])


def rollout_weights(
    log_probs: jax.Array,
    sampler_log_probs: jax.Array,
    mask: jax.Array,
    *,
    level: str = "token",
    mode: str = "truncate",
    highest: jax.typing.ArrayLike | None = 2.0,
    lowest: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Weights that correct for a sampler whose probabilities differ from the trained model's.

    .. math:: w_{it} = \frac{\pi_{train}}{\pi_{sampler}} \quad \text{or} \quad
              w_i = \prod_t \frac{\pi_{train}}{\pi_{sampler}}

    "truncate" moves a weight outside [lowest, highest] to the bound, "mask" sets it to 0. Weights
    are bounded by e^20 even without bounds.

    Args:
      log_probs: log-probabilities of the weights that sampled, recomputed by the trained model
        (`old_log_probs` of the losses), float [batch, time].
      sampler_log_probs: log-probabilities that the sampler reported, same shape.
      mask: True or nonzero on the tokens of the answers, [batch, time].
      level: "token" (low variance, biased) or "sequence" (unbiased).
      mode: "truncate" or "mask".
      highest: Largest weight, > 0; None means none. verl has 2, TRL 3.
      lowest: Smallest weight, > 0; None means none.

    Returns:
      Weights [batch, time] in float32 at least, constants for gradients; 0 in masked places.

    Raises:
      ValueError: The shapes do not fit, a bound is not > 0, or a name is unknown.

    Source: truncated: Yao et al., fengyao.notion.site/off-policy-rl; masked: IcePop; verl's
    `rollout_is` and TRL's `vllm_importance_sampling_mode`.
    """
    check_choice("level", level, ("token", "sequence"))
    check_choice("mode", mode, ("truncate", "mask"))
    check_scalar("highest", highest, above=0.0)
    check_scalar("lowest", lowest, above=0.0)
    advantages = jnp.zeros(jnp.shape(log_probs)[:1])
    tokens = tokens_of(log_probs, sampler_log_probs, advantages, mask)
    log_w = jax.lax.stop_gradient(tokens.log_ratio)
    if level == "sequence":
        log_w = jnp.broadcast_to(jnp.sum(log_w, -1, keepdims=True), log_w.shape)
    weights = jnp.exp(bounded_log_ratio(log_w))
    low = jnp.asarray(0.0 if lowest is None else lowest, weights.dtype)
    high = jnp.asarray(jnp.inf if highest is None else highest, weights.dtype)
    if mode == "truncate":
        weights = jnp.clip(weights, low, high)
    else:
        outside = (weights < low) | (weights > high)
        weights = jnp.where(outside, jnp.zeros_like(weights), weights)
    return zero_masked(weights, tokens.mask)


def trust_metrics(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = None,
    radius: jax.typing.ArrayLike | None = None,
    divergence: str = "k3",
    criterion: str = "token",
    weights: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> dict[str, jax.Array]:
    r"""How far the policy moved from the old one, and which share of tokens was clipped or masked.

    .. math:: \mathrm{trust/used} = \mathrm{trust/distance} / \mathrm{trust/radius}

    At the first inner step after a rollout pi is pi_old: the distance, the clip shares and the
    share masked by divergence are then exactly 0, whatever the loss. They differ from 0 from the
    second inner step on, or where the sampler's log-probabilities stand for pi_old.

    Args:
      log_probs, old_log_probs, advantages, mask, clip, clip_high: As in the loss.
      radius: What the distance is compared with, > 0: the radius of the mask or a KL target; None
        means `clip`.
      divergence, criterion: As in `sequence_trust_mask`; the distance is the mean of the criterion
        over tokens or answers.
      weights: The weights or mask that the loss takes; None means none.
      axis_name: As in `reduce_tokens`.

    Returns:
      Numbers [] by name: trust/radius, trust/distance, trust/used; clip/low, clip/high and clip,
      the shares of tokens that the clip stops; masked, the share with weight 0; ratio/mean.

    Raises:
      ValueError: The shapes do not fit, a number is out of range, or a name is unknown.
    """
    check_choice("criterion", criterion, CRITERIA)
    check_scalar("clip", clip, at_least=0.0)
    check_scalar("radius", radius, above=0.0)
    tokens = tokens_of(jax.lax.stop_gradient(log_probs), old_log_probs, advantages, mask)
    dtype, keep = tokens.log_ratio.dtype, tokens.mask
    distances = jnp.abs(_criterion(log_probs, old_log_probs, keep, criterion, divergence))
    # Each answer counts once for the criteria over tokens: its first token stands for it.
    counted = keep if criterion == "token" else keep & (jnp.cumsum(keep, -1) == 1)
    distance = masked_mean(distances, counted, axis_name=axis_name)
    allowed = jnp.asarray(clip if radius is None else radius, dtype)
    ratio = jnp.exp(bounded_log_ratio(tokens.log_ratio))
    clipped_low, clipped_high = clipped_sides(ratio, tokens.advantages, clip, clip_high)
    given = jnp.ones_like(ratio) if weights is None else per_token("weights", weights, keep)

    def share(values: jax.Array) -> jax.Array:
        return masked_mean(values.astype(dtype), keep, axis_name=axis_name)

    return {
        **trust.trust_metrics(allowed, distance),
        "clip/low": share(clipped_low),
        "clip/high": share(clipped_high),
        "clip": share(clipped_low | clipped_high),
        "masked": share(given == 0),
        "ratio/mean": share(ratio),
    }


def _criterion(
    log_probs: jax.Array, old_log_probs: jax.Array, keep: jax.Array, criterion: str, divergence: str
) -> jax.Array:
    """The divergence of each token, or of its whole answer, [batch, time]."""
    check_shape("old_log_probs", old_log_probs, keep)
    new = zero_masked(widened(jax.lax.stop_gradient(log_probs)), keep)
    old = zero_masked(widened(jax.lax.stop_gradient(old_log_probs)), keep)
    distances = zero_masked(token_divergence(new, old, divergence), keep)
    if criterion == "token":
        return distances
    if criterion == "max":
        answers = jnp.max(jnp.abs(distances), -1)
    elif criterion == "mean":
        answers = masked_mean(distances, keep, sequence=True)
    else:
        answers = jnp.sum(distances, -1)
    return jnp.broadcast_to(answers[:, None], keep.shape)
