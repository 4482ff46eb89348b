"""Offline preference training of a language model: every loss of pairs, from the same start.

A model is pre-trained on prompts and both answers, or is a checkpoint; it is then the reference,
whose log-probabilities are computed once. From it every loss is trained on the same pairs in the
same order, and asked which of the two answers of unseen pairs it prefers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.optimizers import Optimizer
from experiments.preferences import (
    Pairs,
    PreferenceLoss,
    Rewards,
    log_ratio_rewards,
    mean_log_prob_rewards,
)
from experiments.runtime.task import Summary
from experiments.tasks.language_model import (
    LanguageModel,
    Network,
    answer_log_probs,
    language_loss,
    plain,
)
from experiments.tasks.language_training import LanguageTraining, Metrics, Program
from experiments.tasks.preference_pairs import PairTokens, pair_tokens
from experiments.tasks.supervised import PRECISIONS
from experiments.trackers import Row
from trustjax._checks import FieldError, check_count, check_number
from trustjax.data import Batches, PreferenceDataset

PyTree = Any
_TOGETHER = 16  # pairs in one forward pass where no gradient is taken


@dataclass(kw_only=True)
class Preference:
    """Configuration and stages of the experiment; conf/exp/dpo_pairs.yaml has the numbers.

    Attributes:
      pairs: Makes the pairs.
      model: The language model.
      losses: Losses to compare, by name; differences are taken from the first.
      optimizer: Optimizer of all stages.
      seed: Root of all randomness.
      num_seeds: Number of networks per loss, trained side by side; each draws its own split.
      precision: Precision of the network's computations: float32, bfloat16 or float64.
      only: Names of the losses to run; all if empty.
      train_pairs: Pairs that a seed trains on.
      held_out_pairs: Other pairs, on which it is measured.
      flipped: Share of the training pairs whose answers are swapped, in [0, 1].
      most_prompt: Most tokens of a prompt, whose beginning is cut off.
      most_answer: Most tokens of an answer, whose end is cut off.
      pretrain_steps: Steps of language modelling on both answers of the training pairs; 0 for none.
      pretrain_learning_rate: Peak learning rate of these steps.
      steps: Steps of preference training.
      learning_rate: Peak learning rate of these steps.
      batch_size: Pairs in a step.
      steps_per_chunk: Steps in one compiled call, after which the held-out pairs are measured.
      export_models: Whether the trained networks are written as Hugging Face folders.
    """

    pairs: Callable[[], PreferenceDataset]
    model: LanguageModel
    losses: dict[str, PreferenceLoss]
    optimizer: Optimizer
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]
    train_pairs: int
    held_out_pairs: int
    flipped: float
    most_prompt: int
    most_answer: int
    pretrain_steps: int
    pretrain_learning_rate: float
    steps: int
    learning_rate: float
    batch_size: int
    steps_per_chunk: int
    export_models: bool = False

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "held_out_pairs", "most_prompt", "most_answer", "steps",
                     "steps_per_chunk"):  # fmt: skip
            check_count(name, getattr(self, name), at_least=1)
        check_count("pretrain_steps", self.pretrain_steps, at_least=0)
        check_count("batch_size", self.batch_size, at_least=2)  # KTO compares with another pair
        if self.train_pairs < self.batch_size:
            must = f"be >= batch_size = {self.batch_size}"
            raise FieldError("train_pairs", must, self.train_pairs)
        check_number("flipped", self.flipped, at_least=0.0, at_most=1.0)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("pretrain_learning_rate", self.pretrain_learning_rate, above=0.0)
        for name in self.only:
            if name not in self.losses:
                raise FieldError("only", f"name losses of {sorted(self.losses)}", repr(name))

    def stages(self) -> list[LanguageTraining]:
        """Pre-training, if it has steps, then one stage per loss."""
        stages = [self._pretraining()] if self.pretrain_steps else []
        return stages + [self._training(name) for name in self._names()]

    def summarize(self, rows: list[Row]) -> Summary:
        """Accuracy on held-out pairs and how far both answers have moved, by loss."""
        from experiments.tasks import preference_report  # needs SciPy and Matplotlib, at the end

        return preference_report.summarize(rows, self._names())

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes accuracy.png, by loss, and learning_curves.png."""
        from experiments.tasks import preference_report

        preference_report.plot(rows, self._names(), folder)

    def _names(self) -> list[str]:
        return list(self.only or self.losses)

    # Data

    @functools.cached_property
    def _dataset(self) -> PreferenceDataset:
        """As many pairs of the set as the seeds need, drawn at random."""
        data, needed = self.pairs(), self.train_pairs + self.held_out_pairs
        if needed > len(data.prompts):
            must = f"be <= {len(data.prompts) - self.held_out_pairs}, as {data.name} has "
            must += f"{len(data.prompts)} pairs, of which {self.held_out_pairs} are held out"
            raise FieldError("train_pairs", must, self.train_pairs)
        kept = np.random.default_rng(self.seed).permutation(len(data.prompts))[:needed]
        prompts, chosen, rejected = (
            tuple(column[row] for row in kept)
            for column in (data.prompts, data.chosen, data.rejected)
        )
        return PreferenceDataset(prompts, chosen, rejected, data.name)

    @functools.cached_property
    def _network(self) -> Network:
        data = self._dataset
        texts = map(plain, (*data.prompts, *data.chosen, *data.rejected))
        network = self.model.build(texts, PRECISIONS[self.precision])
        network.check_length("most_prompt", self.most_prompt + self.most_answer)
        return network

    @functools.cached_property
    def _tokens(self) -> PairTokens:
        tokenizer = self._network.tokenizer
        return pair_tokens(self._dataset, tokenizer, self.most_prompt, self.most_answer)

    @functools.cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of training pairs, some of them swapped, and of held-out pairs, by seed."""
        train, held_out = [], []
        for index in range(self.num_seeds):
            random = np.random.default_rng([self.seed, index])
            drawn = random.permutation(len(self._dataset.prompts))
            own = drawn[: self.train_pairs]
            wrong = np.arange(self.train_pairs) < round(self.flipped * self.train_pairs)
            train.append(own + wrong * len(self._dataset.prompts))
            held_out.append(drawn[self.train_pairs :])
        return np.stack(train), np.stack(held_out)

    # Stages

    def _key(self, salt: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), salt)

    def _stage(self, name: str, program: Program, **rest: Any) -> LanguageTraining:
        train, held_out = self._rows
        order = self.seed if name == "pretrain" else self.seed + 1  # losses share their order
        return LanguageTraining(
            name=name,
            program=program,
            steps_per_chunk=self.steps_per_chunk,
            source=Batches(self._tokens, train, batch_size=self.batch_size, seed=order),
            held_out=self._tokens.batch(held_out),
            **rest,
        )

    def _initial(self) -> PyTree:
        return self._network.init(jax.random.split(self._key(0), self.num_seeds))

    def _pretraining(self) -> LanguageTraining:
        model = self._network.model

        def loss(params: PyTree, batch: Any, *_: PyTree) -> tuple[jax.Array, Metrics]:
            # Both answers, so that the reference knows their words and not which is preferred.
            tokens, segments = (_flat(batch[name][:, :2]) for name in ("tokens", "segments"))
            return language_loss(model, params, tokens, segments), {}

        def evaluate(params: PyTree, held_out: Any, *_: PyTree) -> Metrics:
            def losses(pair: Any) -> jax.Array:
                return language_loss(model, params, pair["tokens"][:2], pair["segments"][:2])

            return {"loss": jnp.mean(jax.lax.map(losses, held_out, batch_size=_TOGETHER))}

        program = Program(
            self._network,
            self.optimizer,
            self.pretrain_learning_rate,
            self.pretrain_steps,
            loss,
            evaluate,
        )
        return self._stage("pretrain", program, start=lambda final: (self._initial(), {}))

    def _training(self, name: str) -> LanguageTraining:
        names, program = self._programs[self.losses[name].mismatched]

        def start(final: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
            trained = final["pretrain"].trained if self.pretrain_steps else self._initial()
            return trained, {"reference": self._reference(self._network.frozen, trained)}

        return self._stage(
            name,
            program,
            start=start,
            setting=jnp.int32(names.index(name)),
            export_models=self.export_models,
        )

    @functools.cached_property
    def _programs(self) -> dict[bool, tuple[list[str], Program]]:
        """Names and program of the losses without and with mismatched answers.

        Losses share a program, as compiling it takes as long as a short training with it.
        """
        return {
            mismatched: (names, self._program([self.losses[name] for name in names], mismatched))
            for mismatched in (False, True)
            if (names := [n for n in self._names() if self.losses[n].mismatched == mismatched])
        }

    def _program(self, losses: Sequence[PreferenceLoss], mismatched: bool) -> Program:
        columns = 4 if mismatched else 2

        def training_loss(
            params: PyTree, batch: Any, constants: PyTree, index: jax.Array
        ) -> tuple[jax.Array, Metrics]:
            pairs = _pairs(self._log_probs(params, batch, columns), batch, constants["reference"])
            chosen, rejected = _rewards(losses, index, pairs)
            means = [lambda pairs, loss=loss: jnp.mean(loss(pairs)) for loss in losses]
            accuracy = jnp.mean(chosen > rejected)
            return jax.lax.switch(index, means, pairs), {"train/accuracy": accuracy}

        def evaluate(params: PyTree, held_out: Any, constants: PyTree, index: jax.Array) -> Metrics:
            policy = self._log_probs_in_parts(params, held_out, 2)
            pairs = _pairs(policy, held_out, constants["reference"])
            return _measures(_rewards(losses, index, pairs), pairs)

        return Program(
            self._network, self.optimizer, self.learning_rate, self.steps, training_loss, evaluate
        )

    def _log_probs(self, params: PyTree, batch: Any, columns: int) -> jax.Array:
        """log pi(y | x) of the first rows of every pair, [pairs, columns]."""
        rows = (_flat(batch[name][:, :columns]) for name in ("tokens", "segments", "answer"))
        return answer_log_probs(self._network.model, params, *rows).reshape(-1, columns)

    def _log_probs_in_parts(self, params: PyTree, pairs: Any, columns: int) -> jax.Array:
        """The same for many pairs, a few at a time, where no gradient is taken."""

        def of_pair(pair: Any) -> jax.Array:
            return self._log_probs(params, jax.tree.map(lambda x: x[None], pair), columns)[0]

        found: jax.Array = jax.lax.map(of_pair, pairs, batch_size=_TOGETHER)
        return found

    @functools.cached_property
    def _reference(self) -> Callable[[PyTree, PyTree], jax.Array]:
        """log pi_ref(y | x) of all rows of all pairs by seed, [seeds, pairs, rows of a pair]."""
        columns = 4 if any(self.losses[name].mismatched for name in self._names()) else 2
        rows = self._tokens.batch(np.arange(len(self._dataset.prompts)))

        def one_seed(frozen: PyTree, trained: PyTree, rows: Any) -> jax.Array:
            return self._log_probs_in_parts(self._network.params(frozen, trained), rows, columns)

        compiled = jax.jit(jax.vmap(one_seed, in_axes=(None, 0, None)))
        return lambda frozen, trained: compiled(frozen, trained, rows)


def _flat(rows: jax.Array) -> jax.Array:
    """Rows [pairs, rows of a pair, length] as [rows, length]."""
    return rows.reshape(-1, rows.shape[-1])


def _pairs(policy: jax.Array, batch: Any, reference: jax.Array) -> Pairs:
    """What a loss sees of a batch; `policy` is [pairs, 2 or 4], `reference` that of all pairs."""
    columns = policy.shape[1]
    own = reference[batch["pair"][:, None], batch["order"][:, :columns]]
    lengths = jnp.sum(batch["answer"][:, :2], -1)
    mismatched = {}
    if columns == 4:
        mismatched = {"policy_kl": policy[:, 2:].ravel(), "reference_kl": own[:, 2:].ravel()}
    return Pairs(
        policy[:, 0], policy[:, 1], own[:, 0], own[:, 1], lengths[:, 0], lengths[:, 1], **mismatched
    )


def _rewards(losses: Sequence[PreferenceLoss], index: jax.Array, pairs: Pairs) -> Rewards:
    """The rewards that the loss of this index implies."""
    found: Rewards = jax.lax.switch(index, [loss.rewards for loss in losses], pairs)
    return found


def _measures(own: Rewards, pairs: Pairs) -> Metrics:
    """Shares of held-out pairs whose chosen answer has the higher reward, and mean log-ratios."""
    before = pairs._replace(
        policy_chosen=pairs.reference_chosen, policy_rejected=pairs.reference_rejected
    )
    rewards = {
        "accuracy": own,
        "accuracy/log_ratio": log_ratio_rewards(pairs),
        "accuracy/mean_log_prob": mean_log_prob_rewards(pairs),
        "accuracy/reference": mean_log_prob_rewards(before),
    }
    chosen, rejected = log_ratio_rewards(pairs)
    return {
        **{name: jnp.mean(better > worse) for name, (better, worse) in rewards.items()},
        "log_ratio/chosen": jnp.mean(chosen),
        "log_ratio/rejected": jnp.mean(rejected),
    }
