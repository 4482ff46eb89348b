"""Transfer: pre-train on a source domain, fine-tune on a target with little data, test on others.

The experiments of TRAM (arXiv:2310.03646, Section 4) ask which optimizer adapts to the target and
keeps what the pre-trained network knows of the source, and of domains that it is never trained on.
For every seed all methods start from the same pre-trained network and see the same examples in the
same order, so that they differ only in the optimizer. Without pre-training and unseen domains, what
is left compares optimizers from scratch.

`Transfer` has the stages; `experiments.tasks.adaptation` (images), `language_transfer` (text) and
`crosslingual` (words of other languages) have the domains.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.optimizers import Method, Optimizer
from experiments.runtime.task import Summary
from experiments.tasks.adaptation_measures import Measures
from experiments.tasks.objectives import Batch, Objective
from experiments.tasks.search import VALIDATION, Grid, Search, label, search_of_methods
from experiments.tasks.search import Measure as Ranking
from experiments.tasks.supervised import Lanes, Training, TrainState, lanes_of
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.data import Batches
from trustjax.data.batches import Dataset
from trustjax.parallel import check_batch_size, make_mesh, replicated

Evaluate = Callable[[Any, Any], dict[str, jax.Array]]  # (params, model_state) of all lanes


@dataclass(kw_only=True)
class Transfer(ABC):
    """Configuration and stages of an experiment on transfer.

    Attributes:
      methods: Methods to compare, by name; differences are taken from the first.
      seed: Root of all randomness.
      num_seeds: Number of networks per method, trained side by side.
      precision: Precision of the network's computations: float32, bfloat16 or float64.
      only: Names of the methods to run; all if empty.
      pretrain_steps: Steps on the source domain. With 0 the network is fine-tuned as it is made.
      pretrain_learning_rate: Peak learning rate of AdamW in pre-training.
      finetune_steps: Steps on the target domain.
      finetune_examples: Target examples that each seed draws.
      batch_size: Examples per step.
      steps_per_chunk: Steps in one compiled call, and between two rows of metrics.
      input_noise: Standard deviation of the noise that TRAM-x, TRAM-Fisher and R3F add to the
        inputs: to images in [0, 1], or to embeddings of tokens.
      max_test_examples: Upper bound of the number of test examples of a domain.
      sharpness_examples: Target test examples on which the sharpness is measured.
      mesh: Devices that share every batch; None for one device.
      grid: Values to try for each method, which make the experiment a search; see `Search`. Its
        networks are measured on validation examples of the target, never on test examples.
    """

    methods: dict[str, Method]
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str]
    pretrain_steps: int
    pretrain_learning_rate: float
    finetune_steps: int
    finetune_examples: int
    batch_size: int
    steps_per_chunk: int
    input_noise: float
    max_test_examples: int
    sharpness_examples: int
    mesh: Mesh | None = None
    grid: Grid | None = None

    # How domains are judged, a name in `adaptation_measures.SCORES`.
    metric: ClassVar[str] = "accuracy"
    rankings: ClassVar[Sequence[Ranking]] = VALIDATION  # what ranks the trials of a search

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "finetune_steps", "batch_size", "steps_per_chunk",
                     "max_test_examples", "sharpness_examples"):  # fmt: skip
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        if self.pretrain_steps < 0:
            raise FieldError("pretrain_steps", "be >= 0", self.pretrain_steps)
        check_batch_size(self.batch_size, self._devices)
        if self.finetune_examples < self.batch_size:
            raise FieldError(
                "finetune_examples", f"be >= batch_size = {self.batch_size}", self.finetune_examples
            )
        if self.input_noise < 0:
            raise FieldError("input_noise", "be >= 0", self.input_noise)
        if not self.pretrain_learning_rate > 0:
            raise FieldError("pretrain_learning_rate", "be > 0", self.pretrain_learning_rate)
        for name in self.only:
            if name not in self.methods:
                raise FieldError("only", f"name methods of {sorted(self.methods)}", repr(name))
        if self.search is not None:
            self.search.validate()

    @property
    def search(self) -> Search | None:
        """The search among the methods that are run, if there is a grid."""
        if self.grid is None:
            return None
        methods = {name: self.methods[name] for name in self._names()}
        return search_of_methods(methods, self.grid, self.num_seeds, self.rankings)

    def stages(self) -> list[Training]:
        """Pre-training, if it has steps, then one stage per method."""
        stages = [self._pretraining()] if self.pretrain_steps else []
        earlier = {stage.name: stage.shapes() for stage in stages}
        return stages + [
            self._finetuning(name, self.methods[name], earlier) for name in self._names()
        ]

    def summarize(self, rows: list[Row]) -> Summary:
        """Mean and interval of every final measure by method; of a search, the best trials."""
        if self.search is not None:
            return self.search.summarize(rows)
        from experiments.tasks import adaptation_report  # needs SciPy and Matplotlib, at the end

        return adaptation_report.summarize(rows, self._names(), self.metric)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning curves, scores and trust radii; a search has no figures."""
        if self.search is not None:
            return
        from experiments.tasks import adaptation_report

        adaptation_report.plot(rows, self._names(), folder, self.metric)

    def _names(self) -> list[str]:
        return list(self.only or self.methods)

    # What a kind of data adds

    @property
    @abstractmethod
    def _objective(self) -> Objective:
        """The network and what it should learn."""

    @abstractmethod
    def _examples(self, part: str) -> tuple[Dataset, int]:
        """A dataset for "pretrain" or "finetune", and how many of its first examples it may use."""

    @property
    @abstractmethod
    def _held_out(self) -> Batch:
        """Examples that no network is trained on, arrays [domains, examples, ...].

        Of test examples, the domains are the source if there is one, the target, and the unseen
        ones; in a search, validation examples of the target alone.
        """

    @abstractmethod
    def _make_measures(self) -> Measures:
        """What is measured of one network."""

    # Stages

    @functools.cached_property
    def _devices(self) -> Mesh:
        return self.mesh or make_mesh(num_devices=1)

    def _initial_variables(self) -> tuple[Any, Any]:
        """Parameters and other collections before any training, with a leading axis of seeds."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        keys = jax.random.split(jax.random.fold_in(key, 0), self.num_seeds)
        return self._objective.initial(keys)

    def _pretraining(self) -> Training:
        dataset, count = self._examples("pretrain")
        method = Method(Optimizer(optax.adamw), self.pretrain_learning_rate)
        every_row = np.tile(np.arange(count), (self.num_seeds, 1))
        return self._training(
            "pretrain",
            method,
            lanes_of(method, self.num_seeds),
            Batches(dataset, every_row, batch_size=self.batch_size, seed=self.seed),
            num_steps=self.pretrain_steps,
            start=lambda final: self._initial_variables(),
            key=jax.random.fold_in(jax.random.key(self.seed), 1),
        )

    def _finetuning(self, name: str, method: Method, earlier: Mapping[str, TrainState]) -> Training:
        def start(final: Mapping[str, Any]) -> tuple[Any, Any]:
            if not self.pretrain_steps:
                return self._initial_variables()
            return final["pretrain"].params, final["pretrain"].model_state

        return self._training(
            name,
            method,
            self.search.lanes(name) if self.search else lanes_of(method, self.num_seeds),
            self._target_batches,
            num_steps=self.finetune_steps,
            start=start,
            earlier=earlier,
            key=jax.random.fold_in(jax.random.key(self.seed), 2),
        )

    @functools.cached_property
    def _target_batches(self) -> Batches[Any]:
        """Batches of the few target examples, which each seed draws for itself."""
        dataset, count = self._examples("finetune")
        if self.finetune_examples > count:
            raise FieldError(
                "finetune_examples",
                f"be <= {count}, the share of the data kept for it",
                self.finetune_examples,
            )
        drawn = [
            np.random.default_rng([self.seed, index]).permutation(count)
            for index in range(self.num_seeds)
        ]
        few = np.stack(drawn)[:, : self.finetune_examples]
        return Batches(dataset, few, batch_size=self.batch_size, seed=self.seed + 1)

    def _training(
        self, name: str, method: Method, lanes: Lanes, source: Batches[Any], **rest: Any
    ) -> Training:
        after_chunk, final = self._measures
        return Training(
            name=name,
            method=method,
            lanes=lanes,
            source=source,
            steps_per_chunk=self.steps_per_chunk,
            objective=self._objective,
            mesh=self._devices,
            evaluate=after_chunk,
            measure=final,
            label=label(lanes) if self.search else [{"seed": int(i)} for i in lanes.seed_index],
            lanes_compete=self.search is not None and name != "pretrain",
            **rest,
        )

    @functools.cached_property
    def _measures(self) -> tuple[Evaluate, Evaluate]:
        """What is measured of all lanes after a chunk and at the end, compiled once for all."""
        frozen = self._objective.frozen
        held_out = jax.device_put(self._held_out, replicated(self._devices))

        def over_lanes(measure: Callable[..., dict[str, jax.Array]]) -> Evaluate:
            compiled = jax.jit(jax.vmap(measure, in_axes=(None, 0, 0, None)))
            return lambda params, model_state: compiled(frozen, params, model_state, held_out)

        after_chunk, final = self._make_measures()
        return over_lanes(after_chunk), over_lanes(final)
