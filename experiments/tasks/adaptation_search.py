"""Learning rate and radius for every method of the adaptation experiment, with the same budget.

Every method gets the same number of candidates, all trained side by side in one program, and is
judged by the accuracy on validation examples of the target domain. Neither test examples nor
unseen domains are looked at.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import Row, Summary, Table
from experiments.optimizers import Method
from experiments.tasks.adaptation import Adaptation, HeldOut
from experiments.tasks.supervised import Lanes, apply_eval
from trustjax.data import unit_range
from trustjax.parallel import replicated


@dataclass(kw_only=True)
class AdaptationSearch(Adaptation):
    """Configuration and stages of the search; the fields of `Adaptation` and these.

    Attributes:
      learning_rates: candidates for methods with an attack or a penalty, combined with their radii.
      learning_rates_alone: candidates for the others; as many as the combinations.
      radii: by method, the candidates for the weight of its penalty or else the radius of its
        attack; a method with both keeps its radius.
    """

    learning_rates: Sequence[float]
    learning_rates_alone: Sequence[float]
    radii: Mapping[str, Sequence[float]]

    def validate(self) -> None:
        """As for `Adaptation`; also every method must have the same number of candidates."""
        super().validate()
        counts = {name: len(self._candidates(name, self.methods[name])) for name in self._names()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ValueError(f"radii must give every method equally many candidates, got {counts}")

    def _candidates(self, name: str, method: Method) -> list[dict[str, float]]:
        if not method.numbers:
            return [{"learning_rate": rate} for rate in self.learning_rates_alone]
        *_, searched = method.numbers
        pairs = itertools.product(self.learning_rates, self.radii.get(name, ()))
        return [{"learning_rate": r, **method.numbers, searched: value} for r, value in pairs]

    def _lanes(self, name: str, method: Method) -> Lanes:
        """One lane for every candidate and seed."""
        candidates = self._candidates(name, method)
        columns = {
            key: jnp.repeat(jnp.array([c[key] for c in candidates]), self.num_seeds)
            for key in candidates[0]
        }
        seed_index = jnp.tile(jnp.arange(self.num_seeds), len(candidates))
        return Lanes(seed_index, columns.pop("learning_rate"), columns)

    def _label(self, lanes: Lanes) -> list[Row]:
        numbers = {"learning_rate": lanes.learning_rate, **lanes.numbers}
        columns = {key: np.asarray(value) for key, value in numbers.items()}
        return [
            {"seed": int(index), **{k: float(f"{v[lane]:.6g}") for k, v in columns.items()}}
            for lane, index in enumerate(lanes.seed_index)
        ]

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """Validation examples of the target domain alone."""
        domain = self._domain(self.target, self._rows["validation"], salt=1)
        images = unit_range(domain.images[None])
        return jax.device_put(HeldOut(images, domain.labels), replicated(self._devices))

    def _evaluate(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        logits = apply_eval(self._network, params, model_state, held_out.images[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.labels)
        correct = jnp.argmax(logits, -1) == held_out.labels
        return {"validation/accuracy": jnp.mean(correct), "validation/loss": jnp.mean(losses)}

    def _measure(self, params: Any, model_state: Any, held_out: HeldOut) -> dict[str, jax.Array]:
        measures = self._evaluate(params, model_state, held_out)
        return {name.replace("validation", "final"): value for name, value in measures.items()}

    def summarize(self, rows: list[Row]) -> Summary:
        """The best candidate of every method: highest accuracy, then lowest loss, over seeds."""
        candidates = {}
        for name in self._names():
            finals = [row for row in rows if row["stage"] == name and "final/accuracy" in row]
            candidates[name] = [
                {**candidate, **_mean_over_seeds(finals, candidate)}
                for candidate in self._candidates(name, self.methods[name])
            ]
        best = {
            name: max(tried, key=lambda c: (c["accuracy"], -c["loss"]))
            for name, tried in candidates.items()
        }
        cells = []
        for name, found in best.items():
            measured = ("learning_rate", "accuracy", "loss")
            rate, accuracy, loss = (found[key] for key in measured)
            radius = ", ".join(f"{k} = {v:g}" for k, v in found.items() if k not in measured)
            cells.append((name, f"{rate:g}", radius, f"{100 * accuracy:.1f}", f"{loss:.3f}"))
        columns = ("method", "learning rate", "radius", "validation accuracy, %", "loss")
        table = Table("Best on the validation split", columns, cells)
        return Summary({"best": best, "candidates": candidates}, table)

    def plot(self, rows: list[Row], folder: Path) -> None:
        """Nothing to see: the table says it."""


def _mean_over_seeds(finals: list[Row], candidate: Mapping[str, float]) -> dict[str, float]:
    own = [row for row in finals if all(row[key] == value for key, value in candidate.items())]
    return {
        measure: float(np.mean([row[f"final/{measure}"] for row in own]))
        for measure in ("accuracy", "loss")
    }
