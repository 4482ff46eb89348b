r"""Flax's GRU over a whole sequence in which episodes start anew.

    r = sigmoid(W_ir x + b_ir + W_hr h),    z = sigmoid(W_iz x + b_iz + W_hz h)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)),    h' = (1 - z) n + z h

Cho et al., arXiv:1406.1078; the place of b_hn is that of cuDNN and of Flax.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def gru_sequence(
    params: Mapping[str, Mapping[str, jax.Array]],
    inputs: jax.Array,
    carry: jax.Array,
    is_first: jax.Array,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """The memory after every step of a sequence, as a scan of Flax's `GRUCell` has it.

    Products with inputs, which do not wait for the memory, are taken for all steps at once, and
    the three products with the memory are one.

    Args:
      params: Parameters of a `flax.linen.GRUCell`.
      inputs: Inputs, float [time, ..., width].
      carry: Memory before the first step, float [..., features].
      is_first: Whether the memory becomes zero before a step, bool [time, ...].
      dtype: Dtype of the computation; None for that which inputs and parameters have in common.

    Returns:
      The memory, float [time, ..., features].
    """
    inputs, w_x, b_x, w_h, b_n = nn.dtypes.promote_dtype(
        inputs,
        jnp.concatenate([params[name]["kernel"] for name in ("ir", "iz", "in")], -1),
        jnp.concatenate([params[name]["bias"] for name in ("ir", "iz", "in")]),
        jnp.concatenate([params[name]["kernel"] for name in ("hr", "hz", "hn")], -1),
        params["hn"]["bias"],
        dtype=dtype,
    )

    def step(h: jax.Array, each: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, start = each
        h = jnp.where(start[..., None], jnp.zeros_like(h), h)
        x_r, x_z, x_n = jnp.split(x, 3, -1)
        h_r, h_z, h_n = jnp.split(h.astype(w_h.dtype) @ w_h, 3, -1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * (h_n + b_n))
        h = (1 - z) * n + z * h
        return h, h

    carries: jax.Array = jax.lax.scan(step, carry, (inputs @ w_x + b_x, is_first))[1]
    return carries
