"""Training a network from many seeds at once, in one jitted, vmapped scan per chunk."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.optimizers import Method
from experiments.penalties import Penalty
from experiments.tasks.objectives import Batch, Objective
from experiments.trackers import Row
from trustjax.data import Batches, iterate, stacked
from trustjax.optim import two_pass_step
from trustjax.parallel import batch_sharding, replicated
from trustjax.trust import broken_passes, trust_metrics_of

PyTree = Any
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


class TrainState(NamedTuple):
    """Everything that changes in training; under vmap every array has a leading axis of lanes.

    Attributes:
      params: Parameters of the network.
      model_state: Other collections of the Flax model, such as batch statistics.
      opt_state: State of the optimizer.
      reference: Reference parameters of the penalty; None if it needs none.
      step: Int32 [], number of steps done.
    """

    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    reference: PyTree
    step: jax.Array


class Lanes(NamedTuple):
    """What differs between networks that are trained side by side; every array is [lanes].

    Attributes:
      seed_index: Int32; the seed of the lane, which selects its data, their order and the noise.
      learning_rate: Float32; peak learning rate.
      hyperparameters: Float32 each; the other hyperparameters of the method by name.
    """

    seed_index: jax.Array
    learning_rate: jax.Array
    hyperparameters: Mapping[str, jax.Array]


def lanes_of(method: Method, count: int) -> Lanes:
    """`count` lanes with the hyperparameters of `method` and the seeds 0, 1, and so on."""
    full = functools.partial(jnp.full, count)
    hyperparameters = {k: full(v, dtype=jnp.float32) for k, v in method.hyperparameters.items()}
    return Lanes(jnp.arange(count), full(method.learning_rate), hyperparameters)


def training_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    penalty: Penalty | None = None,
    frozen: PyTree = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes `step(state, batch, key) -> (state, metrics)` for mean cross-entropy.

    Args:
      objective: The network, its labels, and the noise on its inputs for `tram("noise")`,
        `tram_fisher` and penalties under noise.
      tx: Any optimizer, with or without a second pass.
      penalty: Term that is added to the cross-entropy, also in the second pass.
      frozen: The weights that are not trained; see `Objective`.
    """

    def evaluated(params: PyTree, model_state: PyTree, batch: Batch, **noise: Any) -> jax.Array:
        return objective.outputs(frozen, params, model_state, batch, **noise)[0]

    def noise_key(key: jax.Array) -> jax.Array:
        return jax.random.fold_in(key, 1)  # not `key` itself, which is that of dropout

    def loss_of(
        params: PyTree, model_state: PyTree, reference: PyTree, batch: Batch, key: jax.Array,
        *, noised: bool = False,
    ) -> Any:  # fmt: skip
        passes = functools.partial(objective.outputs, frozen, params, model_state, batch, key=key)
        noise = noise_key(key)
        logits, new_state = passes(noise_key=noise) if noised else passes()
        labels, where = objective.labels(batch), objective.where(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = jnp.mean(losses, where=where)
        metrics = {"train/loss": loss}
        if penalty is not None:
            values = penalty(
                logits,
                at_reference=lambda: evaluated(reference, model_state, batch),
                under_noise=lambda: passes(noise_key=noise)[0],
            )
            metrics["train/penalty"] = jnp.mean(values, where=where)
            loss = loss + penalty.weight * metrics["train/penalty"]
        aux = {"outputs": logits, "losses": losses, "model_state": new_state, "metrics": metrics}
        return loss, aux if where is None else {**aux, "where": where}

    train_step = two_pass_step(
        loss_of,
        tx,
        output_fn=lambda p, m, r, batch, key: evaluated(p, m, batch),
        noisy_output_fn=lambda p, m, r, batch, key: evaluated(
            p, m, batch, noise_key=noise_key(key)
        ),
        noisy_loss_fn=lambda *args: loss_of(*args, noised=True)[1]["metrics"]["train/loss"],
    )

    def step(
        state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        params, opt_state, _, aux = train_step(
            state.params, state.opt_state, state.model_state, state.reference, batch, key
        )
        # MESA's average takes in the weights before their update, and TRPO compares with them.
        reference = penalty and penalty.refreshed(state.reference, state.params)
        new_state = TrainState(params, aux["model_state"], opt_state, reference, state.step + 1)
        broke = broken_passes(state.opt_state, opt_state)
        return new_state, {**aux["metrics"], **trust_metrics_of(opt_state), **broke}

    return step


@dataclass
class Training:
    """A stage of the experiment loop: trains all lanes side by side.

    Attributes:
      name: Name of the stage.
      num_steps: Length of the training.
      steps_per_chunk: Steps in one jitted scan.
      objective: The network and what it should learn.
      method: Optimizer and penalty; the learning rate follows a cosine down to 0.
      lanes: Seed and hyperparameters of each lane.
      source: Training batches with a leading axis of seeds.
      key: Root of the random keys of this stage.
      mesh: Devices; each trains all lanes on its part of every batch.
      start: Gives (params, model_state) of every seed from the final states of earlier stages.
      evaluate: `(params, model_state) -> {name: [lanes]}` for all lanes, called after every chunk.
      measure: The same, called at the end of the training.
      label: Additional columns of the metric rows, one mapping per lane.
      lanes_compete: Whether a lane may diverge as long as another one does not, as in a search.
      earlier: Shapes of the final states of the earlier stages that `start` reads.
      program: The compiled program of a whole chunk; None compiles it at the first call.
    """

    name: str
    num_steps: int
    steps_per_chunk: int
    objective: Objective
    method: Method
    lanes: Lanes
    source: Batches[Any]
    key: jax.Array
    mesh: Mesh
    start: Callable[[Mapping[str, Any]], tuple[PyTree, PyTree]]
    evaluate: Callable[[PyTree, PyTree], dict[str, jax.Array]]
    measure: Callable[[PyTree, PyTree], dict[str, jax.Array]]
    label: list[Row]
    lanes_compete: bool = False
    earlier: Mapping[str, TrainState] = field(default_factory=dict)
    program: jax.stages.Compiled | None = None

    def init(self, final: Mapping[str, Any]) -> TrainState:
        """The lanes before their first step."""
        start = jax.tree.map(lambda x: x[self.lanes.seed_index], self.start(final))

        @functools.partial(jax.jit, out_shardings=replicated(self.mesh))
        @jax.vmap
        def begin(lane: Lanes, params: PyTree, model_state: PyTree) -> TrainState:
            tx, penalty = self._at(lane)
            reference = penalty and penalty.start(params)
            zero = jnp.zeros([], jnp.int32)
            return TrainState(params, model_state, tx.init(params), reference, zero)

        state: TrainState = begin(self.lanes, *start)
        return state

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """A new iterator over the batches, from the first one on."""
        batches: Iterator[dict[str, np.ndarray]] = iterate(self.source)
        return batches

    def advance(
        self, state: TrainState, batches: Iterator[Any], step: int, num_steps: int
    ) -> tuple[TrainState, list[Row]]:
        """Trains `num_steps` steps; returns one row per lane with the chunk's mean metrics."""
        whole = num_steps == self.steps_per_chunk
        advance = self.program if self.program is not None and whole else self._advance
        frozen = self.objective.frozen
        state, metrics = advance(frozen, state, self.lanes, stacked(batches, num_steps))
        return state, self._rows({**metrics, **self.evaluate(state.params, state.model_state)})

    def finish(self, state: TrainState) -> list[Row]:
        """One row per lane with the final measures."""
        return self._rows(self.measure(state.params, state.model_state))

    def learned(self, state: TrainState) -> Any:
        """The parameters of all lanes; nothing if single lanes may diverge."""
        return () if self.lanes_compete else state.params

    def shapes(self) -> TrainState:
        """Shapes and dtypes of the state."""
        shapes: TrainState = jax.eval_shape(self.init, self.earlier)
        return shapes

    def compiled(self) -> "Training":
        """The stage with the compiled program of a whole chunk."""
        if self.program is not None:
            return self
        batches = {
            name: jax.ShapeDtypeStruct((self.steps_per_chunk, *value.shape), value.dtype)
            for name, value in self.source[0].items()
        }
        frozen = self.objective.frozen
        program = self._advance.lower(frozen, self.shapes(), self.lanes, batches).compile()
        return replace(self, program=program)

    def _at(self, lane: Lanes) -> tuple[optax.GradientTransformation, Penalty | None]:
        """The method with the hyperparameters of a lane."""
        method = self.method.at(**lane.hyperparameters)
        schedule = optax.cosine_decay_schedule(lane.learning_rate, self.num_steps)
        return method.optimizer(schedule, trainable=self.objective.trainable), method.penalty

    @functools.cached_property
    def _advance(self) -> jax.stages.Wrapped:
        def advance_lane(
            frozen: PyTree, state: TrainState, lane: Lanes, batches: Batch
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            tx, penalty = self._at(lane)
            step = training_step(self.objective, tx, penalty, frozen)
            key = jax.random.fold_in(self.key, lane.seed_index)

            def body(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
                # Batches have an axis of seeds; lanes of the same seed see the same examples.
                batch = jax.tree.map(lambda x: x[lane.seed_index], batch)
                # The key of a step depends on its number alone, so that a resumed run has the same.
                return step(state, batch, jax.random.fold_in(key, state.step))

            state, metrics = jax.lax.scan(body, state, batches)
            return state, jax.tree.map(jnp.mean, metrics)

        whole = replicated(self.mesh)
        return jax.jit(
            jax.vmap(advance_lane, in_axes=(None, 0, 0, None)),
            donate_argnums=1,  # only one copy of all parameters and optimizer states
            # Batches are [steps, seeds, examples, ...].
            in_shardings=(whole, whole, whole, batch_sharding(self.mesh, axis=2)),
            out_shardings=whole,
        )

    def _rows(self, metrics: Mapping[str, jax.Array]) -> list[Row]:
        """One row per lane. If lanes compete, a lane that diverged has the metric `diverged` alone.

        If all lanes diverged, their metrics stay: the loop finds them, and ends the run.
        """
        columns = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        finite = np.all(np.isfinite(np.stack([*columns.values()])), axis=0)
        rows = []
        for lane, label in enumerate(self.label):
            measured: Row = {name: float(values[lane]) for name, values in columns.items()}
            if self.lanes_compete and finite.any() and not finite[lane]:  # NaN would end the run
                measured = {"diverged": 1}
            # Columns keep the order of their first appearance: seed, metrics, then the rest of the
            # label, as the loop shows the first metric behind the seed.
            rows.append({"seed": label["seed"], **measured, **label})
        return rows
