"""Names and layouts: parameters of `trustjax.models.ViT` and tensors of Hugging Face's ViT.

Hugging Face stores a matrix transposed, [out, in], and the patch embedding as a convolution kernel
[out, channels, patch, patch].
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from trustjax.models._store import Names

# Flax modules and Hugging Face's. With a classifier, all other tensors have the prefix "vit."
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


def huggingface_name(names: Names, prefix: str) -> str:
    """The name of a parameter's tensor, behind `prefix` unless it is the classifier's."""
    module, *rest = names
    if module.startswith("block_"):
        index, (part, *rest) = module.removeprefix("block_"), rest
        module_name = f"encoder.layer.{index}.{_BLOCK_MODULES[part]}"
    else:
        module_name = _MODULES[module]
    name = ".".join([module_name, *(_LEAVES[leaf] for leaf in rest)])
    return name if module == "head" else prefix + name


def to_huggingface(names: Names, leaf: Any, patch_size: int) -> Any:
    """A parameter in the layout of Hugging Face, as a view.

    Args:
      names: Path to the parameter.
      leaf: The parameter: kernels are [in, out], that of the patch embedding
        [patch * patch * channels, out].
      patch_size: Side of a patch in pixels.
    """
    if names == ("patch_embedding", "kernel"):
        kernel = leaf.reshape(patch_size, patch_size, -1, leaf.shape[-1])
        return kernel.transpose(3, 2, 0, 1)
    return leaf.T if names[-1] == "kernel" else leaf


def from_huggingface(names: Names, tensor: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A tensor of Hugging Face in the layout of Flax: the inverse of `to_huggingface`."""
    if names == ("patch_embedding", "kernel"):
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T if names[-1] == "kernel" else tensor


def huggingface_shape(names: Names, shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
    """The shape that a parameter of this path and shape has at Hugging Face."""
    leaf = np.broadcast_to(np.float32(0), shape)  # a view that takes no memory
    return tuple(to_huggingface(names, leaf, patch_size).shape)
