"""Language models of checkpoints learn from rewards of their reasoning, by several methods."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from experiments.runtime.task import Summary
from experiments.tasks.knights_training import WARM_START, Examination, FirstStage, Online, Tuned
from experiments.tasks.language_model import LanguageModel, Network, prompt_tokens
from experiments.tasks.reasoning_memory import check_memory
from experiments.tasks.reasoning_questions import Question, Questions
from experiments.tasks.supervised import PRECISIONS
from experiments.trackers import Row
from trustjax._checks import FieldError, InputError, check_choice, check_count, check_number
from trustjax.agents.language import Config
from trustjax.data import Tokenizer
from trustjax.envs.language import Prompts, RewardFn, host_reward
from trustjax.models import Decoder, save_transformer
from trustjax.parallel import fully_sharded, replicated

PyTree = Any
_NO_LIMIT = 2**31 - 1


@dataclass(kw_only=True)
class Reasoning:
    """Configuration and stages of the experiment; the numbers are in conf/exp.

    Attributes:
      methods: Configs of `trustjax.agents.language` by name; model, prompts, reward, and the number
        of updates are still open.
      model: The language model, which must be a checkpoint.
      questions: Makes the questions.
      mesh: Devices that share every update.
      shard_params: Whether each device holds a part of the weights instead of all.
      answer_start: What every answer begins with, which is part of the prompt, such as "<think>".
      most_prompt: Most tokens of a prompt; questions with longer ones are left out.
      max_new_tokens: Largest number of tokens of an answer.
      num_updates: Iterations of every method.
      updates_per_chunk: Iterations in one compiled call.
      test_questions: Questions of the final evaluation.
      evaluation_samples: Sampled answers to each of them.
      memory_gib: Memory of a device in GiB, which the estimate must not exceed; None for what the
        device says.
      export_models: Whether the trained networks are written as Hugging Face folders.
      seed: Root of all randomness.
      num_seeds: Trainings of each method, side by side.
      precision: Precision of the computation, float32 or bfloat16; what is trained is float32.
      only: Names of the methods to run; all if empty.
    """

    methods: dict[str, Callable[..., Config]]
    model: LanguageModel
    questions: Callable[[], Questions]
    mesh: Mesh
    shard_params: bool
    answer_start: str
    most_prompt: int
    max_new_tokens: int
    num_updates: int
    updates_per_chunk: int
    test_questions: int
    evaluation_samples: int
    memory_gib: float | None
    export_models: bool
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        for name in (
            "most_prompt", "max_new_tokens", "num_updates", "updates_per_chunk", "test_questions",
            "evaluation_samples", "num_seeds",
        ):  # fmt: skip
            check_count(name, getattr(self, name), at_least=1)
        check_number("memory_gib", self.memory_gib, above=0.0)
        if self.model.pretrained is None:
            advice = "set model.pretrained=FOLDER, or a hub id"
            raise FieldError("model.pretrained", "name a checkpoint", None, advice=advice)
        for name in self.only:
            if name not in self.methods:
                raise FieldError("only", f"name methods of {sorted(self.methods)}", repr(name))

    @property
    def names(self) -> list[str]:
        """The methods that are run."""
        return list(self.only or self.methods)

    def stages(self) -> list["Start | Learning"]:
        """The checkpoint as it is, then one stage for each method."""
        # First, so that an error of the questions is not one of a method.
        answers = len(self._test[1]) * self.evaluation_samples
        for name in self.names:
            try:
                self._config(name).validate()
            except InputError as error:
                field = f"methods.{name}.{error.field}"
                raise InputError(f"methods.{name}.{error}", field) from error
        configs = {name: self._config(name) for name in self.names}
        print(check_memory(configs, self.num_seeds, answers, self.memory_gib))
        key = jax.random.key(self.seed)
        # The weights are read only now: what is above needs no more than their shapes.
        loaded = {name: self._with_weights(config) for name, config in configs.items()}
        examination = Examination(
            self._tokenizer, next(iter(loaded.values())), self._test[0],
            jax.random.split(jax.random.fold_in(key, 1), self.num_seeds), self.evaluation_samples,
        )  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(key, 2), self.num_seeds)
        start = Start(
            WARM_START, 1, 1, functools.partial(self._start, jax.random.fold_in(key, 0)),
            examination,
        )  # fmt: skip
        network = self._network if self.export_models else None
        return [
            start,
            *(
                Learning(
                    name, self.num_updates, self.updates_per_chunk, config, keys, examination,
                    network,
                )
                for name, config in loaded.items()
            ),
        ]  # fmt: skip

    def summarize(self, rows: list[Row]) -> Summary:
        """Accuracies on questions that were not trained on, and what each method gained."""
        from experiments.tasks import knights_report  # needs SciPy and Matplotlib, at the end

        return knights_report.summarize(rows, self.names, self.num_seeds)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning_curves.png, reasoning.png and trust_region.png."""
        from experiments.tasks import knights_report

        knights_report.plot(rows, self.names, folder)

    # The model.

    @functools.cached_property
    def _opened(self) -> tuple[Decoder, Tokenizer]:
        return self.model.checkpoint(PRECISIONS[self.precision])

    @functools.cached_property
    def _network(self) -> Network:
        """The network with its weights, which are read when they are first needed."""
        return self.model.build((), PRECISIONS[self.precision])

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer for all tokens of the model, of which some may stand for nothing."""
        own, size = self._opened[1], self._opened[0].vocab_size
        return dataclasses.replace(
            own,
            vocab_size=size,
            to_text=lambda tokens: own.to_text([t for t in tokens if t < own.vocab_size]),
        )

    def _start(self, key: jax.Array) -> PyTree:
        """What is trained, as it is at first: the weights, or the factors of LoRA."""
        trained = self._network.init(key[None])
        return jax.tree.map(lambda x: x[0], trained)

    def _with_weights(self, config: Config) -> Config:
        """The config with the frozen weights on the devices, at the computation's precision."""
        if config.base_params is None:
            return config
        return dataclasses.replace(config, base_params=self._frozen)

    @functools.cached_property
    def _frozen(self) -> PyTree:
        dtype, loaded = PRECISIONS[self.precision], self._network.loaded
        where = fully_sharded(loaded, self.mesh) if self.shard_params else replicated(self.mesh)
        return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), loaded), where)

    def _config(self, name: str) -> Config:
        """The config of a method, with shapes in place of frozen weights."""
        model, options = self._opened[0], {}
        if self.model.lora_rank is not None:
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
            options = {"base_params": shapes["params"], "lora_rank": self.model.lora_rank}
        return self.methods[name](
            model=model, prompts=self._train, reward=self._reward, num_updates=self.num_updates,
            max_new_tokens=self.max_new_tokens, stop_tokens=self._tokenizer.stop_tokens,
            pad_token=self._tokenizer.pad_token, lora_alpha=self.model.lora_alpha,
            mesh=self.mesh if self.mesh.size > 1 else None, shard_params=self.shard_params,
            **options,
        )  # fmt: skip

    # Questions.

    @functools.cached_property
    def _asked(self) -> Questions:
        return self.questions()

    @functools.cached_property
    def _judges(self) -> tuple[Question, ...]:
        """All questions; the facts of a prompt are its place among them."""
        return (*self._asked.train, *self._asked.test)

    @functools.cached_property
    def _reward(self) -> RewardFn:
        judges, start = self._judges, self.answer_start

        def scored(place: npt.NDArray[np.int32], text: str) -> tuple[int, float]:
            return judges[int(place)].score(start + text)

        return host_reward(scored, self._tokenizer.decode)

    @functools.cached_property
    def _train(self) -> Prompts:
        return self._prompts(range(len(self._asked.train)))[0]

    @functools.cached_property
    def _test(self) -> tuple[Prompts, list[int]]:
        first, count = len(self._asked.train), len(self._asked.test)
        drawn = np.random.default_rng(self.seed).permutation(count)[: self.test_questions]
        return self._prompts([first + int(number) for number in sorted(drawn)])

    def _prompts(self, places: Sequence[int]) -> tuple[Prompts, list[int]]:
        """The prompts of the questions at these places that are not too long, and their places."""
        rows = {place: self._tokens(self._judges[place].prompt) for place in places}
        kept = [place for place in places if len(rows[place]) <= self.most_prompt]
        if not kept:
            shortest = min(map(len, rows.values()), default=0)
            must = f"be >= {shortest}, the shortest prompt of {self._asked.name}"
            raise FieldError("most_prompt", must, self.most_prompt)
        if len(kept) < len(places):
            left = len(places) - len(kept)
            print(f"{left} of {len(places)} questions left out: over {self.most_prompt} tokens")
        batch = self._tokenizer.pad([rows[place] for place in kept], padding="left")
        facts = jnp.asarray(kept, jnp.int32)
        return Prompts(jnp.asarray(batch.tokens), jnp.asarray(batch.segments != 0), facts), kept

    def _tokens(self, prompt: str) -> list[int]:
        """A prompt in the form of the chat template, if there is one, up to the answer's start."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            begun = prompt_tokens(tokenizer, f"{prompt}\n", _NO_LIMIT)
        else:
            begun = prompt_tokens(tokenizer, [{"role": "user", "content": prompt}], _NO_LIMIT)
        return begun + tokenizer.encode(self.answer_start, special=False)


@dataclass(frozen=True, eq=False)
class Start(FirstStage):
    """The stage that evaluates the checkpoint, with which all methods begin.

    Attributes:
      name: Name of the stage.
      num_steps: 1.
      steps_per_chunk: 1.
      begin: Makes what is trained.
      examination: The final evaluation.
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    begin: Callable[[], PyTree]
    examination: Examination

    def init(self, final: Mapping[str, Any]) -> Tuned:
        """What the methods begin with."""
        del final
        return Tuned(self.begin(), ())

    def batches(self) -> None:
        """There is no training."""

    def advance(
        self, state: Tuned, batches: None, step: int, num_steps: int
    ) -> tuple[Tuned, list[Row]]:
        """The same state, and a row with the number of parameters that are trained."""
        del batches, step, num_steps
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return state, [{"seed": 0, "trained_parameters": float(trained)}]


@dataclass(frozen=True, eq=False)
class Learning(Online):
    """The stage of one method, whose networks can be written down.

    Attributes:
      network: The network, to write Hugging Face folders; None for none.
    """

    network: Network | None = None

    def save(self, state: Any, folder: Path) -> None:
        """Writes answers/NAME.txt, and models/NAME/seed_N if asked to."""
        super().save(state, folder)
        for seed in range(len(self.keys)) if self.network is not None else ():
            trained = jax.tree.map(lambda x, seed=seed: x[seed], state.params)
            whole = jax.device_get(self.config.whole_params(trained))
            own = folder / "models" / self.name / f"seed_{seed}"
            own.mkdir(parents=True, exist_ok=True)
            params = jax.tree.map(lambda x: np.asarray(x, np.float32), whole)
            save_transformer(own, self.config.model, params)
