"""Pairs of optimizers that are said to do the same, trained side by side from the same network.

Both see the same batches. What is measured is how far apart their weights are, as a share of the
way that the first one came.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary, Table
from experiments.tasks.supervised import PRECISIONS
from experiments.trackers import Row
from trustjax._checks import FieldError
from trustjax.data import ImageDataset, unit_range

PyTree = Any


class Trainee(NamedTuple):
    """One network and its optimizer's state; under vmap with a leading axis of seeds."""

    params: PyTree
    opt_state: optax.OptState


@dataclass(frozen=True)
class Pair:
    """The stage of one pair, all seeds side by side."""

    task: "Equivalence"
    name: str
    transforms: tuple[optax.GradientTransformation, optax.GradientTransformation]

    @property
    def num_steps(self) -> int:
        """Length of the training."""
        return self.task.steps

    @property
    def steps_per_chunk(self) -> int:
        """Steps between two rows."""
        return self.task.steps_per_chunk

    def init(self, final: Mapping[str, Any]) -> list[Trainee]:
        """The same networks twice."""
        del final
        starts = [self.task.starts() for _ in self.transforms]  # buffers of their own
        return [
            Trainee(params, jax.vmap(tx.init)(params))
            for params, tx in zip(starts, self.transforms, strict=True)
        ]

    def batches(self) -> None:
        """Batches are drawn by key."""

    def advance(
        self, state: list[Trainee], batches: None, step: int, num_steps: int
    ) -> tuple[list[Trainee], list[Row]]:
        """Trains both; logs one row per seed."""
        del batches
        steps = step + jnp.arange(num_steps)
        state, losses = self._train(state, steps)
        first, second = (
            [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(each.params)]
            for each in state
        )
        start = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(self.task.starts())]
        rows: list[Row] = []
        for seed in range(self.task.num_seeds):
            apart, way = (
                np.sqrt(sum(np.sum((a[seed] - b[seed]) ** 2) for a, b in zip(*two, strict=True)))
                for two in ((first, second), (first, start))
            )
            means = np.mean(np.asarray(losses, np.float64)[:, seed], axis=-1)
            rows.append(
                {
                    "seed": seed, "loss": float(means[0]), "loss/control": float(means[1]),
                    "difference": float(apart / way),
                }
            )  # fmt: skip
        return state, rows

    def learned(self, state: list[Trainee]) -> list[PyTree]:
        """The parameters of both."""
        return [each.params for each in state]

    def finish(self, state: list[Trainee]) -> list[Row]:
        """The last rows of `advance` say it all."""
        del state
        return []

    @functools.cached_property
    def _train(self) -> Callable[..., tuple[list[Trainee], jax.Array]]:
        images, labels = self.task.examples()
        network = self.task.network()

        def loss_fn(params: PyTree, rows: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, images[rows])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return jnp.mean(losses)

        @functools.partial(jax.vmap, in_axes=(0, 0, None))
        def train(
            trainees: list[Trainee], seed: jax.Array, steps: jax.Array
        ) -> tuple[list[Trainee], jax.Array]:
            key = jax.random.fold_in(self.task.key(1), seed)

            def one_step(
                trainees: list[Trainee], step: jax.Array
            ) -> tuple[list[Trainee], jax.Array]:
                drawn = jax.random.fold_in(key, step)
                rows = jax.random.choice(drawn, len(labels), (self.task.batch_size,), replace=False)
                stepped, losses = [], []
                for trainee, tx in zip(trainees, self.transforms, strict=True):
                    loss, gradient = jax.value_and_grad(loss_fn)(trainee.params, rows)
                    updates, opt_state = tx.update(gradient, trainee.opt_state, trainee.params)
                    stepped.append(Trainee(optax.apply_updates(trainee.params, updates), opt_state))
                    losses.append(loss)
                return stepped, jnp.stack(losses)

            trainees, losses = jax.lax.scan(one_step, trainees, steps)
            return trainees, losses.T

        seeds = jnp.arange(self.task.num_seeds)

        def all_seeds(state: list[Trainee], steps: jax.Array) -> tuple[list[Trainee], jax.Array]:
            state, losses = train(state, seeds, steps)  # losses [seeds, 2, steps]
            return state, jnp.swapaxes(losses, 0, 1)

        return jax.jit(all_seeds, donate_argnums=0)


@dataclass(frozen=True)
class Equivalence:
    """Pairs of optimizers, one stage a pair.

    Attributes:
      data: makes the dataset, all of which is trained on.
      model: makes the network: `model(num_classes=..., dtype=...)`.
      pairs: by name, an optimizer and its control.
      seed: root of all randomness.
      num_seeds: networks a pair.
      precision: of weights and computations: float32 or float64.
      steps: of training.
      batch_size: examples per step.
      steps_per_chunk: steps between two rows of metrics.
    """

    data: Callable[[], ImageDataset]
    model: Callable[..., nn.Module]
    pairs: Mapping[str, Mapping[str, optax.GradientTransformation]]
    seed: int
    num_seeds: int
    precision: str
    steps: int
    batch_size: int
    steps_per_chunk: int

    def validate(self) -> None:
        """Raises ValueError, naming the field, for what cannot run."""
        for name in ("num_seeds", "steps", "batch_size", "steps_per_chunk"):
            if getattr(self, name) < 1:
                raise FieldError(name, "be >= 1", getattr(self, name))
        for name, pair in self.pairs.items():
            if set(pair) != {"method", "control"}:
                raise FieldError(f"pairs.{name}", "have method and control", sorted(pair))

    def stages(self) -> list[Pair]:
        """One a pair."""
        return [
            Pair(self, name, (pair["method"], pair["control"])) for name, pair in self.pairs.items()
        ]

    def key(self, salt: int) -> jax.Array:
        """Of the networks (0) and of the batches (1)."""
        return jax.random.fold_in(jax.random.key(self.seed), salt)

    def examples(self) -> tuple[jax.Array, jax.Array]:
        """Images in [0, 1] and labels."""
        return jnp.asarray(unit_range(self._data.images)), jnp.asarray(self._data.labels)

    def network(self) -> nn.Module:
        """The Flax module."""
        dtype = PRECISIONS[self.precision]
        return self.model(num_classes=self._data.num_classes, dtype=dtype)

    def starts(self) -> PyTree:
        """Parameters for every seed."""
        keys = jax.random.split(self.key(0), self.num_seeds)
        image = jnp.zeros((1, *self._data.images.shape[1:]), jnp.float32)
        params = jax.vmap(lambda key: self.network().init(key, image)["params"])(keys)
        return jax.tree.map(lambda leaf: leaf.astype(PRECISIONS[self.precision]), params)

    @functools.cached_property
    def _data(self) -> ImageDataset:
        return self.data()

    def summarize(self, rows: list[Row]) -> Summary:
        """Losses of the last chunk and the final difference, by pair; the worst seed."""
        values: dict[str, Any] = {}
        for name in self.pairs:
            last = [row for row in rows if row["stage"] == name and row["step"] == self.steps]
            worst = float(max(row["difference"] for row in last))
            losses = {key: float(np.mean([row[key] for row in last]))
                      for key in ("loss", "loss/control")}  # fmt: skip
            values[name] = {**losses, "difference": worst}
        cells = [
            [name, f"{v['loss']:.6f}", f"{v['loss/control']:.6f}", f"{v['difference']:.1e}"]
            for name, v in values.items()
        ]
        columns = ("pair", "loss", "of the control", "weights apart")
        table = Table("Distance of the weights, as a share of the way they came", columns, cells)
        return Summary(values, table)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """equivalence.png: losses of both, and how far apart the weights are."""
        from experiments.analysis import plots

        style = plots.styles(self.pairs)
        figure, (losses, differences) = plots.panels(2)
        for name in self.pairs:
            loss, control, difference = (
                plots.curve(rows, name, metric) for metric in ("loss", "loss/control", "difference")
            )
            plots.band(losses, loss, name, {**style[name], "marker": ""})
            points = {**style[name], "linestyle": ""}
            plots.band(losses, control, "_", points)  # not in the legend
            plots.band(differences, difference, name, style[name])
        losses.set(title="Training loss\n(lines; markers: the control)", yscale="log")
        differences.set(title="Distance of the weights,\nas a share of the way they came")
        differences.set(yscale="log", ylim=(1e-10, 1))
        for axis in (losses, differences):
            axis.set(xlabel="step")
        plots.legend(figure, losses)
        plots.save(figure, folder / "equivalence.png")
