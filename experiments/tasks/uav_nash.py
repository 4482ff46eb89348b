"""What vehicles gain by leaving alone, with the reward of the team or with their own."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runtime.task import Summary
from experiments.tasks.uav import Vehicles, VehicleTraining
from experiments.trackers import Row
from trustjax._checks import check_choice
from trustjax.agents.multi.equilibrium import Gains, nash_conv
from trustjax.agents.training import EVALUATION

_REWARDS = ("team", "individual")


@dataclass(frozen=True, eq=False)
class Deviating(VehicleTraining):
    """The stage of one method with one reward, which ends with the trainings of all responses.

    Attributes:
      responses: Arguments of `nash_conv`: `num_episodes` and the fields of PPO.
    """

    responses: Mapping[str, Any] = field(default_factory=dict)

    def finish(self, state: Any) -> list[Row]:
        """One row per seed: the measures of its episodes, and the gains of all vehicles."""
        rows = super().finish(state)
        agent: Any = self.config.agent()
        keys = self._keys(jax.random.fold_in(jax.random.key(self.seed), EVALUATION + 2))
        gains_of = functools.partial(nash_conv, agent, **self.responses)
        found: Gains = jax.tree.map(
            lambda x: np.asarray(x, np.float64), jax.jit(jax.vmap(gains_of))(state, keys)
        )
        for lane, row in enumerate(rows):
            row["nash/conv"] = float(found.nash_conv[lane])
            for i in range(agent.env.num_agents):
                row[f"nash/return_{i}"] = float(found.returns[lane, i])
                row[f"nash/response_{i}"] = float(found.responses[lane, i])
                row[f"nash/gain_{i}"] = float(found.gains[lane, i])
        return rows


@dataclass(kw_only=True)
class Deviations(Vehicles):
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Every method is trained once with each reward, which is also that of the environment.

    Attributes:
      rewards: Rewards, "team" or "individual".
      responses: Arguments of `trustjax.agents.multi.equilibrium.nash_conv`: `num_episodes`, and
        fields of `trustjax.agents.ppo.Config` for the training of a response.
    """

    rewards: Sequence[str]
    responses: dict[str, Any]

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for reward in self.rewards:
            check_choice("rewards", reward, _REWARDS)
        super().validate()

    @property
    def names(self) -> list[str]:
        """The methods with each reward, and the planners after them."""
        return [*(stage.name for stage in self._trainings()), *self.planners]

    def _trainings(self) -> list[VehicleTraining]:
        join = "&" if "?" in self.env else "?"
        return [
            self._with_reward(stage, reward, f"{self.env}{join}reward={reward}")
            for stage in super()._trainings()
            for reward in self.rewards
        ]

    def _with_reward(self, stage: VehicleTraining, reward: str, env: str) -> Deviating:
        config = self.agents[stage.name](
            env=env, reward=reward, total_steps=self.total_steps, optimizer=self.optimizer
        )
        given = {each.name: getattr(stage, each.name) for each in dataclasses.fields(stage)}
        own = {"name": f"{stage.name}_{reward}", "config": config, "responses": self.responses}
        return Deviating(**given | own)

    def summarize(self, rows: list[Row]) -> Summary:
        """Returns, the largest gain of a vehicle, and NashConv, with intervals over seeds."""
        from experiments.tasks.uav_report import summarize_gains

        budget = self.responses.get("total_steps", "default")
        title = f"{self.env}, {self.total_steps} steps, responses of {budget} steps"
        return summarize_gains(rows, [stage.name for stage in self._trainings()], title)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning.png and measures.png; see `Vehicles.plot`."""
        from experiments.tasks.uav_report import plot

        plot(rows, [stage.name for stage in self._trainings()], list(self.planners), folder)
