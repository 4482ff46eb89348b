r"""Trust-region aware minimization (TRAM): ASAM whose radius is measured in function space.

Sherborne, Saphra, Dasigi, Peng, arXiv:2310.03646 (ICLR 2024), Eq. 4-7 and Algorithm 1.
TRAM-Fisher, which measures no divergence, is in fisher.py.

    d    = mean over examples of KL(p(.|x, reference) || p(.|x, w))      a number, never in the loss
    eps  = d w^2 g / ||w g||                                             hence ||eps / w|| = d
    g'   = grad L(w + eps),  w <- base(w, g')

The reference function has the previous weights, the initial ones or a moving average of them, or it
is the present one on noised inputs. There is no rho: TRAM measures the radius that ASAM is given.

The released code (tomsherborne/tram_optimizer) differs in two places. Its ascent leaves the
gradient out (`ascent="released"`). Its KL is averaged over classes as well, and then divided by the
batch size once more (`divergence="released_kl"`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._dtypes import is_floating, widened
from trustjax._sharding import AxisName, averaged
from trustjax.geometry import divergence as divergences
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree

Divergence = Callable[[Any, Any, jax.Array | None], jax.Array]
OutputFn = Callable[[PyTree], Any]


class TRAMState(NamedTuple):
    """State of `tram`.

    Attributes:
      count: Steps so far, int32 [].
      reference: Reference parameters, a tree like the parameters; for reference="ema" in float32 at
        least or in `accumulator_dtype`; None for reference="noise".
      radius: Radius of the last step, float []: the divergence d, scaled and clipped.
      distance: Length of the last attack in the scaled norm, float [].
      nonfinite_count: Steps whose second gradient was not finite although the first gradient and
        the attack were, int32 [] (see `on_nonfinite` of `sam`).
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    reference: PyTree | None
    radius: jax.Array
    distance: jax.Array
    nonfinite_count: jax.Array


def tram(
    reference: Literal["previous", "initial", "ema", "noise"] = "previous",
    *,
    divergence: str | Divergence = "kl",
    adaptive: bool | Mask = True,
    eta: jax.typing.ArrayLike = 0.0,
    scale: optax.ScalarOrSchedule = 1.0,
    max_radius: optax.ScalarOrSchedule | None = None,
    ascent: Literal["paper", "released"] = "paper",
    decay: jax.typing.ArrayLike = 0.999,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    refresh_every: jax.typing.ArrayLike = 1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at attacked weights; the radius is a divergence of outputs.

    .. math:: d = \mathrm{mean}_x \, KL(p_{ref}(\cdot|x) \,\|\, p_w(\cdot|x)), \qquad
              \epsilon = d \frac{w^2 g}{\|w g\|_2}, \qquad g' = \nabla L(w + \epsilon)

    With reference "previous" or "initial" the first step has d = 0 and is a step of the base
    optimizer. d is a mean KL, which is quadratic in the step, so it is usually far below ASAM's
    rho.

    `update` takes `params` and these extra arguments; others are ignored:

    - `grad_fn(params) -> gradients`, on the same batch with the same random key;
    - `outputs`: logits [..., classes] at `params`, known from the first pass;
    - `output_fn(params) -> logits`, deterministic, on the same batch; not for reference="noise".
      It also computes `outputs` if they are missing, with one more forward pass;
    - `noisy_outputs`, for reference="noise": logits at `params` on noised inputs;
    - `where`, optional: bool [...], the examples or tokens to include.

    Args:
      reference: The function with which the present one is compared. "previous" has the weights
        before the last update, "initial" those given to `init`, and "ema" their moving average;
        each costs a copy of the parameters. "noise" is the present function on noised inputs.
      divergence: "kl" is KL(reference || present); "reverse_kl", "symmetric_kl", "jensen_shannon"
        and "l2" (of logits) are averaged over examples too; "mmd" compares the two batches;
        "released_kl" is that of the released code. Or a callable
        `(reference_outputs, outputs, where) -> scalar`.
      adaptive: Whether to scale the ball by T = abs(w) + eta; or a mask of leaves, as in `sam`.
      eta: Added to abs(w), >= 0; the paper has 0, which never attacks a weight that is exactly 0.
      scale: Factor of the divergence, >= 0; a number or a schedule.
      max_radius: Upper bound of the radius, >= 0; a number, a schedule, or None for no bound, as in
        the paper.
      ascent: "paper", or "released" for the step of the released code,
        :math:`\epsilon = d w^2 / \|w g\|`, or :math:`d / \|g\|` in every coordinate if not
        adaptive. It moves all weights up whatever the sign of their gradient, so the loss may fall
        along it, and :math:`\|\epsilon / w\| \neq d`. It takes the same `mask`.
      decay: Share of the old average that reference="ema" keeps at a refresh, in [0, 1]; 0 is
        "previous" and 1 is "initial".
      accumulator_dtype: Floating dtype of the moving average of reference="ema"; not for the other
        references. None for float32, or float64 if the parameters have it. In bfloat16 an average
        with a large `decay` would never move, since an increment is less than half of its last
        digit. The model sees the average in the dtypes of its parameters.
      refresh_every: Calls between two refreshes of the reference, >= 1. With k micro-batches per
        step (`optax.MultiSteps(base, k)` after this transform) set k, so that the reference has the
        weights of the previous step; with 1 it would have the present ones in k - 1 of k calls. A
        call whose divergence is NaN, such as a step that `optax.apply_if_finite` refuses, does not
        refresh.
      mask: The leaves to attack, as in `sam`.
      axis_name: Axes over which the second gradient is averaged, as in `sam`; each shard has its
        own divergence and attack.
      on_nonfinite: As in `sam`. If the radius itself is not finite, the gradient is not either.

    Returns:
      A transform whose state is `TRAMState`; `optax.tree.get(state, "radius")` reads d.

    Raises:
      ValueError: `reference`, `divergence`, `ascent` or `on_nonfinite` is unknown, a number is out
        of range, or `accumulator_dtype` is not floating or given for a reference that is no
        average; in `init` and `update`, parameters are hidden by `optax.masked` or
        `optax.partition`; in `update`, an argument listed above is missing.

    Source: arXiv:2310.03646, Eq. 4-7 and Algorithm 1; forward KL as in Appendix C.5.

    >>> import jax, jax.numpy as jnp, optax
    >>> x, y = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([0, 1])
    >>> logits = lambda w: x @ w
    >>> def loss(w):
    ...     return optax.softmax_cross_entropy_with_integer_labels(logits(w), y).mean()
    >>> tx = optax.chain(tram("previous"), optax.sgd(0.1))
    >>> w = jnp.array([[0.6, -0.2], [0.05, 0.4]])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(
    ...         jax.grad(loss)(w), state, w,
    ...         grad_fn=jax.grad(loss), outputs=logits(w), output_fn=logits)
    ...     w = optax.apply_updates(w, updates)
    >>> print(f"{optax.tree.get(state, 'radius'):.2e}")
    3.55e-03
    """
    _check_reference(reference, decay, accumulator_dtype, refresh_every)
    check_choice("ascent", ascent, ASCENTS)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)
    for name, value in {"eta": eta, "scale": scale, "max_radius": max_radius}.items():
        check_scalar(name, value, at_least=0.0)
    measure = divergence_by_name(divergence)
    # Share of the present weights in the new reference.
    refresh_weight = {"previous": 1.0, "initial": 0.0, "ema": 1.0 - decay, "noise": 0.0}[reference]

    def init_fn(params: PyTree) -> TRAMState:
        _attack.check_params("tram", params, mask=mask, adaptive=adaptive)
        first = _first_reference(params, reference, accumulator_dtype)
        return TRAMState(reference=first, **_attack.initial_scalars(params))

    def update_fn(
        updates: PyTree,
        state: TRAMState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        outputs: Any = None,
        output_fn: OutputFn | None = None,
        noisy_outputs: Any = None,
        where: jax.Array | None = None,
        attack_only: bool = False,
        **extra_args: object,
    ) -> tuple[PyTree, TRAMState]:
        del extra_args
        params, grad_fn = _attack.second_pass_arguments(
            "tram", params, grad_fn, axis_name, attack_only=attack_only
        )
        # Eq. 4-5: d, how far the function is from the reference. A number: no gradient enters it.
        reference_outputs, outputs = _compared_outputs(
            reference, state.reference, params, outputs, output_fn, noisy_outputs
        )
        d = measure(*jax.lax.stop_gradient((reference_outputs, outputs)), where)
        if jnp.ndim(d) != 0:
            raise FieldError("divergence", "return one number", f"shape {jnp.shape(d)}")
        radius = _scaled_and_clipped(d, scale, max_radius, state.count)
        mean_radius = averaged(radius.astype(state.radius.dtype), axis_name)

        new_reference = _next_reference(state, params, refresh_weight, refresh_every, mean_radius)
        if reference == "previous" and isinstance(refresh_every, int) and refresh_every == 1:
            # The same numbers. Read from here, XLA sees that nothing needs the old weights or the
            # old reference any longer, and overwrites both in place: 4 % of a step's time.
            params = new_reference

        # Eq. 7: eps = d w^2 g / ||w g||, the attack of ASAM with d in place of rho.
        attack, distance = ASCENTS[ascent](
            _attack.attacked_gradient(updates, params, mask),
            _attack.scaling(params, adaptive, eta),
            radius,
        )
        # Eq. 6: the gradient at w + eps, on the same batch.
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        scalars = _attack.next_scalars(state, mean_radius, distance, broke, axis_name)
        return gradient, TRAMState(reference=new_reference, **scalars)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def divergence_by_name(divergence: str | Divergence) -> Divergence:
    """The divergence of that name in `DIVERGENCES`; a callable stands for itself."""
    if callable(divergence):
        return divergence
    check_choice("divergence", divergence, DIVERGENCES)
    return DIVERGENCES[divergence]


def _check_reference(
    reference: str,
    decay: jax.typing.ArrayLike,
    accumulator_dtype: jax.typing.DTypeLike | None,
    refresh_every: jax.typing.ArrayLike,
) -> None:
    check_choice("reference", reference, ("previous", "initial", "ema", "noise"))
    check_scalar("decay", decay, at_least=0.0, at_most=1.0)
    check_scalar("refresh_every", refresh_every, at_least=1)
    if accumulator_dtype is None:
        return
    if reference != "ema":
        raise ValueError(
            "accumulator_dtype is the dtype of the moving average of reference='ema', got "
            f"reference={reference!r}"
        )
    if not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise FieldError("accumulator_dtype", "be a floating dtype", repr(accumulator_dtype))


def _first_reference(
    params: PyTree, reference: str, accumulator_dtype: jax.typing.DTypeLike | None
) -> PyTree | None:
    """The reference of the first call: a copy of the initial weights, or None for noised inputs."""
    if reference == "noise":
        return None
    # A copy, so that params and state can both be donated.
    copy = jax.tree.map(jnp.copy, params)
    if reference != "ema":
        return copy

    def as_accumulator(leaf: jax.Array) -> jax.Array:
        if not is_floating(leaf):
            return leaf
        return widened(leaf) if accumulator_dtype is None else leaf.astype(accumulator_dtype)

    return jax.tree.map(as_accumulator, copy)


def _compared_outputs(
    reference: str,
    reference_params: PyTree | None,
    params: PyTree,
    outputs: Any,
    output_fn: OutputFn | None,
    noisy_outputs: Any,
) -> tuple[Any, Any]:
    """The outputs of the reference function, and those of the present one on the same batch."""
    if outputs is None and output_fn is not None:
        outputs = output_fn(params)
    if reference == "noise":  # the present weights on noised inputs
        _attack.require("tram('noise')", outputs=outputs, noisy_outputs=noisy_outputs)
        return noisy_outputs, outputs
    # Other weights on the inputs as they are; the model sees them in the dtypes of its parameters.
    _attack.require(f"tram({reference!r})", outputs=outputs, output_fn=output_fn)
    assert output_fn is not None
    return output_fn(_attack.cast_like(reference_params, params)), outputs


def _scaled_and_clipped(
    divergence: jax.Array,
    scale: optax.ScalarOrSchedule,
    max_radius: optax.ScalarOrSchedule | None,
    count: jax.Array,
) -> jax.Array:
    """The radius: the divergence times `scale`, at most `max_radius`."""
    radius = divergence * jnp.asarray(_attack.value_at(scale, count), divergence.dtype)
    if max_radius is None:
        return radius
    bound = jnp.asarray(_attack.value_at(max_radius, count), radius.dtype)
    return jnp.minimum(radius, bound)


def _next_reference(
    state: TRAMState,
    params: PyTree,
    refresh_weight: jax.typing.ArrayLike,
    refresh_every: jax.typing.ArrayLike,
    radius: jax.Array,
) -> PyTree | None:
    """The reference of the next call, moved towards `params` by `refresh_weight`.

    `params` are the weights before their update. The reference stays in calls between refreshes,
    and if the radius is NaN.
    """
    if state.reference is None or (isinstance(refresh_weight, float) and refresh_weight == 0.0):
        return state.reference
    calls = optax.safe_increment(state.count)
    is_due = calls % jnp.asarray(refresh_every).astype(calls.dtype) == 0
    is_due = is_due & ~jnp.isnan(radius)

    def refresh(old: jax.Array, new: jax.Array) -> jax.Array:
        if not is_floating(old):
            return jnp.where(is_due, new, old)
        new = jnp.asarray(new)
        if isinstance(refresh_weight, float) and refresh_weight == 1.0:
            return jnp.where(is_due, new.astype(old.dtype), old)
        # old + weight (new - old), in float32 at least: a small weight would round away.
        wide = widened(old)
        mixed = wide + jnp.asarray(refresh_weight, wide.dtype) * (new.astype(wide.dtype) - wide)
        return jnp.where(is_due, mixed.astype(old.dtype), old)

    return jax.tree.map(refresh, state.reference, params)


def _released_ascent(
    gradient: PyTree, scale: PyTree, radius: jax.typing.ArrayLike
) -> tuple[PyTree, jax.Array]:
    r"""The released code's step :math:`d T^2 / (\|T g\| + 10^{-12})`, and its length."""
    norm = global_norm(_attack.scaled(gradient, scale))
    factor = jnp.asarray(radius, norm.dtype) / (norm + 1e-12)
    # At a zero gradient the quotient would be 1e12 d.
    factor = jnp.where(norm == 0, 0 * factor, factor)
    steps = _attack.scaled(_attack.map_attack(jnp.ones_like, gradient), scale)
    attack = _attack.map_attack(lambda s, t: s * t * factor.astype(s.dtype), steps, scale)
    return attack, factor * global_norm(steps)


def _example_mean(divergence: Callable[[jax.Array, jax.Array], jax.Array]) -> Divergence:
    """The mean of a per-example divergence over the examples that `where` includes."""
    return lambda reference, outputs, where: _attack.example_mean(
        divergence(reference, outputs), where
    )


def _released_kl(reference: jax.Array, outputs: jax.Array, where: jax.Array | None) -> jax.Array:
    """The released code's KL: the mean over batch and classes, divided by the batch size again."""
    mean = _example_mean(divergences.kl_divergence)(reference, outputs, where)
    return mean / (outputs.shape[0] * outputs.shape[-1])


DIVERGENCES: dict[str, Divergence] = {
    "kl": _example_mean(divergences.kl_divergence),
    "reverse_kl": _example_mean(divergences.reverse_kl),
    "symmetric_kl": _example_mean(divergences.symmetric_kl),
    "jensen_shannon": _example_mean(divergences.jensen_shannon),
    "l2": _example_mean(divergences.l2_distance),
    "mmd": lambda reference, outputs, where: divergences.mmd(reference, outputs, where=where),
    "released_kl": _released_kl,
}
ASCENTS = {"paper": _attack.ascent, "released": _released_ascent}
