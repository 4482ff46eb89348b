"""How far a method was allowed to go and how far it went, under the same names for all methods.

- `trust/radius`: the allowed distance, in the geometry of the method.
- `trust/distance`: the distance of the last step.
- `trust/used`: distance / radius, which has no unit, so that methods can be compared by it.
- `trust/nonfinite`: 1 where the second gradient of an attack was not finite, else 0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def trust_metrics(radius: jax.Array, distance: jax.Array) -> dict[str, jax.Array]:
    """The three metrics of a trust region; `trust/used` is 0 where nothing was allowed.

    `radius` and `distance` have any shape, the same one. NaN stays NaN.
    """
    # The inner `where` keeps the derivative finite at a radius of 0.
    used = jnp.where(radius == 0, 0, distance / jnp.where(radius == 0, 1, radius))
    return {"trust/radius": radius, "trust/distance": distance, "trust/used": used}


def trust_metrics_of(opt_state: Any) -> dict[str, jax.Array]:
    """`trust_metrics` of the last step of an optimizer; empty if it has no trust region.

    `opt_state` is the state of any chain or wrapper around a transform of `trustjax.optim`.

    >>> import jax.numpy as jnp, optax
    >>> from trustjax.optim import scale_by_auon
    >>> tx = optax.chain(scale_by_auon(), optax.scale(-0.1))
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> _, state = tx.update(params, tx.init(params))
    >>> sorted(trust_metrics_of(state))
    ['trust/distance', 'trust/radius', 'trust/used']
    """
    radius = optax.tree.get(opt_state, "radius")
    distance = optax.tree.get(opt_state, "distance")
    if radius is None or distance is None:
        return {}
    return trust_metrics(radius, distance)


def means_of_trust(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Means of metrics over several steps, with `trust/used` as mean distance over mean radius.

    A single step may be allowed next to nothing, and would dominate the mean of the ratios. The
    metrics are numbers on the host; without a radius, or with radius 0, they stay as they are.

    >>> means_of_trust({"trust/radius": 2.0, "trust/distance": 1.0, "trust/used": 7.0})
    {'trust/radius': 2.0, 'trust/distance': 1.0, 'trust/used': 0.5}
    """
    radius = metrics.get("trust/radius")
    if not radius:
        return dict(metrics)
    return {**metrics, "trust/used": metrics["trust/distance"] / radius}


def broken_passes(before: optax.OptState, after: optax.OptState) -> dict[str, jax.Array]:
    """1 for a step whose second gradient was not finite (`on_nonfinite` of `sam`), else 0."""
    count, new_count = (optax.tree.get(each, "nonfinite_count") for each in (before, after))
    if count is None:
        return {}
    return {"trust/nonfinite": (new_count - count).astype(jnp.float32)}
