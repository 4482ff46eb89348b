"""The two small problems of the golden numbers, and a step on them."""

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


def assert_close(actual: Any, expected: Any, *, scale: float | None = None) -> None:
    """Compares 12 decimals in float64; in float32 allows 1e-5 of the largest entry.

    `scale` replaces the largest entry if all are zero or a difference of larger terms.
    """
    expected = np.ravel(expected)
    if jax.config.jax_enable_x64:
        limits = {"rtol": 1e-12, "atol": 1e-12}
    else:
        limits = {"rtol": 1e-5, "atol": 1e-5 * (scale or float(np.max(np.abs(expected))))}
    np.testing.assert_allclose(np.ravel(actual), expected, **limits)


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


def check_golden(
    tx: optax.GradientTransformation,
    loss: Callable[[jax.Array], jax.Array],
    problem: dict[str, Any],
    row: dict[str, Any],
    *,
    start: jax.Array | None = None,
    arguments: Callable[[jax.Array], dict[str, Any]] = lambda w: {},
    wrap: Callable[[Any], Any] = jax.jit,
    scale: dict[str, float] | None = None,
) -> tuple[dict[str, jax.Array], Any]:
    """Compares one step with all numbers that `row` has; returns its numbers and the new state.

    `init` sees `start`, and `arguments` makes further extra arguments from the parameters.
    """
    w = array(problem["w"])

    def step(start: jax.Array, w: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        state, extra_args = tx.init(start), {"grad_fn": jax.grad(loss)} | arguments(w)
        attack = attack_of(tx, state, w, loss, **extra_args)
        gradient, state = tx.update(jax.grad(loss)(w), state, w, **extra_args)
        numbers = {
            "attack": attack,
            "rise": jnp.sum(jax.grad(loss)(w) * attack),
            "attacked_loss": loss(w + attack),
            "gradient": gradient,
            "new_w": w - problem["learning_rate"] * gradient,
        }
        return numbers, state

    numbers, state = wrap(step)(w if start is None else start, w)
    compared = numbers.keys() & row.keys()
    assert compared
    for name in compared:
        assert_close(numbers[name], row[name], scale=(scale or {}).get(name))
    return numbers, state
