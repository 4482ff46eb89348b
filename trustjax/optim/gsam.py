r"""Surrogate gap guided sharpness-aware minimization (GSAM).

Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu, arXiv:2203.08065 (ICLR 2022).

SAM makes the loss at the attacked weights small, but a small loss there does not yet mean a small
gap to the clean loss. GSAM also ascends the part of the clean gradient that is orthogonal to the
attacked one, which closes the gap and leaves the attacked loss, to first order, as it is:

    eps    = rho g / ||g||                     g = grad L(w)
    g_p    = grad L(w + eps)
    g_perp = g - (g . g_p / ||g_p||^2) g_p     the part of g orthogonal to g_p
    g'     = g_p - alpha g_perp,  w <- base(w, g')
    rho    = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)

Products and norms run over all leaves seen as one vector. The authors' codes differ in two places:
google-research/big_vision can descend on the clean loss instead (`descend="clean"`), and its
adaptive attack is rho |w| g / ||g||, with the first power of |w| and a norm without it. Here, as in
juntang-zhuang/GSAM, the adaptive attack is that of ASAM.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._dtypes import is_floating, reduction_dtype, widened
from trustjax._sharding import AxisName
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree
from trustjax.optim.sam import SAMState

GSAMState = SAMState  # same fields


def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.4,
    *,
    descend: Literal["attacked", "clean"] = "attacked",
    adaptive: bool | Mask = False,
    eta: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""`sam` that also closes the gap between the attacked and the clean loss.

    .. math:: g' = g_p - \alpha \, g_\perp, \qquad g_p = \nabla L(w + \epsilon), \qquad
              g_\perp = g - \frac{\langle g, g_p \rangle}{\|g_p\|^2} g_p

    `update` takes `params` and `grad_fn` as in `sam`. alpha = 0 is SAM. If g_p is zero, there is
    nothing to project on and g_perp is g.

    Args:
      rho: Radius, >= 0; a number or a schedule. The paper ties it to the learning rate, as
        `radius_schedule` does.
      alpha: Weight of the orthogonal part, >= 0; a number or a schedule.
      descend: "attacked", or "clean" for the form of big_vision that descends on the clean loss,
        :math:`g' = g + \alpha (g_p - \langle g_p, g \rangle g / \|g\|^2)`. It is closer to
        training without an attack and has fewer spikes of the loss.
      adaptive: Whether to scale the ball, as in `sam`.
      eta: Added to abs(w), as in `sam`.
      mask: The leaves to attack, as in `sam`; the decomposition runs over all leaves.
      axis_name: Axes of m-sharpness, as in `sam`; each shard decomposes its own gradients, and the
        results are averaged.
      on_nonfinite: As in `sam`, for the joined gradient.

    Returns:
      A transform whose state is `SAMState`. It cannot stand in `alternating`, where no call sees
      both gradients.

    Raises:
      ValueError: A number is negative, or `descend` or `on_nonfinite` is unknown; in `init` and
        `update`, parameters are hidden by `optax.masked` or `optax.partition`; in `update`,
        `params` or `grad_fn` is missing, or `alternating` calls.

    Source: arXiv:2203.08065, Algorithm 1; alpha is that of the example in juntang-zhuang/GSAM.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
    >>> tx = optax.chain(gsam(0.05, alpha=0.4), optax.sgd(0.01))
    >>> w = jnp.array([2.0, -1.0])
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(-100 * updates)
    [  1.9773464 -10.496509 ]
    """
    check_scalar("rho", rho, at_least=0.0)
    check_scalar("alpha", alpha, at_least=0.0)
    check_scalar("eta", eta, at_least=0.0)
    check_choice("descend", descend, ("attacked", "clean"))
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)

    def init_fn(params: PyTree) -> SAMState:
        _attack.check_params("gsam", params, mask=mask, adaptive=adaptive)
        return SAMState(**_attack.initial_scalars(params))

    def update_fn(
        updates: PyTree,
        state: SAMState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        attack_only: bool = False,
        **extra_args: object,
    ) -> tuple[PyTree, SAMState]:
        del extra_args
        params, grad_fn = _attack.second_pass_arguments(
            "gsam", params, grad_fn, axis_name, attack_only=attack_only, in_two_calls=False
        )
        radius = _attack.value_at(rho, state.count)
        # eps = rho g / ||g||, the attack of SAM.
        attack, distance = _attack.ascent(
            _attack.attacked_gradient(updates, params, mask),
            _attack.scaling(params, adaptive, eta),
            radius,
        )
        weight = jnp.asarray(_attack.value_at(alpha, state.count))

        def join(attacked: PyTree, clean: PyTree) -> PyTree:
            if descend == "attacked":  # g' = g_p - alpha g_perp, with g split along g_p
                return _add_scaled(attacked, -weight, _orthogonal_part(clean, attacked))
            # big_vision: g' = g + alpha times the part of g_p that is orthogonal to g.
            return _add_scaled(clean, weight, _orthogonal_part(attacked, clean))

        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite, join
        )
        return gradient, SAMState(**_attack.next_scalars(state, radius, distance, broke, axis_name))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def radius_schedule(
    learning_rate: optax.Schedule,
    *,
    rho_min: jax.typing.ArrayLike,
    rho_max: jax.typing.ArrayLike,
    learning_rate_max: jax.typing.ArrayLike,
    learning_rate_min: jax.typing.ArrayLike = 0.0,
) -> optax.Schedule:
    r"""A schedule that ties a radius to the learning rate, as GSAM does.

    .. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
              \frac{lr_t - lr_{min}}{lr_{max} - lr_{min}}

    An attack counts its calls. In front of `optax.MultiSteps(base, k)`, which counts steps of k
    calls, give `rho=lambda count: radius(count // k)`.

    A learning rate outside of its two bounds, as in a warm-up from 0, gives the radius of the
    nearer bound.

    Args:
      learning_rate: Learning rate schedule of the base optimizer.
      rho_min: Radius at `learning_rate_min`, >= 0.
      rho_max: Radius at `learning_rate_max`, >= `rho_min`.
      learning_rate_max: Highest learning rate of the schedule.
      learning_rate_min: Lowest learning rate of the schedule. If the two are equal, the radius is
        `rho_max` throughout.

    Returns:
      A schedule `count -> radius`, for `rho` of `gsam` or of any other attack.

    Raises:
      ValueError: `learning_rate` is not a schedule, `rho_min` is negative, or a maximum is below
        its minimum.

    Source: arXiv:2203.08065.

    >>> import optax
    >>> rate = optax.linear_schedule(0.1, 0.0, 4)
    >>> rho = radius_schedule(rate, rho_min=0.02, rho_max=0.06, learning_rate_max=0.1)
    >>> [round(float(rho(step)), 3) for step in range(5)]
    [0.06, 0.05, 0.04, 0.03, 0.02]
    """
    if not callable(learning_rate):
        raise FieldError("learning_rate", "be a schedule", repr(learning_rate))
    check_scalar("rho_min", rho_min, at_least=0.0)
    for low, high, low_name in (
        (rho_min, rho_max, "rho"),
        (learning_rate_min, learning_rate_max, "learning_rate"),
    ):
        if not isinstance(low, jax.core.Tracer):
            check_scalar(f"{low_name}_max", high, at_least=float(np.max(np.asarray(low))))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        rate_min, rate_max, low, high = map(
            jnp.asarray, (learning_rate_min, learning_rate_max, rho_min, rho_max)
        )
        span = rate_max - rate_min
        constant = span == 0  # a constant rate: the share is 1, and not 0 / 0
        share = (learning_rate(count) - rate_min) / jnp.where(constant, jnp.ones_like(span), span)
        share = jnp.where(constant, jnp.ones_like(share), share)
        # Rounding may carry the sum over its upper end, though not the share.
        return jnp.clip(low + (high - low) * jnp.clip(share, 0, 1), low, high)

    return schedule


def _orthogonal_part(vector: PyTree, to: PyTree) -> PyTree:
    """`vector` minus its projection on `to`; `vector` itself if `to` is zero."""
    # The projection is <v, u> u with u = to / ||to||. In <v, to> / <to, to> both products would
    # under- and overflow long before their quotient does.
    unit, _ = _attack.normalized(to)
    return _add_scaled(vector, -_dot(vector, unit), unit)


def _add_scaled(left: PyTree, factor: jax.typing.ArrayLike, right: PyTree) -> PyTree:
    """`left + factor * right` on the floating leaves, in float32 at least."""

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = widened(a), widened(b)
        return a + jnp.asarray(factor, a.dtype) * b

    return jax.tree.map(lambda a, b: add(a, b) if is_floating(a) else a, left, right)


def _dot(left: PyTree, right: PyTree) -> jax.Array:
    """Inner product over the floating leaves, in float32 at least."""
    dtype = reduction_dtype(left)
    total = jnp.zeros([], dtype)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if is_floating(a):
            total = total + jnp.sum(a.astype(dtype) * b.astype(dtype))
    return total
