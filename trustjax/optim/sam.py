r"""Sharpness-aware minimization (SAM) and its scale-invariant form (ASAM).

SAM: Foret, Kleiner, Mobahi, Neyshabur, arXiv:2010.01412, Algorithm 1 and Eq. 2-3.
ASAM: Kwon, Kim, Park, Choi, arXiv:2102.11600.

Both descend along the gradient taken at the worst point of a ball around the weights w:

    SAM    eps = rho g / ||g||                   g = grad L(w)
    ASAM   eps = rho T^2 g / ||T g||             T = |w| + eta
    then   g' = grad L(w + eps),  w <- base(w, g')

The norm is global, over all attacked leaves seen as one vector. The base optimizer sees only g',
at w. Where the authors' codes differ: google-research/sam divides by the bare norm, nan at zero
gradient; SamsungLabs/ASAM scales only leaves named "weight" and takes T = 1 on the others
(`adaptive` as a mask does that).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import check_choice, check_number
from trustjax._sharding import AxisName
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree


class SAMState(NamedTuple):
    """State of `sam` and `asam`.

    Attributes:
      count: int32 [], steps so far.
      radius: float [], rho of the last step.
      distance: float [], length of the last attack in its (scaled) norm: rho, or 0 where the
        gradient was zero.
      nonfinite_count: int32 [], steps whose second gradient was not finite although the first one
        was (see `on_nonfinite` of `sam`).
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    radius: jax.Array
    distance: jax.Array
    nonfinite_count: jax.Array


def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    adaptive: bool | Mask = False,
    eta: jax.typing.ArrayLike = 0.0,
    norm: Literal["l2", "linf"] = "l2",
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the gradient at the attacked weights.

    .. math:: \epsilon = \rho \frac{T^2 g}{\|T g\|_2}, \qquad
              g' = \nabla L(w + \epsilon) \text{ with } \epsilon \text{ held constant}

    T = 1 for SAM, T = abs(w) + eta where `adaptive`. The result has the sign of a gradient: any
    Optax optimizer follows in a chain, and gradient clipping stands between.

    `update` takes `params` and `grad_fn(params) -> gradients`, the gradient on the same batch with
    the same random key; it is called once. Other extra arguments are ignored. A zero gradient
    leaves the weights where they are.

    Args:
      rho: radius of the ball, >= 0; a number (it may be traced) or a schedule of the step count.
      adaptive: scale the ball by T = abs(w) + eta; a tree of bools, or a callable that makes one
        from the parameters, scales only some leaves.
      eta: added to abs(w), so that weights at zero are attacked as well; >= 0.
      norm: "l2", or "linf" for :math:`\epsilon = \rho T \, \mathrm{sign}(g)`.
      mask: tree of bools, or a callable that makes one from the parameters: the leaves to attack.
        The others stay out of the norm; their gradient is still the one at the attacked point.
      axis_name: mesh axis or axes over which the second gradient is averaged, for m-sharpness
        under `jax.shard_map` or `jax.vmap`: pass `update` the local gradient, and each shard
        attacks on its own. Not for `alternating`, whose attacked weights are one for all shards.
      on_nonfinite: what to descend on where the gradient at the attacked weights holds nan or inf
        although the first gradient and the radius are finite: "clean", the first gradient, which is
        a step of the base optimizer; or "propagate", what came out. Both count the event in the
        state. What is broken at the weights themselves stays broken. "clean" keeps the first
        gradient in memory during the second pass.

    Returns:
      A transform whose state is `SAMState`. Leaves of any floating dtype; norms and attacks are
      computed in float32 at least, and the result has the dtypes of the incoming gradient.

    Raises:
      ValueError: a negative `rho` or `eta`, an unknown `norm` or `on_nonfinite`; `update` without
        `params` or `grad_fn`; parameters hidden by `optax.masked` or `optax.partition`.

    Source: SAM, arXiv:2010.01412, Eq. 2-3; ASAM, arXiv:2102.11600.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
    >>> tx = optax.chain(sam(0.05), optax.sgd(0.01))
    >>> w = jnp.array([2.0, -1.0])
    >>> state = tx.init(w)
    >>> updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
    >>> print(optax.apply_updates(w, updates))
    [ 1.9799019  -0.89509714]
    """
    check_number("rho", rho, at_least=0.0)
    check_number("eta", eta, at_least=0.0)
    check_choice("norm", norm, ASCENTS)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)

    def init_fn(params: PyTree) -> SAMState:
        _attack.check_params("sam", params, mask=mask, adaptive=adaptive)
        return SAMState(**_attack.initial(params))

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
            "sam", params, grad_fn, axis_name, attack_only=attack_only
        )
        radius = _attack.value_at(rho, state.count)
        attack, distance = ASCENTS[norm](
            _attack.attacked_gradient(updates, params, mask),
            _attack.scaling(params, adaptive, eta),
            radius,
        )
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        return gradient, SAMState(**_attack.following(state, radius, distance, broke, axis_name))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    *,
    eta: jax.typing.ArrayLike = 0.01,
    norm: Literal["l2", "linf"] = "l2",
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: `sam` in a ball scaled by the weights, indifferent to rescaled layers.

    .. math:: \epsilon = \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w| + \eta

    T is taken on every attacked leaf, biases included. Arguments, state and errors as in `sam`;
    typical radii are about ten times larger.

    Source: arXiv:2102.11600; eta = 0.01 as in the paper (the released command line uses 0).
    """
    return sam(
        rho,
        adaptive=True,
        eta=eta,
        norm=norm,
        mask=mask,
        axis_name=axis_name,
        on_nonfinite=on_nonfinite,
    )


def _sign_ascent(
    gradient: PyTree, scale: PyTree, radius: jax.typing.ArrayLike
) -> tuple[PyTree, jax.Array]:
    """The step to the corner of the box of half-width `radius * T`, and its length."""
    signs = _attack.map_attack(lambda g, t: jnp.sign(g) * t, gradient, scale)
    size = global_norm(signs)
    distance = jnp.asarray(radius, size.dtype) * _attack.ratio(size, size)  # radius, 0, or NaN
    return _attack.map_attack(lambda s: s * jnp.asarray(radius, s.dtype), signs), distance


ASCENTS = {"l2": _attack.ascent, "linf": _sign_ascent}
