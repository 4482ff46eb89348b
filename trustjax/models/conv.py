"""A small residual network: He et al. 2016, Identity Mappings in Deep Residual Networks.

It has the pre-activation blocks of arXiv:1603.05027 in the CIFAR form of arXiv:1512.03385: a 3x3
stem, three stages, and no pooling before the last mean. Its 3x3 convolutions come in two forms with
the same parameters.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice
from trustjax.models._images import unit_range


def lax_convolution(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """3x3 convolution with zero padding 1, by XLA's operation.

    Images [batch, height, width, in] and a kernel [3, 3, in, out] of one dtype give
    [batch, ceil(height / stride), ceil(width / stride), out].
    """
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def matmul_convolution(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`lax_convolution` as a matrix product: nine shifted slices times the flattened kernel.

    On CPU, XLA runs convolutions inside a scan 30 to 100 times slower than outside. Products it
    does not.
    """
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


CONVOLUTIONS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "matmul": matmul_convolution,
    "lax": lax_convolution,
}


class _Convolution(nn.Module):
    """3x3 convolution without bias, whose parameter `kernel` is [3, 3, in, out] in every form."""

    features: int
    stride: int
    form: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        shape = (3, 3, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        convolve = CONVOLUTIONS[self.form]
        return convolve(images.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class _Block(nn.Module):
    """Two convolutions, each after normalisation and ReLU, added to the block's input."""

    features: int
    stride: int
    form: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = _norm_relu("norm_0", images, train, self.dtype)
        shortcut = images
        if images.shape[-1] != self.features or self.stride != 1:
            # The projection of the shortcut: a 1x1 convolution is a dense layer on every
            # stride-th pixel.
            pixels = x[:, :: self.stride, :: self.stride]
            shortcut = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="projection")(
                pixels
            )
        x = _Convolution(self.features, self.stride, self.form, self.dtype, name="conv_0")(x)
        x = _norm_relu("norm_1", x, train, self.dtype)
        x = _Convolution(self.features, 1, self.form, self.dtype, name="conv_1")(x)
        return shortcut + x


class ResNet(nn.Module):
    """Pre-activation residual network with batch normalisation.

    In training (`train=True`), batches are normalised by their own statistics. The running means of
    these are the collection `batch_stats`; `mutable=["batch_stats"]` returns their update.

    Attributes:
      num_classes: Number of logits.
      widths: Number of channels in each stage. Every stage after the first halves height and width.
      blocks_per_stage: Number of residual blocks in each stage, with two convolutions each.
      convolution: "matmul", or "lax" for XLA's operation, which is faster on GPU and TPU, and very
        slow inside a scan on CPU. The parameters fit both.
      dtype: Dtype of the computation; parameters and statistics are float32.

    Raises ValueError for an unknown convolution, or images that are not of rank 4.
    """

    num_classes: int
    widths: Sequence[int] = (16, 32, 64)
    blocks_per_stage: int = 1
    convolution: str = "matmul"
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Makes widths from a config hashable, and checks the convolution."""
        self.widths = tuple(self.widths)
        check_choice("convolution", self.convolution, CONVOLUTIONS)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits float32 [batch, num_classes] of images [batch, height, width, channels].

        Images are floats, or uint8 in 0..255, which are divided by 255. `return_features` also
        returns the input of the head, [batch, widths[-1]] of `dtype`.
        """
        if images.ndim != 4:
            raise FieldError(
                "images", "be [batch, height, width, channels]", f"shape {images.shape}"
            )
        x = unit_range(images)
        x = _Convolution(self.widths[0], 1, self.convolution, self.dtype, name="stem")(x)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage_{stage}_block_{block}"
                x = _Block(width, stride, self.convolution, self.dtype, name=name)(x, train)
        x = _norm_relu("final_norm", x, train, self.dtype).mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
        return (logits, x) if return_features else logits


def _norm_relu(name: str, x: jax.Array, train: bool, dtype: DTypeLike) -> jax.Array:
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype, name=name)
    return nn.relu(norm(x))
