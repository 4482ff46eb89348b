r"""Sharpness-aware minimization (SAM) and its scale-invariant form (ASAM).

SAM: Foret, Kleiner, Mobahi, Neyshabur, arXiv:2010.01412, Algorithm 1 and Eq. 2-3.
ASAM: Kwon, Kim, Park, Choi, arXiv:2102.11600.

Both descend along the gradient at the worst point, to first order, of a ball around the weights w:

    SAM    eps = rho g / ||g||                   g = grad L(w)
    ASAM   eps = rho T^2 g / ||T g||             T = |w| + eta
    then   g' = grad L(w + eps),  w <- base(w, g')

The norm is global: all attacked leaves are seen as one vector. The base optimizer sees only g' and
steps from w. The authors' codes differ in two places: google-research/sam divides by the bare norm,
which gives NaN at a zero gradient, and SamsungLabs/ASAM scales only the leaves named "weight" and
takes T = 1 on the others, for which `adaptive` can be a mask.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import check_choice, check_scalar
from trustjax._sharding import AxisName
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree


class SAMState(NamedTuple):
    """State of `sam`, `asam`, `gsam`, `fisher_sam` and `tram_fisher`.

    Attributes:
      count: Steps so far, int32 [].
      radius: Radius of the last step, float [].
      distance: Length of the last attack in its own norm, float []: the radius, or 0 if the
        gradient was zero.
      nonfinite_count: Steps whose second gradient was not finite although the first gradient and
        the attack were, int32 [] (see `on_nonfinite` of `sam`).
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

    T is 1 for SAM and abs(w) + eta for ASAM (`adaptive`). The result has the sign of a gradient:
    any Optax optimizer can follow in a chain, and gradient clipping stands between the two.

    `update` takes `params` and `grad_fn(params) -> gradients`, the gradient on the same batch with
    the same random key, which is called once. Other extra arguments are ignored. At a zero gradient
    there is no attack.

    Args:
      rho: Radius of the ball, >= 0; a number, which may be traced, or a schedule of the step count.
      adaptive: Whether to scale the ball by T = abs(w) + eta. A tree of bools, or a function that
        makes one from the parameters, selects the leaves to scale.
      eta: Added to abs(w), so that weights at zero are attacked as well; >= 0.
      norm: "l2", or "linf" for :math:`\epsilon = \rho T \, \mathrm{sign}(g)`.
      mask: The leaves to attack, as a tree of bools or a function that makes one from the
        parameters; None for all. The other leaves do not enter the norm; their gradient is still
        the one at the attacked weights.
      axis_name: Mesh axis or axes over which the second gradient is averaged, for m-sharpness under
        `jax.shard_map` or `jax.vmap`: `update` gets the local gradient, and each shard attacks on
        its own. Not for `alternating`, where all shards share the attacked weights.
      on_nonfinite: The gradient to descend on if the one at the attacked weights holds NaN or
        infinity although the first gradient and the attack are finite. "clean" takes the first
        gradient, which makes it a step of the base optimizer, and keeps it in memory during the
        second pass; "propagate" takes what came out. Both count the event in the state. A first
        gradient that is not finite is never replaced.

    Returns:
      A transform whose state is `SAMState`. Leaves may have any floating dtype: norms and attacks
      are computed in float32 at least, and the result has the dtypes of the incoming gradient.

    Raises:
      ValueError: `rho` or `eta` is negative, or `norm` or `on_nonfinite` is unknown; in `init` and
        `update`, parameters are hidden by `optax.masked` or `optax.partition`; in `update`,
        `params` or `grad_fn` is missing.

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
    check_scalar("rho", rho, at_least=0.0)
    check_scalar("eta", eta, at_least=0.0)
    check_choice("norm", norm, ASCENTS)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)

    def init_fn(params: PyTree) -> SAMState:
        _attack.check_params("sam", params, mask=mask, adaptive=adaptive)
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
            "sam", params, grad_fn, axis_name, attack_only=attack_only
        )
        radius = _attack.value_at(rho, state.count)
        # SAM, Eq. 2: eps, the worst step within the radius to first order.
        attack, distance = ASCENTS[norm](
            _attack.attacked_gradient(updates, params, mask),
            _attack.scaling(params, adaptive, eta),
            radius,
        )
        # SAM, Eq. 3: the gradient at w + eps, on the same batch.
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        return gradient, SAMState(**_attack.next_scalars(state, radius, distance, broke, axis_name))

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
    r"""Adaptive SAM: `sam` in a ball that scales with the weights, whatever the scale of a layer.

    .. math:: \epsilon = \rho \frac{T^2 g}{\|T g\|_2}, \qquad T = |w| + \eta

    T scales every attacked leaf, biases included. Arguments, state and errors are those of `sam`;
    typical radii are about ten times larger.

    Source: arXiv:2102.11600; eta = 0.01 is the paper's (the released command line has 0).
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
    """The step to the corner of the box of half-width `radius * T`, and its length.

    Source: SAM, arXiv:2010.01412, Eq. 2 at p = infinity.
    """
    signs = _attack.scaled(_attack.map_attack(jnp.sign, gradient), scale)
    length = _attack.attack_length(radius, global_norm(signs))
    return _attack.map_attack(lambda s: s * jnp.asarray(radius, s.dtype), signs), length


ASCENTS = {"l2": _attack.ascent, "linf": _sign_ascent}
