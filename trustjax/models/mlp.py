"""The multilayer perceptron."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import check_choice
from trustjax.models._images import unit_range

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


class MLP(nn.Module):
    """Dense layers on the flattened input, with dropout after each hidden layer.

    Attributes:
      num_classes: Number of logits.
      hidden: Widths of the hidden layers; an empty sequence gives a linear model.
      activation: Name in `ACTIVATIONS`, or a function of an array.
      dropout: Fraction of the hidden units that are dropped in training, in [0, 1]; it needs the
        random key "dropout".
      dtype: Dtype of the computation; the parameters are float32.

    Raises:
      ValueError: The activation is unknown.
    """

    num_classes: int
    hidden: Sequence[int] = (64, 64)
    activation: str | Callable[[jax.Array], jax.Array] = "relu"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Makes widths from a configuration file a tuple, so that the module can be hashed."""
        self.hidden = tuple(self.hidden)
        if isinstance(self.activation, str):
            check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """The logits, float32 [batch, num_classes], of images [batch, ...].

        Images are floats, or uint8 in 0..255, which are divided by 255. With `return_features` the
        inputs of the output layer, [batch, hidden[-1]] in `dtype`, are returned as well.
        """
        activation = (
            ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        )
        x = unit_range(images).reshape(images.shape[0], -1).astype(self.dtype)
        for index, width in enumerate(self.hidden):
            x = activation(nn.Dense(width, dtype=self.dtype, name=f"dense_{index}")(x))
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
        return (logits, x) if return_features else logits
