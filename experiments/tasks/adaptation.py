"""Cross-dataset adaptation: pre-train on a source domain, fine-tune on a target with little data.

The vision experiments of TRAM (arXiv:2310.03646, Section 4 and Table 3) ask which optimizer adapts
to the target and keeps what the pre-trained network knows of the source, and of domains that it is
never trained on. A domain is the same set of images under a distribution shift. For every seed all
methods start from the same pre-trained network and see the same examples in the same order, so that
they differ only in the optimizer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.optimizers import Method, Optimizer
from experiments.runtime.memory import describe, memory_estimate
from experiments.runtime.task import Summary
from experiments.tasks.adaptation_measures import HeldOut, domain_measures, validation_measures
from experiments.tasks.search import Grid, Search, label, search_of_methods
from experiments.tasks.supervised import (
    PRECISIONS,
    Lanes,
    Training,
    TrainState,
    initial_variables,
    lanes_of,
)
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.data import Batches, ImageDataset, parse_shift, split, unit_range
from trustjax.parallel import check_batch_size, make_mesh, replicated

Measure = Callable[[Any, Any], dict[str, jax.Array]]  # (params, model_state) of all lanes


@dataclass(kw_only=True)
class Adaptation:
    """Configuration and stages of the experiment; conf/exp/tram_vision.yaml has the numbers.

    Attributes:
      data: Makes the dataset; all domains are shifts of its images.
      model: Makes the network: `model(num_classes=..., dtype=...)`. It may be a pre-trained one.
      methods: Methods to compare, by name; differences are taken from the first.
      seed: Root of all randomness.
      num_seeds: Number of networks per method, trained side by side.
      precision: Precision of the network's computations: float32, bfloat16 or float64.
      source: Shift of the source domain, such as "rotation:2"; None for the images as they are.
      target: Shift of the target domain; None for the images as they are.
      unseen: Shifts of the domains that no network is trained on.
      only: Names of the methods to run; all if empty.
      pretrain_steps: Steps on the source domain. With 0 the network is fine-tuned as `model` makes
        it, and fine-tuning may draw from the examples that pre-training would have had.
      pretrain_learning_rate: Peak learning rate of AdamW in pre-training.
      finetune_steps: Steps on the target domain.
      finetune_examples: Target examples that each seed draws.
      batch_size: Examples per step.
      steps_per_chunk: Steps in one compiled call, and between two rows of metrics.
      input_noise: Standard deviation of the noise that TRAM-x, TRAM-Fisher and R3F add to images in
        [0, 1].
      max_test_examples: Upper bound of the number of test examples.
      sharpness_examples: Target test examples on which the sharpness is measured.
      mesh: Devices that share every batch; None for one device.
      grid: Values to try for each method, which make the experiment a search; see `Search`. Its
        networks are measured on validation examples of the target, never on test examples.
    """

    data: Callable[[], ImageDataset]
    model: Callable[..., nn.Module]
    methods: dict[str, Method]
    seed: int
    num_seeds: int
    precision: str
    source: str | None
    target: str | None
    unseen: Sequence[str]
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
        for spec in (self.source, self.target, *self.unseen):
            if spec is not None:
                parse_shift(spec)
        if self.search is not None:
            self.search.validate()

    @property
    def search(self) -> Search | None:
        """The search among the methods that are run, if there is a grid."""
        if self.grid is None:
            return None
        methods = {name: self.methods[name] for name in self._names()}
        return search_of_methods(methods, self.grid, self.num_seeds)

    def stages(self) -> list[Training]:
        """Pre-training, if it has steps, then one stage per method."""
        stages = [self._pretraining()] if self.pretrain_steps else []
        earlier = {stage.name: stage.shapes() for stage in stages}
        stages += [self._finetuning(name, self.methods[name], earlier) for name in self._names()]
        self._report_memory(stages)
        return stages

    def summarize(self, rows: list[Row]) -> Summary:
        """Mean and interval of every final measure by method; of a search, the best trials."""
        if self.search is not None:
            return self.search.summarize(rows)
        from experiments.tasks import adaptation_report  # needs SciPy and Matplotlib, at the end

        return adaptation_report.summarize(rows, self._names())

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning curves, accuracies and trust radii; a search has no figures."""
        if self.search is not None:
            return
        from experiments.tasks import adaptation_report

        adaptation_report.plot(rows, self._names(), folder)

    def _names(self) -> list[str]:
        return list(self.only or self.methods)

    # Data

    @functools.cached_property
    def _dataset(self) -> ImageDataset:
        return self.data()

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Rows of the dataset by purpose; no example of fine-tuning is seen in pre-training.

        The split is the same for every seed, so that a search at another seed has not seen the test
        examples either.
        """
        fractions = {"pretrain": 0.45, "finetune": 0.2, "validation": 0.1, "test": 0.25}
        if not self.pretrain_steps:
            fractions = {"finetune": 0.65, "validation": 0.1, "test": 0.25}
        return split(self._dataset, fractions, seed=0)

    def _domain(self, spec: str | None, rows: np.ndarray, salt: int) -> ImageDataset:
        """The given rows of the dataset under a shift; `salt` draws its random parts anew."""
        images = self._dataset.images[rows]
        if spec is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), salt)
            shifted = jax.jit(parse_shift(spec))(unit_range(images), key)
            # A dataset holds images of eight bits.
            images = np.round(np.asarray(shifted) * 255).astype(np.uint8)
        return self._dataset._replace(images=images, labels=self._dataset.labels[rows])

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """The same examples in every domain; in a search, validation examples of the target."""
        if self.grid is None:
            rows = self._rows["test"][: self.max_test_examples]
            specs = [self.source, self.target, *self.unseen]
        else:
            rows, specs = self._rows["validation"], [self.target]
        domains = [self._domain(spec, rows, salt) for salt, spec in enumerate(specs, start=1)]
        images = unit_range(np.stack([domain.images for domain in domains]))
        sharding = replicated(self._devices)
        return HeldOut(*jax.device_put((images, domains[0].labels), sharding))

    # Stages

    @functools.cached_property
    def _devices(self) -> Mesh:
        return self.mesh or make_mesh(num_devices=1)

    @functools.cached_property
    def _network(self) -> nn.Module:
        dtype = PRECISIONS[self.precision]
        return self.model(num_classes=self._dataset.num_classes, dtype=dtype)

    def _report_memory(self, stages: Sequence[Training]) -> None:
        """Prints the memory that training a pre-trained network will take, as it may be large."""
        if not hasattr(self._network, "load_pretrained"):
            return
        examples = max(self.batch_size, self.sharpness_examples)
        images = jax.ShapeDtypeStruct((examples, *self._dataset.images.shape[1:]), jnp.float32)
        methods = [stage.method for stage in stages]
        num_networks = max(len(stage.lanes.seed_index) for stage in stages)
        print(describe(memory_estimate(self._network, methods, images, num_networks)))

    def _initial_variables(self) -> tuple[Any, Any]:
        """Parameters and other collections before any training, with a leading axis of seeds."""
        image = jnp.zeros((1, *self._dataset.images.shape[1:]), jnp.float32)
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        keys = jax.random.split(jax.random.fold_in(key, 0), self.num_seeds)
        return initial_variables(self._network, keys, image)

    def _pretraining(self) -> Training:
        rows = self._rows["pretrain"]
        domain = self._domain(self.source, rows, salt=0)
        method = Method(Optimizer(optax.adamw), self.pretrain_learning_rate)
        every_row = np.tile(np.arange(len(rows)), (self.num_seeds, 1))
        return self._training(
            "pretrain",
            method,
            lanes_of(method, self.num_seeds),
            Batches(domain, every_row, batch_size=self.batch_size, seed=self.seed),
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
    def _target_batches(self) -> Batches[ImageDataset]:
        """Batches of the few target examples, which each seed draws for itself."""
        rows = self._rows["finetune"]
        if self.finetune_examples > len(rows):
            raise FieldError(
                "finetune_examples",
                f"be <= {len(rows)}, the share of the data kept for it",
                self.finetune_examples,
            )
        domain = self._domain(self.target, rows, salt=0)
        drawn = [
            np.random.default_rng([self.seed, index]).permutation(len(rows))
            for index in range(self.num_seeds)
        ]
        few = np.stack(drawn)[:, : self.finetune_examples]
        return Batches(domain, few, batch_size=self.batch_size, seed=self.seed + 1)

    def _training(
        self, name: str, method: Method, lanes: Lanes, source: Batches[ImageDataset], **rest: Any
    ) -> Training:
        after_chunk, final = self._measures
        return Training(
            name=name,
            method=method,
            lanes=lanes,
            source=source,
            steps_per_chunk=self.steps_per_chunk,
            model=self._network,
            mesh=self._devices,
            input_noise=self.input_noise,
            evaluate=after_chunk,
            measure=final,
            label=label(lanes) if self.search else [{"seed": int(i)} for i in lanes.seed_index],
            lanes_compete=self.search is not None and name != "pretrain",
            **rest,
        )

    @functools.cached_property
    def _measures(self) -> tuple[Measure, Measure]:
        """What is measured of all lanes after a chunk and at the end, compiled once for all."""
        held_out = self._held_out

        def over_lanes(measure: Callable[..., dict[str, jax.Array]]) -> Measure:
            compiled = jax.jit(jax.vmap(measure, in_axes=(0, 0, None)))
            return lambda params, model_state: compiled(params, model_state, held_out)

        after_chunk, final = (
            domain_measures(self._network, self.unseen, self.sharpness_examples)
            if self.grid is None
            else validation_measures(self._network)
        )
        return over_lanes(after_chunk), over_lanes(final)
