"""Knights and knaves: a small model is fine-tuned, then learns from rewards by several methods."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary
from experiments.tasks.knights_puzzles import TEST_SEED, check_people, train_and_test
from experiments.tasks.knights_training import (
    WARM_START,
    Examination,
    FineTuning,
    Online,
    Puzzles,
)
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError, check_choice, check_count, check_number
from trustjax.agents.language import Config
from trustjax.envs.knights import Puzzle, memorization_test, sample_puzzles
from trustjax.envs.knights_text import NAMES
from trustjax.envs.knights_tokens import Knights
from trustjax.envs.language import Prompts, RewardFn, corrupted_judge
from trustjax.models import Decoder


@dataclass(kw_only=True)
class KnightsAndKnaves:
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Attributes:
      methods: Configs of `trustjax.agents.language` by name; model, prompts, reward, and the number
        of updates are still open.
      model: Makes the language model from the size of the vocabulary.
      num_people: Numbers of people in the puzzles, 2 to 8.
      train_puzzles: Puzzles to train on of each size; of 2 people there are no more than 369.
      test_puzzles: Other puzzles of each size, for the final evaluation.
      num_names: Names in the vocabulary, at most 26.
      shuffle_names: Whether the names of a puzzle are drawn; otherwise they are always the same.
      guesses: Share of the answers of the fine-tuning that guess without reasoning; rewards then
        have to find out that reasoning is better.
      fine_tuning_steps: Gradient steps of the fine-tuning.
      fine_tuning_batch: Answers of such a step.
      fine_tuning_rate: Its learning rate, which rises over the first 5 % of the steps and falls
        along a cosine, > 0.
      judge_errors: Share of the answers whose reasoning is judged wrongly in training, which
        Trust-GRPO alone learns from; the final evaluation has the true share of right steps.
      judge_kind: How it is judged then, "inverted" or "hacked"; see `corrupted_judge`.
      num_updates: Iterations of every method.
      updates_per_chunk: Iterations in one compiled call.
      max_new_tokens: Largest number of tokens of an answer.
      evaluation_samples: Sampled answers to each test puzzle.
      remembered: Training puzzles of each size that are asked once more in the end, as they were
        (`final/accuracy_train`) and with one statement or one leaf of it changed such that the
        solution is another (`final/accuracy_statement`, `final/accuracy_leaf`). Whoever knows the
        puzzles by heart is right on the former alone. 0 for none.
      unseen_people: Further numbers of people, 2 to 8, on whose puzzles the final evaluation tests
        too (`final/accuracy_4_unseen`); they are not trained on.
      seed: Root of all randomness.
      num_seeds: Trainings of each method, side by side, from the same fine-tuned model.
      precision: Precision of the computation: float32.
      only: Names of the methods to run; all if empty.
    """

    methods: dict[str, Callable[..., Config]]
    model: Callable[..., Decoder]
    num_people: Sequence[int]
    train_puzzles: int
    test_puzzles: int
    num_names: int
    shuffle_names: bool
    guesses: float
    fine_tuning_steps: int
    fine_tuning_batch: int
    fine_tuning_rate: float
    judge_errors: float
    judge_kind: Literal["inverted", "hacked"]
    num_updates: int
    updates_per_chunk: int
    max_new_tokens: int
    evaluation_samples: int
    remembered: int
    unseen_people: Sequence[int]
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        check_choice("precision", self.precision, ("float32",))
        for name in (
            "train_puzzles", "test_puzzles", "num_names", "fine_tuning_steps", "fine_tuning_batch",
            "num_updates", "updates_per_chunk", "max_new_tokens", "evaluation_samples",
            "num_seeds",
        ):  # fmt: skip
            check_count(name, getattr(self, name), at_least=1)
        check_count("remembered", self.remembered, at_least=0)
        check_number("fine_tuning_rate", self.fine_tuning_rate, above=0.0)
        for name in ("guesses", "judge_errors"):
            check_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
        check_choice("judge_kind", self.judge_kind, ("inverted", "hacked"))
        check_people("num_people", self.num_people)
        if not all(2 <= each <= 8 and each not in self.num_people for each in self.unseen_people):
            requirement = f"be numbers from 2 to 8 without {list(self.num_people)}"
            raise FieldError("unseen_people", requirement, list(self.unseen_people))
        if not self._most_people <= self.num_names <= len(NAMES):
            requirement = f"be from {self._most_people} to {len(NAMES)}"
            raise FieldError("num_names", requirement, self.num_names)
        for name in self.only:
            if name not in self.methods:
                raise FieldError("only", f"name methods of {sorted(self.methods)}", repr(name))
        for name in self.names:
            try:
                self._config(name).validate()
            except InputError as error:
                raise InputError(
                    f"methods.{name}.{error}", f"methods.{name}.{error.field}"
                ) from error

    @property
    def names(self) -> list[str]:
        """The methods that are run."""
        return list(self.only or self.methods)

    @property
    def _most_people(self) -> int:
        return max([*self.num_people, *self.unseen_people])

    @functools.cached_property
    def env(self) -> Knights:
        """The words and rules of the puzzles."""
        return Knights(
            names=NAMES[: self.num_names],
            most_people=self._most_people,
            shuffled=self.shuffle_names,
        )

    @functools.cached_property
    def puzzles(self) -> Puzzles:
        """Puzzles of all sizes; no test puzzle is among those to train on."""
        both = [
            train_and_test(number, self.train_puzzles, self.test_puzzles)
            for number in self.num_people
        ]
        train, test = zip(*both, strict=True)
        prompts, worked = self.env.prompts(train, seed=1)
        _, guessed = self.env.prompts(train, seed=1, guesses=1.0)
        unseen, _ = self.env.prompts(test, seed=2)
        padding = ((0, 0), (0, worked.tokens.shape[1] - guessed.tokens.shape[1]))
        tokens, segments = (
            jnp.stack([ours, np.pad(theirs, padding)])
            for ours, theirs in (
                (worked.tokens, guessed.tokens), (worked.segments, guessed.segments),
            )
        )  # fmt: skip
        return Puzzles(prompts, tokens, segments != 0, unseen, self._others(train))

    def _others(self, train: Sequence[Puzzle]) -> dict[str, Prompts]:
        tests = {
            f"{number}_unseen": [sample_puzzles(number, self.test_puzzles, TEST_SEED)]
            for number in self.unseen_people
        }
        if self.remembered:
            groups = [memorization_test(each, self.remembered) for each in train]
            tests |= {name: [group[name] for group in groups] for name in groups[0]}
        return {name: self.env.prompts(groups, seed=3)[0] for name, groups in tests.items()}

    def stages(self) -> list[FineTuning | Online]:
        """Fine-tuning, then one stage for each method."""
        key = jax.random.key(self.seed)
        truthful = dataclasses.replace(self._config(self.names[0]), reward=self.env.reward)
        examination = Examination(
            self.env.tokenizer, truthful, self.puzzles.test,
            jax.random.split(jax.random.fold_in(key, 1), self.num_seeds), self.evaluation_samples,
            np.asarray(self.puzzles.test.facts.num_people), self.puzzles.others,
        )  # fmt: skip
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.fine_tuning_rate, max(1, self.fine_tuning_steps // 20), self.fine_tuning_steps
        )
        tuning = FineTuning(
            WARM_START, self.fine_tuning_steps, max(1, self.fine_tuning_steps // 20),
            self._model, self.puzzles, self.guesses, self.fine_tuning_batch,
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98)),
            jax.random.fold_in(key, 0), examination,
        )  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(key, 2), self.num_seeds)
        return [
            tuning,
            *(
                Online(
                    name, self.num_updates, self.updates_per_chunk, self._config(name), keys,
                    examination,
                )
                for name in self.names
            ),
        ]  # fmt: skip

    @functools.cached_property
    def _model(self) -> Decoder:
        return self.model(vocab_size=self.env.tokenizer.vocab_size)

    def _config(self, name: str) -> Config:
        reward: RewardFn = self.env.reward
        if self.judge_errors > 0:  # its draws would take time to compile in every method
            reward = corrupted_judge(reward, self.judge_errors, kind=self.judge_kind)
        return self.methods[name](
            model=self._model, prompts=self.puzzles.train, reward=reward,
            num_updates=self.num_updates, max_new_tokens=self.max_new_tokens,
            stop_tokens=self.env.tokenizer.stop_tokens, pad_token=self.env.tokenizer.pad_token,
        )  # fmt: skip

    def summarize(self, rows: list[Row]) -> Summary:
        """Accuracies on unseen puzzles, and what each method gained over the fine-tuned model."""
        from experiments.tasks import knights_report  # needs SciPy and Matplotlib, at the end

        return knights_report.summarize(rows, self.names, self.num_seeds)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning_curves.png, reasoning.png and trust_region.png."""
        from experiments.tasks import knights_report

        knights_report.plot(rows, self.names, folder)
