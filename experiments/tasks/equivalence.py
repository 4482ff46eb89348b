"""Pairs of optimizers that are said to be equivalent, trained from the same network.

Both optimizers of a pair see the same batches. The experiment measures the distance between their
weights, as a share of the distance that the first one has moved from the start.
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


@dataclass(frozen=True, eq=False)
class Pair:
    """The stage of one pair, with all seeds side by side.

    Attributes:
      name: Name of the stage.
      num_steps: Length of the training.
      steps_per_chunk: Steps between two rows of metrics.
      transforms: The optimizer and its control.
      network: Flax module.
      starts: Parameters before the first step, with a leading axis of seeds.
      images: Float32 [examples, height, width, channels] in [0, 1].
      labels: Int32 [examples].
      batch_size: Examples per step.
      key: Root of the random keys of the batches.
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    transforms: tuple[optax.GradientTransformation, optax.GradientTransformation]
    network: nn.Module
    starts: PyTree
    images: jax.Array
    labels: jax.Array
    batch_size: int
    key: jax.Array

    def init(self, final: Mapping[str, Any]) -> list[Trainee]:
        """The same networks twice, in buffers of their own, as training donates them."""
        del final
        return [
            Trainee(jax.tree.map(jnp.copy, self.starts), jax.vmap(tx.init)(self.starts))
            for tx in self.transforms
        ]

    def batches(self) -> None:
        """No iterator, as the batches are drawn by key."""

    def advance(
        self, state: list[Trainee], batches: None, step: int, num_steps: int
    ) -> tuple[list[Trainee], list[Row]]:
        """Trains both; returns one row per seed."""
        del batches
        state, losses = self._train(state, step + jnp.arange(num_steps))
        first, second, start = (
            [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
            for params in (state[0].params, state[1].params, self.starts)
        )
        rows: list[Row] = []
        for seed in range(self._num_seeds):
            apart, moved = (
                np.sqrt(sum(np.sum((a[seed] - b[seed]) ** 2) for a, b in zip(*two, strict=True)))
                for two in ((first, second), (first, start))
            )
            means = np.mean(np.asarray(losses, np.float64)[:, seed], axis=-1)
            rows.append(
                {
                    "seed": seed, "loss": float(means[0]), "loss/control": float(means[1]),
                    "difference": float(apart / moved),
                }
            )  # fmt: skip
        return state, rows

    def learned(self, state: list[Trainee]) -> list[PyTree]:
        """The parameters of both networks."""
        return [each.params for each in state]

    def finish(self, state: list[Trainee]) -> list[Row]:
        """No rows, as the last ones of `advance` have the final distance."""
        del state
        return []

    @property
    def _num_seeds(self) -> int:
        return int(jax.tree.leaves(self.starts)[0].shape[0])

    @functools.cached_property
    def _train(self) -> Callable[..., tuple[list[Trainee], jax.Array]]:
        def loss_fn(params: PyTree, rows: jax.Array) -> jax.Array:
            logits = self.network.apply({"params": params}, self.images[rows])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.labels[rows])
            return jnp.mean(losses)

        @functools.partial(jax.vmap, in_axes=(0, 0, None))
        def train(
            trainees: list[Trainee], seed: jax.Array, steps: jax.Array
        ) -> tuple[list[Trainee], jax.Array]:
            key = jax.random.fold_in(self.key, seed)

            def one_step(
                trainees: list[Trainee], step: jax.Array
            ) -> tuple[list[Trainee], jax.Array]:
                # The key depends on the step alone, so that a resumed run draws the same batches.
                drawn = jax.random.fold_in(key, step)
                size = len(self.labels)
                rows = jax.random.choice(drawn, size, (self.batch_size,), replace=False)
                stepped, losses = [], []
                for trainee, tx in zip(trainees, self.transforms, strict=True):
                    loss, gradient = jax.value_and_grad(loss_fn)(trainee.params, rows)
                    updates, opt_state = tx.update(gradient, trainee.opt_state, trainee.params)
                    stepped.append(Trainee(optax.apply_updates(trainee.params, updates), opt_state))
                    losses.append(loss)
                return stepped, jnp.stack(losses)

            trainees, losses = jax.lax.scan(one_step, trainees, steps)
            return trainees, losses.T

        seeds = jnp.arange(self._num_seeds)

        def all_seeds(state: list[Trainee], steps: jax.Array) -> tuple[list[Trainee], jax.Array]:
            state, losses = train(state, seeds, steps)  # losses [seeds, 2, steps]
            return state, jnp.swapaxes(losses, 0, 1)

        return jax.jit(all_seeds, donate_argnums=0)


@dataclass(frozen=True)
class Equivalence:
    """Configuration and stages of the experiment; conf/exp/auon_equivalence.yaml has the numbers.

    Attributes:
      data: Makes the dataset, all of which is trained on.
      model: Makes the network: `model(num_classes=..., dtype=...)`.
      pairs: Pairs by name, each an optimizer ("method") and its control ("control").
      seed: Root of all randomness.
      num_seeds: Number of networks per pair, trained side by side.
      precision: Precision of weights and computations: float32 or float64.
      steps: Length of a training.
      batch_size: Examples per step.
      steps_per_chunk: Steps between two rows of metrics.
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
        """One stage per pair, all from the same networks."""
        data = self.data()
        dtype = PRECISIONS[self.precision]
        network = self.model(num_classes=data.num_classes, dtype=dtype)
        of_networks, of_batches = (
            jax.random.fold_in(jax.random.key(self.seed), salt) for salt in range(2)
        )
        keys = jax.random.split(of_networks, self.num_seeds)
        image = jnp.zeros((1, *data.images.shape[1:]), jnp.float32)
        params = jax.vmap(lambda key: network.init(key, image)["params"])(keys)
        starts = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        images, labels = jnp.asarray(unit_range(data.images)), jnp.asarray(data.labels)
        return [
            Pair(
                name=name,
                num_steps=self.steps,
                steps_per_chunk=self.steps_per_chunk,
                transforms=(pair["method"], pair["control"]),
                network=network,
                starts=starts,
                images=images,
                labels=labels,
                batch_size=self.batch_size,
                key=of_batches,
            )
            for name, pair in self.pairs.items()
        ]

    def summarize(self, rows: list[Row]) -> Summary:
        """Mean losses of the last chunk, and the final distance of the worst seed, by pair."""
        from experiments.analysis import plots  # needs Matplotlib and SciPy, at the end

        values: dict[str, Any] = {}
        for name in self.pairs:
            loss, control, difference = (
                plots.last(plots.curve(rows, name, metric))
                for metric in ("loss", "loss/control", "difference")
            )
            values[name] = {
                "loss": float(np.mean(loss)),
                "loss/control": float(np.mean(control)),
                "difference": max(difference),
            }
        cells = [
            [name, f"{v['loss']:.6f}", f"{v['loss/control']:.6f}", f"{v['difference']:.1e}"]
            for name, v in values.items()
        ]
        columns = ("pair", "loss", "of the control", "weights apart")
        table = Table("Distance of the weights, as a share of the way they came", columns, cells)
        return Summary(values, table)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes equivalence.png: the losses of both, and the distance between their weights."""
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
