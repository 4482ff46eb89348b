r"""What `adpo_loss` takes besides log-probabilities: targets q, and adaptive temperatures.

A target is a distribution over the candidates of a group, [..., P]. The target of a pair is the
probability that the preferred response is better. All results are constants for gradients, in
float32 at least. Candidates that `where` leaves out have probability 0, whatever their rewards.

Source: Wang, arXiv:2510.18913.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import check_choice, check_scalar
from trustjax._dtypes import widened
from trustjax._sharding import AxisName
from trustjax.losses._candidates import candidates, count, masked_softmax, per_group
from trustjax.losses._shapes import same_shape


def hard_targets(rewards: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """All of the probability on the best candidate of each group, in equal parts where several tie.

    Args:
      rewards: Rewards of the candidates, float [..., P].
      where: Candidates to include, bool, broadcastable to [..., P].

    Returns:
      Target q [..., P].

    Raises:
      ValueError: There are no candidates, or groups are split over devices.

    >>> import jax.numpy as jnp
    >>> print(hard_targets(jnp.array([1.0, 3.0, 2.0, 3.0])))
    [0.  0.5 0.  0.5]
    """
    kept, rewards = candidates(where, rewards=jax.lax.stop_gradient(rewards))
    highest = jnp.max(rewards, -1, keepdims=True, where=kept, initial=-jnp.inf)
    best = (kept & (rewards == highest)).astype(rewards.dtype)
    found = best / jnp.maximum(jnp.sum(best, -1, keepdims=True), 1)
    return jnp.where(jnp.isnan(highest) & kept, highest, found)


def bradley_terry_targets(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    r"""The probability that the first of two responses is better, under the Bradley-Terry model.

    .. math:: s = \sigma\left((R_w - R_l) / \beta_r\right)

    Args:
      chosen_rewards: Rewards R_w of the preferred responses, float [...].
      rejected_rewards: Rewards R_l of the others, same shape.
      temperature: beta_r, > 0, in units of the rewards.

    Returns:
      Target s [...] of `adpo_pairwise_loss`.

    Raises:
      ValueError: The shapes differ, or `temperature` is not > 0.
    """
    check_scalar("temperature", temperature, above=0.0)
    (rejected,) = same_shape(chosen_rewards, rejected_rewards=rejected_rewards)
    margin = jax.lax.stop_gradient(widened(chosen_rewards) - rejected)
    return jax.nn.sigmoid(margin / jnp.asarray(temperature, margin.dtype))


def reward_targets(
    rewards: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 0.5,
    scale: str = "std",
    ddof: int = 1,
    epsilon: jax.typing.ArrayLike = 1e-8,
    tolerance: float = 5e-7,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The softmax of the rewards, normalised within each group ("Listwise-Raw").

    .. math:: q = \mathrm{softmax}(A / \beta_r), \qquad A_i = \frac{R_i - \bar R}{s + \epsilon},
              \qquad s^2 = \frac{1}{P - \mathrm{ddof}} \sum_i (R_i - \bar R)^2

    Groups of equal rewards have the uniform distribution.

    Args:
      rewards: Rewards R of the candidates, float [..., P].
      temperature: beta_r, > 0, a number or one per group, [...] or [..., 1], in units of A.
      scale: "std", or "none" for A_i = R_i minus the mean, which is the softmax of R / beta_r.
      ddof: 1, as in the paper's code, or 0, subtracted from the number of candidates in s.
      epsilon: Small number that is added to s, >= 0.
      tolerance: Rewards of a group whose maximum and minimum differ by no more than this share of
        the larger magnitude count as equal, >= 0: sums of rounded numbers differ by that much, and
        s would amplify it.
      where: Candidates to include, bool, broadcastable to [..., P].

    Returns:
      Target q [..., P].

    Raises:
      ValueError: There are no candidates, groups are split over devices, or an option is out of
        range.

    Source: arXiv:2510.18913, Algorithm 1.

    >>> import jax.numpy as jnp
    >>> print(reward_targets(jnp.array([1.0, 0.0, 0.0, 0.0])).round(4))
    [0.9479 0.0174 0.0174 0.0174]
    """
    check_choice("scale", scale, ("std", "none"))
    check_scalar("ddof", ddof, at_least=0, at_most=1)
    check_scalar("epsilon", epsilon, at_least=0.0)
    check_scalar("tolerance", tolerance, at_least=0.0)
    kept, rewards = candidates(where, rewards=jax.lax.stop_gradient(rewards))
    centred = _centred(rewards, kept, tolerance)
    if scale == "std":
        deviation = _deviation(centred, kept, ddof) + jnp.asarray(epsilon, rewards.dtype)
        centred = centred / jnp.where(deviation == 0, jnp.ones_like(deviation), deviation)
    return masked_softmax(centred / per_group("temperature", temperature, rewards), kept)


def kde_targets(
    rewards: jax.Array,
    *,
    bandwidth: jax.typing.ArrayLike | None = None,
    temperature: jax.typing.ArrayLike = 0.5,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The softmax of smoothed ranks: of the logit of each reward's place among its group.

    .. math:: q = \mathrm{softmax}(z / \beta_r), \quad z_i = \log \frac{F_i}{1 - F_i}, \quad
              F_i = \frac{1}{P} \sum_j \Phi\left(\frac{R_i - R_j}{h}\right)

    However far an outlier lies, :math:`|z_i| \le \log(2 P - 1)`. This bounds the scale of the
    rewards; it does not correct a wrong order.

    Args:
      rewards: Rewards R of the candidates, float [..., P].
      bandwidth: Standard deviation h of the kernel, > 0, in units of the rewards, a number or one
        per group; None for 0.9 min(s, IQR / 1.349) P^(-1/5) of each group, at least 1e-6, where s
        is the standard deviation (ddof 1) and IQR the range between the quartiles.
      temperature: beta_r, > 0, a number or one per group.
      where: Candidates to include, bool, broadcastable to [..., P].

    Returns:
      Target q [..., P].

    Raises:
      ValueError: There are no candidates, groups are split over devices, or an option is out of
        range.

    Source: arXiv:2510.18913 v1 names a KDE-CDF-logit transform, whose formula it does not publish.
    This is a construction of ours that fits the name.
    """
    kept, rewards = candidates(where, rewards=jax.lax.stop_gradient(rewards))
    width = _bandwidth(rewards, kept) if bandwidth is None else bandwidth
    h = per_group("bandwidth", width, rewards)
    # [..., P, P]: reward i against reward j; what is below i, and what is above.
    gaps = (rewards[..., :, None] - rewards[..., None, :]) / (h if h.ndim == 0 else h[..., None])
    others = kept[..., None, :]
    below, above = (
        jnp.log(jnp.sum(jax.scipy.stats.norm.cdf(x), -1, where=others, initial=0))
        for x in (gaps, -gaps)
    )
    # 1 - F is the share above, so that the logit is as exact near 1 as near 0.
    logit = jnp.where(kept, below - above, jnp.zeros_like(below))
    return masked_softmax(logit / per_group("temperature", temperature, rewards), kept)


def target_entropy_temperature(
    target: jax.Array,
    *,
    base: jax.typing.ArrayLike = 0.8,
    alpha: jax.typing.ArrayLike = 0.5,
    minimum: jax.typing.ArrayLike = 0.05,
    epsilon: jax.typing.ArrayLike = 1e-8,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""A temperature per group that is small where the target says little.

    .. math:: \tau = \max\left(\tau_{min}, \tau_{base} (1 - \alpha H / \log P)\right),
              \qquad H = -\sum_i q_i \log(q_i + \epsilon)

    A small temperature keeps the optimum near the anchor. This is the oldest rule of the released
    code (November 2025); the rule of the paper is `smooth_hybrid_temperature`.

    Args:
      target: Target q, float [..., P].
      base: tau_base, > 0.
      alpha: Weight of the entropy.
      minimum: Lower bound of the temperature, > 0.
      epsilon: Small number in the logarithm, >= 0; with 0, H is the entropy itself.
      where: Candidates to include, bool, broadcastable to [..., P]; P is their number.

    Returns:
      Temperatures [...] in float32 at least, constants for gradients.

    Raises:
      ValueError: There are no candidates, groups are split over devices, or a number is out of
        range.

    Source: wk222/verlm, commit 88f702e7, `compute_adaptive_tau`.
    """
    for name, number in {"base": base, "minimum": minimum}.items():
        check_scalar(name, number, above=0.0)
    check_scalar("alpha", alpha)
    check_scalar("epsilon", epsilon, at_least=0.0)
    kept, target = candidates(where, target=jax.lax.stop_gradient(target))
    base, alpha, minimum = (jnp.asarray(x, target.dtype) for x in (base, alpha, minimum))
    offset = target + jnp.asarray(epsilon, target.dtype)
    entropy = -jnp.sum(jax.scipy.special.xlogy(target, offset), -1)
    highest = jnp.log(count(kept, target.dtype)[..., 0])
    # One candidate alone is certain.
    share = jnp.where(highest > 0, entropy / jnp.where(highest > 0, highest, 1), 0 * entropy)
    return jnp.maximum(minimum, base * (1 - alpha * share))


def smooth_hybrid_temperature(
    entropy: jax.Array,
    rewards: jax.Array,
    *,
    base: jax.typing.ArrayLike = 0.8,
    alpha: jax.typing.ArrayLike = 1.0,
    beta: jax.typing.ArrayLike = 0.5,
    minimum: jax.typing.ArrayLike = 0.1,
    maximum: jax.typing.ArrayLike = jnp.inf,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""The paper's temperature per group: large where the policy is unsure, or sure and wrong.

    .. math:: \tau = \mathrm{clip}\left(\tau_{base}
              \left(1 + \alpha H + \beta (1 - H)(1 - R)\right), \tau_{min}, \tau_{max}\right)

    R is the mean reward of the group, scaled to [0, 1] by the lowest and the highest mean of the
    batch, and 0.5 where these agree to 1e-6. A large temperature makes the first step from the
    anchor smaller, but moves the optimum away from it.

    Args:
      entropy: H of each group, float [...]: the mean entropy of its tokens over the logarithm of
        the size of the vocabulary. It is clipped to [0, 1].
      rewards: Rewards of the candidates, float [..., P]; all leading axes together are the batch.
      base: tau_base, > 0.
      alpha: Weight of the uncertainty, 1 in the paper.
      beta: Weight of the error, which the paper does not state; 0.5 in its code.
      minimum, maximum: Bounds of the temperature, > 0; the paper has no upper one.
      where: Candidates to include, bool, broadcastable to [..., P]. Groups without candidates do
        not count in the batch.
      axis_name: Axes of `jax.shard_map` or `jax.vmap` over which the batch is split.

    Returns:
      Temperatures [...] in float32 at least, constants for gradients.

    Raises:
      ValueError: The shapes do not fit, there are no candidates, groups are split over devices, or
        a number is out of range.

    Source: arXiv:2510.18913, Eq. 8.
    """
    for name, number in {"base": base, "minimum": minimum, "maximum": maximum}.items():
        check_scalar(name, number, above=0.0)
    for name, number in {"alpha": alpha, "beta": beta}.items():
        check_scalar(name, number)
    entropy, rewards = jax.lax.stop_gradient((entropy, rewards))
    kept, rewards = candidates(where, rewards=rewards)
    (entropy,) = same_shape(rewards[..., 0], entropy=entropy)
    dtype = rewards.dtype
    base, alpha, beta, minimum, maximum = (
        jnp.asarray(x, dtype) for x in (base, alpha, beta, minimum, maximum)
    )
    means, present = (
        (jnp.sum(rewards, -1, keepdims=True) / count(kept, dtype))[..., 0],
        kept.any(-1),
    )
    lowest = jnp.min(means, where=present, initial=jnp.inf)
    highest = jnp.max(means, where=present, initial=-jnp.inf)
    if axis_name is not None:
        lowest, highest = jax.lax.pmin(lowest, axis_name), jax.lax.pmax(highest, axis_name)
    width = highest - lowest
    apart = width > 1e-6
    scaled = jnp.where(apart, (means - lowest) / jnp.where(apart, width, 1), 0.5)
    unsure = jnp.clip(entropy.astype(dtype), 0, 1)
    # Eq. 8: an uncertainty term, and a penalty for confidence in what earns little.
    tau = base * (1 + alpha * unsure + beta * (1 - unsure) * (1 - jnp.clip(scaled, 0, 1)))
    return jnp.clip(tau, minimum, maximum)


def _centred(rewards: jax.Array, kept: jax.Array, tolerance: float = 5e-7) -> jax.Array:
    """Rewards minus the mean of their group, exactly 0 where all are equal, and 0 where masked."""
    mean = jnp.sum(rewards, -1, keepdims=True) / count(kept, rewards.dtype)
    lowest = jnp.min(rewards, -1, keepdims=True, where=kept, initial=jnp.inf)
    highest = jnp.max(rewards, -1, keepdims=True, where=kept, initial=-jnp.inf)
    # Equal numbers, or their mean, may be rounded; dividing by s would amplify the difference.
    magnitude = jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    equal = (lowest == highest) | (highest - lowest <= tolerance * magnitude)
    return jnp.where(kept & ~equal, rewards - mean, jnp.zeros_like(rewards))


def _deviation(centred: jax.Array, kept: jax.Array, ddof: int) -> jax.Array:
    """Standard deviations [..., 1] of centred numbers, whose squares may overflow."""
    largest = jnp.max(jnp.abs(centred), -1, keepdims=True)
    unit = jnp.where(largest == 0, jnp.ones_like(largest), largest)
    divisor = jnp.maximum(count(kept, centred.dtype) - ddof, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(centred / unit), -1, keepdims=True) / divisor)


def _bandwidth(rewards: jax.Array, kept: jax.Array) -> jax.Array:
    """Silverman's rule per group, [..., 1], with the smaller of two measures of the spread."""
    spread = _deviation(_centred(rewards, kept), kept, 1)
    number = count(kept, rewards.dtype)
    ordered = jnp.sort(jnp.where(kept, rewards, jnp.inf), -1)

    def quantile(share: float) -> jax.Array:
        place = share * (number - 1)
        low, high = (
            jnp.take_along_axis(ordered, end(place).astype(jnp.int32), -1)
            for end in (jnp.floor, jnp.ceil)
        )
        return low + (place - jnp.floor(place)) * (high - low)

    quartiles = (quantile(0.75) - quantile(0.25)) / 1.349
    width = 0.9 * jnp.minimum(spread, quartiles) * number**-0.2
    # A group without candidates has infinite quartiles, whose difference is NaN.
    return jnp.where(kept.any(-1, keepdims=True), jnp.maximum(width, 1e-6), jnp.ones_like(width))
