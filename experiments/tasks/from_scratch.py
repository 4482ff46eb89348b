"""Training a classifier from scratch with several optimizers, on right or on wrong labels.

For every seed and noise level all methods start from the same network and see the same examples,
labels and order. With wrong labels: Foret, Kleiner, Mobahi, Neyshabur, arXiv:2010.01412, Section
3.3; a share of the training labels is replaced by random classes, the test labels stay right.
SAM's best-known claim is that it memorises fewer of them.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.optimizers import Method
from experiments.runtime.task import Summary, Table
from experiments.tasks.supervised import (
    PRECISIONS,
    Lanes,
    Training,
    apply_eval,
    initial_variables,
)
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.data import Batches, ImageDataset, split, unit_range
from trustjax.parallel import check_batch_size, make_mesh, replicated


@dataclass(kw_only=True)
class FromScratch:
    """Configuration and stages of the experiment.

    conf/exp/sam_vision.yaml and conf/exp/auon_vision.yaml have the numbers.

    Attributes:
      data: makes the dataset.
      model: makes the network: `model(num_classes=..., dtype=...)`.
      methods: the optimizers to compare, by name; gains are taken over the first.
      seed: root of all randomness.
      num_seeds: networks per method and noise level, trained side by side.
      precision: of the network's computations: float32, bfloat16 or float64.
      noise_levels: shares of training labels that are drawn again, uniformly over all classes, so
        that a share `level * (1 - 1 / num_classes)` of them is wrong; [0] for right labels.
      only: names of the methods to run; all if empty.
      train_examples: examples that each seed draws.
      steps: of training.
      batch_size: examples per step.
      steps_per_chunk: steps in one compiled call, and between two rows of metrics.
      max_test_examples: upper bound of the test examples.
      mesh: the devices that share every batch; None for one device.
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

    held_out_part: ClassVar[str] = "test"  # of the data, on which the networks are measured
    lanes_compete: ClassVar[bool] = False  # see `Training`

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

    def stages(self) -> list[Training]:
        """One stage a method: all noise levels and seeds side by side."""
        stages = [self._training(name, self.methods[name]) for name in self._names()]
        for stage, following in itertools.pairwise(stages):
            stage.begun = functools.partial(following.compile_ahead, {})
        return stages

    def summarize(self, rows: list[Row]) -> Summary:
        """Mean and interval of the test accuracy by method and noise level; gains, paired."""
        from experiments.analysis.plots import (
            paired_gain,  # Matplotlib and SciPy: at the end of a run
        )
        from experiments.analysis.statistics import METHOD, mean_interval, seeds_label

        def entry(seeds: Sequence[float]) -> dict[str, Any]:
            return {**mean_interval(seeds)._asdict(), "seeds": list(seeds)}

        names = self._names()
        tests = {name: by_noise(rows, name, "final/accuracy") for name in names}
        trained = {name: by_noise(rows, name, "final/train") for name in names}
        gains = {name: paired_gain(tests[name], tests[names[0]]) for name in names}
        values: dict[str, Any] = {
            name: {
                f"{level:g}": {
                    "test": entry(seeds),
                    "train": entry(trained[name][level]),
                    "gain": entry(gains[name][level]),
                }
                for level, seeds in tests[name].items()
            }
            for name in names
        }
        highest = max(self.noise_levels)
        cells = [
            [
                name,
                *(_percent(seeds) for seeds in tests[name].values()),
                *([_percent(gains[name][highest])] if name != names[0] else [""]),
            ]
            for name in names
        ]
        levels = [f"noise {100 * level:g} %" for level in self.noise_levels]
        at_highest = f" at {100 * highest:g} %" if highest else ""
        columns = (
            "method", *(levels if len(levels) > 1 else ["test"]),
            f"gain over {names[0]}{at_highest}, paired",
        )  # fmt: skip
        title = f"Test accuracy in %, mean and {METHOD} over {seeds_label(self.num_seeds)}"
        return Summary(values, Table(title, columns, cells))

    def plot(self, rows: list[Row], folder: Path) -> None:
        """learning_curves.png, at the highest noise; accuracy_by_noise.png for several levels."""
        from experiments.analysis import plots

        names = self._names()
        highest = max(self.noise_levels)
        noisy = [row for row in rows if row["noise"] == highest]
        at_highest = f", noise {100 * highest:g} %" if highest else ""
        test, train = (
            {name: plots.collect_curve(noisy, name, f"accuracy/{split}") for name in names}
            for split in ("test", "train")
        )
        settings = {"xlabel": "step", "ylabel": "accuracy, %"}
        contents = [
            plots.Panel(f"Test accuracy{at_highest}", test, settings, scale=100),
            plots.Panel(f"Training accuracy{at_highest}", train, settings, scale=100),
        ]
        plots.plot_bands([*contents, *_gains(test, names, "step")], names,
                         folder / "learning_curves.png")  # fmt: skip
        if len(self.noise_levels) == 1:
            return

        test, train = (
            {name: by_noise(rows, name, metric) for name in names}
            for metric in ("final/accuracy", "final/train")
        )
        settings["xlabel"] = "share of labels drawn again"
        contents = [
            plots.Panel("Test accuracy, right labels", test, settings, scale=100),
            plots.Panel("Training accuracy, labels as given", train, settings, scale=100),
        ]
        plots.plot_bands([*contents, *_gains(test, names, settings["xlabel"])], names,
                         folder / "accuracy_by_noise.png")  # fmt: skip

    def _names(self) -> list[str]:
        return list(self.only or self.methods)

    # Data

    @functools.cached_property
    def _dataset(self) -> ImageDataset:
        return self.data()

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Always the same split, whatever the seed."""
        return split(self._dataset, {"train": 0.6, "test": 0.4}, seed=0)

    @functools.cached_property
    def _noised(self) -> Batches:
        """The training set of every noise level and seed, one behind the other."""
        rows = self._rows["train"]
        if self.train_examples > len(rows):
            raise FieldError(
                "train_examples",
                f"be <= {len(rows)}, the share of the data kept for training",
                self.train_examples,
            )
        images, labels = [], []
        for level, index in itertools.product(self.noise_levels, range(self.num_seeds)):
            # The same numbers at every level: what is wrong at 20 % is also wrong at 40 %.
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
    def _network(self) -> nn.Module:
        return self.model(num_classes=self._dataset.num_classes, dtype=PRECISIONS[self.precision])

    def _training(self, name: str, method: Method) -> Training:
        key = jax.random.fold_in(jax.random.key(self.seed), 0)

        def start(final: Mapping[str, Any]) -> tuple[Any, Any]:
            """The networks of the seeds, the same at every noise level."""
            del final
            image = jnp.zeros((1, *self._dataset.images.shape[1:]), jnp.float32)
            keys = jax.random.split(jax.random.fold_in(key, 0), self.num_seeds)
            begun = initial_variables(self._network, keys, image)
            seeds = jnp.tile(jnp.arange(self.num_seeds), len(self.noise_levels))
            networks: tuple[Any, Any] = jax.tree.map(lambda leaf: leaf[seeds], begun)
            return networks

        lanes = self._lanes(name, method)
        measures = functools.partial(self._measures, lanes)
        return Training(
            name=name,
            num_steps=self.steps,
            steps_per_chunk=self.steps_per_chunk,
            model=self._network,
            method=method,
            lanes=lanes,
            source=self._noised,
            key=key,
            mesh=self._devices,
            input_noise=0.0,
            start=start,
            evaluate=functools.partial(measures, f"{{}}/{self.held_out_part}", "{}/train"),
            measure=functools.partial(measures, "final/{}", "final/train"),
            label=self._label(lanes),
            lanes_compete=self.lanes_compete,
        )

    def _lanes(self, name: str, method: Method) -> Lanes:
        """One lane for every noise level and seed, all with the method's hyperparameters."""
        del name
        number = len(self.noise_levels) * self.num_seeds
        full = functools.partial(jnp.full, number)
        hyperparameters = {k: full(v, dtype=jnp.float32) for k, v in method.hyperparameters.items()}
        return Lanes(jnp.arange(number), full(method.learning_rate), hyperparameters)

    def _label(self, lanes: Lanes) -> list[Row]:
        levels, seeds = np.divmod(np.asarray(lanes.seed_index), self.num_seeds)
        return [
            {"seed": int(seed), "noise": float(self.noise_levels[level])}
            for level, seed in zip(levels, seeds, strict=True)
        ]

    def _measures(
        self, lanes: Lanes, held_out: str, train: str, params: Any, model_state: Any
    ) -> dict[str, jax.Array]:
        """Of all lanes, held out and on their own training set with its wrong labels; by name."""
        accuracy, loss, trained = self._measures_of(
            params, model_state, lanes.seed_index, *self._held_out
        )
        return {
            held_out.format("accuracy"): accuracy,
            held_out.format("loss"): loss,
            train.format("accuracy"): trained,
        }

    @functools.cached_property
    def _held_out(self) -> tuple[jax.Array, ...]:
        rows = self._rows[self.held_out_part][: self.max_test_examples]
        source = self._noised
        few = source.rows[:, : self.max_test_examples]  # enough to tell what is memorised
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
        def measures(
            params: Any, state: Any, images: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            logits = apply_eval(self._network, params, state, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(jnp.argmax(logits, -1) == labels), jnp.mean(losses)

        def both(
            params: Any, state: Any, index: jax.Array, test: jax.Array, right: jax.Array,
            own: jax.Array, given: jax.Array,
        ) -> tuple[jax.Array, ...]:  # fmt: skip
            image = own[index].astype(jnp.float32) / 255
            trained, _ = measures(params, state, image, given[index])
            return *measures(params, state, test, right), trained

        return jax.jit(jax.vmap(both, in_axes=(0, 0, 0, None, None, None, None)))


def by_noise(rows: Sequence[Row], stage: str, metric: str) -> dict[float, list[float]]:
    """A final metric of a stage: noise level to its value for each seed."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == stage and metric in row:
            found[float(row["noise"])].append(float(row[metric]))
    return dict(found)


def _gains(
    curves: Mapping[str, Mapping[float, Sequence[float]]], names: Sequence[str], xlabel: str
) -> list[Any]:
    """A panel of the gains over the first method, seed by seed; none for a single method."""
    from experiments.analysis import plots

    gains = {name: plots.paired_gain(curves[name], curves[names[0]]) for name in names[1:]}
    title = f"Test accuracy: gain over {names[0]},\npaired by seed"
    settings = {"xlabel": xlabel, "ylabel": "points"}
    return [plots.Panel(title, gains, settings, scale=100)] if gains else []


def _percent(seeds: Sequence[float]) -> str:
    from experiments.analysis.statistics import mean_interval

    return "{:.1f}\n{:.1f} to {:.1f}".format(*(100 * value for value in mean_interval(seeds)))
