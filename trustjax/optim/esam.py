r"""Efficient sharpness-aware minimization (ESAM): SAM on some of the weights and examples.

Du, Yan, Feng, Zhou, Zhen, Goh, Tan, arXiv:2110.03141 (ICLR 2022).

    eps  = m rho g / (beta ||g||)        m: 1 with probability beta, else 0, one draw a leaf
    rise = l_i(w + eps) - l_i(w)         of every example i of the batch
    g'   = grad of the mean l_i(w + eps) over the share gamma of the examples that rise most
    w   <- base(w, g')

The mean of eps over m is SAM's attack. The released code (dydjw9/Efficient_SAM) takes the norm over
the leaves that are kept, and keeps the examples that rise strictly more than the last one of the
share, so one fewer (`form="released"` for both); it draws the leaves of a step at the end of the
step before, so that the first step attacks all of them. The time that it saves, gradients of
dropped leaves in the first pass and examples left out of the second, is not saved here, as shapes
are static.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import FieldError, check_choice, check_number
from trustjax._dtypes import widened
from trustjax._sharding import AxisName
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import Mask, OnNonfinite, PyTree


class ESAMState(NamedTuple):
    """State of `esam`.

    Attributes:
      count: int32 [], steps so far.
      key: uint32 [2], data of the random key of the next step.
      radius: float [], rho / beta of the last step: how long an attack may be.
      distance: float [], length of the last attack in its (scaled) norm, at most that.
      nonfinite_count: int32 [], steps whose second gradient was not finite although the first one
        was (see `on_nonfinite` of `sam`).
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    key: jax.Array
    radius: jax.Array
    distance: jax.Array
    nonfinite_count: jax.Array


def esam(
    rho: optax.ScalarOrSchedule = 0.05,
    beta: jax.typing.ArrayLike = 0.6,
    gamma: jax.typing.ArrayLike = 0.5,
    *,
    form: Literal["paper", "released"] = "paper",
    adaptive: bool | Mask = False,
    eta: jax.typing.ArrayLike = 0.0,
    seed: jax.typing.ArrayLike = 0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    on_nonfinite: OnNonfinite = "clean",
) -> optax.GradientTransformationExtraArgs:
    r"""`sam` that attacks a random part of the leaves and descends on a part of the examples.

    .. math:: \epsilon = \frac{\rho}{\beta} \, m \frac{g}{\|g\|_2}, \qquad
              g' = \nabla \, \mathrm{mean}_{i \in B^+} \, l_i(w + \epsilon), \qquad
              |B^+| = \gamma |B|

    B+ are the examples with the largest :math:`l_i(w + \epsilon) - l_i(w)`. beta = gamma = 1 is
    SAM. It costs as much as SAM, 2 forward and 2 backward passes, if compiled.

    `update` takes `params` and these extra arguments; others are ignored:

    - `grad_fn(params, where) -> gradients` on the same batch with the same random key, of the mean
      loss over the examples that `where`, bool [batch], includes;
    - `losses_fn(params) -> losses` [batch] of single examples, likewise;
    - `losses`, optional: these at `params`, at hand from the first pass;
    - `where`, optional: bool [batch], the examples that count at all.

    With gamma = 1 all that is needed is `grad_fn(params)`, as in `sam`. `two_pass_step` passes all
    of these if `loss_fn` returns the losses in `aux["losses"]`.

    Args:
      rho: radius, >= 0; a number or a schedule.
      beta: probability with which a leaf is attacked, in (0, 1].
      gamma: share of the examples to descend on, in (0, 1], rounded down, at least one example; all
        from 0.99 on, as in the released code.
      form: "paper", or "released" for the norm over kept leaves alone, which makes every attack
        rho / beta long, and for one example fewer (none, and a zero gradient, where the share is a
        single example or its last one ties with the others).
      adaptive: scale the ball as in `sam`.
      eta: as in `sam`.
      seed: integer, where the draws begin.
      mask: the leaves to attack at all, as in `sam`.
      axis_name: as in `sam`; each shard selects its own examples.
      on_nonfinite: as in `sam`.

    Returns:
      A transform whose state is `ESAMState`. In `alternating`, which leaves the second gradient to
      the trainer, gamma must be 1.

    Raises:
      ValueError: a number out of range, an unknown `form` or `on_nonfinite`; `update` without an
        argument listed above; parameters hidden by `optax.masked` or `optax.partition`.

    Source: arXiv:2110.03141, Algorithm 1; beta and gamma as the released script has them for
    ResNet-18 on CIFAR.

    >>> import jax, jax.numpy as jnp, optax
    >>> from trustjax.optim import two_pass_step
    >>> def loss_fn(w, x, y):
    ...     losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
    ...     return losses.mean(), {"losses": losses}
    >>> tx = optax.chain(esam(0.05), optax.sgd(0.1))
    >>> w, x, y = jnp.ones((2, 3)), jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([0, 1])
    >>> step = jax.jit(two_pass_step(loss_fn, tx))
    >>> w, state, loss, aux = step(w, tx.init(w), x, y)
    """
    check_number("rho", rho, at_least=0.0)
    check_number("beta", beta, above=0.0, at_most=1.0)
    check_number("gamma", gamma, above=0.0, at_most=1.0)
    check_number("eta", eta, at_least=0.0)
    check_choice("form", form, ("paper", "released"))
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)
    takes_all = not isinstance(gamma, jax.core.Tracer) and bool(np.all(np.asarray(gamma) >= 0.99))

    def init_fn(params: PyTree) -> ESAMState:
        _attack.check_params("esam", params, mask=mask, adaptive=adaptive)
        return ESAMState(key=jax.random.key_data(jax.random.key(seed)), **_attack.initial(params))

    def update_fn(
        updates: PyTree,
        state: ESAMState,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[..., PyTree] | None = None,
        losses_fn: Callable[[PyTree], jax.Array] | None = None,
        losses: jax.Array | None = None,
        where: jax.Array | None = None,
        attack_only: bool = False,
        **extra_args: object,
    ) -> tuple[PyTree, ESAMState]:
        del extra_args
        params, second_pass = _attack.second_pass_arguments(
            "esam", params, grad_fn, axis_name, attack_only=attack_only
        )
        key, draw = jax.random.split(jax.random.wrap_key_data(state.key))
        radius = jnp.asarray(_attack.value_at(rho, state.count), state.radius.dtype)
        radius = radius / jnp.asarray(beta, radius.dtype)

        scale = _attack.scaling(params, adaptive, eta)
        gradient = _attack.attacked_gradient(updates, params, mask)
        kept = _kept(gradient, draw, beta)
        attack, distance = _attack.ascent(kept, scale, radius)
        if form == "paper":  # the norm of all leaves in place of that of the kept ones
            kept_part = _attack.ratio(_length(kept, scale), _length(gradient, scale))
            attack = _attack.map_attack(lambda e: e * kept_part.astype(e.dtype), attack)
            distance = distance * kept_part

        if not takes_all:
            if attack_only:
                raise FieldError(
                    "gamma",
                    "be 1 in alternating, where the trainer takes the second gradient",
                    gamma,
                )
            if losses_fn is None:
                raise ValueError(
                    "esam needs losses_fn, unless gamma is 1: call tx.update(grads, state, params, "
                    "grad_fn=lambda p, where: ..., losses_fn=lambda p: ...) with the losses "
                    "[batch] of single examples; trustjax.optim.two_pass_step does where loss_fn "
                    "returns them as aux['losses']"
                )
            before = losses_fn(params) if losses is None else losses
            second_pass = _on_selected(second_pass, losses_fn, before, gamma, where, form)
        result, broke = _attack.second_gradient(
            second_pass, params, attack, updates, axis_name, on_nonfinite
        )
        scalars = _attack.following(state, radius, distance, broke, axis_name)
        return result, ESAMState(key=jax.random.key_data(key), **scalars)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _length(gradient: PyTree, scale: PyTree) -> jax.Array:
    return global_norm(_attack.map_attack(lambda g, t: g * t, gradient, scale))


def _kept(gradient: PyTree, key: jax.Array, beta: jax.typing.ArrayLike) -> PyTree:
    """`gradient` with every leaf as it is with probability beta, else zero."""
    leaves, structure = jax.tree.flatten(gradient)
    keeps = jax.random.bernoulli(key, beta, (len(leaves),))
    pairs = zip(keeps, leaves, strict=True)
    return jax.tree.unflatten(structure, [jnp.where(k, g, jnp.zeros_like(g)) for k, g in pairs])


def _on_selected(
    grad_fn: Callable[..., PyTree],
    losses_fn: Callable[[PyTree], jax.Array],
    before: jax.Array,
    gamma: jax.typing.ArrayLike,
    where: jax.Array | None,
    form: str,
) -> Callable[[PyTree], PyTree]:
    """`grad_fn` over the share gamma of the examples whose loss rises most from `before`."""

    def second_pass(attacked: PyTree) -> PyTree:
        rise = widened(jax.lax.stop_gradient(losses_fn(attacked) - before))
        counted = jnp.ones(rise.shape, bool) if where is None else where
        if rise.ndim != 1 or counted.shape != rise.shape:
            raise ValueError(
                "losses, and where if given, must have the shape [batch], got "
                f"{rise.shape} and {counted.shape}"
            )
        total, share = (jnp.asarray(x, rise.dtype) for x in (jnp.sum(counted), gamma))
        # The small number lets 0.7 of 10 be 7 in float32.
        quota = jnp.maximum(jnp.floor(share * total + 1e-4), jnp.ones([], rise.dtype))
        quota = jnp.where(share >= 0.99, total, quota)
        rank = jnp.argsort(jnp.argsort(jnp.where(counted, -rise, jnp.full_like(rise, jnp.inf))))
        selected = counted & (rank.astype(rise.dtype) < quota)
        if form == "released":
            last = jnp.min(jnp.where(selected, rise, jnp.full_like(rise, jnp.inf)))
            selected = selected & ((rise > last) | (share >= 0.99))
        return grad_fn(attacked, where=selected)

    return second_pass
