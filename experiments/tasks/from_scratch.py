"""Training a classifier from scratch with several optimizers, on right or on wrong labels.

For every seed and noise level all methods start from the same network and see the same examples and
labels in the same order. The experiment with wrong labels is that of Foret, Kleiner, Mobahi and
Neyshabur, arXiv:2010.01412, Section 3.3: a share of the training labels is replaced by random
classes, and the test labels stay right. SAM's best-known claim is that it memorises fewer of them.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.optimizers import Method
from experiments.runtime.task import Summary
from experiments.tasks.objectives import Images, accuracy, mean_loss
from experiments.tasks.search import Grid, Search, label, search_of_methods
from experiments.tasks.supervised import PRECISIONS, Lanes, Training, lanes_of
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.data import Batches, ImageDataset, split, unit_range
from trustjax.parallel import check_batch_size, make_mesh, replicated


@dataclass(kw_only=True)
class FromScratch:
    """Configuration and stages of the experiment.

    conf/exp/sam_vision.yaml and conf/exp/auon_vision.yaml have the numbers.

    Attributes:
      data: Makes the dataset.
      model: Makes the network: `model(num_classes=..., dtype=...)`.
      methods: Methods to compare, by name; gains are taken over the first.
      seed: Root of all randomness.
      num_seeds: Number of networks per method and noise level, trained side by side.
      precision: Precision of the network's computations: float32, bfloat16 or float64.
      noise_levels: Shares of training labels that are drawn again, uniformly over all classes, so
        that a share `level * (1 - 1 / num_classes)` of the labels is wrong; [0] for right labels.
      only: Names of the methods to run; all if empty.
      train_examples: Training examples that each seed draws.
      steps: Length of a training.
      batch_size: Examples per step.
      steps_per_chunk: Steps in one compiled call, and between two rows of metrics.
      max_test_examples: Upper bound of the number of test examples.
      mesh: Devices that share every batch; None for one device.
      grid: Values to try for each method at one noise level, which make the experiment a search;
        see `Search`. Its networks are measured on validation examples, never on test examples.
      validation_examples: Number of validation examples of a search, which are taken from the
        training part; None without a grid.
    """

    data: Callable[[], ImageDataset]
    model: Callable[..., nn.Module]
    methods: dict[str, Method]
    seed: int
    num_seeds: int
    precision: str
    noise_levels: Sequence[float]
    only: Sequence[str]
    train_examples: int
    steps: int
    batch_size: int
    steps_per_chunk: int
    max_test_examples: int
    mesh: Mesh | None = None
    grid: Grid | None = None
    validation_examples: int | None = None

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "steps", "batch_size", "steps_per_chunk", "max_test_examples"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        check_batch_size(self.batch_size, self._devices)
        if self.train_examples < self.batch_size:
            raise FieldError(
                "train_examples", f"be >= batch_size = {self.batch_size}", self.train_examples
            )
        levels = list(self.noise_levels)
        if not levels or not all(0 <= level <= 1 for level in levels):
            raise FieldError("noise_levels", "be in [0, 1], at least one", levels)
        if len(set(levels)) < len(levels):
            raise FieldError("noise_levels", "differ", levels)
        for name in self.only:
            if name not in self.methods:
                raise FieldError("only", f"name methods of {sorted(self.methods)}", repr(name))
        self._validate_search()

    def _validate_search(self) -> None:
        search, count = self.search, self.validation_examples
        if search is None:
            if count is not None:
                raise FieldError("validation_examples", "be null without a grid", count)
            return
        search.validate()
        if len(self.noise_levels) > 1:
            raise FieldError("noise_levels", "be one in a search", self.noise_levels)
        if count is None or count < 1:
            raise FieldError("validation_examples", "be >= 1", count)

    @property
    def search(self) -> Search | None:
        """The search among the methods that are run, if there is a grid."""
        if self.grid is None:
            return None
        methods = {name: self.methods[name] for name in self._names()}
        return search_of_methods(methods, self.grid, self.num_seeds)

    def stages(self) -> list[Training]:
        """One stage per method, with all noise levels and seeds side by side."""
        return [self._training(name, self.methods[name]) for name in self._names()]

    def summarize(self, rows: list[Row]) -> Summary:
        """Test accuracy and gains by method and noise level; of a search, the best trials."""
        if self.search is not None:
            return self.search.summarize(rows)
        from experiments.tasks import from_scratch_report  # needs SciPy and Matplotlib, at the end

        return from_scratch_report.summarize(rows, self._names(), self.noise_levels)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes learning curves and accuracy by noise level; a search has no figures."""
        if self.search is not None:
            return
        from experiments.tasks import from_scratch_report

        from_scratch_report.plot(rows, self._names(), self.noise_levels, folder)

    def _names(self) -> list[str]:
        return list(self.only or self.methods)

    # Data

    @functools.cached_property
    def _dataset(self) -> ImageDataset:
        return self.data()

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Rows of the dataset by purpose; the split is the same for every seed."""
        parts = split(self._dataset, {"train": 0.6, "test": 0.4}, seed=0)
        if self.validation_examples is None:
            return parts
        rows = parts["train"]
        if self.validation_examples >= len(rows):
            raise FieldError(
                "validation_examples",
                f"be < {len(rows)}, the share of the data kept for training",
                self.validation_examples,
            )
        at = len(rows) - self.validation_examples
        return {"train": rows[:at], "validation": rows[at:]}

    @functools.cached_property
    def _noised(self) -> Batches[ImageDataset]:
        """Batches of every noise level and seed, each from a training set of its own."""
        rows = self._rows["train"]
        if self.train_examples > len(rows):
            raise FieldError(
                "train_examples",
                f"be <= {len(rows)}, the share of the data kept for training",
                self.train_examples,
            )
        images, labels = [], []
        for level, index in itertools.product(self.noise_levels, range(self.num_seeds)):
            # Every level draws the same numbers, so that what is wrong at 20 % is wrong at 40 %.
            random = np.random.default_rng([self.seed, index])
            drawn = random.permutation(rows)[: self.train_examples]
            again = random.random(len(drawn)) < level
            other = random.integers(self._dataset.num_classes, size=len(drawn), dtype=np.int32)
            images.append(self._dataset.images[drawn])
            labels.append(np.where(again, other, self._dataset.labels[drawn]))
        noised = self._dataset._replace(
            images=np.concatenate(images), labels=np.concatenate(labels)
        )
        own = np.arange(len(noised.labels)).reshape(len(images), self.train_examples)
        return Batches(noised, own, batch_size=self.batch_size, seed=self.seed)

    # Stages

    @functools.cached_property
    def _devices(self) -> Mesh:
        return self.mesh or make_mesh(num_devices=1)

    @functools.cached_property
    def _objective(self) -> Images:
        data = self._dataset
        model = self.model(num_classes=data.num_classes, dtype=PRECISIONS[self.precision])
        example = jnp.zeros((1, *data.images.shape[1:]), jnp.float32)
        return Images(model, example=example)

    def _training(self, name: str, method: Method) -> Training:
        key = jax.random.fold_in(jax.random.key(self.seed), 0)

        def start(final: Mapping[str, Any]) -> tuple[Any, Any]:
            """The networks of the seeds, the same at every noise level."""
            del final
            keys = jax.random.split(jax.random.fold_in(key, 0), self.num_seeds)
            initial = self._objective.initial(keys)
            seeds = jnp.tile(jnp.arange(self.num_seeds), len(self.noise_levels))
            networks: tuple[Any, Any] = jax.tree.map(lambda leaf: leaf[seeds], initial)
            return networks

        if self.search is None:
            lanes = lanes_of(method, len(self.noise_levels) * self.num_seeds)
        else:
            lanes = self.search.lanes(name)
        measures, part = functools.partial(self._measures, lanes), self._held_out_part
        return Training(
            name=name,
            num_steps=self.steps,
            steps_per_chunk=self.steps_per_chunk,
            objective=self._objective,
            method=method,
            lanes=lanes,
            source=self._noised,
            key=key,
            mesh=self._devices,
            start=start,
            evaluate=functools.partial(
                measures, (f"accuracy/{part}", f"loss/{part}", "accuracy/train")
            ),
            measure=functools.partial(measures, ("final/accuracy", "final/loss", "final/train")),
            label=label(lanes) if self.search else self._label(lanes),
            lanes_compete=self.search is not None,
        )

    def _label(self, lanes: Lanes) -> list[Row]:
        """Leading columns of the rows of each lane: its seed and its noise level."""
        levels, seeds = np.divmod(np.asarray(lanes.seed_index), self.num_seeds)
        return [
            {"seed": int(seed), "noise": float(self.noise_levels[level])}
            for level, seed in zip(levels, seeds, strict=True)
        ]

    def _measures(
        self, lanes: Lanes, names: Sequence[str], params: Any, model_state: Any
    ) -> dict[str, jax.Array]:
        """Accuracy and loss of all lanes on held-out data, and accuracy on their training sets.

        The training sets keep their wrong labels. `names` are those of the three metrics.
        """
        found = self._measures_of(params, model_state, lanes.seed_index, *self._held_out)
        return dict(zip(names, found, strict=True))

    @property
    def _held_out_part(self) -> str:
        """The part of the data on which the networks are measured."""
        return "test" if self.grid is None else "validation"

    @functools.cached_property
    def _held_out(self) -> tuple[jax.Array, ...]:
        rows = self._rows[self._held_out_part][: self.max_test_examples]
        source = self._noised
        few = source.rows[:, : self.max_test_examples]  # enough to see how much is memorised
        held_out = (
            unit_range(self._dataset.images[rows]),
            self._dataset.labels[rows],
            source.dataset.images[few],
            source.dataset.labels[few],
        )
        placed: tuple[jax.Array, ...] = jax.device_put(held_out, replicated(self._devices))
        return placed

    @functools.cached_property
    def _measures_of(self) -> Callable[..., tuple[jax.Array, ...]]:
        objective = self._objective

        def measures(
            params: Any, state: Any, images: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            batch = {"image": images, "label": labels}
            logits, _ = objective.outputs({}, params, state, batch)
            return accuracy(objective, logits, batch), mean_loss(objective, logits, batch)

        def both(
            params: Any, state: Any, index: jax.Array, test: jax.Array, right: jax.Array,
            own: jax.Array, given: jax.Array,
        ) -> tuple[jax.Array, ...]:  # fmt: skip
            image = own[index].astype(jnp.float32) / 255
            trained, _ = measures(params, state, image, given[index])
            return *measures(params, state, test, right), trained

        return jax.jit(jax.vmap(both, in_axes=(0, 0, 0, None, None, None, None)))
