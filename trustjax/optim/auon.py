r"""AuON and Hybrid-AuON: a matrix update divided by one scalar, in linear time.

Maity, arXiv:2509.24320 (v1; code: ryyzn9/AuON). With H the Nesterov momentum of one matrix of N
entries, and || || the Frobenius norm:

    AuON      X = H / ||H||,   r = sqrt(mean(cosh(X)^2)),   U = X / r,   W <- W - rate U
    Hybrid    X1 = one Newton-Schulz step from X,  r = sqrt(mean(cosh(X1)^2)),  U = X1 / r

What to know before using it: r is one positive number, so AuON changes neither the direction nor
the ratios of singular values of H. And since the squares of X sum to 1,

    1 + gamma^2 / N <= r^2 <= 1 + sinh(gamma)^2 / N,

so r - 1 is about a millionth for a 768 x 768 matrix, whatever the gradient: AuON is momentum SGD
with every matrix's update on the Frobenius sphere (`gamma=0` is that exactly). docs/methods/auon.md
shows it. The repository's present form applies H / r, not X / r (`normalize=False, gamma=1.5`), and
is Nesterov SGD to six digits; its hybrid takes five Newton-Schulz steps.
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

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import reduction_dtype, widened
from trustjax.geometry.matrix import as_matrices, newton_schulz, size_along
from trustjax.geometry.norm import vector_norm
from trustjax.optim import _leaves
from trustjax.optim._auon_brake import (
    brake_excess,
    excess_of,
    known_excess,
    log_brake,
    norm_and_spread,
    one_for_zero,
    scaled_average,
    two_moments_suffice,
)
from trustjax.optim._leaves import PyTree
from trustjax.optim.auon_labels import matrix_labels as matrix_labels
from trustjax.optim.auon_labels import matrix_numbers

DimensionNumbers = PyTree | Callable[[PyTree], PyTree]
LabelFn = PyTree | Callable[[PyTree], PyTree]


class AuONState(NamedTuple):
    """State of `scale_by_auon`.

    Attributes:
      momentum: average of the gradients, shaped like the parameters; the only buffer.
      radius: float [], the Frobenius norm that a matrix's update may have: 1.
      distance: float [], the one that it had, mean over matrices, before shape factor and rate.
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
    two scalars a matrix are all that crosses the devices of a sharded matrix. There is no bias
    correction. The result is a gradient's: `optax.scale_by_learning_rate` follows.

    Args:
      beta: share of the old momentum kept, in [0, 1).
      nesterov: H as above; else H = M.
      gamma: slope of the brake, >= 0; may be traced.
      ns_steps: Newton-Schulz iterations before the brake (`trustjax.geometry.newton_schulz`); a
        plain int: under `optax.inject_hyperparams` one of its `static_args`.
      normalize: divide by the norm. If not, the applied matrix is H, or the last Newton-Schulz
        iterate Z, and the brake is measured on that over its norm.
      brake: "entries" as above. "rms", an extension of ours, measures r on entries of root mean
        square 1, :math:`\sqrt N X`: there the brake tells heavy tails from spread updates (about
        1.9 for normal entries at gamma = 1, and exp(gamma sqrt N) for a single one), at any size.
      shape_factor: times sqrt(max(1, fan_out / fan_in)), as the code of October 2025 has it.
      dimension_numbers: `optax.contrib.MuonDimensionNumbers` of leaves whose matrix is not that of
        their last two axes, such as convolution kernels: a tree, a prefix of one, or a callable of
        the updates; None for the last two axes. Other axes count separate matrices.
      epsilon: added to the norm.
      brake_epsilon: added to r.
      mu_dtype: dtype of the stored momentum, named as in `optax.contrib.muon`; None for that of
        the parameter, but float32 for bfloat16 and float16, in which an average stands still.

    Returns:
      A transform whose state is `AuONState`. Norms and brakes are taken in float32 at least, by
      `expm1`, `log1p` and `sinh`: r - 1 is right also where 1 + 1 / N rounds to 1. Norms neither
      under- nor overflow.

    Raises:
      ValueError: `beta`, `gamma` or `ns_steps` out of range, an unknown `brake`, a `mu_dtype` that
        is not a floating one; at `init`, leaves with fewer than two axes (`auon` gives those to
        another optimizer).

    Source: arXiv:2509.24320v1; ryyzn9/AuON at c87b862 (paper form) and bba2e82 (HEAD), which have
    one scalar for a stack of matrices.
    """
    check_number("beta", beta, at_least=0.0, at_most=1.0, below=1.0)
    check_number("gamma", gamma, at_least=0.0)
    steps: Any = ns_steps
    if isinstance(steps, jax.core.Tracer):
        raise FieldError(
            "ns_steps",
            "be known before compilation",
            "a traced number",
            advice="with optax.inject_hyperparams give static_args='ns_steps'",
        )
    check_number("ns_steps", ns_steps, at_least=0)
    check_choice("brake", brake, ("entries", "rms"))
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise FieldError("mu_dtype", "be a floating dtype or None", mu_dtype)

    def stored_dtype(leaf: jax.Array) -> jax.typing.DTypeLike:
        return reduction_dtype(leaf) if mu_dtype is None else mu_dtype

    def init_fn(params: PyTree) -> AuONState:
        for path, leaf in jax.tree.leaves_with_path(params):
            if np.ndim(leaf) < 2:
                raise ValueError(
                    f"scale_by_auon takes matrices; {jax.tree_util.keystr(path)} has shape "
                    f"{np.shape(leaf)}: use auon, or optax.partition"
                )
        dtype = reduction_dtype(params)
        momentum = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, stored_dtype(leaf)), params)
        return AuONState(momentum, jnp.ones([], dtype), jnp.zeros([], dtype))

    def direction(
        momentum: jax.Array, gradient: jax.Array, numbers: MuonDimensionNumbers | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The update of one leaf, and the sum and number of its matrices' norms."""
        dtype = momentum.dtype
        fan_in, fan_out = _matrix_axes(momentum, numbers)
        axes = (*fan_in, *fan_out)
        size = size_along(momentum, axes)
        share = 1 - jnp.asarray(beta, dtype) if nesterov else jnp.ones([], dtype)
        ratio = jnp.asarray(beta, dtype) / share

        parts = ratio, momentum, gradient if nesterov else None
        multiple = functools.partial(scaled_average, *parts)
        of_entries = brake == "entries" and not ns_steps
        known = known_excess(gamma, size, dtype) if of_entries else None
        with_fourth = of_entries and known is None and two_moments_suffice(gamma, size, dtype)
        scale, norm, spread = norm_and_spread(*parts, axes=axes, with_fourth=with_fourth)
        small, slope = jnp.asarray(epsilon, dtype), jnp.asarray(gamma, dtype)
        length = one_for_zero(norm + small * scale / share)
        to_unit, unit_norm = scale / length, norm / length

        # What is applied before the brake: a multiple of H, or an iterate of Newton-Schulz.
        iterate = None
        if ns_steps:
            iterate = as_matrices(
                lambda x: newton_schulz(x, steps=ns_steps), multiple(to_unit), fan_in, fan_out
            )
            norm = vector_norm(iterate, axes, keepdims=True)
            unit = iterate / (norm + small)
        elif normalize:
            factor, norm = to_unit, unit_norm
        else:
            factor, norm = share, norm * share / scale

        if brake == "rms":
            entries = unit if iterate is not None else multiple(to_unit)
            shrink = jnp.exp(-log_brake(entries * (slope * math.sqrt(size)), axes))
        else:
            if iterate is not None:
                excess = brake_excess(slope * (iterate if normalize else unit), axis=axes)
            elif known is not None:
                excess = jnp.full_like(norm, known)
            elif with_fourth:
                sinh = jnp.sinh(slope * unit_norm / jnp.sqrt(spread))
                excess = excess_of(jnp.square(sinh) * (spread / size))
            else:
                excess = brake_excess(multiple(slope * to_unit), axis=axes)
            shrink = 1 / (1 + (excess + jnp.asarray(brake_epsilon, dtype)))
        aspect = math.sqrt(max(1.0, size_along(momentum, fan_out) / size_along(momentum, fan_in)))
        final = shrink * aspect if shape_factor else shrink
        update = multiple(factor * final) if iterate is None else iterate * final
        return update, jnp.sum(norm * shrink), jnp.asarray(norm.size, dtype)

    def update_fn(
        updates: PyTree, state: AuONState, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, AuONState]:
        del params, extra_args
        numbers = _numbers(dimension_numbers, updates)

        leaves, structure = jax.tree.flatten(updates)
        new_leaves, momenta, norms, counts = [], [], [], []
        for g, m, n in zip(leaves, jax.tree.leaves(state.momentum), numbers, strict=True):
            wide = widened(g)
            kept = jnp.asarray(beta, wide.dtype)
            momentum = kept * m.astype(wide.dtype) + (1 - kept) * wide
            update, norm, count = direction(momentum, wide, n)
            new_leaves.append(update.astype(g.dtype))
            momenta.append(momentum.astype(m.dtype))
            norms.append(norm.astype(state.distance.dtype))
            counts.append(count.astype(state.distance.dtype))
        distance = state.distance
        if norms:
            distance = jnp.sum(jnp.stack(norms)) / jnp.sum(jnp.stack(counts))
        return jax.tree.unflatten(structure, new_leaves), AuONState(
            jax.tree.unflatten(jax.tree.structure(state.momentum), momenta), state.radius, distance
        )

    transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return _leaves.on_trained("scale_by_auon", transform)


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

    The update of a matrix has Frobenius norm 1, whatever its size, so a rate of Muon is to be
    multiplied by :math:`\sqrt{\min(m, n)}` for updates of the same root mean square.

    Args:
      learning_rate: of the matrices; the paper has 0.055, the code of October 2025 0.24.
      beta: share of the old momentum kept.
      other: the optimizer of the other leaves, with a rate of its own; None for
        `optax.adamw(3e-3)`, the paper's.
      label_fn: maps parameters to a tree of "auon" and "other", or is one; None for
        `matrix_labels`, which `describe_labels` prints. It sees leaves without a gradient, which
        stay, as `optax.MaskedNode`.
      weight_decay: :math:`\lambda`, decoupled, of the matrices.
      dimension_numbers: the matrix in each leaf, as of `scale_by_auon`; None for what names, shapes
        and biases tell, as `describe_labels` prints it.
      nesterov, gamma, ns_steps, normalize, brake, shape_factor, mu_dtype: see `scale_by_auon`.

    Source: arXiv:2509.24320v1; which leaves: Section 4 of the code of October 2025.

    >>> import jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = auon(0.1, other=optax.sgd(0.5))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates["kernel"][0], updates["bias"])
    [-0.0442685 -0.0442685] [-0.5 -0.5]
    """
    optimizer_of_others = optax.adamw(3e-3) if other is None else other
    labels = functools.partial(_labels, matrix_labels if label_fn is None else label_fn)

    def with_numbers(numbers: DimensionNumbers | None) -> optax.GradientTransformationExtraArgs:
        matrices = optax.chain(
            scale_by_auon(
                beta,
                nesterov=nesterov,
                gamma=gamma,
                ns_steps=ns_steps,
                normalize=normalize,
                brake=brake,
                shape_factor=shape_factor,
                dimension_numbers=numbers,
                mu_dtype=mu_dtype,
            ),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
        return optax.partition({"auon": matrices, "other": optimizer_of_others}, labels)

    transform = with_numbers(dimension_numbers)
    if dimension_numbers is None:
        # From the whole tree: a partition hides the biases, which tell inputs from outputs.
        def update_fn(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
        ) -> tuple[PyTree, Any]:
            numbers = matrix_numbers(updates)
            inner = with_numbers(lambda _: numbers)
            moves, state = inner.update(updates, state, params, **extra_args)
            return moves, state

        return _leaves.on_trained(
            "auon", optax.GradientTransformationExtraArgs(transform.init, update_fn)
        )
    return _leaves.on_trained("auon", transform)


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

    Its spectral norm can pass 1, up to 1.2024. Arguments as of `auon`; the repository's HEAD is
    `ns_steps=5, normalize=False, gamma=1.5`, where U = Z / r without the norm of Z.

    Source: arXiv:2509.24320v1, whose text leaves out the root in r that its figure has.
    """
    check_number("ns_steps", ns_steps, at_least=1)
    return auon(
        learning_rate,
        beta,
        other=other,
        label_fn=label_fn,
        weight_decay=weight_decay,
        nesterov=nesterov,
        gamma=gamma,
        ns_steps=ns_steps,
        normalize=normalize,
        shape_factor=shape_factor,
        dimension_numbers=dimension_numbers,
        mu_dtype=mu_dtype,
    )


def _labels(label_fn: LabelFn, params: PyTree) -> PyTree:
    """The label of every leaf; raises ValueError for what is not one."""
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
    """The dimension numbers of every leaf; raises ValueError if something else is given."""
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


def _matrix_axes(
    leaf: jax.Array, numbers: MuonDimensionNumbers | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes over which the matrix sums its inputs, and those of its outputs."""
    if numbers is None:
        return (leaf.ndim - 2,), (leaf.ndim - 1,)
    fan_in, fan_out = (
        tuple(a % leaf.ndim for a in ((axis,) if isinstance(axis, int) else axis))
        for axis in (numbers.reduction_axis, numbers.output_axis)
    )
    if set(fan_in) & set(fan_out):
        raise FieldError("dimension_numbers", "name different axes", numbers)
    return fan_in, fan_out
