r"""AuON and Hybrid-AuON: a matrix update divided by one scalar, in linear time.

Maity, arXiv:2509.24320 (v1; code: ryyzn9/AuON). With H the Nesterov momentum of one matrix of N
entries, and || || the Frobenius norm:

    AuON      X = H / ||H||,   r = sqrt(mean(cosh(X)^2)),   U = X / r,   W <- W - rate U
    Hybrid    X1 = one Newton-Schulz step from X,  r = sqrt(mean(cosh(X1)^2)),  U = X1 / r

What to know before using it: r is one positive number, so AuON changes neither the direction of H
nor the ratios of its singular values. And since the squares of X sum to 1,

    1 + gamma^2 / N <= r^2 <= 1 + sinh(gamma)^2 / N,

so r - 1 is about a millionth for a 768 x 768 matrix, whatever the gradient: AuON is momentum SGD
with the update of every matrix on the Frobenius sphere (`gamma=0` is that exactly).
docs/methods/auon.md shows it. The present form of the repository applies H / r, not X / r
(`normalize=False, gamma=1.5`), and is Nesterov SGD to six digits; its hybrid takes five
Newton-Schulz steps. The steps themselves are in `trustjax.optim._auon_matrix`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from trustjax._checks import FieldError, check_scalar
from trustjax._dtypes import reduction_dtype, widened
from trustjax.optim import _leaves
from trustjax.optim._auon_brake import brake_excess as brake_excess
from trustjax.optim._auon_matrix import MatrixRule, matrix_axes, matrix_update, new_average
from trustjax.optim._leaves import PyTree
from trustjax.optim.auon_labels import matrix_labels as matrix_labels
from trustjax.optim.auon_labels import matrix_numbers

DimensionNumbers = PyTree | Callable[[PyTree], PyTree]
LabelFn = PyTree | Callable[[PyTree], PyTree]


class AuONState(NamedTuple):
    """State of `scale_by_auon`.

    Attributes:
      momentum: The average of the gradients, like the parameters. It is the only buffer.
      radius: Float [], the Frobenius norm that the update of a matrix may have: 1.
      distance: Float [], the Frobenius norm that it had, averaged over the matrices, before the
        shape factor and the learning rate.
    """

    momentum: PyTree
    radius: jax.Array
    distance: jax.Array


def scale_by_auon(
    beta: jax.typing.ArrayLike = 0.95,
    *,
    nesterov: bool = True,
    gamma: jax.typing.ArrayLike = 1.0,
    ns_steps: int = 0,
    normalize: bool = True,
    brake: Literal["entries", "rms"] = "entries",
    shape_factor: bool = False,
    dimension_numbers: DimensionNumbers | None = None,
    epsilon: jax.typing.ArrayLike = 1e-7,
    brake_epsilon: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides the momentum of every matrix by its norm and by the brake r.

    .. math:: M \leftarrow \beta M + (1 - \beta) G, \quad H = \beta M + (1 - \beta) G, \quad
              X = \frac{H}{\|H\|_F + \epsilon}, \quad
              U = \frac{X}{r}, \quad r = \sqrt{\tfrac1N \textstyle\sum_{ij} \cosh(\gamma X_{ij})^2}

    ======================  ==========================================================
    AuON, paper             the default
    AuON, repository HEAD   ``normalize=False, gamma=1.5``: U = H / r, not scale invariant
    Hybrid, paper           ``ns_steps=1``: X replaced by one Newton-Schulz step from X
    Hybrid, HEAD            ``ns_steps=5, normalize=False, gamma=1.5``
    control                 ``gamma=0``: r = 1, normalised momentum SGD
    ======================  ==========================================================

    Without Newton-Schulz steps the direction and the ratios of singular values are those of H, and
    only two scalars per matrix cross the devices of a sharded matrix. There is no bias correction.
    The result has the sign of a gradient: `optax.scale_by_learning_rate` follows.

    Args:
      beta: The share of the old momentum that is kept, in [0, 1).
      nesterov: Whether H is as above; otherwise H = M.
      gamma: The slope of the brake, >= 0. It may be traced.
      ns_steps: The number of Newton-Schulz iterations before the brake
        (`trustjax.geometry.newton_schulz`). It is a plain int: name it in the `static_args` of
        `optax.inject_hyperparams`.
      normalize: Whether to divide by the norm. If not, H is applied, or the last Newton-Schulz
        iterate Z, and the brake is measured on this matrix over its norm.
      brake: "entries" measures r as above. "rms", an extension of ours, measures it on entries of
        root mean square 1, :math:`\sqrt N X`: there the brake tells heavy tails from spread updates
        (about 1.9 for normal entries at gamma = 1, and exp(gamma sqrt N) for a single one), at any
        size.
      shape_factor: Whether to multiply by sqrt(max(1, fan_out / fan_in)), as the code of October
        2025 does.
      dimension_numbers: The `optax.contrib.MuonDimensionNumbers` of leaves whose matrix is not in
        their last two axes, such as convolution kernels: a tree, a prefix of one, or a function of
        the updates. None stands for the last two axes. Other axes count separate matrices.
      epsilon: The number added to the norm, >= 0.
      brake_epsilon: The number added to r, >= 0; "rms" has none.
      mu_dtype: The dtype of the stored momentum, named as in `optax.contrib.muon`. None stands for
        that of the parameter, except that bfloat16 and float16 parameters have a momentum in
        float32, since in half precision an average stands still.

    Returns:
      A transform whose state is `AuONState`. Norms and brakes are computed in float32 at least, by
      `expm1`, `log1p` and `sinh`: r - 1 is right even where 1 + 1 / N rounds to 1. Norms neither
      under- nor overflow.

    Raises:
      ValueError: A number is out of range, `brake` is unknown or has no use for `brake_epsilon`, or
        `mu_dtype` is not a floating dtype. At `init`: a leaf has fewer than two axes (`auon` gives
        those to another optimizer).

    Source: arXiv:2509.24320v1; ryyzn9/AuON at c87b862 (paper form) and bba2e82 (HEAD), which take
    one scalar for a stack of matrices.
    """
    rule = MatrixRule(
        beta,
        nesterov=nesterov,
        gamma=gamma,
        ns_steps=ns_steps,
        normalize=normalize,
        brake=brake,
        shape_factor=shape_factor,
        mu_dtype=mu_dtype,
        epsilon=epsilon,
        brake_epsilon=brake_epsilon,
    )
    return _scale_by(rule, dimension_numbers)


def _scale_by(
    rule: MatrixRule, dimension_numbers: DimensionNumbers | None
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_auon` with the hyperparameters in one object."""

    def stored_dtype(leaf: jax.Array) -> jax.typing.DTypeLike:
        return reduction_dtype(leaf) if rule.mu_dtype is None else rule.mu_dtype

    def init_fn(params: PyTree) -> AuONState:
        for path, leaf in jax.tree.leaves_with_path(params):
            if np.ndim(leaf) < 2:
                raise ValueError(
                    f"scale_by_auon takes matrices, but params{jax.tree_util.keystr(path)} has "
                    f"shape {np.shape(leaf)}: use auon, which gives such leaves to another "
                    "optimizer, or optax.partition"
                )
        dtype = reduction_dtype(params)
        momentum = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, stored_dtype(leaf)), params)
        return AuONState(momentum, jnp.ones([], dtype), jnp.zeros([], dtype))

    def update_fn(
        updates: PyTree, state: AuONState, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, AuONState]:
        del params, extra_args
        numbers = _numbers(dimension_numbers, updates)
        leaves, structure = jax.tree.flatten(updates)
        old_averages, state_structure = jax.tree.flatten(state.momentum)
        new_leaves, averages, norms = [], [], []
        for g, m, n in zip(leaves, old_averages, numbers, strict=True):
            # In float32 at least, also where M is stored in fewer digits.
            wide = widened(g)
            average = new_average(rule, m.astype(wide.dtype), wide)
            update, norm = matrix_update(rule, average, wide, matrix_axes(wide.ndim, n))
            new_leaves.append(update.astype(g.dtype))
            averages.append(average.astype(m.dtype))
            norms.append(norm)
        return jax.tree.unflatten(structure, new_leaves), AuONState(
            jax.tree.unflatten(state_structure, averages),
            state.radius,
            _mean(norms, state.distance.dtype) if norms else state.distance,
        )

    transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return _leaves.on_trained("scale_by_auon", transform)


def _mean(norms: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The mean over all matrices of all leaves."""
    sums = [jnp.sum(norm).astype(dtype) for norm in norms]
    counts = [jnp.asarray(norm.size, norm.dtype).astype(dtype) for norm in norms]
    return jnp.sum(jnp.stack(sums)) / jnp.sum(jnp.stack(counts))


def auon(
    learning_rate: optax.ScalarOrSchedule,
    beta: jax.typing.ArrayLike = 0.95,
    *,
    other: optax.GradientTransformation | None = None,
    label_fn: LabelFn | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = True,
    gamma: jax.typing.ArrayLike = 1.0,
    ns_steps: int = 0,
    normalize: bool = True,
    brake: Literal["entries", "rms"] = "entries",
    shape_factor: bool = False,
    dimension_numbers: DimensionNumbers | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AuON for the matrices, another optimizer for embeddings, heads and vectors.

    .. math:: W \leftarrow W - \eta \, (U + \lambda W)

    The update of a matrix has Frobenius norm 1, whatever the size of the matrix. A learning rate of
    Muon gives updates of the same root mean square if it is multiplied by
    :math:`\sqrt{\min(m, n)}`.

    Args:
      learning_rate: The rate of the matrices. The paper has 0.055, the code of October 2025 0.24.
      beta: The share of the old momentum that is kept.
      other: The optimizer of the other leaves, with its own learning rate. None stands for
        `optax.adamw(3e-3)`, the paper's.
      label_fn: A function of the parameters that returns a tree of "auon" and "other", or such a
        tree. None stands for `matrix_labels`, which `describe_labels` prints. It sees leaves
        without a gradient, which stay as they are, as `optax.MaskedNode`.
      weight_decay: :math:`\lambda`, the decoupled weight decay of the matrices.
      dimension_numbers: The axes of the matrix in each leaf, as in `scale_by_auon`. None stands for
        what names, shapes and biases tell, as `describe_labels` prints it.
      nesterov, gamma, ns_steps, normalize, brake, shape_factor, mu_dtype: As in `scale_by_auon`.

    Raises:
      ValueError: A number is out of range, or a name is unknown. At `init`: a label is neither
        "auon" nor "other", or `optax.masked` or `optax.partition` around it hides the bias that
        tells the axes of a matrix.

    Source: arXiv:2509.24320v1. The choice of leaves follows the code of October 2025.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = auon(0.1, other=optax.sgd(0.5))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates["kernel"][0], updates["bias"])
    [-0.04434093 -0.04434093] [-0.5 -0.5]
    """
    rule = MatrixRule(
        beta,
        nesterov=nesterov,
        gamma=gamma,
        ns_steps=ns_steps,
        normalize=normalize,
        brake=brake,
        shape_factor=shape_factor,
        mu_dtype=mu_dtype,
    )
    return _with_others(rule, learning_rate, other, label_fn, weight_decay, dimension_numbers)


def hybrid_auon(
    learning_rate: optax.ScalarOrSchedule,
    beta: jax.typing.ArrayLike = 0.95,
    *,
    other: optax.GradientTransformation | None = None,
    label_fn: LabelFn | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = True,
    gamma: jax.typing.ArrayLike = 1.0,
    ns_steps: int = 1,
    normalize: bool = True,
    shape_factor: bool = False,
    dimension_numbers: DimensionNumbers | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hybrid-AuON: `auon` after one Newton-Schulz step.

    .. math:: X_1 = a X + (b A + c A^2) X, \quad A = X X^T, \qquad U = X_1 / r(X_1)

    The spectral norm of the update can exceed 1; it is at most 1.2024. The arguments are those of
    `auon`. The HEAD of the repository is `ns_steps=5, normalize=False, gamma=1.5`: there U = Z / r,
    where Z, the last iterate, is not divided by its norm.

    Source: arXiv:2509.24320v1, whose text leaves out the root in r that its figure has.
    """
    check_scalar("ns_steps", ns_steps, at_least=1)
    rule = MatrixRule(
        beta,
        nesterov=nesterov,
        gamma=gamma,
        ns_steps=ns_steps,
        normalize=normalize,
        brake="entries",
        shape_factor=shape_factor,
        mu_dtype=mu_dtype,
    )
    return _with_others(rule, learning_rate, other, label_fn, weight_decay, dimension_numbers)


def _with_others(
    rule: MatrixRule,
    learning_rate: optax.ScalarOrSchedule,
    other: optax.GradientTransformation | None,
    label_fn: LabelFn | None,
    weight_decay: optax.ScalarOrSchedule,
    dimension_numbers: DimensionNumbers | None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole model, with a rule for its matrices; arguments as in `auon`."""
    check_scalar("learning_rate", learning_rate, at_least=0.0, below=math.inf)
    check_scalar("weight_decay", weight_decay, at_least=0.0, below=math.inf)
    optimizer_of_others = optax.adamw(3e-3) if other is None else other
    labels = functools.partial(_labels, matrix_labels if label_fn is None else label_fn)

    def partitioned(numbers: DimensionNumbers | None) -> optax.GradientTransformationExtraArgs:
        matrices = optax.chain(
            _scale_by(rule, numbers),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
        return optax.partition({"auon": matrices, "other": optimizer_of_others}, labels)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if dimension_numbers is None:
            # From the whole tree: a partition hides the biases, which tell inputs from outputs.
            numbers = matrix_numbers(updates)
            tx = partitioned(lambda _: numbers)
        else:
            tx = partitioned(dimension_numbers)
        moves, state = tx.update(updates, state, params, **extra_args)
        return moves, state

    def init_fn(params: PyTree) -> Any:
        if dimension_numbers is None:
            matrix_numbers(params)  # raises if they cannot be known
        return partitioned(dimension_numbers).init(params)

    return _leaves.on_trained("auon", optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _labels(label_fn: LabelFn, params: PyTree) -> PyTree:
    """The label of every leaf. Raises ValueError if `label_fn` gives anything else."""
    found = _leaves.resolved(label_fn, params)
    labels = jax.tree.leaves(found)
    wrong = [x for x in labels if not (isinstance(x, str) and x in ("auon", "other"))]
    if wrong or (isinstance(found, str) and not _leaves.is_leaf(params)):
        raise FieldError(
            "label_fn",
            "be a tree of 'auon' and 'other', or a function of the parameters that makes one",
            repr(wrong[0] if wrong else found),
            advice=_leaves.SCHEDULED.format(argument="label_fn"),
        )
    return _leaves.broadcast("label_fn", found, params)


def _numbers(
    dimension_numbers: DimensionNumbers | None, updates: PyTree
) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of every leaf. Raises ValueError if anything else is given."""
    found = _leaves.resolved(dimension_numbers, updates)
    for entry in jax.tree.leaves(found, is_leaf=_is_dimension_numbers):
        if not _is_dimension_numbers(entry):
            raise FieldError(
                "dimension_numbers",
                "be a tree of optax.contrib.MuonDimensionNumbers and None, or a function of the "
                "parameters that makes one",
                f"{entry!r} in it",
                advice=_leaves.SCHEDULED.format(argument="dimension_numbers"),
            )
    numbers = _leaves.broadcast("dimension_numbers", found, updates, is_leaf=_is_dimension_numbers)
    return _leaves.entries(updates, numbers)


def _is_dimension_numbers(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)
