"""Rotary position embeddings: Su et al. 2021, RoFormer, arXiv:2104.09864."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import check_choice, check_number


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are stretched for long texts.

    Attributes:
      kind: "linear" divides all frequencies by `factor`. "llama3" (Llama 3.1, arXiv:2407.21783)
        divides those whose wavelength is above `original_length / low_frequency_factor`, keeps
        those below `original_length / high_frequency_factor`, and blends in between.
      factor: The divisor, at least 1.
      low_frequency_factor: See `kind`.
      high_frequency_factor: See `kind`, above `low_frequency_factor`.
      original_length: Number of positions in the pre-training before the stretch.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_choice("kind", self.kind, ("linear", "llama3"))
        check_number("factor", self.factor, at_least=1)
        check_number("low_frequency_factor", self.low_frequency_factor, above=0)
        check_number(
            "high_frequency_factor", self.high_frequency_factor, above=self.low_frequency_factor
        )
        check_number("original_length", self.original_length, at_least=1)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [batch, time, 1, head_dim / 2], of positions [batch, time]."""
    angles = positions[..., None, None] * _frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [batch, time, heads, head_dim] in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> npt.NDArray[np.float32]:
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        # Turns within the original length: many turns are local and stay as they are.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = ((turns - low) / (high - low)).clip(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)
