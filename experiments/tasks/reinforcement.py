"""Reinforcement learning: agents in one environment, one after the other, all seeds together."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from experiments.optimizers import Optimizer
from experiments.runtime.task import Summary
from experiments.tasks.reinforcement_training import Training
from experiments.tasks.search import Grid, Measure, Search, label
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError, check_count
from trustjax.agents import AgentConfig
from trustjax.envs import make
from trustjax.parallel import make_mesh

RETURN = Measure("return", "return without noise", 1, lambda value: f"{value:.1f}")

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
      evaluation_episodes: Episodes of an evaluation, without noise in the actions. There is always
        one at the end of training.
      evaluation_every: Steps between two evaluations during training, after which the best policy
        so far is kept; each falls on the end of a chunk. None for no evaluation during training.
      mesh: Devices that share the environments; None for one device.
      grid: Values to try by agent and number of its Config, to search for hyperparameters; see
        `Search`. None to train every agent as it is configured.
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
    evaluation_every: int | None = None
    mesh: Mesh | None = None
    grid: Grid | None = None

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "total_steps", "steps_per_chunk", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        check_count("evaluation_every", self.evaluation_every, at_least=1)
        try:
            environment = make(self.env)
        except ValueError as error:
            raise InputError(f"env must be an environment: {error}", "env") from error
        if environment.on_host:
            raise FieldError(
                "env", "be an environment in JAX, as all seeds are trained and evaluated together",
                repr(self.env), advice="train it in Python, with trustjax.agents",
            )  # fmt: skip
        for name in self.only:
            if name not in self.agents:
                raise FieldError("only", f"name agents of {sorted(self.agents)}", repr(name))
        if self.search is not None:
            self._check_trials(self.search)
        for stage in self.stages():
            stage.check()

    @functools.cached_property
    def search(self) -> Search | None:
        """The search among the agents that are run, if there is a grid."""
        if self.grid is None:
            return None
        configured = {
            name: {
                key: getattr(self._config(name), key)
                for key in ("learning_rate", *self.grid.get(name, ()))
                if key in self._numbers(name)
            }
            for name in self.only or self.agents
        }
        title = f"Best on {self.env}, {self.total_steps} steps"
        return Search(configured, self.grid, self.num_seeds, title, (RETURN,))

    def stages(self) -> list[Training]:
        """One stage per agent; in a search it trains all trials of the agent side by side."""
        return [self._stage(name) for name in self.only or self.agents]

    def _stage(self, name: str) -> Training:
        seed_index, numbers = np.arange(self.num_seeds), {}
        labels: list[Row] = [{"seed": int(index)} for index in seed_index]
        if self.search is not None:
            lanes = self.search.lanes(name)
            seed_index, labels = np.asarray(lanes.seed_index), label(lanes)
            numbers = {"learning_rate": lanes.learning_rate, **lanes.hyperparameters}
        return Training(
            name=name,
            config=self._config(name),
            seed=self.seed,
            seed_index=seed_index,
            numbers=numbers,
            labels=labels,
            lanes_compete=self.search is not None,
            chunk=self.steps_per_chunk,
            evaluation_episodes=self.evaluation_episodes,
            evaluation_every=self.evaluation_every,
            mesh=self.mesh or make_mesh(num_devices=1),
        )

    def _numbers(self, name: str) -> list[str]:
        """The fields of an agent's Config that are numbers, which lanes may have for themselves."""
        config = self._config(name)
        numbers = [f.name for f in dataclasses.fields(config) if not f.metadata.get("static")]
        return [number for number in numbers if number != "env_params"]

    def _check_trials(self, search: Search) -> None:
        """Raises ValueError for a search that cannot run; it names the number of the grid."""
        for name in search.configured:
            numbers = self._numbers(name)
            if unknown := {*search.grid.get(name, ())} - {*numbers}:
                raise FieldError(f"grid.{name}", f"name some of {numbers}", sorted(unknown))
        search.validate()
        for name in search.configured:
            for trial in search.trials(name):
                values: dict[str, Any] = {**trial}
                try:
                    dataclasses.replace(self._config(name), **values).validate()
                except InputError as error:
                    raise InputError(f"grid.{name}: {error}", f"grid.{name}") from error

    def _config(self, name: str) -> AgentConfig:
        dtype = {"dtype": "bfloat16"} if self.precision == "bfloat16" else {}
        return self.agents[name](
            env=self.env, total_steps=self.total_steps, optimizer=self.optimizer, **dtype
        )

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Final returns by agent, compared with the first agent; the best trials of a search."""
        if self.search is not None:
            return self.search.summarize(rows)
        from experiments.tasks import reinforcement_report

        title = f"{self.env}, {self.total_steps} steps"
        return reinforcement_report.summarize(rows, list(self.only or self.agents), title)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning_curves.png (returns) and trust_region.png; nothing for a search."""
        if self.search is not None:
            return
        from experiments.tasks import reinforcement_report

        reinforcement_report.plot(rows, list(self.only or self.agents), self.env, folder)
