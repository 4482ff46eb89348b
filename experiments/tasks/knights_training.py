"""The stages of knights and knaves: fine-tuning on worked answers, then learning from rewards."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from experiments.trackers import Row
from trustjax.agents import select_seed
from trustjax.agents.language import Config, Evaluation, fine_tuning_loss, pass_at_k
from trustjax.data import Tokenizer
from trustjax.envs.language import Prompts
from trustjax.models import Decoder

WARM_START = "warm_start"
_TEXTS = 6  # puzzles whose answers are written down


class Puzzles(NamedTuple):
    """Puzzles to train on and to be tested with.

    Attributes:
      train: Prompts of the training.
      answers: Answers to them, first the worked ones, then guesses, int32 [2, prompts, time].
      answer_mask: True on their tokens, bool [2, prompts, time].
      test: Prompts of other puzzles.
      others: Prompts of further tests by name; see `KnightsAndKnaves.remembered`.
    """

    train: Prompts
    answers: jax.Array
    answer_mask: jax.Array
    test: Prompts
    others: Mapping[str, Prompts]


@dataclass(frozen=True, eq=False)
class Examination:
    """The final evaluation, which the fine-tuned model and all methods have in common.

    Attributes:
      tokenizer: The tokenizer of prompts and answers.
      config: Config whose model, prompts and reward are used.
      test: Prompts of puzzles that no training has seen.
      keys: Random keys of the sampled answers, one per seed.
      num_samples: Sampled answers to each prompt.
      people: Number of people in each of the puzzles, [prompts]; None for questions of other kinds.
      others: Prompts of further tests by name, whose accuracy alone is reported.
    """

    tokenizer: Tokenizer
    config: Config
    test: Prompts
    keys: jax.Array
    num_samples: int
    people: npt.NDArray[Any] | None = None
    others: Mapping[str, Prompts] = field(default_factory=dict)

    @functools.cached_property
    def _programs(self) -> tuple[Any, Any]:
        # The config is an argument, so that its parameters are not constants of the programs.
        @jax.jit
        def sampled(config: Config, params: Any, key: jax.Array, test: Prompts) -> Evaluation:
            found: Evaluation = config.agent().evaluate(
                _Acting(params), key, test, num_samples=self.num_samples
            )
            return found

        @jax.jit
        def greedy(config: Config, params: Any, key: jax.Array) -> Evaluation:
            found: Evaluation = config.agent().evaluate(
                _Acting(params), key, self.test, deterministic=True
            )
            return found

        return functools.partial(sampled, self.config), functools.partial(greedy, self.config)

    def rows(self, params: Any) -> list[Row]:
        """One row per seed, from parameters with a leading axis of seeds."""
        sampled, greedy = self._programs
        found: list[Row] = []
        # One seed after the other: together they would hold many caches at a time.
        for seed, key in enumerate(self.keys):
            own = select_seed(params, seed)
            drawn, likeliest = sampled(own, key, self.test), greedy(own, key)
            right = np.asarray(drawn.levels == 1)
            row: Row = {
                "seed": seed,
                "final/accuracy": float(right.mean()),
                "final/greedy": float(np.mean(likeliest.levels == 1)),
                "final/thinking": float(np.mean(drawn.thinking)),
                f"final/pass@{self.num_samples}": float(
                    np.mean(pass_at_k(drawn.levels, self.num_samples))
                ),
                "final/length": float(np.mean(np.sum(drawn.mask, -1))),
            }
            row |= {
                f"final/accuracy_{n}": float(right[self.people == n].mean())
                for n in ({*self.people.tolist()} if self.people is not None else ())
            }
            row |= {f"final/level_{n}": float(np.mean(drawn.levels == n)) for n in (1, 2, 3, 4)}
            row |= {
                f"final/accuracy_{name}": float(np.mean(sampled(own, key, test).levels == 1))
                for name, test in self.others.items()
            }
            found.append(row)
        return found

    def write(self, params: Any, path: Path) -> None:
        """Writes the answers of the first seed to a few puzzles."""
        sampled, _ = self._programs
        found = sampled(select_seed(params, 0), self.keys[0], self.test)
        path.parent.mkdir(parents=True, exist_ok=True)
        decode, lines = self.tokenizer.decode, []
        step = max(1, len(self.test.tokens) // _TEXTS)
        for index in range(0, len(self.test.tokens), step):
            prompt = np.asarray(self.test.tokens[index])[np.asarray(self.test.mask[index])]
            answer = np.asarray(found.tokens[index, 0])[np.asarray(found.mask[index, 0])]
            level = int(found.levels[index, 0])
            lines.append(f"{decode(prompt, stop=False)} {decode(answer)}\nlevel {level}\n")
        path.write_text("\n".join(lines), encoding="utf-8")


class _Acting(NamedTuple):
    """The part of a state that acts."""

    params: Any


class Tuned(NamedTuple):
    """The state of fine-tuning: one model, with which all methods begin."""

    params: Any
    opt_state: Any


class FirstStage:
    """What the first stages have in common: one model, with which the trainings of all seeds begin.

    Attributes:
      name: Name of the stage.
      examination: The final evaluation.
    """

    name: str
    examination: Examination

    def finish(self, state: Tuned) -> list[Row]:
        """The accuracy of the model with the keys of every seed."""
        return self.examination.rows(self._for_all_seeds(state))

    def learned(self, state: Tuned) -> Any:
        """The parameters."""
        return state.params

    def save(self, state: Tuned, folder: Path) -> None:
        """Writes answers/NAME.txt."""
        params = self._for_all_seeds(state)
        self.examination.write(params, folder / "answers" / f"{self.name}.txt")

    def _for_all_seeds(self, state: Tuned) -> Any:
        number = len(self.examination.keys)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), state.params)


@dataclass(frozen=True, eq=False)
class FineTuning(FirstStage):
    """The stage that teaches a model to write worked answers, as far as it goes.

    Attributes:
      name: Name of the stage.
      num_steps: Gradient steps.
      steps_per_chunk: Steps between two rows.
      model: The language model.
      puzzles: The puzzles with their answers.
      guesses: Share of the answers that are guesses.
      batch_size: Answers of a step.
      optimizer: The optimizer, with its learning rate.
      key: Root of all randomness.
      examination: The final evaluation.
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    model: Decoder
    puzzles: Puzzles
    guesses: float
    batch_size: int
    optimizer: optax.GradientTransformation
    key: jax.Array
    examination: Examination

    def init(self, final: Mapping[str, Any]) -> Tuned:
        """The model with random parameters."""
        del final
        first = self.puzzles.train.tokens[:1]
        params = jax.jit(lambda key: self.model.init(key, first)["params"])(self.key)
        return Tuned(params, self.optimizer.init(params))

    def batches(self) -> None:
        """There is no iterator: batches are drawn by the number of the step."""

    def advance(
        self, state: Tuned, batches: None, step: int, num_steps: int
    ) -> tuple[Tuned, list[Row]]:
        """`num_steps` more steps, and a row with the mean loss per token."""
        del batches
        state, losses = self._steps(state, step, num_steps)
        return state, [{"seed": 0, "loss": float(jnp.mean(losses))}]

    @functools.cached_property
    def _steps(self) -> Callable[..., tuple[Tuned, jax.Array]]:
        puzzles = self.puzzles

        def one(state: Tuned, step: jax.Array) -> tuple[Tuned, jax.Array]:
            key_rows, key_kind = jax.random.split(jax.random.fold_in(self.key, step))
            size = (self.batch_size,)
            drawn = jax.random.randint(key_rows, size, 0, len(puzzles.train.tokens))
            kind = (jax.random.uniform(key_kind, size) < self.guesses).astype(jnp.int32)
            prompts = puzzles.train.tokens[drawn], puzzles.train.mask[drawn]
            answers = puzzles.answers[kind, drawn], puzzles.answer_mask[kind, drawn]
            loss, gradient = jax.value_and_grad(
                lambda params: fine_tuning_loss(self.model, params, *prompts, *answers)
            )(state.params)
            updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
            return Tuned(optax.apply_updates(state.params, updates), opt_state), loss

        def steps(state: Tuned, step: int, num_steps: int) -> tuple[Tuned, jax.Array]:
            return jax.lax.scan(one, state, step + jnp.arange(num_steps))

        return jax.jit(steps, static_argnums=2, donate_argnums=0)


@dataclass(frozen=True, eq=False)
class Online:
    """The stage of one method, which learns from rewards; all seeds in one compiled program.

    Attributes:
      name: Name of the stage.
      num_steps: Iterations.
      steps_per_chunk: Iterations between two compiled calls.
      config: Config of the method, without the parameters to begin with.
      keys: Random keys of the trainings, one per seed.
      examination: The final evaluation.
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    config: Config
    keys: jax.Array
    examination: Examination

    def init(self, final: Mapping[str, Any]) -> Any:
        """All seeds with the parameters that fine-tuning has ended with."""
        config = dataclasses.replace(self.config, initial_params=final[WARM_START].params)
        init = jax.vmap(lambda config, key: config.agent().init(key), in_axes=(None, 0))
        return jax.jit(init)(config, self.keys)

    def batches(self) -> None:
        """There is no data beside the prompts."""

    def advance(
        self, state: Any, batches: None, step: int, num_steps: int
    ) -> tuple[Any, list[Row]]:
        """One row for each seed and iteration."""
        del batches
        state, history = self._advance(state, num_steps)
        history = {name: np.asarray(values, np.float64) for name, values in history.items()}
        first = ("accuracy", "reward/mean")
        names = (*first, *sorted({*history} - {*first}))
        return state, [
            {
                "step": step + index + 1,
                "seed": seed,
                **{name: float(history[name][seed, index]) for name in names},
            }
            for index in range(num_steps)
            for seed in range(len(self.keys))
        ]

    @functools.cached_property
    def _advance(self) -> Callable[..., Any]:
        # The config is an argument, so that its parameters are not constants of the program.
        def advance(config: Config, state: Any, num_updates: int) -> Any:
            agent = config.agent()
            return jax.vmap(lambda state: agent.advance(state, num_updates))(state)

        compiled = jax.jit(advance, static_argnums=2, donate_argnums=1)
        return functools.partial(compiled, self.config)

    def finish(self, state: Any) -> list[Row]:
        """The accuracy of every seed."""
        return self.examination.rows(state.params)

    def learned(self, state: Any) -> Any:
        """The parameters of all seeds."""
        return state.params

    def save(self, state: Any, folder: Path) -> None:
        """Writes answers/NAME.txt."""
        self.examination.write(state.params, folder / "answers" / f"{self.name}.txt")
