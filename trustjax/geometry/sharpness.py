"""Sharpness of a loss around given weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_number
from trustjax._dtypes import dtype_of, is_complex, is_floating, widened
from trustjax._loops import is_known

PyTree = Any


def epsilon_sharpness(
    loss_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    epsilon: jax.typing.ArrayLike = 1e-5,
    num_steps: int = 5,
) -> jax.Array:
    r"""The largest relative rise of the loss in a small box around the weights, in percent.

    .. math:: 100 \, \frac{\max_{|y_i| \le \epsilon (|x_i| + 1)} L(x + y) - L(x)}{1 + L(x)}

    The maximum is approached by `num_steps` steps of ascent along the sign of the gradient, each
    1 / num_steps of the half-width of the box, and is the highest loss on the way, at least L(x).
    In a box as small as the default the loss is close to linear, and its maximum is close to the
    corner where the ascent ends.

    Args:
      loss_fn: `params -> []`, a loss >= 0 without randomness.
      params: The weights x. Floating leaves must be float32 at least, since narrower ones cannot
        resolve the box.
      epsilon: The half-width of the box relative to abs(x) + 1, > 0.
      num_steps: The number of gradients, >= 1.

    Returns:
      [] in the dtype of the loss, >= 0, in percent.

    Raises:
      ValueError: A number is out of range, or a leaf is complex or narrower than float32.

    Source: Keskar et al., arXiv:1609.04836, Metric 2.1; with these constants in TRAM,
    arXiv:2310.03646, Appendix B.7, where plain SGD (learning rate 8e-5) looks for the maximum.
    """
    check_number("epsilon", epsilon, above=0.0)
    check_number("num_steps", num_steps, at_least=1)
    for leaf in jax.tree.leaves(params):
        if is_complex(leaf) or (is_floating(leaf) and dtype_of(leaf) != widened(leaf).dtype):
            raise FieldError(
                "params", "be real and float32 at least", f"a leaf of {dtype_of(leaf)}"
            )

    def ascend(moved: PyTree, _: None) -> tuple[PyTree, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(moved)

        def step(x: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
            if not is_floating(x):
                return y
            box = jnp.asarray(epsilon, x.dtype) * (jnp.abs(x) + 1)
            return jnp.clip(y + box / num_steps * jnp.sign(g), x - box, x + box)

        return jax.tree.map(step, params, moved, gradient), loss

    if all(is_known(leaf) for leaf in jax.tree.leaves((params, epsilon))):
        # Outside of jit a scan is compiled again at every call.
        corner, rows = params, []
        for _ in range(num_steps):
            corner, loss = ascend(corner, None)
            rows.append(loss)
        losses = jnp.stack(rows)
    else:
        corner, losses = jax.lax.scan(ascend, params, length=num_steps)
    highest = jnp.maximum(jnp.max(losses), loss_fn(corner))
    return 100 * (highest - losses[0]) / (1 + losses[0])
