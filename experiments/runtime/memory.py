"""An estimate of the memory that a training takes, before anything is compiled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.optimizers import Method

GIB = 2**30


def memory_estimate(
    model: nn.Module,
    methods: Sequence[Method],
    images: jax.ShapeDtypeStruct,
    num_networks: int,
) -> dict[str, float]:
    """Memory in GiB that the largest step of a training takes, by purpose.

    Arrays are counted by their shapes, so the estimate is the same on every device. The compiler
    may need somewhat more (scratch space), or less (it fuses operations). Batches, the evaluation
    and the forward passes of a penalty are not counted.

    Args:
      model: Flax module. Its frozen parameters have neither gradients nor optimizer state.
      methods: The methods that are trained one after another; the one with most memory counts.
      images: Shape of the largest batch, float [examples, height, width, channels].
      num_networks: Number of networks that are trained side by side.

    Returns:
      GiB of "parameters"; "gradients"; "optimizer state", with the reference parameters of a
      penalty; "attack copies", the attacked parameters of a second pass; "activations", which the
      forward pass keeps for the backward pass; and their sum, "total".
    """
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: model.init({"params": key, "dropout": key}, _zeros(images)))
    params = variables["params"]
    trainable = model.trainable if hasattr(model, "trainable") else _everything
    trained = array_bytes(
        leaf
        for leaf, chosen in zip(
            jax.tree.leaves(params), jax.tree.leaves(trainable(params)), strict=True
        )
        if chosen
    )
    states = []
    for method in methods:
        tx = method.optimizer(1.0, trainable=trainable)
        reference = method.penalty and jax.eval_shape(method.penalty.start, params)
        states.append(array_bytes(jax.tree.leaves((jax.eval_shape(tx.init, params), reference))))
    attacks = any(method.optimizer.attack is not None for method in methods)
    parts = {
        "parameters": array_bytes(jax.tree.leaves(params)),
        "gradients": trained,
        "optimizer state": max(states),
        "attack copies": trained if attacks else 0,
        "activations": _activations(model, variables, images),
    }
    gib = {name: num_networks * size / GIB for name, size in parts.items()}
    return {**gib, "total": sum(gib.values())}


def describe(estimate: Mapping[str, float]) -> str:
    """The estimate in one line."""
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in estimate.items() if name != "total")
    return f"memory estimate: {estimate['total']:.2f} GiB ({parts})"


def residual_bytes(function: Callable[..., Any], params: Any, *arguments: Any) -> int:
    """Bytes that `function(params, *arguments)` computes and keeps for the gradient of `params`.

    Parameters and arguments are arrays or shapes. They are kept as well, but not counted.
    """

    def residuals(params: Any, *arguments: Any) -> list[jax.Array]:
        # The function that vjp returns is a pytree of the arrays that it keeps.
        return jax.tree.leaves(jax.vjp(lambda p: function(p, *arguments), params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, *arguments).jaxpr
    inputs = set(jaxpr.invars)
    kept = {v for v in jaxpr.outvars if not hasattr(v, "val") and v not in inputs}
    return array_bytes(variable.aval for variable in kept)


def _activations(model: nn.Module, variables: Any, images: jax.ShapeDtypeStruct) -> int:
    """Bytes that the forward pass computes and keeps for the backward pass."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        logits: jax.Array = model.apply(
            {"params": params, **rest}, images, train=True, rngs=rngs, mutable=list(rest)
        )[0]
        return logits

    return residual_bytes(apply, variables["params"], rest, images)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


def array_bytes(arrays: Any) -> int:
    """Bytes of arrays or shapes."""
    return sum(array.size * array.dtype.itemsize for array in arrays)
