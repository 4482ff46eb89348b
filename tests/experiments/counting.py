"""A small stage whose every step matters, and checkpoints in memory, for tests of the loop."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime.checkpoint import CheckpointMetadata
from experiments.trackers import Row


class Numbers:
    """An iterator over integers with the state that Grain's have."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.next += 1
        return self.next

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@jax.jit
def one_step(state: dict[str, jax.Array], number: jax.Array) -> dict[str, jax.Array]:
    key = jax.random.fold_in(state["key"], number)
    x = 0.9 * state["x"] + jax.random.normal(key, state["x"].shape) * number
    return {"x": x, "key": state["key"]}


def nothing(name: str) -> None:
    """The default of `event`."""


@dataclass
class Counting:
    """A stage with random numbers, an iterator, a shorter last chunk and late columns.

    `event` is called with a name wherever a process could be killed.
    """

    name: str
    num_steps: int = 7
    steps_per_chunk: int = 2
    begins_from: str | None = None
    event: Callable[[str], None] = nothing
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def init(self, final: Mapping[str, Any]) -> dict[str, jax.Array]:
        self.event("init")
        if self.begins_from is not None:
            return final[self.begins_from]
        return {"x": jnp.arange(3.0), "key": jax.random.PRNGKey(0)}

    def batches(self) -> Numbers:
        return Numbers()

    def advance(
        self, state: dict[str, jax.Array], batches: Numbers, step: int, num_steps: int
    ) -> tuple[dict[str, jax.Array], list[Row]]:
        self.event("advance")
        for _ in range(num_steps):
            state = one_step(state, jnp.float32(next(batches)))
        self.chunks.append((step, num_steps))
        rows: list[Row] = [{"seed": seed, "x": state["x"][seed]} for seed in range(2)]
        if step >= 4:
            rows[1]["late"] = np.float32(1 / 3)
        return state, rows

    def finish(self, state: dict[str, jax.Array]) -> list[Row]:
        self.event("finish")
        return [{"seed": 0, "note": 'a, "b"', "final": state["x"][2]}]


class InMemory:
    """What `Checkpoints` does, in a dict that outlives the loop."""

    def __init__(self, store: dict[int, Any], event: Callable[[str], None] = nothing) -> None:
        self._store = store
        self._event = event
        self.folder = "memory"

    def latest(self) -> CheckpointMetadata:
        return (
            CheckpointMetadata(**json.loads(self._store[max(self._store)][0]))
            if self._store
            else CheckpointMetadata()
        )

    def save(self, state: Any, metadata: CheckpointMetadata) -> None:
        self._event("before save")
        text = json.dumps({**metadata._asdict(), "began_from": dict(metadata.began_from)})
        self._store[metadata.step] = (text, jax.tree.map(np.asarray, state))
        self._event("after save")

    def restore(self, like: Any) -> Any:
        return jax.tree.map(
            lambda _, leaf: jnp.asarray(leaf), like, self._store[max(self._store)][1]
        )

    def close(self) -> None:
        """Nothing is held."""
