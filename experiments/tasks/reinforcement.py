"""Reinforcement learning: agents side by side in one environment, all seeds of one together."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.optimizers import Optimizer
from experiments.runtime.task import Diverged, Summary, Table
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError
from trustjax.agents import AgentConfig, data_parallel, select_seed
from trustjax.agents.algorithm import known
from trustjax.envs import make
from trustjax.parallel import make_mesh

# NaN says no more of these than that there is no number yet, and rows leave them out.
_MAY_BE_UNDEFINED = ("episode/return", "episode/length", "value/explained")

MakeConfig = Callable[..., AgentConfig]  # env, total_steps, dtype, optimizer -> Config


_MOST_ROWS = 500  # of an agent and seed; longer trainings write means over several iterations


@dataclass(kw_only=True)
class Reinforcement:
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Attributes:
      agents: by name, Configs of `trustjax.agents` whose environment and length are still open.
      env: name of the environment, as `trustjax.envs.make` takes it.
      optimizer: of all agents' networks.
      seed: root of all randomness.
      num_seeds: trained side by side.
      precision: of the networks: float32, bfloat16 or float64.
      only: names of the agents to run; all if empty.
      total_steps: of all environments of one seed together.
      steps_per_chunk: steps of one compiled call, rounded to whole iterations; metrics are written
        after it, with a row for each iteration.
      evaluation_episodes: at the end of training, without noise in the actions.
      mesh: the devices that share the environments; None for one device.
    """

    agents: dict[str, MakeConfig]
    env: str
    optimizer: Optimizer
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]
    total_steps: int
    steps_per_chunk: int
    evaluation_episodes: int
    mesh: Mesh | None = None

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "total_steps", "steps_per_chunk", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        try:
            make(self.env)
        except ValueError as error:
            raise InputError(f"env must be an environment: {error}", "env") from error
        for name in self.only:
            if name not in self.agents:
                raise FieldError("only", f"name agents of {sorted(self.agents)}", repr(name))
        for stage in self.stages():
            stage.check()

    def stages(self) -> list["Training"]:
        """One stage an agent."""
        return [Training(self, name, self._config(name)) for name in self.only or self.agents]

    def _config(self, name: str) -> AgentConfig:
        dtype = {"dtype": "bfloat16"} if self.precision == "bfloat16" else {}
        return self.agents[name](
            env=self.env, total_steps=self.total_steps, optimizer=self.optimizer, **dtype
        )

    # SciPy and Matplotlib are imported at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Returns at the end by agent: of training, of an evaluation; who beats the first one."""
        from experiments.analysis.statistics import (
            METHOD,
            interquartile_mean,
            mean_interval,
            probability_of_improvement,
            seeds_label,
        )

        names = list(self.only or self.agents)
        finals = {name: _finals(rows, name) for name in names}
        versus = [f"above {names[0]}"] if len(names) > 1 else []
        values: dict[str, Any] = {}
        cells = []
        for name, found in finals.items():
            training = found["final/training_return"]
            means = {key: mean_interval(each) for key, each in found.items()}
            middle = interquartile_mean([training])
            better = probability_of_improvement(
                [(training, finals[names[0]]["final/training_return"])]
            )
            values[name] = {
                **{key: {**mean._asdict(), "seeds": found[key]} for key, mean in means.items()},
                "interquartile_mean": middle._asdict(),
                f"probability_of_improvement_over_{names[0]}": better._asdict(),
            }
            of_training, of_policy = means["final/training_return"], means["final/return"]
            cells.append([
                name,
                f"{of_training.mean:.1f}\n{of_training.low:.1f} to {of_training.high:.1f}",
                f"{of_policy.mean:.1f}\n{of_policy.low:.1f} to {of_policy.high:.1f}",
                *(f"{better.mean:.2f}" if name != names[0] else "" for _ in versus),
                f"{_seconds(rows, name):.0f}",
            ])  # fmt: skip
        title = (
            f"{self.env}, {self.total_steps} steps, mean and {METHOD} over "
            f"{seeds_label(self.num_seeds)}"
        )
        columns = ("agent", "return in training", "return without noise", *versus, "seconds")
        return Summary(values, Table(title, columns, cells))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """learning_curves.png: returns; trust_region.png: how far each iteration went."""
        from experiments.analysis import plots

        names = list(self.only or self.agents)

        def panel(metric: str, title: str) -> plots.Panel:
            settings = {"xlabel": "steps", **plots.metric_settings(metric)}
            return plots.Panel(title, plots.curves(rows, names, metric), settings)

        returns = panel("episode/return", f"{self.env}: return in training")
        plots.plot_bands([returns], names, folder / "learning_curves.png")
        known = {name for row in rows for name in row}  # SAC has no radius
        metrics = [m for m in ("kl/new_old", "trust/used", "entropy") if m in known]
        contents = [panel(metric, plots.metric_title(metric)) for metric in metrics]
        plots.plot_bands(contents, names, folder / "trust_region.png")


@dataclass(frozen=True)
class Training:
    """The stage of one agent; a step is one step of one environment."""

    task: Reinforcement
    name: str
    config: AgentConfig

    @property
    def num_steps(self) -> int:
        """Whole iterations that fit into the task's steps."""
        return self.config.num_updates * self.config.steps_per_update

    @property
    def steps_per_chunk(self) -> int:
        """Whole iterations, at least one that learns."""
        size = self.config.steps_per_update
        least = self.config.first_update + 1
        return max(least, round(self.task.steps_per_chunk / size)) * size

    def check(self) -> None:
        """Raises ValueError for an agent that cannot run."""
        try:
            self._programs  # noqa: B018
        except ValueError as error:
            raise ValueError(f"agents.{self.name}.{error}") from error

    def init(self, final: Mapping[str, Any]) -> Any:
        """All seeds before the first iteration that learns."""
        del final
        key = jax.random.key(self.task.seed)
        init, _ = self._programs
        return init(jax.random.split(key, self.task.num_seeds))

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: Any, batches: None, step: int, num_steps: int
    ) -> tuple[Any, list[Row]]:
        """One row for each seed and iteration, or for a few iterations where there are many."""
        del batches
        _, advance = self._programs
        size = self.config.steps_per_update
        start = step or self.config.first_update * size  # whose steps `init` has taken
        state, history = advance(state, (step + num_steps - start) // size)
        first = ("episode/return", "episode/length")  # the main metric leads
        history = known(history)
        columns = {name: history[name] for name in (*first, *sorted({*history} - {*first}))}
        self._check_finite(columns, start)
        count = len(columns["episode/return"][0])
        together = math.ceil(self.config.num_updates / _MOST_ROWS)
        rows: list[Row] = []
        for begin in range(0, count, together):
            end = min(begin + together, count)
            for seed in range(self.task.num_seeds):
                row: Row = {"step": start + end * size, "seed": seed}
                for name, values in columns.items():
                    # No episode may have ended yet, and no return differ from the others.
                    some = values[seed][begin:end]
                    defined = some[np.isfinite(some)]
                    if len(defined):
                        row[name] = float(defined.mean())
                if row.get("trust/radius"):  # of the row: single iterations may have next to none
                    row["trust/used"] = float(row["trust/distance"]) / float(row["trust/radius"])
                rows.append(row)
        return state, rows

    def finish(self, state: Any) -> list[Row]:
        """One row per seed: the last return in training, and that of the policy without noise."""
        key = jax.random.fold_in(jax.random.key(self.task.seed), 1)
        keys = jax.random.split(key, self.task.num_seeds)
        returns, lengths = self._evaluate(state, keys)
        training = known(state.episodes)["episode/return"]
        rows: list[Row] = [
            {
                "seed": seed,
                "final/return": float(np.mean(returns[seed])),
                "final/length": float(np.mean(lengths[seed])),
            }
            for seed in range(self.task.num_seeds)
        ]
        for row, value in zip(rows, training, strict=True):
            if np.isfinite(value):  # else no episode has ended
                row["final/training_return"] = float(value)
        return rows

    def learned(self, state: Any) -> Any:
        """The parameters of all networks and seeds."""
        return state.params

    def save(self, state: Any, folder: Path) -> None:
        """Writes the policy of every seed to policies/NAME/seed_N.npz."""
        agent = self.config.agent()
        place = folder / "policies" / self.name
        place.mkdir(parents=True, exist_ok=True)
        for seed in range(self.task.num_seeds):
            agent.policy(select_seed(state, seed)).save(place / f"seed_{seed}.npz")

    @functools.cached_property
    def _programs(self) -> Any:
        mesh = self.task.mesh or make_mesh(num_devices=1)
        make_agent = type(self.config).agent
        return data_parallel(make_agent, self.config, mesh, num_seeds=self.task.num_seeds)

    @functools.cached_property
    def _evaluate(self) -> Any:
        agent = self.config.agent()
        evaluate = functools.partial(
            agent.evaluate, num_episodes=self.task.evaluation_episodes, deterministic=True
        )
        return jax.jit(jax.vmap(evaluate))

    def _check_finite(self, columns: Mapping[str, np.ndarray], step: int) -> None:
        for name, values in columns.items():
            undefined = np.isnan(values) if name in _MAY_BE_UNDEFINED else False
            wrong = ~(np.isfinite(values) | undefined)
            if not wrong.any():
                continue
            seed, update = np.argwhere(wrong)[0]
            at = step + (int(update) + 1) * self.config.steps_per_update
            raise Diverged(f"{name} of seed {seed} is {values[seed, update]} at step {at}")


def _finals(rows: Sequence[Row], stage: str) -> dict[str, list[float]]:
    """Metrics of the final evaluation, with the values of all seeds, NaN where undefined."""
    own = [row for row in rows if row["stage"] == stage and "final/return" in row]
    names = ("final/return", "final/length", "final/training_return")
    return {name: [float(row.get(name, math.nan)) for row in own] for name in names}


def _seconds(rows: Sequence[Row], stage: str) -> float:
    return max(float(row.get("time/seconds", 0)) for row in rows if row["stage"] == stage)
