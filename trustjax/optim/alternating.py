"""Two-pass transforms for trainers that only know `tx.update(grads, state, params)`."""

import functools
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
      attack_state: state of the attack.
      base_state: state of the base optimizer; it counts steps, not calls.
      clean: the parameters of the last call without the attack.
      pending: bool [], whether an attack is waiting to be taken back.
    """

    attack_state: optax.OptState
    base_state: optax.OptState
    clean: PyTree
    pending: jax.Array


def alternating(
    attack: optax.GradientTransformation, base: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Spreads one step over two calls of `update`: first the attack, then the descent.

    Odd calls return the attack itself, so that the trainer's next gradient is taken at the attacked
    weights. Even calls take the attack back and step with `base` from the clean weights. Give both
    calls of a pair the same batch; use `clean_params` for evaluation and checkpoints.

    Args:
      attack: `sam`, `asam`, `tram` or another transform that takes `grad_fn` and returns the second
        gradient as it is (not `gsam`); what else it needs (`outputs`, `output_fn`, ...) goes
        through the extra arguments of odd calls. Or a plain transform, whose update is the attack
        as it is, sign included.
      base: the optimizer of the descent. Gradients that are not finite are refused by
        `alternating(optax.apply_if_finite(attack, n), optax.apply_if_finite(base, n))`, which
        keeps odd and even calls apart; around `alternating` a refused call would shift them. The
        attack's `on_nonfinite` does not see the second gradient, which goes to `base`. It sees
        leaves without a gradient as `optax.MaskedNode`.

    Returns:
      A transform whose state is `AlternatingState`.

    Raises:
      ValueError: `update` without `params`, and whatever `attack` and `base` raise.

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
        moving = functools.partial(_leaves.trained_part, params)

        def start_attack() -> tuple[PyTree, AlternatingState]:
            # Asked for "the gradient" at the attacked point, answer how far that point is away:
            # the transform then returns its attack. Those that do more with the second gradient
            # than return it refuse.
            question = {
                "grad_fn": lambda attacked: jax.tree.map(
                    lambda p, u, a: a - p if _leaves.is_trained(p) else u, params, updates, attacked
                ),
                "attack_only": True,
            }
            moves, attack_state = attack.update(
                updates, state.attack_state, params, **(extra_args | question)
            )
            return moving(moves), AlternatingState(
                attack_state, state.base_state, clean=params, pending=jnp.ones([], bool)
            )

        def step() -> tuple[PyTree, AlternatingState]:
            before = moving(state.clean)
            descent, base_state = base.update(
                moving(updates), state.base_state, before, **extra_args
            )
            back = jax.tree.map(jnp.subtract, before, moving(params))
            moves = jax.tree.map(jnp.add, back, descent)
            clean = jax.tree.map(
                lambda p, c, new: new if _leaves.is_trained(p) else c,
                params,
                state.clean,
                optax.apply_updates(before, descent),
            )
            return moves, AlternatingState(
                state.attack_state, base_state, clean=clean, pending=jnp.zeros([], bool)
            )

        if is_known(state.pending):  # outside of jit cond compiles both branches at every call
            moves, state = (step if state.pending else start_attack)()
        else:
            moves, state = jax.lax.cond(state.pending, step, start_attack)
        return jax.tree.map(_leaves.resting, params, updates, moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clean_params(state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters without a pending attack, for evaluation and checkpoints.

    Args:
      state: an `AlternatingState`, or an optimizer state that holds one.
      params: the trainer's parameters.

    Returns:
      `params`, or while an attack is pending the parameters before it.

    Raises:
      ValueError: `state` holds no `AlternatingState`, or several.
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
    """`params` with arrays in place of Python numbers, whose dtype is only a proposal."""
    return jax.tree.map(
        lambda p: jnp.asarray(p, dtype_of(p)) if _leaves.is_trained(p) else p, params
    )
