"""Backtracking: the longest step along a direction that a trust region and the loss allow."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._loops import while_loop

# Maps a fraction of the full step to the loss and the divergence there.
Evaluate = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class SearchResult(NamedTuple):
    """The outcome of a line search.

    Attributes:
      num_tried: Int32 [], the number of steps that were tried.
      accepted: Bool [], whether the last of them was accepted.
      fraction: Float [], the share of the full step in the last of them.
      divergence: Float [], the divergence that the last of them made.
    """

    num_tried: jax.Array
    accepted: jax.Array
    fraction: jax.Array
    divergence: jax.Array


def backtracking(
    evaluate: Evaluate,
    *,
    loss: jax.Array,
    expected_decrease: jax.Array,
    radius: jax.Array,
    has_direction: jax.Array,
    backtrack: jax.typing.ArrayLike,
    max_backtracks: int,
    accept_ratio: jax.typing.ArrayLike,
    slack: jax.typing.ArrayLike,
) -> SearchResult:
    r"""Tries the fractions 1, beta, beta^2, ... of a step until one is accepted.

    .. math:: D(\beta^k) \le c \, \delta, \qquad
              L(0) - L(\beta^k) \ge r \, \beta^k \, d, \qquad L(\beta^k) < L(0)

    Args:
      evaluate: `fraction -> (loss, divergence)` at that fraction of the full step.
      loss: Float [], L(0), the loss without a step.
      expected_decrease: Float [], d, the fall of the loss that its gradient promises for the full
        step.
      radius: Float [], delta.
      has_direction: Bool [], False if there is nothing to try. Then no step is accepted.
      backtrack: beta, in (0, 1].
      max_backtracks: The largest number of steps to try.
      accept_ratio: r, >= 0.
      slack: c, >= 1.

    Returns:
      `SearchResult`.

    Source: arXiv:1502.05477, Appendix C.
    """
    dtype = radius.dtype
    # The full step is built to make a divergence of delta itself, so rounding must not refuse it.
    rounding = float(np.finfo(dtype).eps) ** 0.5
    highest = jnp.asarray(slack, dtype) * radius * (1 + rounding)

    def attempt(search: SearchResult) -> SearchResult:
        # Not **, which outside of jit compiles a program for every exponent.
        fraction = jax.lax.pow(jnp.asarray(backtrack, dtype), search.num_tried)
        new_loss, divergence = evaluate(fraction)
        promised = jnp.asarray(accept_ratio, dtype) * fraction * expected_decrease
        accepted = (
            jnp.isfinite(new_loss)
            & (divergence <= highest)
            & (new_loss < loss)  # a loss that stayed the same number did not fall
            & (loss - new_loss >= promised)
        )
        return SearchResult(search.num_tried + 1, accepted, fraction, divergence)

    # Without a direction the search starts with all its tries used up.
    zero = jnp.zeros_like(radius)
    return while_loop(
        lambda search: ~search.accepted & (search.num_tried < max_backtracks),
        attempt,
        SearchResult(jnp.where(has_direction, 0, max_backtracks), jnp.array(False), zero, zero),
    )
