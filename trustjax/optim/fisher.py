r"""Attacks inside the ellipse of the Fisher metric: Fisher SAM and TRAM-Fisher.

Fisher SAM: Kim, Li, Hu, Hospedales, arXiv:2206.04920 (ICML 2022).
TRAM-Fisher: Sherborne, Saphra, Dasigi, Peng, arXiv:2310.03646 (ICLR 2024), Eq. 8-9, Algorithm 2.

    F    = 1 + eta f           f: diagonal of the empirical Fisher matrix, at clean or noised inputs
    eps  = gamma F^-1 g / sqrt(g' F^-1 g)           hence eps' F eps = gamma^2
    g'   = grad L(w + eps),  w <- base(w, g')

TRAM's Fisher code is not released; the damping 1 + eta f is that of third-party code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import check_choice, check_scalar
from trustjax._dtypes import is_floating, widened
from trustjax._sharding import AxisName
from trustjax.geometry.norm import vector_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree
from trustjax.optim.sam import SAMState

FisherState = SAMState  # same fields


def fisher_sam(
    gamma: optax.ScalarOrSchedule = 0.1,
    eta: jax.typing.ArrayLike = 0.1,
    *,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at weights attacked within an ellipse of the Fisher metric.

    .. math:: \epsilon = \gamma \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
              F = 1 + \eta g^2, \qquad \epsilon^\top F \epsilon = \gamma^2

    The square of the batch gradient estimates the diagonal of the Fisher matrix. `update` takes
    `params` and `grad_fn(params) -> gradients` as in `sam`.

    Args:
      gamma: Radius, >= 0; a number or a schedule.
      eta: Weight of the Fisher matrix in the metric, >= 0; 0 gives SAM.
      mask: The leaves to attack, as in `sam`.
      axis_name: Axes of m-sharpness, as in `sam`.
      on_nonfinite: As in `sam`.

    Returns:
      A transform whose state is `SAMState`; its distance is in the Fisher norm.

    Raises:
      ValueError: A number is negative, or `on_nonfinite` is unknown; in `init` and `update`,
        parameters are hidden by `optax.masked` or `optax.partition`; in `update`, `params` or
        `grad_fn` is missing.

    Source: arXiv:2206.04920; gamma and eta are those of the experiments of arXiv:2310.03646.
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
    r"""`fisher_sam` with the Fisher matrix at noised inputs.

    .. math:: \epsilon = \gamma \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
              F = 1 + \eta f, \qquad \epsilon^\top F \epsilon = \gamma^2

    f is the diagonal of the empirical Fisher matrix, at noised inputs with the gold labels. No
    divergence is measured: the radius is gamma.

    `update` takes `params` and `grad_fn(params) -> gradients` as in `sam`, and `fisher_grads`, in
    one of two forms: the gradient of the mean loss on the noised batch, a tree like the parameters,
    whose square is f; or the gradients of single examples, with one more leading axis, whose mean
    square is f. If the gradient at noised inputs is passed as `updates` too, it saves a pass: 2
    forward and 2 backward ones remain of 3 and 3.

    Arguments, state and errors are those of `fisher_sam`; ValueError also if `fisher_grads` is
    missing.

    Source: arXiv:2310.03646, Eq. 8-9 and Algorithm 2, with the square root that gives the ellipse
    the radius gamma and that the printed Eq. 8 lacks.
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
    """The transform of `fisher_sam`, or with `noised` that of `tram_fisher`."""
    check_scalar("gamma", gamma, at_least=0.0)
    check_scalar("eta", eta, at_least=0.0)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)

    def init_fn(params: PyTree) -> SAMState:
        _attack.check_params(name, params, mask=mask)
        return SAMState(**_attack.initial_scalars(params))

    def update_fn(
        updates: PyTree,
        state: SAMState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        fisher_grads: PyTree | None = None,
        attack_only: bool = False,
        **extra_args: object,
    ) -> tuple[PyTree, SAMState]:
        del extra_args
        params, grad_fn = _attack.second_pass_arguments(
            name, params, grad_fn, axis_name, attack_only=attack_only
        )
        if noised:
            _attack.require(name, fisher_grads=fisher_grads)
        else:
            fisher_grads = updates
        radius = _attack.value_at(gamma, state.count)
        # TRAM, Eq. 8-9: the attack in the ellipse. The metric enters as a scaling T = F^(-1/2):
        # T^2 g / ||T g|| = F^-1 g / sqrt(g' F^-1 g).
        attack, distance = _attack.ascent(
            _attack.attacked_gradient(updates, params, mask),
            jax.tree.map(lambda p, f: _fisher_scaling(p, f, eta), params, fisher_grads),
            radius,
        )
        # The gradient at w + eps, on the clean batch.
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        return gradient, SAMState(**_attack.next_scalars(state, radius, distance, broke, axis_name))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fisher_scaling(
    param: jax.Array, gradient: jax.Array, eta: jax.typing.ArrayLike
) -> jax.Array | float:
    """The scaling T = (1 + eta f)^(-1/2) of one leaf; 1 for a leaf that is not floating."""
    if not is_floating(param):
        return 1.0
    # Root of f: f itself, a square, could under- or overflow.
    root = jnp.abs(widened(gradient))
    if gradient.ndim == np.ndim(param) + 1:  # one gradient per example
        root = vector_norm(gradient, axis=0) / len(gradient) ** 0.5
    return 1 / jnp.hypot(jnp.ones_like(root), jnp.sqrt(jnp.asarray(eta, root.dtype)) * root)
