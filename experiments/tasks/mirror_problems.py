"""The problems of the mirror descent experiment, each for one random key.

A player on the simplex chooses weights x_t, then sees the loss of round t and takes a step of
mirror descent. Its regret is the excess of its total loss over that of the best constant x in
hindsight.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax.geometry import euclidean, simplex
from trustjax.optim import mirror_descent

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # of the weights [n] and a round [n]

# The two geometries of the simplex: with its own map, and with Euclidean steps and projections.
ON_SIMPLEX: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "entropy": lambda rate: mirror_descent(rate, simplex()),
    "euclidean": lambda rate: mirror_descent(
        rate, euclidean(), projection=optax.projections.projection_simplex
    ),
}
PLAYERS = (*ON_SIMPLEX, "uniform")  # of the portfolio; the last one never changes its weights


def play(tx: optax.GradientTransformation, loss: Loss, rounds: jax.Array) -> jax.Array:
    """Losses [T] of a player that starts from uniform weights, over `rounds` [T, n]."""
    start = jnp.full(rounds.shape[1], 1 / rounds.shape[1], rounds.dtype)

    def one_round(
        carry: tuple[jax.Array, Any], seen: jax.Array
    ) -> tuple[tuple[jax.Array, Any], jax.Array]:
        x, state = carry
        # x_t is chosen before the round: its loss counts, then the player learns from it.
        value, gradient = jax.value_and_grad(loss)(x, seen)
        updates, state = tx.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), value

    _, losses = jax.lax.scan(one_round, (start, tx.init(start)), rounds)
    return losses


def linear_loss(x: jax.Array, losses: jax.Array) -> jax.Array:
    """Mean of the experts' losses [n], weighted by x."""
    return x @ losses


def log_loss(x: jax.Array, relatives: jax.Array) -> jax.Array:
    """Minus the logarithm of a day's growth, for price relatives [n]."""
    return -jnp.log(x @ relatives)


def theory_rate(name: str, n: int, horizon: int) -> float:
    """The best learning rate for T rounds with losses in [-1, 1].

    sqrt(2 log n / T) with the entropy, sqrt(2 / (n T)) with the Euclidean map.
    """
    return float(np.sqrt(2 * np.log(n) / horizon if name == "entropy" else 2 / (n * horizon)))


def theory_bound(name: str, n: int, horizon: int) -> float:
    """The bound of the regret at `theory_rate`: sqrt(2 T log n), and sqrt(2 n T)."""
    return float(np.sqrt(2 * horizon * np.log(n) if name == "entropy" else 2 * n * horizon))


def best_constant_portfolio(relatives: jax.Array, steps: int = 2000) -> jax.Array:
    """Loss [] of the best constant portfolio in hindsight, for price relatives [T, n].

    Found by exponentiated gradient on the mean loss, a convex function.
    """

    def mean_loss(x: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(partial(log_loss, x))(relatives))

    unused = jnp.zeros((steps, relatives.shape[1]), relatives.dtype)
    return play(mirror_descent(20.0, simplex()), mean_loss, unused)[-1] * len(relatives)


def market(
    key: jax.Array, *, num_assets: int, days: int, report_days: Sequence[int]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Losses of the players after every day, and of the best constant portfolio after some.

    Daily price relatives are log-normal, with a drift for each asset.

    Returns:
      [days] for each of `PLAYERS`; [report_days].
    """
    of_drift, of_noise = jax.random.split(key)
    drift = 0.02 * jax.random.normal(of_drift, (num_assets,))
    relatives = jnp.exp(drift + 0.1 * jax.random.normal(of_noise, (days, num_assets)))
    # The gradient of the log loss is a ratio of relatives: about 1, at most about 2.
    rates = {name: theory_rate(name, num_assets, days) for name in ON_SIMPLEX}
    losses = {
        name: jnp.cumsum(play(make(rates[name]), log_loss, relatives))
        for name, make in ON_SIMPLEX.items()
    }
    losses["uniform"] = jnp.cumsum(-jnp.log(relatives.mean(1)))
    best = jnp.stack([best_constant_portfolio(relatives[:day]) for day in report_days])
    return losses, best


def game(
    key: jax.Array, *, n: int, rounds: int, edge: float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Total losses [] of the players over a game with n experts, and of the best expert.

    Experts lose -1 or 1: the first one -edge on average, the others 0.
    """
    shares = jnp.full(n, 0.5).at[0].set((1 - edge) / 2)
    losses = jnp.where(jax.random.uniform(key, (rounds, n)) < shares, 1.0, -1.0)
    best = jnp.min(jnp.sum(losses, 0))
    return {
        name: jnp.sum(play(make(theory_rate(name, n, rounds)), linear_loss, losses))
        for name, make in ON_SIMPLEX.items()
    }, best


def regression(
    key: jax.Array,
    *,
    tx: optax.GradientTransformation,
    num_unknowns: int,
    num_equations: int,
    num_nonzero: int,
    steps: int,
    dtype: jnp.dtype,
) -> dict[str, jax.Array]:
    """Solves equations whose solution is not unique, from zero, and measures what is found.

    Returns:
      [] each: the residual and the error relative to their start, the share of the support that is
      found, the 1-norm relative to the true one, and the largest absolute value.
    """
    of_matrix, of_signs = jax.random.split(key)
    shape = (num_equations, num_unknowns)
    matrix = jax.random.normal(of_matrix, shape, dtype) / np.sqrt(num_equations)
    signs = jax.random.rademacher(of_signs, (num_nonzero,), dtype)
    target = jnp.zeros(num_unknowns, dtype).at[:num_nonzero].set(signs)
    values = matrix @ target

    def loss(x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(matrix @ x - values))

    start = jnp.zeros_like(target)

    def body(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (x + updates, state), None

    (x, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=steps)
    largest = jnp.argsort(-jnp.abs(x))[:num_nonzero]
    return {
        "residual": jnp.sqrt(loss(x) / loss(start)),
        "error": jnp.linalg.norm(x - target) / jnp.linalg.norm(target),
        "support": jnp.mean(largest < num_nonzero),
        "norm_1": jnp.sum(jnp.abs(x)) / num_nonzero,
        "norm_max": jnp.max(jnp.abs(x)),
    }
