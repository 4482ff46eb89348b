"""Distillation of policies: a teacher is trained, and students learn from the states it visits."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.optimizers import Optimizer
from experiments.runtime.task import Summary
from experiments.tasks.distillation_training import StudentTraining
from experiments.tasks.reinforcement_training import Training
from experiments.tasks.students import Student
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError, check_count, check_number
from trustjax.agents import AgentConfig, Policy
from trustjax.envs import make


@dataclass(kw_only=True)
class Distillation:
    """Configuration and stages of the experiment; conf/exp/adpo_distill.yaml has the numbers.

    Attributes:
      teacher: Config of an agent with continuous actions; environment, length, optimizer and dtype
        are still open.
      env: Name of the environment, as `trustjax.envs.make` takes it.
      students: Losses of students, by name; differences are taken from the first.
      optimizer: Optimizer of all networks.
      seed: Root of all randomness.
      num_seeds: Number of teachers, each with one student per loss, trained side by side.
      precision: Precision of the networks: float32 or bfloat16.
      only: Names of the students to run; all if empty.
      teacher_steps: Steps of the teacher's environments.
      steps_per_chunk: Steps of one compiled call, of the teacher's environments.
      visited_envs: Environments in which the teacher acts to visit states; a quarter of them is
        held out.
      visited_steps: Steps in each of them.
      candidates: Actions of a group, an even number P: half are drawn from the teacher, half from
        the student.
      steps: Gradient steps of a student.
      student_steps_per_chunk: Gradient steps of one compiled call.
      learning_rate: Learning rate of a student, which falls to 0 along a cosine.
      batch_size: States in a gradient step.
      evaluation_episodes: Episodes of an evaluation.
    """

    teacher: Callable[..., AgentConfig]
    env: str
    students: dict[str, Student]
    optimizer: Optimizer
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]
    teacher_steps: int
    steps_per_chunk: int
    visited_envs: int
    visited_steps: int
    candidates: int
    steps: int
    student_steps_per_chunk: int
    learning_rate: float
    batch_size: int
    evaluation_episodes: int

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "teacher_steps", "steps_per_chunk", "visited_steps", "steps",
                     "student_steps_per_chunk", "batch_size", "evaluation_episodes"):  # fmt: skip
            check_count(name, getattr(self, name), at_least=1)
        check_count("visited_envs", self.visited_envs, at_least=4)
        check_count("candidates", self.candidates, at_least=2)
        if self.candidates % 2:
            raise FieldError("candidates", "be even", self.candidates)
        check_number("learning_rate", self.learning_rate, above=0.0)
        try:
            environment = make(self.env)
        except ValueError as error:
            raise InputError(f"env must be an environment: {error}", "env") from error
        if environment.num_actions is not None or environment.on_host:
            raise FieldError("env", "be one in JAX with continuous actions", repr(self.env))
        for name in self.only:
            if name not in self.students:
                raise FieldError("only", f"name students of {sorted(self.students)}", repr(name))
        units = getattr(self._config, "gru_size", None)
        if units is not None:
            raise FieldError("teacher.gru_size", "be null", units)
        self._teacher.check()

    def stages(self) -> list[Any]:
        """The teachers, then one stage per loss of students."""
        return [self._teacher, *(self._student(name) for name in self._names())]

    def summarize(self, rows: list[Row]) -> Summary:
        """Return, divergence from the teacher, ranking and sharpness of every student."""
        from experiments.tasks import distillation_report  # needs SciPy and Matplotlib, at the end

        return distillation_report.summarize(rows, self._names(), self.env)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes students.png, where every student ends, and learning_curves.png."""
        from experiments.tasks import distillation_report

        distillation_report.plot(rows, self._names(), self.env, folder)

    def _names(self) -> list[str]:
        return list(self.only or self.students)

    @functools.cached_property
    def _config(self) -> AgentConfig:
        dtype = {"dtype": "bfloat16"} if self.precision == "bfloat16" else {}
        return self.teacher(
            env=self.env, total_steps=self.teacher_steps, optimizer=self.optimizer, **dtype
        )

    @functools.cached_property
    def _teacher(self) -> Training:
        return Training.of_seeds(
            self.num_seeds,
            name="teacher",
            config=self._config,
            seed=self.seed,
            chunk=self.steps_per_chunk,
            evaluation_episodes=self.evaluation_episodes,
        )

    def _student(self, name: str) -> StudentTraining:
        config, actor = self._config, self._config.agent().actor
        clip = jnp.asarray(config.clip_observations)
        return StudentTraining(
            name=name,
            loss=self.students[name],
            teachers="teacher",
            like=Policy({}, None, clip, actor, config.env, config.env_params),
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            seed=self.seed,
            num_seeds=self.num_seeds,
            visited_envs=self.visited_envs,
            visited_steps=self.visited_steps,
            candidates=self.candidates,
            batch_size=self.batch_size,
            evaluation_episodes=self.evaluation_episodes,
            num_steps=self.steps,
            steps_per_chunk=self.student_steps_per_chunk,
        )
