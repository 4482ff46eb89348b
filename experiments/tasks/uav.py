"""Vehicles that serve users: multi-agent methods beside planners that do not learn."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.optimizers import Optimizer
from experiments.runtime.task import Summary
from experiments.tasks.once import Once
from experiments.tasks.reinforcement_training import Training
from experiments.tasks.uav_play import PLANNERS, play, trained
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError, check_choice, check_count
from trustjax.agents.algorithm import mask_missing_episodes
from trustjax.agents.multi import MultiAgentConfig
from trustjax.agents.training import EVALUATION
from trustjax.envs import MultiUAV
from trustjax.envs.joint import Joint, joint
from trustjax.envs.registry import make_once

MakeConfig = Callable[..., MultiAgentConfig]  # env, total_steps, optimizer -> Config


@dataclass(frozen=True, eq=False)
class VehicleTraining(Training):
    """The stage of one method, whose last rows have the measures of its episodes."""

    def finish(self, state: Any) -> list[Row]:
        """One row per seed: the measures of episodes, and the return in training.

        Policies act as they are trained, by samples. `final/modes` is the return of their most
        likely actions, by which vehicles that see the same may fly in circles or into each other.
        """
        agent: Any = self.config.agent()
        keys = self._keys(final_key(self.seed))

        def measure(state: Any, key: jax.Array) -> Mapping[str, jax.Array]:
            def episodes(*, deterministic: bool) -> dict[str, jax.Array]:
                act = trained(agent, state, deterministic=deterministic)
                return play(agent.env, act, key, self.evaluation_episodes, agent.initial_carry())

            modes = episodes(deterministic=True)["return"]
            return {**episodes(deterministic=False), "modes": modes}

        rows = final_rows(jax.jit(jax.vmap(measure))(state, keys))
        last = mask_missing_episodes(state.episodes)["episode/return"]
        for row, own, value in zip(rows, self.labels, last, strict=True):
            row |= own
            if np.isfinite(value):
                row["final/training_return"] = float(value)
        return rows


@dataclass(kw_only=True)
class Vehicles:
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Attributes:
      agents: Configs of `trustjax.agents.multi` by name; environment, length and optimizer are
        still open. Gains are taken over the first.
      planners: Names in `uav_play.PLANNERS` of references that do not learn.
      env: Name of the environment, "trustjax:MultiUAV" with its options.
      optimizer: Optimizer of all networks.
      seed: Root of all randomness.
      num_seeds: Number of seeds, trained side by side.
      precision: float32, the only one.
      only: Names of the agents to run; all if empty.
      total_steps: Steps of one seed in all its environments together.
      steps_per_chunk: Steps in one compiled call, rounded to whole iterations.
      evaluation_episodes: Episodes of every seed that are measured at the end.
      mesh: Devices that share the environments; None for one device.
    """

    agents: dict[str, MakeConfig]
    planners: Sequence[str]
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
            check_count(name, getattr(self, name), at_least=1)
        check_choice("precision", self.precision, ("float32",))
        try:
            env = self._joint
        except ValueError as error:
            raise InputError(f"env must be an environment: {error}", "env") from error
        if not isinstance(env.unwrapped, MultiUAV) or env.num_actions is None:
            raise FieldError("env", "be trustjax:MultiUAV with discrete actions", repr(self.env))
        if env.unwrapped.end_on_collision:
            raise FieldError(
                "env", "have end_on_collision=False, for episodes of one length", repr(self.env)
            )
        for name in self.only:
            check_choice("only", name, self.agents)
        for name in self.planners:
            check_choice("planners", name, PLANNERS)
        for stage in self._trainings():
            stage.check()

    @property
    def names(self) -> list[str]:
        """The methods that run, and the planners after them."""
        return [*(self.only or self.agents), *self.planners]

    def stages(self) -> list[Any]:
        """One stage per method, and one per planner."""
        planners = [
            Once(name, functools.partial(self._measure_planner, name)) for name in self.planners
        ]
        return [*self._trainings(), *planners]

    @functools.cached_property
    def _joint(self) -> Joint:
        env: Any = make_once(self.env)
        return joint(env)

    def _trainings(self) -> list[VehicleTraining]:
        return [
            VehicleTraining.of_seeds(
                self.num_seeds,
                name=name,
                config=self.agents[name](
                    env=self.env, total_steps=self.total_steps, optimizer=self.optimizer
                ),
                seed=self.seed,
                chunk=self.steps_per_chunk,
                evaluation_episodes=self.evaluation_episodes,
                mesh=self.mesh,
            )
            for name in self.only or self.agents
        ]

    def _measure_planner(self, name: str) -> list[Row]:
        """The measures of a planner in the episodes that trained policies are measured in."""
        env = self._joint
        keys = jax.random.split(final_key(self.seed), self.num_seeds)
        measure = functools.partial(
            play, env, PLANNERS[name](env), num_episodes=self.evaluation_episodes
        )
        rows = final_rows(jax.jit(jax.vmap(lambda key: measure(key=key)))(keys))
        return [{"seed": seed, **row} for seed, row in enumerate(rows)]

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Measures by method with intervals, and differences from the first, paired by seed."""
        from experiments.tasks.uav_report import summarize

        return summarize(rows, self.names, f"{self.env}, {self.total_steps} steps")

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning.png, measures.png and, with attention, attention.png."""
        from experiments.tasks.uav_report import plot

        plot(rows, list(self.only or self.agents), list(self.planners), folder)


def final_key(seed: int) -> jax.Array:
    """The key of the last episodes, the same for all methods; no split of the root has it."""
    return jax.random.fold_in(jax.random.key(seed), EVALUATION + 1)


def final_rows(found: Mapping[str, jax.Array]) -> list[Row]:
    """One row per seed with the means over episodes, from measures [seed, episode]."""
    means = {name: np.asarray(values, np.float64).mean(1) for name, values in found.items()}
    return [
        {f"final/{name}": float(values[seed]) for name, values in means.items()}
        for seed in range(len(next(iter(means.values()))))
    ]
