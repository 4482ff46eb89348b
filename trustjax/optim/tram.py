r"""Trust-region aware minimization (TRAM): ASAM whose radius is measured in function space.

Sherborne, Saphra, Dasigi, Peng, arXiv:2310.03646 (ICLR 2024), Eq. 4-7 and Algorithm 1.
TRAM-Fisher, which measures no divergence, is in fisher.py.

    d    = mean over examples of KL(p(.|x, reference) || p(.|x, w))      a number, never in the loss
    eps  = d w^2 g / ||w g||                                             hence ||eps / w|| = d
    g'   = grad L(w + eps),  w <- base(w, g')

The reference is the previous weights, the initial ones, an average of the past, or the present
weights on noised inputs. There is no rho: what ASAM is told, TRAM measures.

The released code (tomsherborne/tram_optimizer) differs in two places. Its ascent leaves the
gradient out (`ascent="released"`), and its KL is averaged over classes as well and then divided by
the batch size once more (`divergence="released_kl"`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import is_floating, widened
from trustjax._sharding import AxisName, averaged
from trustjax.geometry import divergence as rulers
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import GradFn, Mask, OnNonfinite, PyTree

Divergence = Callable[[Any, Any, jax.Array | None], jax.Array]
OutputFn = Callable[[PyTree], Any]


class TRAMState(NamedTuple):
    """State of `tram`.

    Attributes:
      count: int32 [], steps so far.
      reference: the reference parameters, like the parameters, those of reference="ema" in float32
        at least (`accumulator_dtype`); None for reference="noise".
      radius: float [], the radius of the last step: the divergence d, scaled and clipped.
      distance: float [], length of the last attack in the scaled norm.
      nonfinite_count: int32 [], steps whose second gradient was not finite although the first one
        was (see `on_nonfinite` of `sam`).
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
    r"""Replaces the gradient by the one at weights attacked as far as the function has moved.

    .. math:: d = \mathrm{mean}_x \, KL(p_{ref}(\cdot|x) \,\|\, p_w(\cdot|x)), \qquad
              \epsilon = d \frac{w^2 g}{\|w g\|_2}, \qquad g' = \nabla L(w + \epsilon)

    The first step with reference "previous" or "initial" has d = 0 and is a step of the base
    optimizer. d is a mean KL, quadratic in the move, so usually far below ASAM's rho.

    `update` takes `params` and these extra arguments; others are ignored:

    - `grad_fn(params) -> gradients` on the same batch with the same random key;
    - `outputs`: logits [..., classes] at `params`, at hand from the first pass;
    - `output_fn(params) -> logits`, deterministic, on the same batch, unless reference="noise"
      (it also gives `outputs` if those are missing, for one forward pass more);
    - `noisy_outputs`, for reference="noise": logits at `params` on noised inputs;
    - `where`, optional: bool [...], the examples or tokens that count.

    Args:
      reference: what the present function is compared with. "previous": the weights before the
        last update (costs a copy of the parameters, as do the next two); "initial": those given to
        `init`; "ema": their moving average; "noise": the present weights on noised inputs.
      divergence: "kl" = KL(reference, present), "reverse_kl", "symmetric_kl", "jensen_shannon",
        "l2" (of logits), each averaged over examples; "mmd" of the batches; "released_kl"; or
        a callable `(reference_outputs, outputs, where) -> scalar`.
      adaptive: scale the ball by T = abs(w) + eta, else by 1; or a mask of leaves, as in `sam`.
      eta: added to abs(w); the paper has 0, where weights at exactly zero are not attacked.
      scale: factor on the divergence, >= 0.
      max_radius: upper bound of the radius; None for no bound, as in the paper.
      ascent: "paper", or "released" for the step of the released code,
        :math:`\epsilon = d w^2 / \|w g\|` (not adaptive: :math:`d / \|g\|` in every
        coordinate): it moves all weights up whatever the sign of their gradient, so the loss may
        fall along it, and :math:`\|\epsilon / w\| \neq d`. Here it is masked like the other.
      decay: share of the old average kept by reference="ema", in [0, 1]; 0 is "previous", 1 is
        "initial".
      accumulator_dtype: floating dtype in which reference="ema" is kept, and only that; None for
        float32, or float64 where the parameters are. In bfloat16 an average with a large `decay`
        never moves: what it takes in is less than half of its last digit. The model sees the
        average in the dtypes of its parameters.
      refresh_every: calls between refreshes of the reference. With k micro-batches per step
        (`optax.MultiSteps(base, k)` after this transform) set k; the reference is then the weights
        of the previous step, and not the present ones in k - 1 of k calls. A call whose divergence
        is nan, a step that `optax.apply_if_finite` would refuse, refreshes nothing.
      mask: the leaves to attack, as in `sam`.
      axis_name: axes over which the second gradient is averaged, for a divergence and an attack
        per shard, as in `sam`.
      on_nonfinite: as in `sam`; a radius that is not finite stays so, and so does the gradient.

    Returns:
      A transform whose state is `TRAMState`; `optax.tree.get(state, "radius")` reads d.

    Raises:
      ValueError: an unknown `reference`, `divergence`, `ascent` or `on_nonfinite`, a number out of
        range, an `accumulator_dtype` that is not floating or has no average to keep;
        `update` without an argument listed above; parameters hidden by `optax.masked` or
        `optax.partition`.

    Source: arXiv:2310.03646, Eq. 4-7. KL direction: forward, Appendix C.5.

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
    check_choice("reference", reference, ("previous", "initial", "ema", "noise"))
    check_choice("ascent", ascent, ASCENTS)
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)
    if not callable(divergence):
        check_choice("divergence", divergence, DIVERGENCES)
    for name, value in {"eta": eta, "scale": scale, "max_radius": max_radius}.items():
        check_number(name, value, at_least=0.0)
    check_number("decay", decay, at_least=0.0, at_most=1.0)
    check_number("refresh_every", refresh_every, at_least=1)
    if accumulator_dtype is not None and reference != "ema":
        raise ValueError(
            f"accumulator_dtype is of the average of reference='ema', got reference={reference!r}"
        )
    if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise FieldError("accumulator_dtype", "be a floating dtype", repr(accumulator_dtype))
    measure = divergence if callable(divergence) else DIVERGENCES[divergence]
    # How much of the present weights enters the reference at a refresh.
    refresh_weight = {"previous": 1.0, "initial": 0.0, "ema": 1.0 - decay, "noise": 0.0}[reference]

    def init_fn(params: PyTree) -> TRAMState:
        _attack.check_params("tram", params, mask=mask, adaptive=adaptive)
        # A copy, so that params and state can both be donated.
        copy = None if reference == "noise" else jax.tree.map(jnp.copy, params)
        if reference == "ema":
            copy = jax.tree.map(accumulator, copy)
        return TRAMState(reference=copy, **_attack.initial(params))

    def accumulator(leaf: jax.Array) -> jax.Array:
        if not is_floating(leaf):
            return leaf
        return widened(leaf) if accumulator_dtype is None else leaf.astype(accumulator_dtype)

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
        if outputs is None and output_fn is not None:
            outputs = output_fn(params)
        if reference == "noise":
            _attack.require("tram('noise')", outputs=outputs, noisy_outputs=noisy_outputs)
            reference_outputs = noisy_outputs
        else:
            _attack.require(f"tram({reference!r})", outputs=outputs, output_fn=output_fn)
            assert output_fn is not None
            reference_outputs = output_fn(_attack.like(state.reference, params))

        radius = measure(*jax.lax.stop_gradient((reference_outputs, outputs)), where)
        radius = radius * jnp.asarray(_attack.value_at(scale, state.count), radius.dtype)
        if max_radius is not None:
            bound = jnp.asarray(_attack.value_at(max_radius, state.count), radius.dtype)
            radius = jnp.minimum(radius, bound)

        mean_radius = averaged(radius.astype(state.radius.dtype), axis_name)
        calls = optax.safe_increment(state.count)
        due = calls % jnp.asarray(refresh_every).astype(calls.dtype) == 0
        new_reference = _refreshed(
            state.reference, params, refresh_weight, due & ~jnp.isnan(mean_radius)
        )
        if reference == "previous" and isinstance(refresh_every, int) and refresh_every == 1:
            # The same numbers. Read from here, XLA sees that nothing needs the old weights or the
            # old reference any longer, and overwrites both in place: 4 % of a step's time.
            params = new_reference

        attack, distance = ASCENTS[ascent](
            _attack.attacked_gradient(updates, params, mask),
            _attack.scaling(params, adaptive, eta),
            radius,
        )
        gradient, broke = _attack.second_gradient(
            grad_fn, params, attack, updates, axis_name, on_nonfinite
        )
        scalars = _attack.following(state, mean_radius, distance, broke, axis_name)
        return gradient, TRAMState(reference=new_reference, **scalars)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refreshed(
    reference: PyTree | None,
    params: PyTree,
    refresh_weight: jax.typing.ArrayLike,
    due: jax.Array,
) -> PyTree | None:
    """The reference of the next call: `params`, before their update, taken in where `due`."""
    if reference is None or (isinstance(refresh_weight, float) and refresh_weight == 0.0):
        return reference

    def refresh(old: jax.Array, new: jax.Array) -> jax.Array:
        if not is_floating(old):
            return jnp.where(due, new, old)
        new = jnp.asarray(new)
        if isinstance(refresh_weight, float) and refresh_weight == 1.0:
            return jnp.where(due, new.astype(old.dtype), old)
        wide = widened(old)
        mixed = wide + jnp.asarray(refresh_weight, wide.dtype) * (new.astype(wide.dtype) - wide)
        return jnp.where(due, mixed.astype(old.dtype), old)

    return jax.tree.map(refresh, reference, params)


def _released_ascent(
    gradient: PyTree, scale: PyTree, radius: jax.typing.ArrayLike
) -> tuple[PyTree, jax.Array]:
    r"""The released code's step :math:`d T^2 / (\|T g\| + 10^{-12})`, and its length."""
    norm = global_norm(_attack.map_attack(lambda g, t: g * t, gradient, scale))
    factor = jnp.asarray(radius, norm.dtype) / (norm + 1e-12)
    # At zero gradient the guard alone would throw the weights far away.
    factor = jnp.where(norm == 0, 0 * factor, factor)
    steps = _attack.map_attack(lambda g, t: jnp.ones_like(g) * t, gradient, scale)
    attack = _attack.map_attack(lambda s, t: s * t * factor.astype(s.dtype), steps, scale)
    return attack, factor * global_norm(steps)


def _example_mean(divergence: Callable[[jax.Array, jax.Array], jax.Array]) -> Divergence:
    """The mean of a per-example divergence over the examples that `where` includes."""
    return lambda reference, outputs, where: _attack.example_mean(
        divergence(reference, outputs), where
    )


def _released_kl(reference: jax.Array, outputs: jax.Array, where: jax.Array | None) -> jax.Array:
    """Mean KL over batch and classes, divided by the batch size again."""
    mean = _example_mean(rulers.kl_divergence)(reference, outputs, where)
    return mean / (outputs.shape[0] * outputs.shape[-1])


DIVERGENCES: dict[str, Divergence] = {
    "kl": _example_mean(rulers.kl_divergence),
    "reverse_kl": _example_mean(rulers.reverse_kl),
    "symmetric_kl": _example_mean(rulers.symmetric_kl),
    "jensen_shannon": _example_mean(rulers.jensen_shannon),
    "l2": _example_mean(rulers.l2_distance),
    "mmd": lambda reference, outputs, where: rulers.mmd(reference, outputs, where=where),
    "released_kl": _released_kl,
}
ASCENTS = {"paper": _attack.ascent, "released": _released_ascent}
