"""LoRA: Hu et al. 2021, Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    W' = W + (alpha / r) A B        A [in, r] normal, B [r, out] zeros at first

The factors are a tree of their own, which is what is trained; the model never knows. In the paper W
is [out, in], so that its B A is the transposed A B of here.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_count, check_number

PyTree = Any


def attention_kernels(path: tuple[str, ...]) -> bool:
    """Whether a path ends in the kernel of a query or value, which the paper adapts."""
    return path[-2:] in (("query", "kernel"), ("value", "kernel"))


def lora_init(
    key: jax.Array,
    params: PyTree,
    *,
    rank: int,
    target: Callable[[tuple[str, ...]], bool] = attention_kernels,
) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """Factors that change nothing yet: `lora_merge(params, factors)` equals the parameters.

    Args:
      key: Random key, for the factors "a".
      params: Parameters, a nested dict.
      rank: The rank r of the change, at least 1.
      target: Function of a parameter's path that says whether it is adapted; by default the kernels
        of queries and values, in a `Decoder`, an `Encoder` and a `ViT`.

    Returns:
      For the path of each adapted kernel [in, out], "a" float32 [in, r] with a standard deviation
      of 1 / sqrt(in), and "b" float32 [r, out], zeros.

    Raises ValueError for a rank below 1, for no target, and for one that is no matrix.

    >>> params = {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    >>> factors = lora_init(jax.random.key(0), params, rank=2)
    >>> jax.tree.map(jnp.shape, factors)
    {('query', 'kernel'): {'a': (4, 2), 'b': (2, 6)}}
    """
    check_count("rank", rank, at_least=1)
    flat = flax.traverse_util.flatten_dict(params)
    targets = sorted(path for path in flat if target(path))
    if not targets:
        raise FieldError("target", "choose at least one parameter", "none")
    factors = {}
    for path, factor_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        shape = flat[path].shape
        if len(shape) != 2:
            raise FieldError("target", "choose matrices", f"{'/'.join(path)} of shape {shape}")
        a = jax.random.normal(factor_key, (shape[0], rank)) / jnp.sqrt(shape[0])
        factors[path] = {"a": a, "b": jnp.zeros((rank, shape[1]))}
    return factors


def lora_tree(factors: dict[tuple[str, ...], Any]) -> PyTree:
    """The factors of `lora_init` as a nested dict with keys of text, as checkpoints need them."""
    return flax.traverse_util.unflatten_dict(factors)


def lora_factors(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """The factors by path, as `lora_merge` takes them, from `lora_tree`."""
    found: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(
        tree, is_leaf=lambda _, value: set(value) == {"a", "b"}
    )
    return found


def lora_merge(
    params: PyTree,
    factors: dict[tuple[str, ...], dict[str, jax.Array]],
    *,
    alpha: ArrayLike = 16.0,
) -> PyTree:
    """Parameters with W + (alpha / r) A B in place of each adapted W, of W's dtype.

    Training and the merged model use the same function, so that both compute the same bits:
    `jax.grad(lambda factors: loss(lora_merge(params, factors)))` has the gradient of the factors
    alone, and `save_transformer(folder, model, lora_merge(params, factors))` writes a plain model.

    Args:
      params: The parameters that `lora_init` was given; they are not changed.
      factors: Its factors.
      alpha: Scale of the change, > 0; the same for training and merging. It may be traced.

    Raises ValueError for factors of other parameters.

    >>> params = {"query": {"kernel": jnp.zeros((1, 1))}}
    >>> factors = {("query", "kernel"): {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}}
    >>> lora_merge(params, factors, alpha=4.0)["query"]["kernel"]
    Array([[4.]], dtype=float32)
    """
    check_number("alpha", alpha, above=0)
    flat = dict(flax.traverse_util.flatten_dict(params))
    for path, factor in factors.items():
        a, b = factor["a"], factor["b"]
        kernel = flat.get(path)
        if kernel is None or kernel.shape != (a.shape[0], b.shape[1]):
            got = f"{'/'.join(path)} of {a.shape[0]} x {b.shape[1]}"
            raise FieldError("factors", "belong to the parameters", got)
        change = jnp.matmul(a, b, preferred_element_type=jnp.float32)
        scale = jnp.asarray(alpha, change.dtype) / a.shape[1]
        flat[path] = (kernel + scale * change).astype(kernel.dtype)
    return flax.traverse_util.unflatten_dict(flat)
