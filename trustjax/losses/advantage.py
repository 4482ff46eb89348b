r"""Advantages: how much better an action was than the policy's average.

Arrays are [time, ...]; a transition t goes from s_t to s'_t, which is the state before any reset.
An episode ends in one of two ways. `terminated`: there is nothing after it, so its value is 0.
`truncated`: a time limit ended it, so it goes on in theory, and V(s'_t) stands for the rest. Where
both are set, `terminated` wins. `next_values` is V(s'_t) for every t: at a truncation that of the
final observation, not of the one after the reset.

Results are targets: no gradient flows through them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import widened


def gae(
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: jax.typing.ArrayLike,
    lambda_: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Generalised advantage estimation.

    .. math::
        \delta_t &= r_t + \gamma (1 - \mathrm{terminated}_t) V(s'_t) - V(s_t) \\
        A_t &= \delta_t + \gamma \lambda (1 - \mathrm{terminated}_t)(1 - \mathrm{truncated}_t)
               A_{t+1}

    Args:
      rewards: [time, ...] float.
      values: same shape, V(s_t).
      next_values: same shape, V(s'_t), of the observation before a reset.
      terminated: same shape, bool.
      truncated: same shape, bool.
      discount: gamma in [0, 1].
      lambda_: lambda in [0, 1]; 0 is one step of bootstrapping, 1 the whole return.

    Returns:
      [time, ...] float32 at least, constants for gradients. Targets of the value are
      `gae(...) + values`, which are the `lambda_returns`.

    Raises:
      ValueError: the shapes differ, there is no step, or a number is out of range.

    Source: Schulman et al., arXiv:1506.02438, Eq. 16; time limits: Pardo et al., arXiv:1712.00378.

    >>> import jax.numpy as jnp
import numpy as np
    >>> no = jnp.zeros(2, bool)
    >>> print(gae(jnp.ones(2), jnp.zeros(2), jnp.zeros(2), no, no, discount=0.5, lambda_=1.0))
    [1.5 1. ]
    """
    rewards, values, next_values, terminated, truncated = _constants(
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
    )
    gamma, lambda_ = _checked(discount, lambda_, rewards.dtype)
    bootstrap = jnp.where(terminated, jnp.zeros_like(next_values), gamma * next_values)
    ended = terminated | truncated
    return _accumulate(
        rewards + bootstrap - values,
        jnp.where(ended, jnp.zeros_like(rewards), gamma * lambda_),
    )


def lambda_returns(
    rewards: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: jax.typing.ArrayLike,
    lambda_: jax.typing.ArrayLike,
) -> jax.Array:
    r"""Returns that trust the values with weight 1 - lambda at every step: TD(lambda).

        .. math:: G_t = r_t + \gamma (1 - \mathrm{terminated}_t)
                  \left((1 - \lambda) V(s'_t) + \lambda G_{t+1}\right)

        with V(s'_t) for G_{t+1} at a truncation and after the last step.

        Args:
          rewards, next_values, terminated, truncated, discount, lambda_: as in `gae`.

        Returns:
          [time, ...] float32 at least, constants for gradients.

        Raises:
          ValueError: as `gae`.

        Source: Sutton and Barto, Reinforcement Learning, 2nd ed., Eq. 12.18.

        >>> import jax.numpy as jnp
    import numpy as np
        >>> no = jnp.zeros(2, bool)
        >>> print(lambda_returns(jnp.ones(2), jnp.full(2, 4.0), no, no, discount=0.5, lambda_=1.0))
        [2.5 3. ]
    """
    rewards, next_values, terminated, truncated = _constants(
        rewards=rewards, next_values=next_values, terminated=terminated, truncated=truncated
    )
    gamma, lambda_ = _checked(discount, lambda_, rewards.dtype)
    last = jnp.zeros_like(truncated).at[-1].set(True)
    ends = truncated | last
    mixed = jnp.where(ends, next_values, (1 - lambda_) * next_values)
    zeros = jnp.zeros_like(rewards)
    return _accumulate(
        rewards + jnp.where(terminated, zeros, gamma * mixed),
        jnp.where(terminated | ends, zeros, gamma * lambda_),
    )


class VTrace(NamedTuple):
    """Result of `vtrace`.

    Attributes:
      targets: [time, ...], v_t, what the value is to learn.
      advantages: [time, ...], the weights of the policy gradient, with rho_t in them.
    """

    targets: jax.Array
    advantages: jax.Array


def vtrace(
    log_ratios: jax.Array,
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: jax.typing.ArrayLike,
    lambda_: jax.typing.ArrayLike = 1.0,
    clip_rho: jax.typing.ArrayLike = 1.0,
    clip_c: jax.typing.ArrayLike = 1.0,
) -> VTrace:
    r"""Targets for a policy from the transitions of another one.

    .. math::
        \rho_t &= \min(\bar\rho, \pi / \mu), \quad c_t = \lambda \min(\bar c, \pi / \mu) \\
        v_t - V(s_t) &= \rho_t \delta_t + \gamma c_t (v_{t+1} - V(s_{t+1})) \\
        A_t &= \rho_t (r_t + \gamma v_{t+1} - V(s_t))

    Ends of episodes cut the recursion as in `gae`: v_{t+1} is 0 where terminated, V(s'_t) where
    truncated and after the last step. With ratios of 1 the targets are the `lambda_returns`.

    Args:
      log_ratios: [time, ...] float, log pi(a_t | s_t) - log mu(a_t | s_t); mu is the policy that
        acted.
      rewards, values, next_values, terminated, truncated, discount, lambda_: as in `gae`.
      clip_rho: the largest rho_t, > 0; sets which policy the values belong to.
      clip_c: the largest c_t before lambda, > 0; sets only how fast they get there.

    Returns:
      `VTrace`, constants for gradients.

    Raises:
      ValueError: as `gae`.

    Source: Espeholt et al., arXiv:1802.01561, Eq. 1 and Section 4.2.
    """
    check_number("clip_rho", clip_rho, above=0.0)
    check_number("clip_c", clip_c, above=0.0)
    log_ratios, rewards, values, next_values, terminated, truncated = _constants(
        log_ratios=log_ratios,
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
    )
    gamma, lambda_ = _checked(discount, lambda_, rewards.dtype)
    # No more than the dtype holds: an infinite weight of an error of 0 would be NaN.
    largest = jnp.asarray(np.finfo(rewards.dtype).max, rewards.dtype)
    ratios = jnp.minimum(jnp.exp(log_ratios), largest)
    rho = jnp.minimum(jnp.asarray(clip_rho, rewards.dtype), ratios)
    c = lambda_ * jnp.minimum(jnp.asarray(clip_c, rewards.dtype), ratios)
    zeros = jnp.zeros_like(rewards)
    deltas = rho * (rewards + jnp.where(terminated, zeros, gamma * next_values) - values)
    corrections = _accumulate(deltas, jnp.where(terminated | truncated, zeros, gamma * c))
    targets = values + corrections
    after = jnp.concatenate([targets[1:], next_values[-1:]])
    after = jnp.where(truncated, next_values, after)
    bootstrap = jnp.where(terminated, zeros, gamma * after)
    return VTrace(targets, rho * (rewards + bootstrap - values))


def group_relative(
    rewards: jax.Array,
    *,
    scale: str = "std",
    epsilon: float = 1e-6,
    axis: int = -1,
) -> jax.Array:
    r"""Rewards against the mean of their group.

    .. math:: A_i = \frac{r_i - \bar r}{s + \epsilon}, \qquad
              s^2 = \frac{1}{G - 1} \sum_i (r_i - \bar r)^2

    A group of equal rewards, and a group of one, has advantages of 0.

    Args:
      rewards: [..., G] float, G rewards of a group along `axis`.
      scale: "std", or "none" for A_i = r_i - mean (Dr. GRPO).
      epsilon: added to s.
      axis: the axis of the group.

    Returns:
      Same shape, float32 at least, constants for gradients.

    Raises:
      ValueError: an unknown `scale`, no such axis, or an empty one.

    Source: Shao et al., arXiv:2402.03300; "none": Liu et al., arXiv:2503.20783. The papers do not
    say which s; G - 1 is that of the released codes (verl, TRL).
    """
    check_choice("scale", scale, ("std", "none"))
    size = _group_size(rewards, axis, at_least=1)
    rewards = widened(jax.lax.stop_gradient(rewards))
    centred = rewards - jnp.mean(rewards, axis, keepdims=True)
    # The mean of equal numbers is rounded: what is left of them is noise, which s would blow up.
    equal = jnp.min(rewards, axis, keepdims=True) == jnp.max(rewards, axis, keepdims=True)
    centred = jnp.where(equal, jnp.zeros_like(centred), centred)
    if scale == "none":
        return centred
    variance = jnp.sum(jnp.square(centred), axis, keepdims=True) / max(size - 1, 1)
    return centred / (jnp.sqrt(variance) + epsilon)


def leave_one_out(rewards: jax.Array, *, axis: int = -1) -> jax.Array:
    r"""Rewards against the mean of the others in their group.

        .. math:: A_i = r_i - \frac{1}{G - 1} \sum_{j \ne i} r_j

        Args:
          rewards: [..., G] float, G >= 2 rewards of a group along `axis`.
          axis: the axis of the group.

        Returns:
          Same shape, float32 at least, constants for gradients.

        Raises:
          ValueError: a group of one, no such axis, or an empty one.

        Source: RLOO, Ahmadian et al., arXiv:2402.14740.

        >>> import jax.numpy as jnp
    import numpy as np
        >>> print(leave_one_out(jnp.array([1.0, 0.0, 0.0])))
        [ 1.  -0.5 -0.5]
    """
    size = _group_size(rewards, axis, at_least=2)
    rewards = widened(jax.lax.stop_gradient(rewards))
    return (rewards - jnp.mean(rewards, axis, keepdims=True)) * (size / (size - 1))


def _group_size(rewards: jax.Array, axis: int, *, at_least: int) -> int:
    shape = jnp.shape(rewards)
    if not -len(shape) <= axis < len(shape):
        raise FieldError("axis", f"be one of rewards, whose shape is {shape}", axis)
    if shape[axis] < at_least:
        raise FieldError(
            "rewards", f"have at least {at_least} entries along axis {axis}", f"shape {shape}"
        )
    return shape[axis]


def _accumulate(terms: jax.Array, factors: jax.Array) -> jax.Array:
    """x_t = terms_t + factors_t x_{t+1}, from the last to the first; nothing after the last."""

    def step(carry: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        term, factor = each
        carry = term + factor * carry
        return carry, carry

    start = jnp.zeros_like(terms[0])
    return jax.lax.scan(step, start, (terms, factors), reverse=True, unroll=8)[1]


def _constants(**arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays without gradients, in float32 at least or bool; their shapes are checked."""
    (first, shape), *others = ((name, jnp.shape(array)) for name, array in arrays.items())
    if not shape or shape[0] == 0:
        raise FieldError(first, "have a time axis of at least one step", f"shape {shape}")
    for name, other in others:
        if other != shape:
            raise FieldError(name, f"have the shape of {first}, {shape}", other)
    return tuple(
        jnp.asarray(array).astype(bool)
        if name in ("terminated", "truncated")
        else widened(jax.lax.stop_gradient(jnp.asarray(array)))
        for name, array in arrays.items()
    )


def _checked(
    discount: jax.typing.ArrayLike, lambda_: jax.typing.ArrayLike, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    check_number("discount", discount, at_least=0.0, at_most=1.0)
    check_number("lambda_", lambda_, at_least=0.0, at_most=1.0)
    return jnp.asarray(discount, dtype), jnp.asarray(lambda_, dtype)
