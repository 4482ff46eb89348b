r"""Estimates of a KL divergence from the log-probabilities of sampled tokens.

With d = log pi - log pi_ref of a token that was drawn from pi:

    name   value               gradient by log pi   property
    k1     d                   1                    unbiased, any sign; its mean gradient is 0
    k2     d^2 / 2             d                    biased, but its mean gradient is that of the KL
    k3     exp(-d) + d - 1     1 - exp(-d)          unbiased, >= 0; mean gradient of KL(pi_ref|pi)
    abs    |d|                 sign(d)              the penalty of KL-Cov
    k1+    d                   d                    value of k1 with the gradient of k2
    k3+    exp(-d) + d - 1     d                    value of k3 with the gradient of k2

k1 belongs into rewards, not into losses. The estimate of KL(pi_ref || pi) from samples of pi_ref is
`kl_estimate(reference_log_probs, log_probs, kind)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trustjax._checks import check_choice
from trustjax.losses._ratio import bounded_log_ratio, log_ratio
from trustjax.losses._shapes import check_shape


def _k3(d: jax.Array) -> jax.Array:
    # exp(-d) - 1 as one function: near d = 0 the difference would lose all digits.
    exponent = bounded_log_ratio(-d)
    return jnp.expm1(exponent) - exponent


def _k2(d: jax.Array) -> jax.Array:
    return jnp.square(d) / 2


def _straight_through(value: jax.Array, gradient_of: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(value - gradient_of) + gradient_of


KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": lambda d: d,
    "k2": _k2,
    "k3": _k3,
    "abs": jnp.abs,
    "k1+": lambda d: _straight_through(d, _k2(d)),
    "k3+": lambda d: _straight_through(_k3(d), _k2(d)),
}


def kl_estimate(
    log_probs: jax.Array, reference_log_probs: jax.Array, kind: str = "k3"
) -> jax.Array:
    r"""Estimates of KL(pi || pi_ref), one per token that was drawn from pi.

    .. math:: k_1 = d, \quad k_2 = d^2 / 2, \quad k_3 = e^{-d} + d - 1, \qquad
              d = \log\pi - \log\pi_{ref}

    exp(-d) is bounded by e^20, as in verl; unlike there, a token beyond the bound keeps the
    gradient that it has at the bound, so that the policy is driven back. TRL has no bound.

    Args:
      log_probs: log pi of the tokens, float [...].
      reference_log_probs: log pi_ref of the same tokens, same shape. Gradients flow into both.
      kind: "k1", "k2", "k3", "abs", "k1+" or "k3+".

    Returns:
      Estimates [...] in nats, in float32 at least.

    Raises:
      ValueError: The shapes differ, or `kind` is unknown.

    Source: Schulman, Approximating KL Divergence (2020); "+": verl.

    >>> import jax.numpy as jnp
    >>> print(kl_estimate(jnp.array([-1.0]), jnp.array([-1.5]), "k2"))
    [0.125]
    """
    check_choice("kl", kind, KL_ESTIMATORS)
    check_shape("reference_log_probs", reference_log_probs, log_probs)
    return KL_ESTIMATORS[kind](log_ratio(log_probs, reference_log_probs))
