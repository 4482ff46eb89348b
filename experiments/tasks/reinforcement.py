"""Reinforcement learning: agents in one environment, one after the other, all seeds together."""

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
from experiments.runtime.task import Diverged, Summary
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError
from trustjax.agents import AgentConfig, data_parallel, select_seed
from trustjax.agents.algorithm import mask_missing_episodes
from trustjax.envs import make
from trustjax.parallel import make_mesh
from trustjax.trust import means_of_trust

# NaN in these metrics means only that there is no value yet; rows leave them out.
_MAY_BE_UNDEFINED = ("episode/return", "episode/length", "value/explained")

_MOST_ROWS = 500  # per agent and seed; longer trainings write means over several iterations

MakeConfig = Callable[..., AgentConfig]  # env, total_steps, dtype, optimizer -> Config


@dataclass(kw_only=True)
class Reinforcement:
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Attributes:
      agents: Configs of `trustjax.agents` by name; environment, length, optimizer and dtype are
        still open.
      env: Name of the environment, as `trustjax.envs.make` takes it.
      optimizer: Optimizer of all networks of all agents.
      seed: Root of all randomness.
      num_seeds: Number of seeds, trained side by side.
      precision: Precision of the networks: float32, bfloat16 or float64.
      only: Names of the agents to run; all if empty.
      total_steps: Steps of one seed in all its environments together.
      steps_per_chunk: Steps in one compiled call, rounded to whole iterations. Metrics are written
        after it, with a row for each iteration.
      evaluation_episodes: Episodes at the end of training, without noise in the actions.
      mesh: Devices that share the environments; None for one device.
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
        """One stage per agent."""
        return [
            Training(
                name=name,
                config=self._config(name),
                seed=self.seed,
                num_seeds=self.num_seeds,
                chunk=self.steps_per_chunk,
                evaluation_episodes=self.evaluation_episodes,
                mesh=self.mesh or make_mesh(num_devices=1),
            )
            for name in self.only or self.agents
        ]

    def _config(self, name: str) -> AgentConfig:
        dtype = {"dtype": "bfloat16"} if self.precision == "bfloat16" else {}
        return self.agents[name](
            env=self.env, total_steps=self.total_steps, optimizer=self.optimizer, **dtype
        )

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Final returns by agent, in training and without noise, compared with the first agent."""
        from experiments.tasks import reinforcement_report

        title = f"{self.env}, {self.total_steps} steps"
        return reinforcement_report.summarize(rows, list(self.only or self.agents), title)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning_curves.png (returns) and trust_region.png (the size of iterations)."""
        from experiments.tasks import reinforcement_report

        reinforcement_report.plot(rows, list(self.only or self.agents), self.env, folder)


@dataclass(frozen=True, eq=False)
class Training:
    """The stage of one agent; a step is one step of one environment.

    Attributes:
      name: Name of the stage.
      config: Config of the agent.
      seed: Root of all randomness.
      num_seeds: Number of seeds, trained side by side.
      chunk: Steps of one call of `advance` before they are rounded to whole iterations.
      evaluation_episodes: Episodes of the final evaluation.
      mesh: Devices that share the environments.
    """

    name: str
    config: AgentConfig
    seed: int
    num_seeds: int
    chunk: int
    evaluation_episodes: int
    mesh: Mesh

    @property
    def num_steps(self) -> int:
        """The steps of all whole iterations."""
        return self.config.num_updates * self.config.steps_per_update

    @property
    def steps_per_chunk(self) -> int:
        """Steps of one call of `advance`: whole iterations, at least one of which learns."""
        size = self.config.steps_per_update
        least = self.config.first_update + 1
        return max(least, round(self.chunk / size)) * size

    def check(self) -> None:
        """Raises InputError, which names the field, for an agent that cannot run."""
        try:
            self._programs  # noqa: B018
        except InputError as error:
            if error.field is None:
                raise
            agent = f"agents.{self.name}"
            raise InputError(f"{agent}.{error}", f"{agent}.{error.field}") from error

    def init(self, final: Mapping[str, Any]) -> Any:
        """All seeds before the first iteration that learns."""
        del final
        init, _ = self._programs
        return init(jax.random.split(jax.random.key(self.seed), self.num_seeds))

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
        history = mask_missing_episodes(history)
        columns = {name: history[name] for name in (*first, *sorted({*history} - {*first}))}
        self._check_finite(columns, start)
        count = len(columns["episode/return"][0])
        together = math.ceil(self.config.num_updates / _MOST_ROWS)
        spans = [(begin, min(begin + together, count)) for begin in range(0, count, together)]
        return state, [
            {"step": start + end * size, "seed": seed, **_means(columns, seed, slice(begin, end))}
            for begin, end in spans
            for seed in range(self.num_seeds)
        ]

    def finish(self, state: Any) -> list[Row]:
        """One row per seed: the last return in training, and that of the policy without noise."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1)  # 1: not the keys of the training
        keys = jax.random.split(key, self.num_seeds)
        returns, lengths = self._evaluate(state, keys)
        training = mask_missing_episodes(state.episodes)["episode/return"]
        rows: list[Row] = [
            {
                "seed": seed,
                "final/return": float(np.mean(returns[seed])),
                "final/length": float(np.mean(lengths[seed])),
            }
            for seed in range(self.num_seeds)
        ]
        for row, value in zip(rows, training, strict=True):
            if np.isfinite(value):  # NaN as long as no episode has ended
                row["final/training_return"] = float(value)
        return rows

    def learned(self, state: Any) -> Any:
        """The parameters of all networks and seeds."""
        return state.params

    def save(self, state: Any, folder: Path) -> None:
        """Writes the policy of every seed to policies/NAME/seed_N.npz."""
        agent = self.config.agent()
        own = folder / "policies" / self.name
        own.mkdir(parents=True, exist_ok=True)
        for seed in range(self.num_seeds):
            agent.policy(select_seed(state, seed)).save(own / f"seed_{seed}.npz")

    @functools.cached_property
    def _programs(self) -> Any:
        make_agent = type(self.config).agent
        return data_parallel(make_agent, self.config, self.mesh, num_seeds=self.num_seeds)

    @functools.cached_property
    def _evaluate(self) -> Any:
        agent = self.config.agent()
        evaluate = functools.partial(
            agent.evaluate, num_episodes=self.evaluation_episodes, deterministic=True
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


def _means(columns: Mapping[str, np.ndarray], seed: int, iterations: slice) -> Row:
    """The metrics of a seed, averaged over the iterations in which they are defined."""
    means: Row = {}
    for name, values in columns.items():
        # Undefined: a return while no episode has ended, `value/explained` of equal returns.
        some = values[seed][iterations]
        defined = some[np.isfinite(some)]
        if len(defined):
            means[name] = float(defined.mean())
    return means_of_trust(means)
