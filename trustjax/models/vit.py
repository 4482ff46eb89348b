"""Vision transformer: Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv:2010.11929.

Layer by layer as in the paper and in the checkpoints google/vit-*, which `trustjax.models.
pretrained` reads: layer norms before attention and MLP, learned position embeddings, exact GELU,
biases on query, key and value. These are separate Dense layers, and patches are cut by a reshape,
not by a convolution, which is slow in a scan on CPU: a checkpoint's convolution kernel [patch,
patch, channels, width] is the Dense kernel [patch * patch * channels, width] of the same order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.models._images import unit_range

PyTree = Any


@dataclass(frozen=True)
class Preprocessing:
    """Turns images into the inputs that a pre-trained network was trained on.

    Images are resized, a grey channel is repeated, and each channel becomes (x - mean) / std.

    Attributes:
      size: Height and width in pixels.
      channels: Number of channels.
      mean: Mean of each channel, for images in [0, 1].
      std: Standard deviation of each channel.
      method: Method of `jax.image.resize`. Values that "cubic" and "lanczos3" give outside [0, 1]
        are clipped, as in 8-bit images.
      resize: Whether images of another size are resized; if not, they raise an error.

    Raises ValueError unless each channel has a finite mean and a positive finite std, in float32.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = "linear"
    resize: bool = True

    def __post_init__(self) -> None:
        """Checks the numbers."""
        check_choice("method", self.method, ("nearest", "linear", "cubic", "lanczos3"))
        float32 = np.finfo(np.float32)
        high = float(float32.max)
        for name, low in (("mean", -high), ("std", float(float32.tiny))):
            values = getattr(self, name)
            if len(values) != self.channels or not all(low <= value <= high for value in values):
                above = " above 0" if name == "std" else ""
                raise FieldError(name, f"be {self.channels} finite float32 numbers{above}", values)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [batch, any height, any width, 1 or channels] -> [batch, *size, channels].

        Floats in [0, 1], or uint8 0..255. Raises ValueError for images of another type, rank or
        number of channels, or of another size with `resize=False`.
        """
        images = unit_range(images)
        if images.ndim != 4 or images.shape[-1] not in (1, self.channels):
            raise FieldError(
                "images",
                f"be [batch, height, width, channels] with 1 or {self.channels} channels",
                f"shape {images.shape}",
            )
        batch, *size, channels = images.shape
        if tuple(size) != self.size:
            if not self.resize:
                raise FieldError(
                    "images",
                    f"be {self.size[0]} x {self.size[1]}, as the checkpoint does not resize them",
                    f"{size[0]} x {size[1]}",
                )
            images = jax.image.resize(images, (batch, *self.size, channels), self.method)
            if self.method in ("cubic", "lanczos3"):
                images = images.clip(0, 1)
        mean, std = (jnp.asarray(each, images.dtype) for each in (self.mean, self.std))
        return (images - mean) / std


class _Block(nn.Module):
    """Pre-norm transformer block on [batch, tokens, width]."""

    num_heads: int
    mlp_width: int
    dropout: float
    layer_norm_epsilon: float
    qkv_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        batch, length, width = tokens.shape

        norm = functools.partial(nn.LayerNorm, self.layer_norm_epsilon, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=not train)

        x = norm(name="attention_norm")(tokens)
        query, key, value = (
            dense(width, use_bias=self.qkv_bias, name=name)(x).reshape(
                batch, length, self.num_heads, -1
            )
            for name in ("query", "key", "value")
        )
        x = jax.nn.dot_product_attention(query, key, value).reshape(batch, length, width)
        tokens = tokens + drop(dense(width, name="attention_out")(x))

        x = norm(name="mlp_norm")(tokens)
        x = drop(nn.gelu(dense(self.mlp_width, name="mlp_in")(x), approximate=False))
        tokens = tokens + drop(dense(width, name="mlp_out")(x))
        return tokens


# The attributes of `ViT` that are counts, and their smallest values.
_COUNTS = {
    "num_classes": 0,
    "patch_size": 1,
    "width": 1,
    "depth": 0,
    "num_heads": 1,
    "representation_width": 1,
    "frozen_blocks": 0,
}


class ViT(nn.Module):
    """Vision transformer classifier.

    Attributes:
      num_classes: Number of logits; 0 for no head, so that the features are the logits.
      patch_size: Side of a patch in pixels. It must divide the image's height and width.
      width: Size of a token, a multiple of `num_heads`.
      depth: Number of transformer blocks.
      num_heads: Number of attention heads in a block.
      mlp_ratio: Hidden width of a block's MLP as a multiple of `width`, above 0.
      dropout: Rate of dropout after the position embeddings, the attention and both MLP layers, in
        [0, 1]; not on the attention weights. In training it needs the `dropout` key.
      pool: Input of the head: "cls", a learned token before the patches, or "mean" of the patches.
      layer_norm_epsilon: Epsilon of the layer norms, 1e-12 in the checkpoints google/vit-*.
      dtype: Dtype of the computation; parameters are float32.
      qkv_bias: Whether query, key and value have biases.
      representation_width: Width of a dense layer with tanh before the head, which pre-training
        adds and fine-tuning drops; None for no such layer.
      frozen_blocks: Number of first blocks that get no gradient, nor do the embeddings before
        them; None trains all. `trainable` tells optimizers the same.
      preprocess: Function of the images that comes first, such as `trustjax.models.Preprocessing`.

    Raises ValueError for an unknown pool, for numbers out of range, for a width that is no multiple
    of `num_heads`, and for more frozen blocks than there are.
    """

    num_classes: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4
    dropout: float = 0.0
    pool: str = "cls"
    layer_norm_epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32
    qkv_bias: bool = True
    representation_width: int | None = None
    frozen_blocks: int | None = None
    preprocess: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self) -> None:
        """Checks all that does not depend on the images."""
        check_choice("pool", self.pool, ("cls", "mean"))
        for name, at_least in _COUNTS.items():
            check_count(name, getattr(self, name), at_least=at_least)
        check_number("frozen_blocks", self.frozen_blocks, at_most=self.depth)
        check_number("mlp_ratio", self.mlp_ratio, above=0)
        check_number("dropout", self.dropout, at_least=0, at_most=1)
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, at_least=0)
        if self.width % self.num_heads:
            raise FieldError(
                "width", "be a multiple of num_heads", f"{self.width} and {self.num_heads}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits float32 [batch, num_classes] of images [batch, height, width, channels].

        Images are floats, or uint8 in 0..255, which are divided by 255. `return_features` also
        returns the input of the head, [batch, width] of `dtype`. The position embeddings fix the
        size of the images for which parameters are valid.
        """
        images = unit_range(images)
        if self.preprocess is not None:
            images = self.preprocess(images)
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embedding")(
            patches(images, self.patch_size)
        )
        if self.pool == "cls":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:])
        )
        x = nn.Dropout(self.dropout)(x + positions.astype(self.dtype), deterministic=not train)
        x = self._without_gradient(x, blocks=0)
        for index in range(self.depth):
            x = _Block(
                num_heads=self.num_heads,
                mlp_width=round(self.width * self.mlp_ratio),
                dropout=self.dropout,
                layer_norm_epsilon=self.layer_norm_epsilon,
                qkv_bias=self.qkv_bias,
                dtype=self.dtype,
                name=f"block_{index}",
            )(x, train)
            x = self._without_gradient(x, blocks=index + 1)
        x = nn.LayerNorm(self.layer_norm_epsilon, dtype=self.dtype, name="final_norm")(x)
        x = x[:, 0] if self.pool == "cls" else x.mean(axis=1)
        if self.representation_width is not None:
            x = jnp.tanh(
                nn.Dense(self.representation_width, dtype=self.dtype, name="representation")(x)
            )
        logits = x
        if self.num_classes:
            logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        logits = logits.astype(jnp.float32)
        return (logits, x) if return_features else logits

    def _without_gradient(self, x: jax.Array, blocks: int) -> jax.Array:
        """`x`, the output of the first `blocks`; without gradient if exactly these are frozen."""
        return jax.lax.stop_gradient(x) if blocks == self.frozen_blocks else x

    @nn.nowrap
    def trainable(self, params: Any) -> Any:
        """A tree of bools, False on the parameters that `frozen_blocks` freezes.

        It is the `mask=` of attacks, and gives the labels of the optimizer that follows:
        `optax.partition({True: optax.adamw(1e-3), False: optax.set_to_zero()}, model.trainable)`.
        Otherwise weight decay would change the frozen weights, and their state would take memory.
        """
        if self.frozen_blocks is None:
            return jax.tree.map(lambda _: True, params)
        blocks = (f"block_{index}" for index in range(self.frozen_blocks))
        frozen = {"patch_embedding", "class_token", "position_embedding", *blocks}
        return jax.tree.map_with_path(lambda path, _: path[0].key not in frozen, params)


def patches(images: jax.Array, patch_size: int) -> jax.Array:
    """Splits images [batch, height, width, channels] into square patches, row by row.

    Returns [batch, height / p * width / p, p * p * channels] for `patch_size` p; the pixels of a
    patch are in rows, too. Raises ValueError unless p divides height and width.
    """
    if images.ndim != 4:
        raise FieldError("images", "be [batch, height, width, channels]", f"shape {images.shape}")
    batch, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise FieldError(
            "patch_size",
            "divide the image's height and width",
            f"patch_size {patch_size} and images of {height} x {width}",
        )
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return grid.swapaxes(2, 3).reshape(batch, rows * columns, -1)
