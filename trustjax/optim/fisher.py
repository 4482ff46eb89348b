r"""Attacks inside the ellipse of the Fisher metric: Fisher SAM and TRAM-Fisher.

Fisher SAM: Kim, Li, Hu, Hospedales, arXiv:2206.04920 (ICML 2022).
TRAM-Fisher: Sherborne, Saphra, Dasigi, Peng, arXiv:2310.03646 (ICLR 2024), Eq. 8-9, Algorithm 2.

    F    = 1 + eta f           f: diagonal empirical Fisher, at the inputs or at noised ones
    eps  = gamma F^-1 g / sqrt(g' F^-1 g)           hence eps' F eps = gamma^2
    g'   = grad L(w + eps),  w <- base(w, g')

TRAM's Fisher code is not released; the damping 1 + eta f is that of third-party codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import check_choice, check_number
from trustjax._dtypes import is_floating, widened
from trustjax._sharding import AxisName
from trustjax.geometry.norm import vector_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree


class FisherState(NamedTuple):
    """State of `fisher_sam` and `tram_fisher`.

    Attributes:
      count: int32 [], steps so far.
      radius: float [], gamma of the last step.
      distance: float [], length of the last attack in the Fisher norm: gamma, or 0.
      nonfinite_count: int32 [], steps whose second gradient was not finite although the first one
        was (see `on_nonfinite` of `sam`).
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    radius: jax.Array
    distance: jax.Array
    nonfinite_count: jax.Array


def fisher_sam(
    gamma: optax.ScalarOrSchedule = 0.1,
    eta: jax.typing.ArrayLike = 0.1,
    *,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at weights attacked inside an ellipse of the Fisher metric.

    .. math:: \epsilon = \gamma \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
              F = 1 + \eta g^2, \qquad \epsilon^\top F \epsilon = \gamma^2

    The square of the batch gradient stands for the diagonal of the Fisher matrix. `update` takes
    `params` and `grad_fn(params) -> gradients` as in `sam`.

    Args:
      gamma: radius, >= 0; a number or a schedule.
      eta: weight of the Fisher matrix in the metric, >= 0; 0 gives SAM.
      mask: the leaves to attack, as in `sam`.
      axis_name: as in `sam`.
      on_nonfinite: as in `sam`.

    Returns:
      A transform whose state is `FisherState`.

    Raises:
      ValueError: a negative number, an unknown `on_nonfinite`; `update` without `params` or
        `grad_fn`; parameters hidden by `optax.masked` or `optax.partition`.

    Source: arXiv:2206.04920; gamma and eta as in the experiments of arXiv:2310.03646.
    """
    return _attack_in_ellipse("fisher_sam", gamma, eta, mask, axis_name, on_nonfinite, noised=False)


def tram_fisher(
    gamma: optax.ScalarOrSchedule = 0.1,
    eta: jax.typing.ArrayLike = 0.1,
    *,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""`fisher_sam` with the Fisher matrix of noised inputs.

    .. math:: \epsilon = \gamma \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
              F = 1 + \eta f, \qquad \epsilon^\top F \epsilon = \gamma^2

    f is the diagonal of the empirical Fisher matrix at noised inputs with the gold labels. There is
    no divergence here: the radius is gamma.

    `update` takes `params`, `grad_fn(params) -> gradients` as in `sam`, and `fisher_grads`: the
    gradient of the mean loss on the noised batch, in the structure of the parameters, f being its
    square; or the gradients of single examples, with one leading axis more, f being the mean of
    their squares. Passing the gradient at noised inputs as `updates` too saves a pass (2 forward
    and 2 backward instead of 3 and 3).

    Arguments, state and errors as in `fisher_sam`; ValueError also without `fisher_grads`.

    Source: arXiv:2310.03646, Eq. 8-9 and Algorithm 2, with the square root that makes the ellipse
    have radius gamma, which the printed Eq. 8 lacks.
    """
    return _attack_in_ellipse("tram_fisher", gamma, eta, mask, axis_name, on_nonfinite, noised=True)


def _attack_in_ellipse(
    name: str,
    gamma: optax.ScalarOrSchedule,
    eta: jax.typing.ArrayLike,
    mask: Mask | None,
    axis_name: AxisName | None,
    on_nonfinite: OnNonfinite,
    *,
    noised: bool,
) -> optax.GradientTransformationExtraArgs:
    check_number("gamma", gamma, at_least=0.0)
    check_number("eta", eta, at_least=0.0)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)

    def init_fn(params: PyTree) -> FisherState:
        _attack.check_params(name, params, mask=mask)
        return FisherState(**_attack.initial(params))

    def update_fn(
        updates: PyTree,
        state: FisherState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        fisher_grads: PyTree | None = None,
        attack_only: bool = False,
        **extra_args: object,
    ) -> tuple[PyTree, FisherState]:
        del extra_args
        params, grad_fn = _attack.second_pass_arguments(
            name, params, grad_fn, axis_name, attack_only=attack_only
        )
        if noised:
            _attack.require(name, fisher_grads=fisher_grads)
        else:
            fisher_grads = updates
        radius = _attack.value_at(gamma, state.count)
        # The metric enters as a scaling T = F^(-1/2): T^2 g / ||T g|| = F^-1 g / sqrt(g F^-1 g).
        attack, distance = _attack.ascent(
            _attack.attacked_gradient(updates, params, mask),
            jax.tree.map(lambda p, f: _fisher_scaling(p, f, eta), params, fisher_grads),
            radius,
        )
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        scalars = _attack.following(state, radius, distance, broke, axis_name)
        return gradient, FisherState(**scalars)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fisher_scaling(
    param: jax.Array, gradient: jax.Array, eta: jax.typing.ArrayLike
) -> jax.Array | float:
    if not is_floating(param):
        return 1.0
    # The root of f, whose square would under- or overflow.
    size = jnp.abs(widened(gradient))
    if gradient.ndim == np.ndim(param) + 1:
        size = vector_norm(gradient, axis=0) / len(gradient) ** 0.5
    return 1 / jnp.hypot(jnp.ones_like(size), jnp.sqrt(jnp.asarray(eta, size.dtype)) * size)
