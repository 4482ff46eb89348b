"""Two-pass transforms for trainers that only know `tx.update(grads, state, params)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import FieldError
from trustjax._dtypes import dtype_of
from trustjax._loops import is_known
from trustjax.optim import _attack, _leaves
from trustjax.optim._attack import PyTree
from trustjax.optim._extra_args import with_extra_args


class AlternatingState(NamedTuple):
    """State of `alternating`.

    Attributes:
      attack_state: State of the attack.
      base_state: State of the base optimizer, which counts steps, not calls.
      clean: Parameters of the last call without the attack.
      pending: Whether an attack is still to be taken back, bool [].
    """

    attack_state: optax.OptState
    base_state: optax.OptState
    clean: PyTree
    pending: jax.Array


def alternating(
    attack: optax.GradientTransformation, base: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Spreads one step over two calls of `update`: first the attack, then the descent.

    Odd calls return the attack itself, so that the trainer takes its next gradient at the attacked
    weights. Even calls take the attack back and step with `base` from the clean weights. Give both
    calls of a pair the same batch, and use `clean_params` for evaluation and checkpoints.

    The trainer adds both moves in the dtype of the weights. In float32 the attack is taken back up
    to rounding. In bfloat16 a weight that is small beside its attack loses digits in every pair,
    about 1 % in ten thousand; keep the trained weights in float32 there.

    To refuse gradients that are not finite, wrap both parts:
    `alternating(optax.apply_if_finite(attack, n), optax.apply_if_finite(base, n))`. Around
    `alternating` a refused call would swap odd and even calls. The attack's `on_nonfinite` has no
    effect on the second gradient, which goes to `base`.

    Args:
      attack: `sam`, `asam`, `tram` or another transform that takes `grad_fn` and returns the second
        gradient as it is (not `gsam`); its other extra arguments (`outputs`, `output_fn`, ...) are
        those of the odd calls. Or a plain transform, whose update is the attack, sign included.
      base: The optimizer of the descent. It sees leaves without a gradient as `optax.MaskedNode`.

    Returns:
      A transform whose state is `AlternatingState`.

    Raises:
      ValueError: In `init`, parameters are hidden by `optax.masked` or `optax.partition`; in
        `update`, `params` is missing; and whatever `attack` and `base` raise.

    >>> import jax, jax.numpy as jnp, optax
    >>> from trustjax.optim import sam
    >>> grad = jax.grad(lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2))
    >>> tx = alternating(sam(0.05), optax.sgd(0.01))
    >>> w = jnp.array([2.0, -1.0])
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(grad(w), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> print(w)
    [ 1.9799019  -0.89509714]
    """
    attack, base = with_extra_args(attack), with_extra_args(base)

    def init_fn(params: PyTree) -> AlternatingState:
        _attack.check_whole_tree(
            "alternating",
            params,
            "Put it inside: alternating(attack(..., mask=...), optax.partition(...))",
        )
        return AlternatingState(
            attack.init(params),
            base.init(_leaves.trained_part(params, params)),
            clean=jax.tree.map(jnp.copy, _as_arrays(params)),
            pending=jnp.zeros([], bool),
        )

    def update_fn(
        updates: PyTree, state: AlternatingState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AlternatingState]:
        if params is None:
            raise ValueError("alternating needs params: call tx.update(grads, state, params)")
        _leaves.check_gradient(params, updates)
        params = _as_arrays(params)

        def start_attack() -> tuple[PyTree, AlternatingState]:
            return _start_attack(attack, updates, state, params, extra_args)

        def descend() -> tuple[PyTree, AlternatingState]:
            return _descend(base, updates, state, params, extra_args)

        if is_known(state.pending):  # outside of jit cond compiles both branches at every call
            moves, new_state = (descend if state.pending else start_attack)()
        else:
            moves, new_state = jax.lax.cond(state.pending, descend, start_attack)
        return jax.tree.map(_leaves.resting, params, updates, moves), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _start_attack(
    attack: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: AlternatingState,
    params: PyTree,
    extra_args: dict[str, Any],
) -> tuple[PyTree, AlternatingState]:
    """The first call of a pair: moves the trainer's weights from w to w + eps."""
    # An attack returns grad_fn(w + eps) as it is. This grad_fn returns the difference from w, so
    # the transform returns eps. Transforms that do more with the second gradient refuse.
    question = {
        "grad_fn": lambda attacked: jax.tree.map(
            lambda p, u, a: a - p if _leaves.is_trained(p) else u, params, updates, attacked
        ),
        "attack_only": True,
    }
    moves, attack_state = attack.update(
        updates, state.attack_state, params, **(extra_args | question)
    )
    return _leaves.trained_part(params, moves), AlternatingState(
        attack_state, state.base_state, clean=params, pending=jnp.ones([], bool)
    )


def _descend(
    base: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: AlternatingState,
    params: PyTree,
    extra_args: dict[str, Any],
) -> tuple[PyTree, AlternatingState]:
    """The second call of a pair: moves from w + eps to w and on to base(w, gradient at w + eps)."""
    before = _leaves.trained_part(params, state.clean)
    descent, base_state = base.update(
        _leaves.trained_part(params, updates), state.base_state, before, **extra_args
    )
    back = jax.tree.map(jnp.subtract, before, _leaves.trained_part(params, params))
    moves = jax.tree.map(jnp.add, back, descent)
    # Kept apart from the trainer's weights, w + eps + (moves), which round differently.
    clean = jax.tree.map(
        lambda p, c, new: new if _leaves.is_trained(p) else c,
        params,
        state.clean,
        optax.apply_updates(before, descent),
    )
    return moves, AlternatingState(
        state.attack_state, base_state, clean=clean, pending=jnp.zeros([], bool)
    )


def clean_params(state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters without a pending attack, for evaluation and checkpoints.

    Args:
      state: An `AlternatingState`, or an optimizer state that holds one.
      params: The trainer's parameters.

    Returns:
      `params`, or the parameters before the attack while one is pending.

    Raises:
      ValueError: `state` holds no `AlternatingState`, or more than one.
    """
    found = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AlternatingState))
        if isinstance(leaf, AlternatingState)
    ]
    if len(found) != 1:
        raise FieldError("state", "hold one AlternatingState", len(found))
    return jax.tree.map(lambda c, p: jnp.where(found[0].pending, c, p), found[0].clean, params)


def _as_arrays(params: PyTree) -> PyTree:
    """`params` with arrays in place of trained Python numbers, so that every leaf has a dtype."""
    return jax.tree.map(
        lambda p: jnp.asarray(p, dtype_of(p)) if _leaves.is_trained(p) else p, params
    )
