"""A stage that trains a language model from many seeds at once, for any loss of text."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optimizers import Optimizer
from experiments.tasks.language_model import Network
from experiments.trackers import Row
from trustjax.data import Batches, iterate, stacked
from trustjax.models.text_checkpoint import save_transformer
from trustjax.optim import two_pass_step
from trustjax.trust import broken_passes, trust_metrics_of

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that changes or is computed once; every array has a leading axis of seeds.

    Attributes:
      trained: The part of the weights that is trained; see `Network`.
      opt_state: State of the optimizer.
      constants: What the loss compares with, such as log-probabilities of a reference.
      step: Int32 [], number of steps done.
    """

    trained: PyTree
    opt_state: optax.OptState
    constants: PyTree
    step: jax.Array


@dataclass(frozen=True, eq=False)
class Program:
    """The compiled programs of a training, which several stages may share.

    Attributes:
      network: The network.
      optimizer: Optimizer, whose learning rate rises over a tenth of the steps and falls to 0 along
        a cosine.
      learning_rate: Peak of that rate.
      num_steps: Length of the training.
      loss: `(params, batch, constants, setting) -> (loss [], metrics)` of one seed; `setting` is
        what differs between stages that share the program.
      evaluate: `(params, held_out, constants, setting) -> metrics` of one seed.
    """

    network: Network
    optimizer: Optimizer
    learning_rate: float
    num_steps: int
    loss: Callable[[PyTree, Batch, PyTree, PyTree], tuple[jax.Array, Metrics]]
    evaluate: Callable[[PyTree, PyTree, PyTree, PyTree], Metrics]

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer with its schedule."""
        warm = self.num_steps // 10
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(self.num_steps, warm + 1)
        )
        return self.optimizer(schedule)

    @functools.cached_property
    def begin(self) -> Callable[[PyTree], optax.OptState]:
        """`trained -> opt_state`, both with a leading axis of seeds."""
        return jax.jit(jax.vmap(self.tx.init))

    @functools.cached_property
    def advance(self) -> Callable[..., tuple[TrainState, Metrics]]:
        """`(frozen, state, batches, setting) -> (state, mean metrics)`; batches [steps, seeds]."""

        def loss_fn(trained: PyTree, frozen: PyTree, *rest: Any) -> tuple[jax.Array, Any]:
            loss, metrics = self.loss(self.network.params(frozen, trained), *rest)
            return loss, {"metrics": {"train/loss": loss, **metrics}}

        train_step = two_pass_step(loss_fn, self.tx)

        def one_seed(
            frozen: PyTree, state: TrainState, batches: Batch, setting: PyTree
        ) -> tuple[TrainState, Metrics]:
            def body(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
                trained, opt_state, _, aux = train_step(
                    state.trained, state.opt_state, frozen, batch, state.constants, setting
                )
                broke = broken_passes(state.opt_state, opt_state)
                state = state._replace(trained=trained, opt_state=opt_state, step=state.step + 1)
                return state, {**aux["metrics"], **trust_metrics_of(opt_state), **broke}

            state, metrics = jax.lax.scan(body, state, batches)
            return state, jax.tree.map(jnp.mean, metrics)

        # The frozen weights and the setting are the same for all seeds.
        return jax.jit(jax.vmap(one_seed, in_axes=(None, 0, 1, None)), donate_argnums=1)

    @functools.cached_property
    def measure(self) -> Callable[..., Metrics]:
        """`(frozen, trained, held_out, constants, setting) -> metrics` [seeds]."""

        def one_seed(
            frozen: PyTree, trained: PyTree, held_out: PyTree, constants: PyTree, setting: PyTree
        ) -> Metrics:
            params = self.network.params(frozen, trained)
            return self.evaluate(params, held_out, constants, setting)

        return jax.jit(jax.vmap(one_seed, in_axes=(None, 0, 0, 0, None)))


@dataclass(frozen=True, eq=False)
class LanguageTraining:
    """A stage of the experiment loop; see `experiments.runtime.task.Stage`.

    Attributes:
      name: Name of the stage.
      program: What is compiled.
      steps_per_chunk: Steps in one jitted scan.
      source: Training batches with a leading axis of seeds.
      start: Gives (trained, constants) of every seed from the final states of earlier stages.
      held_out: What is measured after every chunk, arrays with a leading axis of seeds.
      setting: What the loss of this stage gets beside; without an axis of seeds.
      export_models: Whether the final networks are written as Hugging Face folders.
    """

    name: str
    program: Program
    steps_per_chunk: int
    source: Batches[Any]
    start: Callable[[Mapping[str, Any]], tuple[PyTree, PyTree]]
    held_out: PyTree
    setting: PyTree = ()
    export_models: bool = False

    @property
    def num_steps(self) -> int:
        """Length of the training."""
        return self.program.num_steps

    def init(self, final: Mapping[str, Any]) -> TrainState:
        """All seeds before their first step."""
        trained, constants = self.start(final)
        opt_state = self.program.begin(trained)
        # A copy, as the steps overwrite the state and several stages may start from one.
        trained = jax.tree.map(jnp.copy, trained)
        step = jnp.zeros(len(self.source.rows), jnp.int32)
        return TrainState(trained, opt_state, constants, step)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """A new iterator over the batches, from the first one on."""
        batches: Iterator[dict[str, np.ndarray]] = iterate(self.source)
        return batches

    def advance(
        self, state: TrainState, batches: Iterator[Any], step: int, num_steps: int
    ) -> tuple[TrainState, list[Row]]:
        """Trains `num_steps` steps; returns one row per seed with the chunk's mean metrics."""
        frozen = self.program.network.frozen
        state, metrics = self.program.advance(
            frozen, state, stacked(batches, num_steps), self.setting
        )
        measured = self.program.measure(
            frozen, state.trained, self.held_out, state.constants, self.setting
        )
        columns = {k: np.asarray(v, np.float64) for k, v in {**measured, **metrics}.items()}
        return state, [
            {"seed": seed, **{name: float(values[seed]) for name, values in columns.items()}}
            for seed in range(len(state.step))
        ]

    def finish(self, state: TrainState) -> list[Row]:
        """No rows, as the last ones of `advance` hold the final measures."""
        del state
        return []

    def learned(self, state: TrainState) -> PyTree:
        """The trained weights of all seeds."""
        return state.trained

    def save(self, state: TrainState, folder: Path) -> None:
        """Writes the networks to models/NAME/seed_N, if asked to."""
        network = self.program.network
        for seed in range(len(state.step)) if self.export_models else ():
            trained = jax.tree.map(lambda x, seed=seed: x[seed], state.trained)
            params = jax.device_get(network.params(network.frozen, trained))
            own = folder / "models" / self.name / f"seed_{seed}"
            own.mkdir(parents=True, exist_ok=True)
            save_transformer(own, network.model, params)
