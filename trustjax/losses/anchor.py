r"""Anchors of ADPO as values in a train state: fixed, averaged, or refreshed now and then.

An anchor is a pair of pure functions, like an Optax transform:

    anchor = kl_anchor(threshold=0.1)
    state = anchor.init(params)
    state = anchor.update(state, new_params, distance=kl)     once per step, outside the gradient

`state.params` are the weights of the anchor policy. The states are NamedTuples of arrays, so they
work under jit and scan and are saved with the rest of a train state.

    fixed_anchor(params)   the given weights, such as a teacher or a supervised model
    fixed_anchor()         "self": the weights given to `init`, the student's own first ones
    ema_anchor             the moving average of the weights
    periodic_anchor        the weights, refreshed every k updates ("dynamic, offline")
    on_policy_anchor       the weights at every update, one of which is made per rollout
    kl_anchor              the weights, refreshed when the policy has gone too far

After a refresh the loss starts at log P, with gradient (1 / P - q) / tau, not 0: the target goes on
pulling. k refreshes compound to :math:`\pi_0 q^{k \tau}`, whatever the loss, so methods with
different refreshes should be compared at equal sharpness.

Source: Wang, arXiv:2510.18913, Section 3 and Algorithm 1; the modes of wk222/verlm, 88f702e7.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import FieldError, check_count, check_number
from trustjax._dtypes import is_floating, widened

PyTree = Any


class AnchorState(NamedTuple):
    """The state of an anchor.

    Attributes:
      params: Weights of the anchor policy, a tree like the parameters; for `ema_anchor` in float32
        at least.
      updates: Number of updates, int32 [].
      refreshes: Number of times the weights of the policy were copied, int32 [].
      distances: The last distances between policy and anchor, newest first, float32 [window], and
        NaN where there was none since the last refresh; None for anchors that measure nothing.
    """

    params: PyTree
    updates: jax.Array
    refreshes: jax.Array
    distances: jax.Array | None = None


class AnchorUpdate(Protocol):
    """`update` of an anchor: the state after a step of the policy."""

    def __call__(
        self, state: AnchorState, params: PyTree, *, distance: jax.Array | None = None
    ) -> AnchorState:
        """The next state.

        Args:
          state: The present state.
          params: The weights of the policy.
          distance: The distance of the policy from the anchor, [], such as the mean of
            `trust/distance` over groups and devices. Only `kl_anchor` uses it; like the extra
            arguments of Optax, it may be given to all.
        """


class AnchorInit(Protocol):
    """`init` of an anchor: the state before the first step."""

    def __call__(self, params: PyTree) -> AnchorState:
        """The first state, for the first weights of the policy."""


class Anchor(NamedTuple):
    """An anchor as two pure functions.

    Attributes:
      init: `init(params) -> AnchorState`, which copies the weights.
      update: `update(state, params, *, distance=None) -> AnchorState`.
    """

    init: AnchorInit
    update: AnchorUpdate


def fixed_anchor(params: PyTree | None = None) -> Anchor:
    """An anchor that never moves.

    Args:
      params: Weights of the anchor, such as those of a teacher or of a supervised model; None for
        those given to `init`, the student's own first ones (the paper's self-anchor).

    >>> import jax.numpy as jnp
    >>> anchor = fixed_anchor()
    >>> state = anchor.update(anchor.init(jnp.array(1.0)), jnp.array(2.0))
    >>> print(state.params, state.updates)
    1.0 1
    """
    given = params

    def init(params: PyTree) -> AnchorState:
        return _start(params if given is None else given)

    def update(
        state: AnchorState, params: PyTree, *, distance: jax.Array | None = None
    ) -> AnchorState:
        del params, distance
        return _counted(state)

    return Anchor(init, update)


def ema_anchor(decay: jax.typing.ArrayLike = 0.99) -> Anchor:
    r"""An anchor that is the moving average of the policy's weights.

    .. math:: \theta^{ref} \leftarrow a \, \theta^{ref} + (1 - a) \, \theta

    Leaves that are not floating, such as counters, are copied.

    Args:
      decay: a, in [0, 1], per update; 0.99 in the released code. The paper does not state it.

    Raises:
      ValueError: `decay` is out of range.
    """
    check_number("decay", decay, at_least=0.0, at_most=1.0)

    def init(params: PyTree) -> AnchorState:
        return _start(jax.tree.map(lambda x: widened(x) if is_floating(x) else x, params))

    def update(
        state: AnchorState, params: PyTree, *, distance: jax.Array | None = None
    ) -> AnchorState:
        del distance

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            if not is_floating(old):
                return new
            keep = jnp.asarray(decay, old.dtype)
            return keep * old + (1 - keep) * jnp.asarray(new).astype(old.dtype)

        return _counted(state)._replace(params=jax.tree.map(average, state.params, params))

    return Anchor(init, update)


def periodic_anchor(every: int) -> Anchor:
    """An anchor that becomes the policy at every k-th update.

    Args:
      every: k, >= 1. The paper does not state it.

    Raises:
      ValueError: `every` is not an int >= 1.
    """
    check_count("every", every, at_least=1)

    def update(
        state: AnchorState, params: PyTree, *, distance: jax.Array | None = None
    ) -> AnchorState:
        del distance
        state = _counted(state)
        return _refreshed(state, params, state.updates % every == 0)

    return Anchor(_start, update)


def on_policy_anchor() -> Anchor:
    """An anchor that is the policy which sampled the present groups.

    Call `update` once per rollout, before the steps on its groups. This is the only anchor of the
    trainers that were released with the paper.
    """
    return periodic_anchor(1)


def kl_anchor(*, threshold: jax.typing.ArrayLike = 0.1, window: int = 10) -> Anchor:
    """An anchor that becomes the policy when their mean distance exceeds a threshold.

    The mean is over the last `window` distances since the last refresh; until there are as many,
    nothing happens, nor while one of them is NaN.

    Args:
      threshold: Largest mean distance that is allowed, > 0, in nats for a KL divergence.
      window: Number of distances in the mean, >= 1.

    Raises:
      ValueError: `threshold` is not > 0, `window` is not an int >= 1, or `update` is called without
        a distance.

    Source: wk222/verlm, commit 88f702e7, whose helper leaves it to the caller to empty the window.
    """
    check_number("threshold", threshold, above=0.0)
    check_count("window", window, at_least=1)

    def init(params: PyTree) -> AnchorState:
        return _start(params)._replace(distances=jnp.full(window, jnp.nan, jnp.float32))

    def update(
        state: AnchorState, params: PyTree, *, distance: jax.Array | None = None
    ) -> AnchorState:
        if distance is None or state.distances is None:
            raise FieldError("distance", "be given to the update of kl_anchor", None)
        newest = jnp.asarray(distance).astype(jnp.float32)[None]
        distances = jnp.concatenate([newest, state.distances[:-1]])
        due = jnp.mean(distances) > threshold
        state = _refreshed(_counted(state), params, due)
        return state._replace(
            distances=jnp.where(due, jnp.full_like(distances, jnp.nan), distances)
        )

    return Anchor(init, update)


def _start(params: PyTree) -> AnchorState:
    zero = jnp.zeros([], jnp.int32)
    # A copy, so that the policy's weights and the state can both be donated.
    return AnchorState(jax.tree.map(jnp.copy, params), zero, jnp.copy(zero))


def _counted(state: AnchorState) -> AnchorState:
    return state._replace(updates=optax.safe_increment(state.updates))


def _refreshed(state: AnchorState, params: PyTree, due: jax.Array) -> AnchorState:
    """The state with the weights of the policy where a refresh is due."""
    return state._replace(
        params=jax.tree.map(lambda old, new: jnp.where(due, new, old), state.params, params),
        refreshes=state.refreshes + due.astype(jnp.int32),
    )
