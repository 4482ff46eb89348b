"""Observations in parts: what a network sees of them, and the mask of actions among them.

An observation is an array or a dict of arrays, also of dicts. Its part named "action_mask" says
which discrete actions are legal; it is no input of a network.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTION_MASK = "action_mask"
Key = str | tuple[str, ...] | None


def seen_parts(observation: Any, key: Key) -> Any:
    """The part named `key`, a dict of several parts, or for None all parts but the mask."""
    if not isinstance(observation, Mapping):
        return observation
    if isinstance(key, str):
        return observation[key]
    names = [name for name in observation if name != ACTION_MASK] if key is None else key
    return {name: observation[name] for name in names}


def action_mask(observation: Any) -> Any:
    """The mask of an observation, bool [..., actions]; None for one without a mask."""
    return observation.get(ACTION_MASK) if isinstance(observation, Mapping) else None


class Flat(nn.Module):
    """The default features of observations in parts: all entries of all parts side by side."""

    @nn.compact
    def __call__(self, observation: Any) -> jax.Array:
        """Features, float [batch, width], of an array or a dict of arrays, [batch, ...]."""
        rows = [
            leaf.reshape(len(leaf), math.prod(leaf.shape[1:])).astype(jnp.result_type(float))
            for leaf in jax.tree.leaves(observation)
        ]
        return jnp.concatenate(rows, -1)
