r"""Advantages: how much better an action was than the average action of the policy.

Arrays are [time, ...]. Transition t goes from s_t to s'_t, the state before any reset. An episode
ends in one of two ways: where it is `terminated`, nothing follows and the next value is 0; where it
is `truncated` by a time limit, it would have gone on, and V(s'_t) stands for the rest. Where both
are set, `terminated` wins. `next_values` is V(s'_t) for every t; at a truncation it is the value of
the final observation, not of the one after the reset.

The results are targets: no gradient flows through them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax._dtypes import widened
from trustjax._sharding import AxisName, summed


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
      rewards: Rewards r_t, float [time, ...].
      values: V(s_t), same shape.
      next_values: V(s'_t) of the observation before a reset, same shape.
      terminated: Whether the episode terminated at the step, bool, same shape.
      truncated: Whether a time limit ended the episode at the step, bool, same shape.
      discount: Discount factor gamma per step, in [0, 1].
      lambda_: Weight lambda in [0, 1]; 0 bootstraps after one step, 1 takes the whole return.

    Returns:
      Advantages [time, ...] in float32 at least, constants for gradients. The targets of the value
      are `gae(...) + values`, which equal the `lambda_returns`.

    Raises:
      ValueError: The shapes differ, there is no step, or a hyperparameter is out of range.

    Source: Schulman et al., arXiv:1506.02438, Eq. 16; time limits: Pardo et al., arXiv:1712.00378.

    >>> import jax.numpy as jnp
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
    # A truncated episode bootstraps from V(s'_t), a terminated one does not.
    bootstrap = jnp.where(terminated, jnp.zeros_like(next_values), gamma * next_values)
    ended = terminated | truncated
    # Eq. 16 as a recursion: sum_l (gamma lambda)^l delta_{t+l}, which stops where an episode ends.
    return accumulate(
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
    r"""Returns that bootstrap from the values with weight 1 - lambda at every step: TD(lambda).

    .. math:: G_t = r_t + \gamma (1 - \mathrm{terminated}_t)
              \left((1 - \lambda) V(s'_t) + \lambda G_{t+1}\right)

    At a truncation and after the last step, V(s'_t) takes the place of G_{t+1}.

    Args:
      rewards, next_values, terminated, truncated, discount, lambda_: As in `gae`.

    Returns:
      Returns [time, ...] in float32 at least, constants for gradients.

    Raises:
      ValueError: As `gae`.

    Source: Sutton and Barto, Reinforcement Learning, 2nd ed., Eq. 12.18.

    >>> import jax.numpy as jnp
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
    return accumulate(
        rewards + jnp.where(terminated, zeros, gamma * mixed),
        jnp.where(terminated | ends, zeros, gamma * lambda_),
    )


class VTrace(NamedTuple):
    """The result of `vtrace`.

    Attributes:
      targets: Targets v_t of the value, [time, ...].
      advantages: Advantages A_t [time, ...], which weight log pi in the policy gradient and include
        the factor rho_t.
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
    r"""Off-policy targets: the value and advantages of one policy from transitions of another.

    .. math::
        \rho_t &= \min(\bar\rho, \pi / \mu), \quad c_t = \lambda \min(\bar c, \pi / \mu) \\
        v_t - V(s_t) &= \rho_t \delta_t + \gamma c_t (v_{t+1} - V(s_{t+1})) \\
        A_t &= \rho_t (r_t + \gamma v_{t+1} - V(s_t))

    The recursion stops at the ends of episodes as in `gae`: v_{t+1} is 0 where the episode is
    terminated, and V(s'_t) where it is truncated and after the last step. With ratios of 1 the
    targets are the `lambda_returns`.

    Args:
      log_ratios: log pi(a_t | s_t) - log mu(a_t | s_t), float [time, ...], where mu is the policy
        that acted.
      rewards, values, next_values, terminated, truncated, discount, lambda_: As in `gae`.
      clip_rho: Bound of rho_t, > 0; it determines the policy whose values the targets estimate.
      clip_c: Bound of c_t before the factor lambda, > 0; it affects only the speed of convergence.

    Returns:
      `VTrace` of constants for gradients.

    Raises:
      ValueError: As `gae`.

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
    # Bounded by the largest number of the dtype: an infinite ratio times an error of 0 is NaN.
    largest = jnp.asarray(np.finfo(rewards.dtype).max, rewards.dtype)
    ratios = jnp.minimum(jnp.exp(log_ratios), largest)
    # The truncated importance weights of Eq. 1, with lambda as an additional factor of c.
    rho = jnp.minimum(jnp.asarray(clip_rho, rewards.dtype), ratios)
    c = lambda_ * jnp.minimum(jnp.asarray(clip_c, rewards.dtype), ratios)
    zeros = jnp.zeros_like(rewards)
    # Eq. 1 as a recursion from the last step to the first.
    deltas = rho * (rewards + jnp.where(terminated, zeros, gamma * next_values) - values)
    corrections = accumulate(deltas, jnp.where(terminated | truncated, zeros, gamma * c))
    targets = values + corrections
    # Section 4.2: the advantage bootstraps from v_{t+1}, where that belongs to the same episode.
    next_targets = jnp.concatenate([targets[1:], next_values[-1:]])
    next_targets = jnp.where(truncated, next_values, next_targets)
    bootstrap = jnp.where(terminated, zeros, gamma * next_targets)
    return VTrace(targets, rho * (rewards + bootstrap - values))


def group_relative(
    rewards: jax.Array,
    *,
    scale: str = "std",
    epsilon: float = 1e-6,
    axis: int = -1,
    ddof: int = 1,
    tolerance: float = 1e-6,
    group_size: int | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Rewards relative to the mean of their group, in units of its standard deviation.

    .. math:: A_i = \frac{r_i - \bar r}{s + \epsilon}, \qquad
              s^2 = \frac{1}{G - ddof} \sum_i (r_i - \bar r)^2

    A group of equal rewards and a group of one reward have advantages of 0. (In verl, the advantage
    in a group of one is the reward itself.)

    Args:
      rewards: Rewards of each group along `axis`, float [..., G].
      scale: "std"; "none" for A_i = r_i minus the mean (Dr. GRPO); or "batch" for one s, that of
        the rewards of all groups around their common mean (Lite PPO, TRL).
      epsilon: Small number that is added to s; TRL has 1e-4.
      axis: Axis of the group.
      ddof: 1 or 0: s^2 divides by G - ddof.
      tolerance: Rewards of a group whose maximum and minimum differ by no more than this count as
        equal, >= 0: sums of rounded numbers do, and s would amplify what they differ by.
      group_size: G, where `rewards` hold the groups behind each other along `axis`, [..., P G]
        (TRL's and verl's batches); None where the axis is the group.
      axis_name: For "batch", the mesh axes over which groups are split inside `jax.shard_map`.

    Returns:
      Advantages of the same shape in float32 at least, constants for gradients.

    Raises:
      ValueError: `scale` is unknown, the axis does not exist or is empty, a number is out of range,
        or a group is not whole on a device.

    Source: Shao et al., arXiv:2402.03300; "none": Liu et al., arXiv:2503.20783; "batch": Liu et
    al., arXiv:2508.08221. The papers do not define s; the released codes (verl, TRL) divide by
    G - 1.
    """
    check_choice("scale", scale, ("std", "none", "batch"))
    check_number("tolerance", tolerance, at_least=0.0)
    if ddof not in (0, 1):
        raise FieldError("ddof", "be 0 or 1", ddof)
    if axis_name is not None and scale != "batch":
        raise FieldError("axis_name", 'be None for a scale other than "batch"', axis_name)
    shape = jnp.shape(rewards)
    rewards, axis, size = _grouped(rewards, axis, group_size, at_least=1)
    centred = rewards - jnp.mean(rewards, axis, keepdims=True)
    # The mean of equal numbers is rounded, and dividing by s would amplify the difference.
    lowest = jnp.min(rewards, axis, keepdims=True)
    highest = jnp.max(rewards, axis, keepdims=True)
    equal = (lowest == highest) | (highest - lowest <= tolerance)
    centred = jnp.where(equal, jnp.zeros_like(centred), centred)
    if scale == "std":
        squares = jnp.sum(jnp.square(centred), axis, keepdims=True)
        centred = centred / (jnp.sqrt(squares / max(size - ddof, 1)) + epsilon)
    if scale == "batch":
        centred = centred / (_deviation(rewards, ddof, axis_name) + epsilon)
    return centred.reshape(shape)


def leave_one_out(
    rewards: jax.Array, *, axis: int = -1, group_size: int | None = None
) -> jax.Array:
    r"""Rewards relative to the mean of the other rewards in their group.

    .. math:: A_i = r_i - \frac{1}{G - 1} \sum_{j \ne i} r_j

    Args:
      rewards: Rewards of each group along `axis`, float [..., G] with G >= 2.
      axis: Axis of the group.
      group_size: As in `group_relative`.

    Returns:
      Advantages of the same shape in float32 at least, constants for gradients.

    Raises:
      ValueError: The axis does not exist or has fewer than two entries, or a group is not whole on
        a device.

    Source: RLOO, Ahmadian et al., arXiv:2402.14740.

    >>> import jax.numpy as jnp
    >>> print(leave_one_out(jnp.array([3.0, 0.0, 0.0])))
    [ 3.  -1.5 -1.5]
    """
    shape = jnp.shape(rewards)
    rewards, axis, size = _grouped(rewards, axis, group_size, at_least=2)
    # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1).
    advantages = (rewards - jnp.mean(rewards, axis, keepdims=True)) * (size / (size - 1))
    return advantages.reshape(shape)


def _grouped(
    rewards: jax.Array, axis: int, group_size: int | None, *, at_least: int
) -> tuple[jax.Array, int, int]:
    """Rewards as constants with one axis for the group, that axis, and the size of a group."""
    shape = jnp.shape(rewards)
    if not -len(shape) <= axis < len(shape):
        raise FieldError("axis", f"be an axis of rewards, whose shape is {shape}", axis)
    axis = axis % len(shape)
    check_count("group_size", group_size, at_least=at_least)
    size = shape[axis] if group_size is None else group_size
    if size < at_least or shape[axis] < at_least:
        raise FieldError(
            "rewards", f"have at least {at_least} entries along axis {axis}", f"shape {shape}"
        )
    _check_whole(rewards, axis, size)
    rewards = widened(jax.lax.stop_gradient(rewards))
    grouped = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    return rewards.reshape(grouped), axis + 1, size


def _check_whole(rewards: jax.Array, axis: int, size: int) -> None:
    """Raises FieldError unless every device holds whole groups along the axis."""
    held = jnp.shape(rewards)[axis]
    if isinstance(rewards, jax.Array) and not isinstance(rewards, jax.core.Tracer):
        held = rewards.sharding.shard_shape(rewards.shape)[axis]
    if held % size != 0:
        raise FieldError(
            "rewards",
            f"have whole groups of {size} on every device along axis {axis}",
            f"{held} entries on a device",
            advice="split a batch between groups, not within them",
        )


def _deviation(rewards: jax.Array, ddof: int, axis_name: AxisName | None) -> jax.Array:
    """The standard deviation of all rewards, over all devices."""
    count = summed(jnp.asarray(rewards.size, rewards.dtype), axis_name)
    mean = summed(jnp.sum(rewards), axis_name) / count
    squares = summed(jnp.sum(jnp.square(rewards - mean)), axis_name)
    return jnp.sqrt(squares / jnp.maximum(count - ddof, 1))


def accumulate(terms: jax.Array, factors: jax.Array) -> jax.Array:
    """x_t = terms_t + factors_t x_{t+1} from the last step to the first, with 0 after the last."""

    def step(carry: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        term, factor = each
        carry = term + factor * carry
        return carry, carry

    start = jnp.zeros_like(terms[0])
    return jax.lax.scan(step, start, (terms, factors), reverse=True, unroll=8)[1]


def _constants(**arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays as constants in float32 at least, flags as bool; raises unless shapes agree."""
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
