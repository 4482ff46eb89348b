"""The two small problems of the golden numbers, and how to take one step on them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "tram_sam.json").read_text(encoding="utf-8")
)
QUADRATIC = GOLDEN["quadratic"]
SOFTMAX = GOLDEN["softmax"]


def array(values: Any) -> jax.Array:
    """Values in the default float dtype: float64 under the x64 fixture, else float32."""
    return jnp.asarray(np.asarray(values, float))


def tolerance() -> dict[str, float]:
    """As many digits as the golden numbers are printed with; 1e-5 in float32."""
    return {"rtol": 1e-9, "atol": 2e-12} if jax.config.jax_enable_x64 else {"rtol": 1e-5}


def assert_close(actual: Any, expected: Any) -> None:
    scale = max(1.0, float(np.max(np.abs(expected))))
    limits = tolerance()
    np.testing.assert_allclose(
        np.ravel(actual), np.ravel(expected), limits["rtol"], limits.get("atol", 1e-5 * scale)
    )


def quadratic(w: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(array([1.0, 10.0]) * jnp.square(w))


def logits(w: jax.Array, noise: Any = 0.0) -> jax.Array:
    return (array(SOFTMAX["x"]) + array(noise)) @ w


def cross_entropies(w: jax.Array, noise: Any = 0.0) -> jax.Array:
    labels = jnp.array(SOFTMAX["y"])
    return optax.softmax_cross_entropy_with_integer_labels(logits(w, noise), labels)


def softmax_loss(w: jax.Array, noise: Any = 0.0) -> jax.Array:
    return cross_entropies(w, noise).mean()


def attack_of(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    loss: Callable[[Any], jax.Array],
    **extra_args: Any,
) -> Any:
    """The attack itself: the transform is asked for the gradient of (attacked point - params)."""
    extra_args["grad_fn"] = lambda attacked: jax.tree.map(jnp.subtract, attacked, params)
    return tx.update(jax.grad(loss)(params), state, params, **extra_args)[0]
