"""Learning from what people chose: likelihood, pairs, anchored lists, with wrong labels added."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary
from experiments.tasks.choice_methods import ListwiseChoice, Method
from experiments.tasks.group_training import LossFn, in_rounds
from experiments.tasks.once import Once
from experiments.trackers import Row
from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.data import CHOICE_DATASETS, ChoiceDataset, human_choices

Params = Any
_BINS = 15
REFERENCE = "reference"  # name of the reference among the methods of the results


class _Data(NamedTuple):
    """A data set as arrays.

    Attributes:
      inputs: Inputs of the network, float32 [n, J, D].
      available: Alternatives to choose from, bool [n, J].
      choices: The chosen alternatives, int32 [n].
    """

    inputs: jax.Array
    available: jax.Array
    choices: jax.Array


class _Rows(NamedTuple):
    """Rows of a seed: `trusted` ones, which stay right, `train`, which hold them, and `test`."""

    trusted: jax.Array
    train: jax.Array
    test: jax.Array


@dataclass(frozen=True)
class Choices:
    """Configuration and stages of the experiment; conf/exp/adpo_choice.yaml has the numbers.

    Attributes:
      model: Makes the network that scores an alternative: `model(num_classes=1)`.
      methods: Methods to compare, by name; gains are taken over the first.
      data: Names of data sets of `trustjax.data.human_choices`.
      optimizer: Optimizer of the reference and of all methods.
      noise_levels: Shares in [0, 1) of the training choices that become another alternative.
      train_share: Share of the people in training, in (0, 1); the others are for testing.
      trusted_share: Share of the training choices that the reference is fitted to, in (0, 1].
      reference_steps: Steps of the reference, >= 1.
      steps: Steps of every method, from the reference on, >= 1.
      batch_size: Choices in a step, >= 1.
      seed: Root of all randomness.
      num_seeds: Number of splits into training and test, and of networks.
      precision: float32, the only one.
    """

    model: Callable[..., nn.Module]
    methods: Mapping[str, Method]
    data: Sequence[str]
    optimizer: optax.GradientTransformation
    noise_levels: Sequence[float]
    train_share: float
    trusted_share: float
    reference_steps: int
    steps: int
    batch_size: int
    seed: int
    num_seeds: int
    precision: str

    def validate(self) -> None:
        """Raises FieldError, naming the field, for what cannot run."""
        for name in ("reference_steps", "steps", "batch_size"):
            check_count(name, getattr(self, name), at_least=1)
        check_choice("precision", self.precision, ("float32",))
        check_number("train_share", self.train_share, above=0.0, below=1.0)
        check_number("trusted_share", self.trusted_share, above=0.0, at_most=1.0)
        for name, values in {"data": self.data, "noise_levels": self.noise_levels}.items():
            if not values or len(set(values)) < len(values):
                raise FieldError(name, "hold different values", list(values))
        for name in self.data:
            check_choice("data", name, CHOICE_DATASETS)
        check_number("noise_levels", np.array(self.noise_levels), at_least=0.0, below=1.0)
        for name, method in self.methods.items():
            if self.steps % (method.refreshes + 1):
                field = f"methods.{name}.refreshes"
                raise FieldError(
                    field, f"be one less than a divisor of steps = {self.steps}", method.refreshes
                )

    def stages(self) -> list[Once]:
        """One stage per data set, which are read here."""
        return [
            Once(name, functools.partial(self.measure, human_choices(name))) for name in self.data
        ]

    def measure(self, data: ChoiceDataset) -> list[Row]:
        """One row per seed, noise level and method; all of them are one compiled program."""
        inputs = jnp.asarray(network_inputs(data))
        arrays = _Data(inputs, jnp.asarray(data.available), jnp.asarray(data.choices))
        rows = [self._split(data.people, seed) for seed in range(self.num_seeds)]
        keys = jax.random.split(jax.random.key(self.seed), self.num_seeds)
        of_levels = jax.vmap(self._lane, in_axes=(None, None, None, 0))
        lanes = jax.jit(jax.vmap(of_levels, in_axes=(None, 0, 0, None)))
        levels = jnp.asarray(self.noise_levels, jnp.float32)
        found = lanes(arrays, jax.tree.map(lambda *x: jnp.stack(x), *rows), keys, levels)
        columns = jax.tree.map(lambda x: np.asarray(x, float), found)
        names = [REFERENCE, *self.methods, *(f"{name}/implied" for name in self.methods)]
        return [
            {
                "seed": seed,
                "noise": float(level),
                "method": name,
                **{metric: values[seed, index] for metric, values in columns[name].items()},
            }
            for name in names
            if name in columns  # without an anchor, the policy is all there is
            for seed in range(self.num_seeds)
            for index, level in enumerate(self.noise_levels)
        ]

    def _split(self, people: np.ndarray, seed: int) -> _Rows:
        """Rows in the order of shuffled people, of whom none is on both sides."""
        rng = np.random.default_rng([self.seed, seed])
        place = rng.permutation(int(people.max()) + 1)[people]
        order = np.argsort(place, kind="stable")
        size = int(self.train_share * len(order))
        # Every seed has as many rows; those of the person at the border are left out.
        gap = int(np.bincount(people).max()) - 1
        trusted = max(1, int(self.trusted_share * size))
        return _Rows(
            *(jnp.asarray(x) for x in (order[:trusted], order[:size], order[size + gap :]))
        )

    def _lane(
        self, data: _Data, rows: _Rows, key: jax.Array, level: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        """Measures of the reference and of all methods for one seed and one noise level."""
        of_network, of_noise, of_reference, of_steps = jax.random.split(key, 4)
        start = self._network.init(of_network, data.inputs[0])
        likelihood = Method(ListwiseChoice(), anchored=False)
        trusted = jax.tree.map(lambda x: x[rows.trusted], data)
        reference, _ = self._train(likelihood, start, trusted, of_reference, self.reference_steps)
        train = jax.tree.map(lambda x: x[rows.train], data)
        train = train._replace(choices=with_wrong_labels(train, of_noise, level))
        test = jax.tree.map(lambda x: x[rows.test], data)
        found = {REFERENCE: self._measures(reference, test)}
        for name, method in self.methods.items():
            params, anchor = self._train(method, reference, train, of_steps, self.steps)
            found[name] = self._measures(params, test)
            if method.anchored:
                # What the loss fits to the choices is the softmax of the scores.
                log_probs, anchored = (self._policy(x, test) for x in (params, anchor))
                scores = (log_probs - anchored) / method.temperature
                implied = _log_softmax(scores, test.available)
                found[f"{name}/implied"] = held_out(implied, test.choices, test.available)
        return found

    def _train(
        self, method: Method, start: Params, data: _Data, key: jax.Array, steps: int
    ) -> tuple[Params, Params]:
        """The parameters after training, and those of the last anchor."""
        visits = jax.random.randint(key, (steps, self.batch_size), 0, len(data.choices))

        def problem(_: Params, held: Params, visit: jax.Array) -> tuple[LossFn, dict[str, Any]]:
            batch = jax.tree.map(lambda x: x[visit], data)
            chosen = jax.nn.one_hot(batch.choices, batch.available.shape[-1])
            anchor = jnp.zeros(batch.available.shape)
            if method.anchored:
                anchor = jax.lax.stop_gradient(self._policy(held, batch))

            def loss(params: Params) -> jax.Array:
                scores = (self._policy(params, batch) - anchor) / method.temperature
                return jnp.mean(method.loss(scores, chosen, batch.available))

            return loss, {}

        rounds = visits.reshape(method.refreshes + 1, -1, self.batch_size)
        return in_rounds(self.optimizer, problem, start, rounds)

    @functools.cached_property
    def _network(self) -> nn.Module:
        return self.model(num_classes=1)

    def _policy(self, params: Params, data: _Data) -> jax.Array:
        """Log-probabilities [n, J] of the alternatives, 0 for those that are not available."""
        size = data.inputs.shape[-1]
        scores = jnp.asarray(self._network.apply(params, data.inputs.reshape(-1, size)))
        return _log_softmax(scores.reshape(data.available.shape), data.available)

    def _measures(self, params: Params, test: _Data) -> dict[str, jax.Array]:
        return held_out(self._policy(params, test), test.choices, test.available)

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Means with intervals by data set, method and noise level, and gains over the first."""
        from experiments.tasks.choices_report import summary

        return summary(rows, self.data, list(self.methods), self.noise_levels)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes choices.png: likelihood and calibration over the share of wrong labels."""
        from experiments.tasks.choices_report import plot

        plot(rows, self.data, [REFERENCE, *self.methods], folder / "choices.png")


def network_inputs(data: ChoiceDataset) -> np.ndarray:
    """Inputs [n, J, D]: features of mean 0 and spread 1, and which alternative it is."""
    n, size = data.available.shape
    items = data.items
    mean, spread = items[data.available].mean(0), items[data.available].std(0)
    items = np.where(data.available[..., None], (items - mean) / np.maximum(spread, 1e-6), 0)
    shared = (data.shared - data.shared.mean(0)) / np.maximum(data.shared.std(0), 1e-6)
    which = np.broadcast_to(np.eye(size), (n, size, size))
    repeated = np.broadcast_to(shared[:, None], (n, size, shared.shape[-1]))
    return np.concatenate([items, which, repeated], -1).astype(np.float32)


def with_wrong_labels(data: _Data, key: jax.Array, level: jax.typing.ArrayLike) -> jax.Array:
    """The choices [n], of which this share became another available alternative.

    The same key draws the same numbers at all levels: what is wrong at 10 % is wrong at 20 %.
    """
    of_place, of_other = jax.random.split(key)
    number = data.available.shape[-1]
    others = data.available & (jnp.arange(number) != data.choices[:, None])
    scores = jnp.where(others, jax.random.uniform(of_other, others.shape), -1.0)
    is_wrong = jax.random.uniform(of_place, data.choices.shape) < level
    return jnp.where(is_wrong & others.any(-1), jnp.argmax(scores, -1), data.choices)


def held_out(
    log_probs: jax.Array, choices: jax.Array, available: jax.Array
) -> dict[str, jax.Array]:
    """Mean log-likelihood in nats, accuracy, and expected calibration error (15 bins).

    The error is the mean over choices of the distance, in each bin of the largest probability,
    between its mean and the accuracy: Guo et al., arXiv:1706.04599, Eq. 3.
    """
    chosen = jnp.take_along_axis(log_probs, choices[:, None], -1)[:, 0]
    log_probs = jnp.where(available, log_probs, -jnp.inf)
    confidence = jnp.exp(jnp.max(log_probs, -1))
    is_right = jnp.argmax(log_probs, -1) == choices
    bins = jnp.clip((confidence * _BINS).astype(jnp.int32), 0, _BINS - 1)
    gaps = jax.nn.one_hot(bins, _BINS).T @ (confidence - is_right)
    return {
        "log_likelihood": jnp.mean(chosen),
        "accuracy": jnp.mean(is_right),
        "calibration_error": jnp.sum(jnp.abs(gaps)) / len(choices),
    }


def _log_softmax(scores: jax.Array, available: jax.Array) -> jax.Array:
    """Log-probabilities over the available alternatives, and 0 for the others."""
    return jnp.where(available, jax.nn.log_softmax(jnp.where(available, scores, -1e30)), 0.0)
