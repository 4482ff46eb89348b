"""How much of a brax environment's state its positions and velocities do not show, by backend.

python -m benchmarks.hidden_state --out FILE [--task hopper ...] [--backend spring ...]

Observations are made of q and qd. After some steps with random actions the simulation goes on
twice with the same actions: from its state, and from a new state that is built from q and qd alone.
The gap of a component of the observation is the root mean square of the difference, over that of
the change of the component since then; a task has the median over components. 0 means that q
and qd are the whole state, as on the generalized backend; 1 that a prediction from them is as
wrong as to predict no change.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.optimizers import environment
from trustjax.envs import make
from trustjax.envs.third_party import default_promotion

TASKS = ("inverted_pendulum", "hopper", "walker2d", "halfcheetah", "ant", "humanoid")
BACKENDS = ("spring", "positional", "generalized")


@default_promotion()
def gap(task: str, backend: str, *, states: int, before: int, after: int) -> float:
    """The median gap over the components of the observation, >= 0.

    Args:
      task: Name of the environment in brax.
      backend: Backend of the simulation.
      states: Simulations with start states and actions of their own.
      before: Steps with random actions before the state is built anew, >= 1.
      after: Steps after that, >= 1.
    """
    env = make(f"brax:{task}?backend={backend}").unwrapped
    step = jax.jit(jax.vmap(env.step))  # one program for all steps, as it compiles for long
    keys = jax.random.split(jax.random.PRNGKey(0), states)  # brax takes keys of the old style
    shape = (before + after, states, env.action_size)
    actions = jax.random.uniform(jax.random.key(1), shape, minval=-1, maxval=1)
    state = jax.jit(jax.vmap(env.reset))(keys)
    for action in actions[:before]:
        state = step(state, action)
    shown = jax.jit(jax.vmap(env.pipeline_init))(state.pipeline_state.q, state.pipeline_state.qd)
    ends = []
    for start in (state.pipeline_state, shown):
        later = state.replace(pipeline_state=start)
        for action in actions[before:]:
            later = step(later, action)
        ends.append(later.obs)
    first, true, rebuilt = map(np.asarray, (state.obs, *ends))
    change = np.sqrt(np.mean(np.square(true - first), axis=0))
    difference = np.sqrt(np.mean(np.square(rebuilt - true), axis=0))
    moves = change > 0
    return float(np.median(difference[moves] / change[moves]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints one line per task and backend, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hidden_state")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--states", type=int, default=64, help="simulations, >= 1")
    options = parser.parse_args(arguments)
    if options.states < 1:
        parser.error(f"--states: got {options.states}, allowed: an integer >= 1")
    steps = {"states": options.states, "before": 8, "after": 4}
    found: dict[str, dict[str, float]] = {}
    for task in options.task:
        for backend in options.backend:
            found.setdefault(task, {})[backend] = gap(task, backend, **steps)
            print(f"{task}, {backend}: {found[task][backend]:.3f}", flush=True)
        numbers = {**environment(), **steps, "gap": found}
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
