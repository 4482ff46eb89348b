"""Pre-trained vision transformers, from the checkpoints of Hugging Face's ViT (checkpoint.py)."""

import math
import os
from dataclasses import replace
from pathlib import Path

import flax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_count
from trustjax._files import local_folder
from trustjax.models._store import CheckpointError
from trustjax.models.checkpoint import FILES, open_checkpoint
from trustjax.models.vit import Preprocessing, PyTree, ViT


class PretrainedViT(ViT):
    """A `ViT` with the sizes of a checkpoint, made by `pretrained_vit`.

    Attributes:
      folder: Folder of the checkpoint.
    """

    folder: str = ""

    @nn.nowrap  # makes another module
    def load_pretrained(self) -> dict[str, PyTree]:
        """The checkpoint's parameters but those of a new head, float32 arrays on the host.

        The position embeddings are interpolated to the model's image size. Raises CheckpointError
        if files have changed since `pretrained_vit` and no longer fit.

        >>> model = pretrained_vit("google/vit-base-patch16-224-in21k", 100)  # doctest: +SKIP
        >>> new = model.init(jax.random.key(0), images)["params"]  # doctest: +SKIP
        >>> params = {**new, **model.load_pretrained()}  # doctest: +SKIP
        """
        checkpoint = open_checkpoint(Path(self.folder))
        dropped = set()
        if self.num_classes != checkpoint.fields["num_classes"]:
            dropped = {"head", "representation"}
        loaded = {n: checkpoint.read(n) for n in checkpoint.tensors if n[0] not in dropped}
        if isinstance(self.preprocess, Preprocessing):
            height, width = self.preprocess.size
            grid = (height // self.patch_size, width // self.patch_size)
            names = ("position_embedding",)
            loaded[names] = interpolate_positions(loaded[names], grid)
        params: dict[str, PyTree] = flax.traverse_util.unflatten_dict(loaded)
        return params


def pretrained_vit(
    pretrained: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    image_size: int | None = None,
    frozen_blocks: int | None = None,
    dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> PretrainedViT:
    """The network of a checkpoint; its method `load_pretrained` returns the weights.

    It takes images in [0, 1] of any size with 1 or 3 channels, and converts them to the size, the
    channels and the normalisation of the checkpoint.

    Args:
      pretrained: A folder, or a hub id `owner/name`, which is downloaded once.
      num_classes: Number of classes. If the checkpoint has no head, or a head for another number,
        the head is new, and the dense layer before it from pre-training (the pooler) is dropped, as
        in the ViT paper. None keeps both as they are; without a head the logits are the features.
      image_size: Side of the images that the network sees, a multiple of the patch size; by default
        the checkpoint's. The position embeddings are interpolated to it.
      frozen_blocks: As for `ViT`.
      dropout: As for `ViT`; the checkpoint's own rate is ignored.
      dtype: Dtype of the computation; parameters are float32, whatever the file's dtype.

    Raises:
      CheckpointError: There is no such folder or hub id, or it has no config.json or safetensors
        file; the architecture is not ViT's; or tensors are missing, unknown, of another shape or
        not floating. All of this is checked here, before any tensor is read.
      ValueError: An argument is out of range.
      ImportError: A package of the `experiments` extra is missing.
    """
    check_count("num_classes", num_classes, at_least=1)
    check_count("image_size", image_size)
    folder = local_folder("pretrained", pretrained, CheckpointError, "model", allow_patterns=FILES)
    fields = dict(open_checkpoint(folder).fields)
    if num_classes is not None and num_classes != fields["num_classes"]:
        fields |= {"num_classes": num_classes, "representation_width": None}
    if image_size is not None:
        if image_size < 1 or image_size % fields["patch_size"]:
            raise FieldError(
                "image_size",
                f"be a positive multiple of the checkpoint's patch size {fields['patch_size']}",
                image_size,
            )
        fields["preprocess"] = replace(fields["preprocess"], size=(image_size, image_size))
    return PretrainedViT(
        **fields, frozen_blocks=frozen_blocks, dropout=dropout, dtype=dtype, folder=str(folder)
    )


def build_vit(
    num_classes: int,
    patch_size: int = 16,
    width: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4,
    dropout: float = 0.0,
    pool: str = "cls",
    layer_norm_epsilon: float = 1e-6,
    dtype: DTypeLike = jnp.float32,
    *,
    pretrained: str | None = None,
    image_size: int | None = None,
    frozen_blocks: int | None = None,
) -> ViT:
    """A `ViT` of the given sizes; with `pretrained`, one of a checkpoint's sizes instead.

    It is for configurations in which the key `pretrained` decides between the two. The other
    arguments are those of `ViT` and `pretrained_vit`. Without `pretrained`, `image_size` must be
    None.
    """
    if pretrained is not None:
        return pretrained_vit(
            pretrained,
            num_classes,
            image_size=image_size,
            frozen_blocks=frozen_blocks,
            dropout=dropout,
            dtype=dtype,
        )
    if image_size is not None:
        raise FieldError("image_size", "be null without pretrained", image_size)
    return ViT(
        num_classes,
        patch_size,
        width,
        depth,
        num_heads,
        mlp_ratio,
        dropout,
        pool,
        layer_norm_epsilon,
        dtype,
        frozen_blocks=frozen_blocks,
    )


def interpolate_positions(
    positions: npt.NDArray[np.float32], grid: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Position embeddings for another number of patches, by bicubic interpolation.

    This is transformers' `interpolate_pos_encoding`: cubic convolution with a = -0.75 between the
    centres of pixels, with repeated borders and without a low-pass filter. The embedding of the
    class token stays. (`jax.image.resize` has a = -0.5.)

    Args:
      positions: Embeddings [1, 1 + side * side, width]: of the class token, then of the patches of
        a square image row by row.
      grid: Numbers of rows and columns of patches.

    Returns:
      [1, 1 + rows * columns, width].

    Raises ValueError unless the patches fill a square.
    """
    _, length, width = positions.shape
    side = math.isqrt(length - 1)
    if side * side != length - 1:
        raise FieldError(
            "positions", "be one and a square number of embeddings", f"shape {positions.shape}"
        )
    if grid == (side, side):
        return positions
    rows, columns = (_bicubic_matrix(side, new) for new in grid)
    patches = positions[0, 1:].reshape(side, side, width)
    resized = np.einsum("ri,cj,ijw->rcw", rows, columns, patches).reshape(1, -1, width)
    return np.concatenate([positions[:, :1], resized.astype(positions.dtype)], axis=1)


def _bicubic_matrix(old: int, new: int) -> npt.NDArray[np.float64]:
    """The weights [new, old] of cubic convolution from `old` to `new` points."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5  # of the new points, in old pixels
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        at = np.floor(centres).astype(int) + tap  # each new point has four old neighbours
        d = np.abs(centres - at)
        near = ((a + 2) * d - (a + 3)) * d**2 + 1  # d <= 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # 1 < d <= 2
        # Neighbours beyond the border repeat its pixel, so their weights add up.
        np.add.at(matrix, (np.arange(new), at.clip(0, old - 1)), np.where(d <= 1, near, far))
    return matrix
