"""What mirror descent is good for: three problems in which the geometry shows.

- A portfolio of n assets, rebalanced every day: the regret against the best constant portfolio
  (Helmbold, Schapire, Singer, Warmuth, *On-line portfolio selection using multiplicative updates*,
  1998).
- A game over n experts, one of which is better on average: with the rates of theory the regret
  grows as sqrt(log n) with the entropy, and as sqrt(n) with the Euclidean map.
- Sparse regression with fewer equations than unknowns: from zero, each map finds the solution of
  least potential, which has the right support or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime.task import Summary, Table
from experiments.tasks.mirror_problems import (
    ON_SIMPLEX,
    PLAYERS,
    game,
    market,
    regression,
    theory_bound,
)
from experiments.tasks.once import Once
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.geometry import MirrorMap
from trustjax.optim import mirror_descent


@dataclass(frozen=True)
class Solver:
    """A mirror map and its learning rate in the regression."""

    mirror_map: MirrorMap
    learning_rate: float


@dataclass(frozen=True)
class Mirror:
    """Configuration and stages of the experiment; conf/exp/mirror_descent.yaml has the numbers.

    Attributes:
      solvers: Mirror maps of the regression and their learning rates, by name.
      seed: Root of all randomness.
      num_seeds: Number of markets, of games of each size and of regressions.
      precision: Precision of the regression; float64 where a map makes small numbers.
      days: Days in the market.
      num_assets: Assets in the market, >= 2.
      sizes: Numbers of experts, >= 2, with one game each.
      rounds: Rounds of a game.
      edge: How much less than the others the best expert loses on average, in (0, 1).
      num_unknowns: Unknowns of the regression.
      num_equations: Equations of the regression.
      num_nonzero: Unknowns that are not zero but 1 or -1.
      steps: Steps of the regression.
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
        """The portfolio, then a game of each size, then the regression with each map."""
        games = [Once(f"game_{n}", partial(self._game, n)) for n in self.sizes]
        fits = [
            Once(f"regression_{name}", partial(self._regression, name)) for name in self.solvers
        ]
        return [Once("portfolio", self._portfolio), *games, *fits]

    def _keys(self, salt: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.seed), salt)
        return jax.random.split(key, self.num_seeds)

    def _portfolio(self) -> list[Row]:
        """One row per seed and report day: the regret of every player up to that day."""
        days = sorted({max(1, self.days * part // 8) for part in range(1, 9)})
        markets = partial(market, num_assets=self.num_assets, days=self.days, report_days=days)
        losses, best = jax.jit(jax.vmap(markets))(self._keys(0))
        return [
            {"seed": seed, "step": day,
             **{f"regret/{name}": float(values[seed, day - 1] - best[seed, index])
                for name, values in losses.items()}}
            for seed in range(self.num_seeds)
            for index, day in enumerate(days)
        ]  # fmt: skip

    def _game(self, n: int) -> list[Row]:
        """One row per seed: the regret of every player against the best expert."""
        games = partial(game, n=n, rounds=self.rounds, edge=self.edge)
        losses, best = jax.jit(jax.vmap(games))(self._keys(1))
        regrets = [(name, values - best) for name, values in losses.items()]
        return [
            {"seed": seed, **{f"regret/{name}": float(regret[seed]) for name, regret in regrets}}
            for seed in range(self.num_seeds)
        ]

    def _regression(self, name: str) -> list[Row]:
        """One row per seed: the residual, the support that is found, norms of the solution."""
        solver = self.solvers[name]
        fits = partial(
            regression,
            tx=mirror_descent(solver.learning_rate, solver.mirror_map),
            num_unknowns=self.num_unknowns,
            num_equations=self.num_equations,
            num_nonzero=self.num_nonzero,
            steps=self.steps,
            dtype=jnp.dtype(self.precision),
        )
        found = jax.jit(jax.vmap(fits))(self._keys(2))
        columns = {metric: np.asarray(values, float) for metric, values in found.items()}
        return [
            {"seed": seed, **{metric: float(values[seed]) for metric, values in columns.items()}}
            for seed in range(self.num_seeds)
        ]

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Means with intervals: the final regrets, and the solutions of the regression by map."""
        from experiments.analysis import plots
        from experiments.analysis.statistics import mean_entry

        def entry(stage: str, metric: str) -> dict[str, Any]:
            return mean_entry(plots.last(plots.curve(rows, stage, metric)))

        values: dict[str, Any] = {
            "portfolio": {name: entry("portfolio", f"regret/{name}") for name in PLAYERS},
            "games": {
                str(n): {name: entry(f"game_{n}", f"regret/{name}") for name in ON_SIMPLEX}
                for n in self.sizes
            },
            "regression": {
                name: {
                    metric: entry(f"regression_{name}", metric)
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
        """Writes mirror_descent.png: the portfolio's regret, regret against n, support by map."""
        from experiments.analysis import plots

        style = plots.styles(PLAYERS)
        figure, (portfolio, games, fits) = plots.panels(3)
        for name in PLAYERS:
            curve = plots.curve(rows, "portfolio", f"regret/{name}")
            plots.band(portfolio, curve, name, style[name])
        portfolio.set(title="Portfolio: log growth behind\nthe best constant one", xlabel="day")
        self._plot_games(rows, games, style)
        self._plot_regression(rows, fits)
        plots.legend(figure, portfolio)
        plots.save(figure, folder / "mirror_descent.png")

    def _plot_games(self, rows: list[Row], axis: Any, style: Mapping[str, Any]) -> None:
        from experiments.analysis import plots

        sizes = sorted(self.sizes)
        for name in ON_SIMPLEX:
            regrets = {
                float(n): plots.last(plots.curve(rows, f"game_{n}", f"regret/{name}"))
                for n in sizes
            }
            plots.band(axis, regrets, name, style[name])
            bounds = [theory_bound(name, n, self.rounds) for n in sizes]
            axis.plot(sizes, bounds, color=style[name]["color"], linestyle=":", linewidth=1)
        axis.set(title="Experts: regret\n(dotted: bounds of theory)", xlabel="number of experts")
        axis.set(xscale="log", yscale="log")

    def _plot_regression(self, rows: list[Row], axis: Any) -> None:
        from experiments.analysis import plots

        names = list(self.solvers)
        looks = (("support", "o", plots.COLORS[0]), ("error", "s", plots.COLORS[5]))
        for (metric, marker, color), shift in zip(looks, (-0.1, 0.1), strict=True):
            values = np.array(
                [plots.last(plots.curve(rows, f"regression_{name}", metric)) for name in names]
            )
            x = np.arange(len(names)) + shift  # so that the two markers of a map stand apart
            axis.vlines(x, values.min(1), values.max(1), color=color)
            axis.plot(x, values.mean(1), marker, color=color, label=metric)
        axis.set(title="Regression: support found,\nerror of the solution (range over seeds)")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.legend()
