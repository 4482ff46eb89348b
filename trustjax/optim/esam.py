r"""Efficient sharpness-aware minimization (ESAM): SAM on some of the weights and examples.

Du, Yan, Feng, Zhou, Zhen, Goh, Tan, arXiv:2110.03141 (ICLR 2022).

    eps  = m rho g / (beta ||g||)        m: 1 with probability beta, else 0, drawn for each leaf
    rise = l_i(w + eps) - l_i(w)         for every example i of the batch
    g'   = grad of the mean l_i(w + eps) over the share gamma of the examples with the largest rise
    w   <- base(w, g')

The mean of eps over m is SAM's attack. The released code (dydjw9/Efficient_SAM) takes the norm over
the kept leaves alone, and it selects the examples that rise strictly more than the last one of the
share, which makes one fewer (`form="released"` for both). It also draws the leaves of a step at the
end of the step before, so that its first step attacks all of them. It saves the time of the dropped
leaves in the first pass and of the dropped examples in the second; here, where shapes are static,
nothing is saved.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._dtypes import widened
from trustjax._sharding import AxisName
from trustjax.geometry.norm import global_norm
from trustjax.optim import _attack
from trustjax.optim._attack import Mask, OnNonfinite, PyTree


class ESAMState(NamedTuple):
    """State of `esam`.

    Attributes:
      count: Steps so far, int32 [].
      key: Data of the random key of the next step, uint32 [2].
      radius: Upper bound of the length of the last attack, rho / beta, float [].
      distance: Length of the last attack in its own norm, float [].
      nonfinite_count: Steps whose second gradient was not finite although the first gradient and
        the attack were, int32 [] (see `on_nonfinite` of `sam`).
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
    r"""`sam` that attacks some of the leaves, at random, and descends on some of the examples.

    .. math:: \epsilon = \frac{\rho}{\beta} \, m \frac{g}{\|g\|_2}, \qquad
              g' = \nabla \, \mathrm{mean}_{i \in B^+} \, l_i(w + \epsilon), \qquad
              |B^+| = \gamma |B|

    B+ holds the examples with the largest :math:`l_i(w + \epsilon) - l_i(w)`. beta = gamma = 1 is
    SAM. The compiled step costs as much as SAM's: 2 forward and 2 backward passes.

    `update` takes `params` and these extra arguments; others are ignored:

    - `grad_fn(params, where) -> gradients`, on the same batch with the same random key: the
      gradient of the mean loss over the examples that `where`, bool [batch], includes;
    - `losses_fn(params) -> losses` [batch], the losses of single examples on the same batch;
    - `losses`, optional: the losses at `params`, known from the first pass;
    - `where`, optional: bool [batch], the examples from which to select.

    With gamma = 1 it needs only `grad_fn(params)`, as in `sam`. `two_pass_step` passes all of these
    if `loss_fn` returns the losses in `aux["losses"]`.

    Args:
      rho: Radius, >= 0; a number or a schedule.
      beta: Probability that a leaf is attacked, in (0, 1].
      gamma: Share of the examples to descend on, in (0, 1]; rounded down to at least one example.
        From 0.99 on it selects all of them, as in the released code.
      form: "paper", or "released" for the released code: the norm is over the kept leaves alone, so
        that every attack has length rho / beta, and one example fewer is selected. None is, and the
        gradient is zero, if the share is a single example or if its examples all rise equally.
      adaptive: Whether to scale the ball, as in `sam`.
      eta: Added to abs(w), as in `sam`.
      seed: Seed of the random draws, an integer.
      mask: The leaves that may be attacked, as in `sam`.
      axis_name: Axes of m-sharpness, as in `sam`; each shard selects among its own examples.
      on_nonfinite: As in `sam`.

    Returns:
      A transform whose state is `ESAMState`. In `alternating`, where the trainer takes the second
      gradient, gamma must be 1.

    Raises:
      ValueError: A number is out of range, or `form` or `on_nonfinite` is unknown; in `init` and
        `update`, parameters are hidden by `optax.masked` or `optax.partition`; in `update`, an
        argument listed above is missing.

    Source: arXiv:2110.03141, Algorithm 1; beta and gamma are those of the released script for
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
    check_scalar("rho", rho, at_least=0.0)
    check_scalar("beta", beta, above=0.0, at_most=1.0)
    check_scalar("gamma", gamma, above=0.0, at_most=1.0)
    check_scalar("eta", eta, at_least=0.0)
    check_choice("form", form, ("paper", "released"))
    check_choice("on_nonfinite", on_nonfinite, _attack.ON_NONFINITE)
    takes_all = not isinstance(gamma, jax.core.Tracer) and bool(np.all(np.asarray(gamma) >= 0.99))

    def init_fn(params: PyTree) -> ESAMState:
        _attack.check_params("esam", params, mask=mask, adaptive=adaptive)
        key = jax.random.key_data(jax.random.key(seed))
        return ESAMState(key=key, **_attack.initial_scalars(params))

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
        # Kept leaves move by 1 / beta as much, so that the mean attack is SAM's.
        radius = radius / jnp.asarray(beta, radius.dtype)

        # Stochastic weight perturbation: only the leaves that the draw keeps are attacked.
        scale = _attack.scaling(params, adaptive, eta)
        gradient = _attack.attacked_gradient(updates, params, mask)
        kept = _kept_leaves(gradient, draw, beta)
        attack, distance = _attack.ascent(kept, scale, radius)
        if form == "paper":
            attack, distance = _over_norm_of_all(attack, distance, kept, gradient, scale)

        # Sharpness-sensitive data selection: the second gradient is that of the selected examples.
        if not takes_all:
            losses_fn = _required_losses_fn(losses_fn, gamma, attack_only)
            before = losses_fn(params) if losses is None else losses
            second_pass = _on_selected(second_pass, losses_fn, before, gamma, where, form)
        result, broke = _attack.second_gradient(
            second_pass, params, attack, updates, axis_name, on_nonfinite
        )
        scalars = _attack.next_scalars(state, radius, distance, broke, axis_name)
        return result, ESAMState(key=jax.random.key_data(key), **scalars)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _over_norm_of_all(
    attack: PyTree, distance: jax.Array, kept: PyTree, gradient: PyTree, scale: PyTree
) -> tuple[PyTree, jax.Array]:
    """The attack and its length, divided by ||T g|| over all leaves, not the kept ones alone."""
    norm_of_kept, norm_of_all = (
        global_norm(_attack.scaled(tree, scale)) for tree in (kept, gradient)
    )
    kept_part = _attack.ratio(norm_of_kept, norm_of_all)
    attack = _attack.map_attack(lambda e: e * kept_part.astype(e.dtype), attack)
    return attack, distance * kept_part


def _required_losses_fn(
    losses_fn: Callable[[PyTree], jax.Array] | None,
    gamma: jax.typing.ArrayLike,
    attack_only: bool,
) -> Callable[[PyTree], jax.Array]:
    """Returns `losses_fn`, or raises ValueError if examples cannot be selected."""
    if attack_only:
        raise FieldError(
            "gamma", "be 1 in alternating, where the trainer takes the second gradient", gamma
        )
    if losses_fn is None:
        raise ValueError(
            "esam needs losses_fn, unless gamma is 1: call tx.update(grads, state, params, "
            "grad_fn=lambda p, where: ..., losses_fn=lambda p: ...) with the losses [batch] of "
            "single examples; trustjax.optim.two_pass_step does if loss_fn returns them as "
            "aux['losses']"
        )
    return losses_fn


def _kept_leaves(gradient: PyTree, key: jax.Array, beta: jax.typing.ArrayLike) -> PyTree:
    """`gradient` with each leaf kept with probability beta, and zero otherwise."""
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
    """`grad_fn` on the share gamma of the examples whose losses rise most from `before`."""

    def second_pass(attacked: PyTree) -> PyTree:
        rise = widened(jax.lax.stop_gradient(losses_fn(attacked) - before))
        included = jnp.ones(rise.shape, bool) if where is None else where
        if rise.ndim != 1 or included.shape != rise.shape:
            raise ValueError(
                "losses, and where if given, must have the shape [batch], got "
                f"{rise.shape} and {included.shape}"
            )
        return grad_fn(attacked, where=_largest_rises(rise, included, gamma, form))

    return second_pass


def _largest_rises(
    rise: jax.Array, included: jax.Array, gamma: jax.typing.ArrayLike, form: str
) -> jax.Array:
    """The mask of the share gamma of the `included` examples that rise most, bool [batch]."""
    total, share = (jnp.asarray(x, rise.dtype) for x in (jnp.sum(included), gamma))
    # The 1e-4 makes 0.7 of 10 examples 7 in float32.
    quota = jnp.maximum(jnp.floor(share * total + 1e-4), jnp.ones([], rise.dtype))
    quota = jnp.where(share >= 0.99, total, quota)
    # Sorting the order of the sort gives ranks; excluded examples rank last.
    # A rise that is NaN ranks first: left out, a broken loss would not be seen.
    rise = jnp.where(jnp.isnan(rise), jnp.full_like(rise, jnp.inf), rise)
    rank = jnp.argsort(jnp.argsort(jnp.where(included, -rise, jnp.full_like(rise, jnp.inf))))
    selected = included & (rank.astype(rise.dtype) < quota)
    if form == "released":  # strictly more than the last one of the share
        last = jnp.min(jnp.where(selected, rise, jnp.full_like(rise, jnp.inf)))
        selected = selected & ((rise > last) | (share >= 0.99))
    return selected
