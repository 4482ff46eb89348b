"""Parameters of `trustjax.models.ViT` beside the tensors of transformers' ViT: names and layouts.

A matrix is stored transposed, [out, in], and the patch embedding as a convolution kernel
[out, channels, patch, patch].
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Names = tuple[str, ...]  # the path to a parameter in our tree

# Our modules and theirs. The encoder's tensors have the prefix "vit." beside a classifier.
_MODULES = {
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "final_norm": "layernorm",
    "representation": "pooler.dense",
    "head": "classifier",
}
_BLOCK_MODULES = {
    "attention_norm": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "attention_out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def their_name(names: Names, prefix: str) -> str:
    """The name of a tensor; `prefix` is that of all but the classifier's."""
    module, *rest = names
    if module.startswith("block_"):
        index, (part, *rest) = module.removeprefix("block_"), rest
        their_module = f"encoder.layer.{index}.{_BLOCK_MODULES[part]}"
    else:
        their_module = _MODULES[module]
    name = ".".join([their_module, *(_LEAVES[leaf] for leaf in rest)])
    return name if module == "head" else prefix + name


def to_theirs(names: Names, leaf: Any, patch_size: int) -> Any:
    """A parameter of ours in their layout."""
    if names == ("patch_embedding", "kernel"):
        kernel = leaf.reshape(patch_size, patch_size, -1, leaf.shape[-1])
        return kernel.transpose(3, 2, 0, 1)
    return leaf.T if names[-1] == "kernel" else leaf


def to_ours(names: Names, tensor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The inverse of `to_theirs`."""
    if names == ("patch_embedding", "kernel"):
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T if names[-1] == "kernel" else tensor


def their_shape(names: Names, shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
    """The shape in their layout of a parameter of ours."""
    leaf = np.broadcast_to(np.float32(0), shape)  # without memory
    return tuple(to_theirs(names, leaf, patch_size).shape)
