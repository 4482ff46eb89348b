"""The stage of one agent: all its seeds, or all trials of a search, are trained side by side."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.runtime.task import Diverged
from experiments.trackers import Row
from trustjax._checks import InputError
from trustjax.agents import (
    AgentConfig,
    Best,
    data_parallel,
    evaluate_and_keep_best,
    initial_best,
    select_seed,
)
from trustjax.agents.algorithm import mask_missing_episodes
from trustjax.agents.training import EVALUATION
from trustjax.parallel import make_mesh
from trustjax.trust import means_of_trust

# NaN in these metrics means only that there is no value yet; rows leave them out.
_MAY_BE_UNDEFINED = ("episode/return", "episode/length", "value/explained")

_DIVERGED: Row = {"diverged": 1}

_MOST_ROWS = 500  # per agent and seed; longer trainings write means over several iterations


class Evaluated(NamedTuple):
    """The state of a stage that is evaluated during training.

    Attributes:
      training: States of the agent, of all lanes.
      best: The best policy of each lane so far.
    """

    training: Any
    best: Best


@dataclass(frozen=True, eq=False)
class Training:
    """The stage of one agent; a step is one step of one environment.

    Attributes:
      name: Name of the stage.
      config: Config of the agent.
      seed: Root of all randomness.
      seed_index: Seed of each lane; lanes are trained side by side.
      numbers: Numbers of the config by name, each [lane], that differ between lanes; {} if the
        lanes differ by their seeds alone.
      labels: First columns of the rows of each lane, its seed among them.
      lanes_compete: Whether a lane may diverge as long as another one does not, as in a search.
      chunk: Steps of one call of `advance` before they are rounded to whole iterations.
      evaluation_episodes: Episodes of an evaluation.
      evaluation_every: Steps between two evaluations during training, which make the state an
        `Evaluated`; None for no evaluation before the end, and the states of the agent alone.
      mesh: Devices that share the environments.
    """

    name: str
    config: AgentConfig
    seed: int
    seed_index: np.ndarray
    numbers: Mapping[str, jax.Array]
    labels: Sequence[Row]
    lanes_compete: bool
    chunk: int
    evaluation_episodes: int
    evaluation_every: int | None
    mesh: Mesh

    @classmethod
    def of_seeds(cls, num_seeds: int, *, mesh: Mesh | None = None, **fields: Any) -> Self:
        """The stage with one lane for each seed, which differ in nothing else.

        Args:
          num_seeds: Number of seeds.
          mesh: Devices that share the environments; None for one device.
          **fields: name, config, seed, chunk and evaluation_episodes.
        """
        return cls(
            seed_index=np.arange(num_seeds),
            numbers={},
            labels=[{"seed": index} for index in range(num_seeds)],
            lanes_compete=False,
            evaluation_every=None,
            mesh=mesh or make_mesh(num_devices=1),
            **fields,
        )

    @property
    def num_steps(self) -> int:
        """The steps of all whole iterations."""
        return self.config.num_updates * self.config.steps_per_update

    @property
    def _common(self) -> int:
        """A common divisor of the numbers of iterations of all chunks."""
        config = self.config
        chunk = min(self.steps_per_chunk // config.steps_per_update, config.num_updates)
        return math.gcd(chunk, config.first_update, config.num_updates)

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
        """All lanes before the first iteration that learns."""
        del final
        init, _ = self._programs
        state = init(self._keys(jax.random.key(self.seed)))
        if self.evaluation_every is None:
            return state
        return Evaluated(state, jax.jit(jax.vmap(initial_best))(state))

    def batches(self) -> None:
        """There is no data."""

    def advance(
        self, state: Any, batches: None, step: int, num_steps: int
    ) -> tuple[Any, list[Row]]:
        """One row for each lane and iteration, or for a few iterations where there are many.

        The last row of a lane has `evaluation/return` and `evaluation/length` where one is due.
        """
        del batches
        if isinstance(state, Evaluated):
            training, rows = self._advance(state.training, step, num_steps)
            state = state._replace(training=training)
            return self._evaluated(state, rows) if self._is_due(step, num_steps) else (state, rows)
        return self._advance(state, step, num_steps)

    def _advance(self, state: Any, step: int, num_steps: int) -> tuple[Any, list[Row]]:
        _, advance = self._programs
        size = self.config.steps_per_update
        start = step or self.config.first_update * size  # whose steps `init` has taken
        # Calls of one length need one program. The first chunk of an agent with a replay, and
        # the last chunk of any agent, may have fewer iterations than the others.
        count = (step + num_steps - start) // size
        each = math.gcd(count, self._common)
        parts = []
        for _ in range(count // each):
            state, part = advance(state, each)
            parts.append(jax.tree.map(np.asarray, part))
        history = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
        first = ("episode/return", "episode/length")  # the main metric leads
        history = mask_missing_episodes(history)
        columns = {name: history[name] for name in (*first, *sorted({*history} - {*first}))}
        healthy = self._healthy(columns, start)
        together = math.ceil(self.config.num_updates / _MOST_ROWS)
        spans = [(begin, min(begin + together, count)) for begin in range(0, count, together)]
        return state, [
            {
                "step": start + end * size,
                **self.labels[lane],
                **(_means(columns, lane, slice(begin, end)) if healthy[lane] else _DIVERGED),
            }
            for begin, end in spans
            for lane in range(len(self.labels))
        ]

    def finish(self, state: Any) -> list[Row]:
        """One row per lane: the last return in training, and that of the policy without noise.

        A lane that has diverged has none.
        """
        state = _training(state)
        # No small number: fold_in(key, i) is split(key)[i], the key of the training of seed i.
        key = jax.random.fold_in(jax.random.key(self.seed), EVALUATION + 1)
        found = self._evaluate(state, self._keys(key))
        training = mask_missing_episodes(state.episodes)["episode/return"]
        rows: list[Row] = []
        for lane, own in enumerate(self.labels):
            row = {
                **own,
                "final/return": float(np.mean(found.returns[lane])),
                "final/length": float(np.mean(found.lengths[lane])),
            }
            if not np.all(found.finished[lane]):  # in an environment that keeps no time limit
                row["final/cut_off"] = float(1 - np.mean(found.finished[lane]))
            if np.isfinite(training[lane]):  # NaN as long as no episode has ended
                row["final/training_return"] = float(training[lane])
            rows.append(row)
        if self.lanes_compete:
            rows = [row for row, whole in zip(rows, _whole(state.params), strict=True) if whole]
        return rows

    def learned(self, state: Any) -> Any:
        """The parameters of all networks and lanes; of none where a lane may diverge."""
        return () if self.lanes_compete else _training(state).params

    def save(self, state: Any, folder: Path) -> None:
        """Writes the policy of every seed to policies/NAME/seed_N.npz; none of a search.

        The best one in the evaluations during training is in seed_N_best.npz.
        """
        if self.lanes_compete:
            return
        agent = self.config.agent()
        own = folder / "policies" / self.name
        own.mkdir(parents=True, exist_ok=True)
        for lane, seed in enumerate(self.seed_index):
            agent.policy(select_seed(_training(state), lane)).save(own / f"seed_{seed}.npz")
            if isinstance(state, Evaluated):
                best: Any = select_seed(state.best, lane)
                agent.policy(best).save(own / f"seed_{seed}_best.npz")

    def _keys(self, key: jax.Array) -> jax.Array:
        """The key of every lane; lanes of one seed share it."""
        return jax.random.split(key, int(self.seed_index.max()) + 1)[self.seed_index]

    @functools.cached_property
    def _programs(self) -> Any:
        make_agent = type(self.config).agent
        return data_parallel(
            make_agent, self.config, self.mesh, num_seeds=len(self.labels), numbers=self.numbers
        )

    @functools.cached_property
    def _evaluate(self) -> Any:
        agent = self.config.agent()
        evaluate = functools.partial(
            agent.evaluate, num_episodes=self.evaluation_episodes, deterministic=True
        )
        return jax.jit(jax.vmap(evaluate))

    def _is_due(self, step: int, num_steps: int) -> bool:
        """Whether a multiple of `evaluation_every`, or the end, is in the steps of a chunk."""
        end, every = step + num_steps, self.evaluation_every or self.num_steps
        return end == self.num_steps or end // every > step // every

    def _evaluated(self, state: Evaluated, rows: list[Row]) -> tuple[Evaluated, list[Row]]:
        """The state with the best policies, and the rows with the evaluation in the last ones."""
        keys = self._keys(jax.random.fold_in(jax.random.key(self.seed), EVALUATION))
        best, found = self._keep_best(state.training, state.best, keys)
        last = rows[-len(self.labels) :]
        for name, values in found.items():
            for row, value in zip(last, np.asarray(values, np.float64), strict=True):
                if np.isfinite(value):  # it may not be in a lane that has diverged
                    row[name] = float(value)
        return state._replace(best=best), rows

    @functools.cached_property
    def _keep_best(self) -> Any:
        agent, num_episodes = self.config.agent(), self.evaluation_episodes
        return jax.jit(
            jax.vmap(
                lambda state, best, key: evaluate_and_keep_best(
                    agent, state, best, key, num_episodes
                )
            )
        )

    def _healthy(self, columns: Mapping[str, np.ndarray], step: int) -> np.ndarray:
        """Whether the metrics of each lane are finite: bool [lane].

        Raises Diverged if those of some lane are not, or of all lanes where these compete.
        """
        healthy = np.ones(len(self.labels), bool)
        first = ""
        for name, values in columns.items():
            undefined = np.isnan(values) if name in _MAY_BE_UNDEFINED else False
            wrong = ~(np.isfinite(values) | undefined)
            if wrong.any() and not first:
                lane, update = np.argwhere(wrong)[0]
                at = step + (int(update) + 1) * self.config.steps_per_update
                seed = self.labels[lane]["seed"]
                first = f"{name} of seed {seed} is {values[lane, update]} at step {at}"
            healthy &= ~wrong.any(1)
        if first and not (self.lanes_compete and healthy.any()):
            raise Diverged(first)
        return healthy


def _training(state: Any) -> Any:
    """The states of the agent in the state of a stage."""
    return state.training if isinstance(state, Evaluated) else state


def _whole(params: Any) -> np.ndarray:
    """Whether all parameters of each lane are finite: bool [lane]."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    finite = [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
    return np.asarray(np.all(finite, axis=0))


def _means(columns: Mapping[str, np.ndarray], lane: int, iterations: slice) -> Row:
    """The metrics of a lane, averaged over the iterations in which they are defined."""
    means: Row = {}
    for name, values in columns.items():
        # Undefined: a return while no episode has ended, `value/explained` of equal returns.
        some = values[lane][iterations]
        defined = some[np.isfinite(some)]
        if len(defined):
            means[name] = float(defined.mean())
    return means_of_trust(means)
