"""What mirror descent is good for: three problems in which the geometry shows.

- A portfolio of n assets, rebalanced every day: regret to the best constant one (Helmbold,
  Schapire, Singer, Warmuth, *On-line portfolio selection using multiplicative updates*, 1998).
- A game over n experts, one of which is better on average: with the rates of theory the regret
  grows as sqrt(log n) with the entropy, and as sqrt(n) with the Euclidean map.
- Sparse regression with fewer equations than unknowns: from zero, each map finds the solution that
  has the least potential, and so, or not, the support.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary, Table
from experiments.tasks.once import Once
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.geometry import MirrorMap, euclidean, simplex
from trustjax.optim import mirror_descent

Loss = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Solver:
    """A map with its learning rate in the regression."""

    mirror_map: MirrorMap
    learning_rate: float


# The two geometries of the simplex: with its own map, and with Euclidean steps and projections.
ON_SIMPLEX: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "entropy": lambda rate: mirror_descent(rate, simplex()),
    "euclidean": lambda rate: mirror_descent(
        rate, euclidean(), projection=optax.projections.projection_simplex
    ),
}


def play(tx: optax.GradientTransformation, loss: Loss, rounds: jax.Array) -> jax.Array:
    """Losses [T] of a player on the simplex: x_t is chosen before round t, rounds [T, n]."""
    start = jnp.full(rounds.shape[1], 1 / rounds.shape[1], rounds.dtype)

    def one_round(
        carry: tuple[jax.Array, Any], seen: jax.Array
    ) -> tuple[tuple[jax.Array, Any], jax.Array]:
        x, state = carry
        value, gradient = jax.value_and_grad(loss)(x, seen)
        updates, state = tx.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), value

    _, losses = jax.lax.scan(one_round, (start, tx.init(start)), rounds)
    return losses


def linear_loss(x: jax.Array, losses: jax.Array) -> jax.Array:
    """What the experts lose, weighted."""
    return x @ losses


def log_loss(x: jax.Array, relatives: jax.Array) -> jax.Array:
    """Minus the logarithm of the day's growth, of price relatives [n]."""
    return -jnp.log(x @ relatives)


def theory_rate(name: str, n: int, horizon: int) -> float:
    """Of T rounds with losses in [-1, 1]: sqrt(2 log n / T), and sqrt(2 / (n T))."""
    return float(np.sqrt(2 * np.log(n) / horizon if name == "entropy" else 2 / (n * horizon)))


def theory_bound(name: str, n: int, horizon: int) -> float:
    """Of the regret at that rate: sqrt(2 T log n), and sqrt(2 n T)."""
    return float(np.sqrt(2 * horizon * np.log(n) if name == "entropy" else 2 * n * horizon))


def best_constant_portfolio(relatives: jax.Array, steps: int = 2000) -> jax.Array:
    """Loss of the best portfolio in hindsight, of relatives [T, n], by exponentiated gradient."""

    def mean_loss(x: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(partial(log_loss, x))(relatives))

    days = jnp.zeros((steps, relatives.shape[1]), relatives.dtype)
    return play(mirror_descent(20.0, simplex()), mean_loss, days)[-1] * len(relatives)


@dataclass(frozen=True)
class Mirror:
    """The three problems.

    Attributes:
      solvers: by name, the maps of the regression and their rates.
      seed: root of all randomness.
      num_seeds: markets, games and regressions.
      precision: float64 for the regression, whose small p make small numbers.
      days: of the market.
      num_assets: in the market.
      sizes: n of the games, each >= 2.
      rounds: of a game.
      edge: by how much the better expert is better on average, in (0, 1).
      num_unknowns: of the regression.
      num_equations: of the regression.
      num_nonzero: unknowns that are not zero, of size 1.
      steps: of the regression.
    """

    solvers: Mapping[str, Solver]
    seed: int
    num_seeds: int
    precision: str
    days: int
    num_assets: int
    sizes: Sequence[int]
    rounds: int
    edge: float
    num_unknowns: int
    num_equations: int
    num_nonzero: int
    steps: int

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        counts = ("days", "rounds", "num_equations", "num_nonzero", "steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        if self.num_assets < 2:
            raise FieldError("num_assets", "be >= 2", self.num_assets)
        if not self.sizes or min(self.sizes) < 2 or len(set(self.sizes)) < len(self.sizes):
            raise FieldError("sizes", "be different numbers >= 2", list(self.sizes))
        if not 0 < self.edge < 1:
            raise FieldError("edge", "be in (0, 1)", self.edge)
        if self.num_nonzero > self.num_unknowns:
            raise FieldError(
                "num_nonzero", f"be <= num_unknowns = {self.num_unknowns}", self.num_nonzero
            )

    def stages(self) -> list[Once]:
        """The portfolio, a game of each size, the regression with each map."""
        games = [Once(f"game_{n}", partial(self._game, n)) for n in self.sizes]
        fits = [
            Once(f"regression_{name}", partial(self._regression, name)) for name in self.solvers
        ]
        return [Once("portfolio", self._portfolio), *games, *fits]

    def _keys(self, salt: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), salt)
        return jax.random.split(key, self.num_seeds)

    # Portfolio

    def _portfolio(self) -> list[Row]:
        """Regret to the best constant portfolio after ever more days."""
        shape = (self.days, self.num_assets)

        @jax.jit
        @jax.vmap
        def markets(key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            of_drift, of_noise = jax.random.split(key)
            drift = 0.02 * jax.random.normal(of_drift, (self.num_assets,))
            relatives = jnp.exp(drift + 0.1 * jax.random.normal(of_noise, shape))
            # The gradient of the log loss is a ratio of relatives: about 1, at most about 2.
            rates = {name: theory_rate(name, self.num_assets, self.days) for name in ON_SIMPLEX}
            found = {name: jnp.cumsum(play(make(rates[name]), log_loss, relatives))
                     for name, make in ON_SIMPLEX.items()}  # fmt: skip
            found["uniform"] = jnp.cumsum(-jnp.log(relatives.mean(1)))
            best = jnp.stack([best_constant_portfolio(relatives[:day]) for day in self._days])
            return found, best

        losses, best = markets(self._keys(0))
        return [
            {"seed": seed, "step": day,
             **{f"regret/{name}": float(values[seed, day - 1] - best[seed, index])
                for name, values in losses.items()}}
            for seed in range(self.num_seeds)
            for index, day in enumerate(self._days)
        ]  # fmt: skip

    @property
    def _days(self) -> list[int]:
        return sorted({max(1, self.days * part // 8) for part in range(1, 9)})

    # Experts

    def _game(self, n: int) -> list[Row]:
        """Regret to the best expert at the end; its losses are -edge on average, the others' 0."""

        @jax.jit
        @jax.vmap
        def games(key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            shares = jnp.full(n, 0.5).at[0].set((1 - self.edge) / 2)
            losses = jnp.where(jax.random.uniform(key, (self.rounds, n)) < shares, 1.0, -1.0)
            best = jnp.min(jnp.sum(losses, 0))
            return {
                name: jnp.sum(play(make(theory_rate(name, n, self.rounds)), linear_loss, losses))
                for name, make in ON_SIMPLEX.items()
            }, best

        losses, best = games(self._keys(1))
        regrets = [(name, values - best) for name, values in losses.items()]
        return [
            {"seed": seed, **{f"regret/{name}": float(regret[seed]) for name, regret in regrets}}
            for seed in range(self.num_seeds)
        ]

    # Regression

    def _regression(self, name: str) -> list[Row]:
        """Size of the residual, support found, and norms of the solution."""
        solver = self.solvers[name]
        tx = mirror_descent(solver.learning_rate, solver.mirror_map)

        @jax.jit
        @jax.vmap
        def fits(key: jax.Array) -> dict[str, jax.Array]:
            of_matrix, of_signs = jax.random.split(key)
            shape, dtype = (self.num_equations, self.num_unknowns), jnp.dtype(self.precision)
            matrix = jax.random.normal(of_matrix, shape, dtype) / np.sqrt(self.num_equations)
            signs = jax.random.rademacher(of_signs, (self.num_nonzero,), dtype)
            target = jnp.zeros(self.num_unknowns, dtype).at[: self.num_nonzero].set(signs)
            values = matrix @ target

            def loss(x: jax.Array) -> jax.Array:
                return 0.5 * jnp.sum(jnp.square(matrix @ x - values))

            start = jnp.zeros_like(target)

            def body(carry: Any, _: None) -> tuple[Any, None]:
                x, state = carry
                updates, state = tx.update(jax.grad(loss)(x), state, x)
                return (x + updates, state), None

            (x, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=self.steps)
            largest = jnp.argsort(-jnp.abs(x))[: self.num_nonzero]
            return {
                "residual": jnp.sqrt(loss(x) / loss(start)),
                "error": jnp.linalg.norm(x - target) / jnp.linalg.norm(target),
                "support": jnp.mean(largest < self.num_nonzero),
                "norm_1": jnp.sum(jnp.abs(x)) / self.num_nonzero,
                "norm_max": jnp.max(jnp.abs(x)),
            }

        found = fits(self._keys(2))
        columns = {metric: np.asarray(values, float) for metric, values in found.items()}
        return [
            {"seed": seed, **{metric: float(values[seed]) for metric, values in columns.items()}}
            for seed in range(self.num_seeds)
        ]

    # Results

    def summarize(self, rows: list[Row]) -> Summary:
        """Means with intervals: last regret, regret by n, support and error by map."""
        from experiments.analysis.statistics import mean_interval  # needs SciPy, at the end

        def interval(stage: str, metric: str, step: int | None = None) -> dict[str, Any]:
            values = [
                float(row[metric])
                for row in rows
                if row["stage"] == stage and step in (None, row["step"])
            ]
            return {**mean_interval(values)._asdict(), "seeds": values}

        players = (*ON_SIMPLEX, "uniform")
        values: dict[str, Any] = {
            "portfolio": {
                name: interval("portfolio", f"regret/{name}", self.days) for name in players
            },
            "games": {
                str(n): {name: interval(f"game_{n}", f"regret/{name}") for name in ON_SIMPLEX}
                for n in self.sizes
            },
            "regression": {
                name: {
                    metric: interval(f"regression_{name}", metric)
                    for metric in ("residual", "error", "support", "norm_1", "norm_max")
                }
                for name in self.solvers
            },
        }
        cells = [
            [
                name,
                f"{100 * found['support']['mean']:.0f}",
                f"{found['error']['mean']:.3f}",
                f"{found['norm_1']['mean']:.2f}",
                f"{found['norm_max']['mean']:.2f}",
                f"{found['residual']['mean']:.0e}",
            ]
            for name, found in values["regression"].items()
        ]
        columns = ("map", "support found, %", "error", "1-norm / true", "largest", "residual")
        return Summary(values, Table("Sparse regression", columns, cells))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """mirror_descent.png: the portfolio's regret, regret against n, support by map."""
        from experiments.analysis import plots

        players = (*ON_SIMPLEX, "uniform")
        style = plots.styles(players)
        figure, (market, games, fits) = plots.panels(3)
        for name in players:
            curve = plots.curve(rows, "portfolio", f"regret/{name}")
            plots.band(market, curve, name, style[name])
        market.set(title="Portfolio: log growth behind\nthe best constant one", xlabel="day")
        sizes = sorted(self.sizes)
        for name in ON_SIMPLEX:
            found = {
                float(n): [float(r[f"regret/{name}"]) for r in rows if r["stage"] == f"game_{n}"]
                for n in sizes
            }
            plots.band(games, found, name, style[name])
            bounds = [theory_bound(name, n, self.rounds) for n in sizes]
            games.plot(sizes, bounds, color=style[name]["color"], linestyle=":", linewidth=1)
        games.set(title="Experts: regret\n(dotted: bounds of theory)", xlabel="number of experts")
        games.set(xscale="log", yscale="log")
        names = list(self.solvers)
        looks = (("support", "o", plots.COLORS[0]), ("error", "s", plots.COLORS[5]))
        for (metric, marker, color), shift in zip(looks, (-0.1, 0.1), strict=True):
            values = np.array([
                [float(r[metric]) for r in rows if r["stage"] == f"regression_{name}"]
                for name in names
            ])  # fmt: skip
            places = np.arange(len(names)) + shift
            fits.vlines(places, values.min(1), values.max(1), color=color)
            fits.plot(places, values.mean(1), marker, color=color, label=metric)
        fits.set(title="Regression: support found,\nerror of the solution (range over seeds)")
        fits.set_xticks(range(len(names)), names, rotation=45, ha="right")
        fits.legend()
        plots.legend(figure, market)
        plots.save(figure, folder / "mirror_descent.png")
