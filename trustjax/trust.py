"""Metrics of a trust region, under the same names for all methods.

- `trust/radius`: the distance that a step was allowed, in the geometry of the method.
- `trust/distance`: the distance that it went.
- `trust/used`: distance / radius, which has no unit, so methods can be compared by it.
- `trust/nonfinite`: 1 if the second gradient of an attack was not finite, else 0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def trust_metrics(radius: jax.Array, distance: jax.Array) -> dict[str, jax.Array]:
    """The metrics `trust/radius`, `trust/distance` and `trust/used`, which is 0 at radius 0.

    `radius` and `distance` have the same shape, whatever it is. NaN stays NaN.
    """
    # The inner `where` keeps the derivative finite at a radius of 0.
    used = jnp.where(radius == 0, 0, distance / jnp.where(radius == 0, 1, radius))
    return {"trust/radius": radius, "trust/distance": distance, "trust/used": used}


def trust_metrics_of(opt_state: Any) -> dict[str, jax.Array]:
    """`trust_metrics` of the last step of an optimizer, or {} if it has no trust region.

    `opt_state` is the state of a transform of `trustjax.optim`, or of a chain or wrapper around it.

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
    """The metric `trust/nonfinite` of a step, or {} if the optimizer has no attack.

    It is 1, a float32 [], if the second gradient was not finite although the first gradient and the
    attack were (`on_nonfinite` of `sam`). `before` and `after` are the optimizer states around the
    step.
    """
    count, new_count = (optax.tree.get(each, "nonfinite_count") for each in (before, after))
    if count is None:
        return {}
    return {"trust/nonfinite": (new_count - count).astype(jnp.float32)}
