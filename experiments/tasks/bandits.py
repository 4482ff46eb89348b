"""Preference methods on noisy bandits: twelve scenarios and all seeds in one program per method."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.task import Summary
from experiments.tasks.group_methods import Method
from experiments.tasks.group_training import (
    Params,
    Visits,
    draw_visits,
    fit_reference,
    measures,
    train,
)
from experiments.tasks.once import Once
from experiments.trackers import Row
from trustjax._checks import FieldError, check_choice, check_count, check_number
from trustjax.envs.bandit import (
    SCENARIOS,
    Corruption,
    Groups,
    corruptions,
    make_bandit,
    sample_groups,
)


class _Shared(NamedTuple):
    """What the scenarios of a seed share.

    Attributes:
      reference: Parameters of the reference.
      test: Clean groups on which policies are measured.
      of_visits: Random key of the batches.
    """

    reference: Params
    test: Groups
    of_visits: jax.Array


class _Own(NamedTuple):
    """What a seed and a scenario have of their own.

    Attributes:
      groups: Corrupted groups to train on.
      anchor: Log-probabilities of their items under the reference.
    """

    groups: Groups
    anchor: jax.Array


@dataclass(frozen=True)
class Bandits:
    """Configuration and stages of the experiment; conf/exp/adpo_bandits.yaml has the numbers.

    Attributes:
      model: Makes the network that scores an item: `model(num_classes=1)`.
      methods: Methods to compare, by name; gains are taken over the first.
      scenarios: Names of `trustjax.envs.bandit.SCENARIOS`.
      reference: Optimizer of the reference.
      reference_steps: Steps of the reference, >= 1, each with new clean groups.
      reference_groups: Groups in such a step, >= 1.
      reference_temperature: Temperature of its targets, > 0, in units of the rewards.
      train_groups: Corrupted groups of each seed and scenario.
      test_groups: Clean groups on which policies are measured.
      matched_entropy: Mean entropy in nats at which policies are compared as well.
      seed: Root of all randomness.
      num_seeds: Number of bandits.
      precision: float32, the only one.
      only: Names of the methods to run; [] runs all.
    """

    model: Callable[..., nn.Module]
    methods: Mapping[str, Method]
    scenarios: Sequence[str]
    reference: optax.GradientTransformation
    reference_steps: int
    reference_groups: int
    reference_temperature: float
    train_groups: int
    test_groups: int
    matched_entropy: float
    seed: int
    num_seeds: int
    precision: str
    only: Sequence[str] = ()

    def validate(self) -> None:
        """Raises FieldError, naming the field, for what cannot run."""
        for name in ("reference_steps", "reference_groups", "train_groups", "test_groups"):
            check_count(name, getattr(self, name), at_least=1)
        check_number("reference_temperature", self.reference_temperature, above=0.0)
        check_number("matched_entropy", self.matched_entropy, above=0.0, below=float(np.log(4)))
        check_choice("precision", self.precision, ("float32",))
        if not self.scenarios or len(set(self.scenarios)) < len(self.scenarios):
            raise FieldError("scenarios", "be different names", list(self.scenarios))
        for name in self.scenarios:
            check_choice("scenarios", name, SCENARIOS)
        for name in self.only:
            check_choice("only", name, self.methods)

    @property
    def names(self) -> list[str]:
        """Names of the methods that run, the baseline first."""
        return [name for name in self.methods if not self.only or name in self.only]

    def stages(self) -> list[Once]:
        """One stage per method."""
        return [Once(name, functools.partial(self._rows_and_next, name)) for name in self.names]

    def _rows_and_next(self, name: str) -> list[Row]:
        """The rows of a method. The next method is begun in the meantime, in a second thread.

        XLA leaves a core idle for much of a compilation, and in programs of small products.
        """
        _ = self._problems, self._measured  # made once, before there are threads
        here = self.names.index(name)
        for each in self.names[here : here + 2]:
            if each not in self._begun:
                self._begun[each] = self._threads.submit(self._rows, self.methods[each])
        return self._begun[name].result()

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=2)

    @functools.cached_property
    def _begun(self) -> dict[str, Future[list[Row]]]:
        return {}

    def _rows(self, method: Method) -> list[Row]:
        """One row per seed and scenario."""

        def trained(shared: _Shared, own: _Own, visits: Visits) -> Params:
            start = shared.reference
            return train(method, self._policy, start, own.anchor, own.groups, visits)

        shared, own = self._problems
        num_groups, num_items = own.groups.rewards.shape[2:]
        draw = functools.partial(
            draw_visits,
            steps=method.steps,
            batch_size=method.batch_size,
            num_groups=num_groups,
            num_items=num_items,
            pairs=method.pairs,
        )
        visits = jax.vmap(draw)(shared.of_visits)
        # The draws of a seed are shared by the scenarios. One seed comes after the other, as the
        # activations of all seeds would not fit into the cache of a core.
        over_scenarios = jax.vmap(trained, in_axes=(None, 0, None))
        over_seeds = jax.jit(lambda *of_seeds: jax.lax.map(lambda a: over_scenarios(*a), of_seeds))
        found = self._measured(over_seeds(shared, own, visits), shared)
        columns = {name: np.asarray(values, float) for name, values in found.items()}
        return [
            {
                "seed": seed,
                "scenario": scenario,
                **{name: values[seed, index] for name, values in columns.items()},
            }
            for seed in range(self.num_seeds)
            for index, scenario in enumerate(self.scenarios)
        ]

    @functools.cached_property
    def _problems(self) -> tuple[_Shared, _Own]:
        """What all methods share: by seed, and by seed and scenario."""
        keys = jax.random.split(jax.random.key(self.seed), self.num_seeds)
        corrupted = corruptions(self.scenarios)
        problems = jax.jit(jax.vmap(lambda key: self._problem(key, corrupted)))
        found: tuple[_Shared, _Own] = problems(keys)
        return found

    def _problem(self, key: jax.Array, corrupted: Corruption) -> tuple[_Shared, _Own]:
        """One bandit: its reference, its clean groups for testing, and its corrupted ones."""
        of_bandit, of_clean, of_train, of_network, of_visits = jax.random.split(key, 5)
        bandit = make_bandit(of_bandit)
        num_clean = self.reference_steps * self.reference_groups
        both = sample_groups(of_clean, bandit, num_groups=num_clean + self.test_groups)
        clean, test = Groups(*(x[:num_clean] for x in both)), Groups(*(x[num_clean:] for x in both))
        start = self._network.init(of_network, _features(test.contexts[:1], test.items[:1])[0])
        reference = fit_reference(
            self._policy,
            start,
            self.reference,
            clean,
            steps=self.reference_steps,
            temperature=self.reference_temperature,
        )

        def own(corruption: Corruption) -> _Own:
            groups = sample_groups(of_train, bandit, corruption, num_groups=self.train_groups)
            return _Own(groups, self._policy(reference, groups.contexts, groups.items))

        return _Shared(reference, test, of_visits), jax.vmap(own)(corrupted)

    @functools.cached_property
    def _measured(self) -> Callable[[Params, _Shared], dict[str, jax.Array]]:
        """The measures of parameters, all by seed and scenario; one program for all methods."""

        def measured(params: Params, shared: _Shared) -> dict[str, jax.Array]:
            log_probs, first = (
                self._policy(each, shared.test.contexts, shared.test.items)
                for each in (params, shared.reference)
            )
            return measures(log_probs, first, shared.test, entropy=self.matched_entropy)

        return jax.jit(jax.vmap(jax.vmap(measured, in_axes=(0, None))))

    @functools.cached_property
    def _network(self) -> nn.Module:
        return self.model(num_classes=1)

    def _policy(self, params: Params, contexts: jax.Array, items: jax.Array) -> jax.Array:
        """Log-probabilities [n, P] of items: the softmax of their scores."""
        features = _features(contexts, items)
        scores = self._network.apply(params, features.reshape(-1, features.shape[-1]))
        return jax.nn.log_softmax(jnp.asarray(scores).reshape(items.shape[:-1]))

    # SciPy and Matplotlib are imported only at the end of a run.

    def summarize(self, rows: list[Row]) -> Summary:
        """Means with intervals, and gains over the first method, paired by seed."""
        from experiments.tasks.bandits_report import summary

        return summary(rows, self.names, self.scenarios)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Writes bandits.png: gains by scenario, with heat maps, and sharpness by method."""
        from experiments.tasks.bandits_report import plot

        plot(rows, self.names, self.scenarios, folder / "bandits.png")


def _features(contexts: jax.Array, items: jax.Array) -> jax.Array:
    """Inputs [n, P, 3 d] of the network: context, item and their products."""
    context = jnp.broadcast_to(contexts[..., None, :], items.shape)
    return jnp.concatenate([context, items, context * items], -1)
