"""The stage of one loss of students: all seeds, each with a teacher of its own, side by side."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers import Optimizer
from experiments.tasks.students import Seen, Student, log_densities, ndcg
from experiments.trackers import Row
from trustjax.agents import Policy
from trustjax.agents.rollout import prepared_for, reset_envs
from trustjax.agents.running_statistics import normalized_observations
from trustjax.agents.training import EVALUATION
from trustjax.distributions import DiagonalGaussian
from trustjax.losses import AnchorState
from trustjax.optim import two_pass_step
from trustjax.trust import means_of_trust

PyTree = Any
Metrics = dict[str, jax.Array]


class States(NamedTuple):
    """States that a teacher has visited, and what it does in them.

    Attributes:
      observations: Observations as the network gets them, [states, features].
      mean: Means of the teacher's actions before the tanh, [states, d].
      log_std: Logarithms of their standard deviations, [states, d].
    """

    observations: jax.Array
    mean: jax.Array
    log_std: jax.Array

    @property
    def teacher(self) -> DiagonalGaussian:
        """The teacher's policy at the states."""
        return DiagonalGaussian(self.mean, self.log_std)


class StudentState(NamedTuple):
    """Everything that changes or is computed once; every array has a leading axis of seeds.

    Attributes:
      params: Variables of the student's network.
      opt_state: State of the optimizer.
      anchor: The anchor.
      train: States to learn from.
      held_out: Other states, on which the student is measured.
      statistics: Those that normalise the observations, as the teacher's; None for none.
    """

    params: PyTree
    opt_state: optax.OptState
    anchor: AnchorState
    train: States
    held_out: States
    statistics: PyTree


def gaussian_at(policy: Policy, params: PyTree, observations: jax.Array) -> DiagonalGaussian:
    """The policy of a network of the teacher's kind over actions before the tanh."""
    return DiagonalGaussian(*policy.actor.apply(params, observations, ())[0])


def visited(policy: Policy, key: jax.Array, num_envs: int, num_steps: int) -> States:
    """The states that a policy visits with the noise in its actions, [steps, environments]."""
    env = policy.environment
    key_reset, key_play = jax.random.split(key)
    start = reset_envs(env, policy.env_params, jax.random.split(key_reset, num_envs))

    def step(now: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        observation, state = now
        key_act, key_step = jax.random.split(key)
        action, _ = policy.act(observation, key_act)
        keys = jax.random.split(key_step, num_envs)
        following = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, policy.env_params)
        rows = prepared_for(policy.actor)(observation)
        rows = normalized_observations(rows, policy.statistics, policy.clip_observations)
        return following[:2], rows

    _, rows = jax.lax.scan(step, start, jax.random.split(key_play, num_steps))
    return States(rows, *gaussian_at(policy, policy.variables, rows))


@dataclass(frozen=True, eq=False)
class StudentTraining:
    """A stage of the experiment loop; see `experiments.runtime.task.Stage`.

    Attributes:
      name: Name of the stage.
      loss: The loss of the students.
      teachers: Name of the stage of the teachers.
      like: A policy of the teachers' kind, whose weights and statistics are not read.
      optimizer, learning_rate, seed, num_seeds, visited_envs, visited_steps, candidates,
        batch_size, evaluation_episodes: As in `Distillation`.
      num_steps: Gradient steps.
      steps_per_chunk: Gradient steps of one compiled call.
    """

    name: str
    loss: Student
    teachers: str
    like: Policy
    optimizer: Optimizer
    learning_rate: float
    seed: int
    num_seeds: int
    visited_envs: int
    visited_steps: int
    candidates: int
    batch_size: int
    evaluation_episodes: int
    num_steps: int
    steps_per_chunk: int

    def init(self, final: Mapping[str, Any]) -> StudentState:
        """New students, the same for every loss, and the states that their teachers visit."""

        @jax.jit
        @jax.vmap
        def begin(params: PyTree, statistics: PyTree, key: jax.Array) -> StudentState:
            policy = self._policy(params, statistics)
            key_visit, key_init = jax.random.split(key)
            states = visited(policy, key_visit, self.visited_envs, self.visited_steps)
            # Whole environments are held out, as the states of one resemble each other.
            most = self.visited_envs - self.visited_envs // 4
            train, held_out = (
                jax.tree.map(lambda x, part=part: x[:, part].reshape(-1, x.shape[-1]), states)
                for part in (slice(most), slice(most, None))
            )
            params = policy.actor.init(key_init, train.observations[:1])
            return StudentState(
                params, self._tx.init(params), self.loss.anchor.init(params), train, held_out,
                statistics,
            )  # fmt: skip

        teachers = final[self.teachers]
        state: StudentState = begin(teachers.params["actor"], teachers.observations, self._keys(0))
        return state

    def batches(self) -> None:
        """The states are in the state of the stage."""

    def advance(
        self, state: StudentState, batches: None, step: int, num_steps: int
    ) -> tuple[StudentState, list[Row]]:
        """Trains `num_steps` steps; returns one row per seed with the chunk's mean metrics."""
        del batches
        steps = jnp.arange(step, step + num_steps)
        state, metrics = self._advance(state, self._keys(1), steps)
        measured = self._measure(state, self._keys(2))
        columns = {k: np.asarray(v, np.float64) for k, v in {**measured, **metrics}.items()}
        return state, [
            {"seed": seed, **means_of_trust({k: float(v[seed]) for k, v in columns.items()})}
            for seed in range(self.num_seeds)
        ]

    def finish(self, state: StudentState) -> list[Row]:
        """One row per seed with the return of the student, without and with noise."""
        # The keys of the teachers' own evaluation, so that both play the same episodes.
        key = jax.random.fold_in(jax.random.key(self.seed), EVALUATION + 1)
        returns = self._evaluate(state, jax.random.split(key, self.num_seeds))
        return [
            {"seed": seed, **{name: float(values[seed]) for name, values in returns.items()}}
            for seed in range(self.num_seeds)
        ]

    def learned(self, state: StudentState) -> PyTree:
        """The students' weights."""
        return state.params

    def save(self, state: StudentState, folder: Path) -> None:
        """Writes the students to policies/NAME/seed_N.npz."""
        own = folder / "policies" / self.name
        own.mkdir(parents=True, exist_ok=True)
        for seed in range(self.num_seeds):
            params, statistics = jax.tree.map(
                lambda x, seed=seed: x[seed], (state.params, state.statistics)
            )
            self._policy(params, statistics).save(own / f"seed_{seed}.npz")

    def _keys(self, salt: int) -> jax.Array:
        """A key for every seed, the same for every loss."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1000 + salt)
        return jax.random.split(key, self.num_seeds)

    @functools.cached_property
    def _tx(self) -> optax.GradientTransformation:
        return self.optimizer(optax.cosine_decay_schedule(self.learning_rate, self.num_steps))

    def _policy(self, params: PyTree, statistics: PyTree) -> Policy:
        return dataclasses.replace(self.like, variables=params, statistics=statistics)

    def _drawn(self, key: jax.Array, *policies: DiagonalGaussian) -> jax.Array:
        """Candidates [states, P, d], equally many from each of the policies at the states."""
        each = self.candidates // len(policies)
        drawn = [
            jax.vmap(policy.sample)(jax.random.split(own, each))
            for policy, own in zip(policies, jax.random.split(key, len(policies)), strict=True)
        ]
        return jnp.moveaxis(jnp.concatenate(drawn), 0, 1)

    @functools.cached_property
    def _advance(self) -> Callable[..., tuple[StudentState, Metrics]]:
        def loss_fn(
            params: PyTree, anchor: PyTree, states: States, key: jax.Array
        ) -> tuple[jax.Array, Any]:
            student, reference = (
                gaussian_at(self.like, weights, states.observations)
                for weights in (params, jax.lax.stop_gradient(anchor))
            )
            # The student's own samples show it where it is wrong; the teacher's alone, which lie
            # close together, tell a student with a large deviation next to nothing.
            drawn = self._drawn(key, states.teacher, student)
            candidates = jax.lax.stop_gradient(drawn)
            loss, metrics = self.loss(Seen(student, states.teacher, reference, candidates))
            return loss, {"metrics": {"train/loss": loss, **metrics}}

        train_step = two_pass_step(loss_fn, self._tx)

        def one_seed(
            state: StudentState, key: jax.Array, steps: jax.Array
        ) -> tuple[StudentState, Metrics]:
            def body(state: StudentState, step: jax.Array) -> tuple[StudentState, Metrics]:
                # The key of a step depends on its number alone, so that a resumed run has the same.
                key_states, key_actions = jax.random.split(jax.random.fold_in(key, step))
                rows = jax.random.randint(
                    key_states, (self.batch_size,), 0, len(state.train.observations)
                )
                states = jax.tree.map(lambda x: x[rows], state.train)
                params, opt_state, _, aux = train_step(
                    state.params, state.opt_state, state.anchor.params, states,
                    key_actions,
                )  # fmt: skip
                distance = aux["metrics"].get("trust/distance")
                anchor = self.loss.anchor.update(state.anchor, params, distance=distance)
                state = state._replace(params=params, opt_state=opt_state, anchor=anchor)
                return state, aux["metrics"]

            state, metrics = jax.lax.scan(body, state, steps)
            return state, jax.tree.map(jnp.mean, metrics)

        return jax.jit(jax.vmap(one_seed, (0, 0, None)), donate_argnums=0)

    @functools.cached_property
    def _measure(self) -> Callable[..., Metrics]:
        """Divergences from the teacher in both directions, ranking and sharpness, on held-out."""

        @jax.jit
        @jax.vmap
        def measure(state: StudentState, key: jax.Array) -> Metrics:
            states = state.held_out
            student = gaussian_at(self.like, state.params, states.observations)
            candidates = self._drawn(key, states.teacher)
            gains = jax.nn.softmax(log_densities(states.teacher, candidates), -1)
            scores = log_densities(student, candidates)
            return {
                "kl/teacher_student": jnp.mean(states.teacher.kl_divergence(student)),
                "kl/student_teacher": jnp.mean(student.kl_divergence(states.teacher)),
                "ndcg": jnp.mean(ndcg(scores, gains)),
                # Geometric means of the deviation and of its ratio to the teacher's.
                "std/ratio": jnp.exp(jnp.mean(student.log_std - states.log_std)),
                "std/student": jnp.exp(jnp.mean(student.log_std)),
            }

        return measure

    @functools.cached_property
    def _evaluate(self) -> Callable[..., Metrics]:
        @jax.jit
        @jax.vmap
        def evaluate(state: StudentState, key: jax.Array) -> Metrics:
            policy = self._policy(state.params, state.statistics)
            return {
                name: jnp.mean(
                    policy.evaluate(
                        key, self.evaluation_episodes, deterministic=deterministic
                    ).returns
                )
                for name, deterministic in (("final/return", True), ("final/noisy_return", False))
            }

        return evaluate
