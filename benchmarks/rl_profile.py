"""Time of the parts of a PPO iteration on CartPole, and the limit set by its matrix products.

python -m benchmarks.rl_profile --out FILE [--repeats N]

An iteration has 64 environments, 128 steps, 4 epochs and 4 minibatches, as in the question
"cartpole" of rl_throughput. Each part is a compiled program of its own, so that the parts need not
add up to the whole. The programs take turns.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import environment
from experiments.runtime.files import write_text
from trustjax.agents import PPO, ppo, rollout
from trustjax.agents.on_policy import State

ITERATIONS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_profile", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats: got {given.repeats}, allowed: an integer >= 1")
    agent = PPO(
        ppo.Config(
            num_envs=64, num_steps=128, num_epochs=4, learning_rate=1e-3,
            normalize_observations=False, normalize_rewards=False,
        )
    )  # fmt: skip
    state = jax.jit(agent.init)(jax.random.key(0))
    programs = {name: _compiled(part, state) for name, part in parts(agent).items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(given.repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(state))
            seconds[name].append(time.perf_counter() - started)
    found = {
        name: {"milliseconds": 1e3 * float(np.median(each)) / ITERATIONS}
        for name, each in seconds.items()
    }
    steps = agent.config.steps_per_update
    found["iteration"]["steps_per_second"] = 1e3 * steps / found["iteration"]["milliseconds"]
    found["matrix products"]["steps_per_second"] = (
        1e3 * steps / found["matrix products"]["milliseconds"]
    )
    write_text(
        given.out, json.dumps({"environment": environment(), "parts": found}, indent=2) + "\n"
    )
    print(json.dumps(found, indent=1))


def parts(agent: PPO) -> dict[str, Callable[[State], State]]:
    """An iteration and its parts; each returns a state that depends on all that it computes."""
    config = agent.config

    def iteration(state: State) -> State:
        return agent.update(state)[0]

    def random_numbers(state: State) -> State:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(state.key, i), (128, 2)))(
            state.runner.env_index
        )
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (2,))))(keys[:, :, 0])
        return _depending(state, noise)

    def environments(state: State) -> State:
        def step(runner: rollout.Runner, key: jax.Array) -> Any:
            keys = jax.random.split(key, config.num_envs)
            action = (runner.observation[:, 2] > 0).astype(jnp.int32)
            observation, env_state, *rest, info = jax.vmap(agent.env.step)(
                keys, runner.env_state, action
            )
            runner = runner._replace(env_state=env_state, observation=observation)
            return runner, (rest, info["final_observation"])

        runner, seen = jax.lax.scan(step, state.runner, jax.random.split(state.key, 128))
        return _depending(state._replace(runner=runner), *jax.tree.leaves(seen))

    def collecting(state: State) -> State:
        runner, seen = rollout.collect(
            agent.env, None, agent.actor, state.params["actor"], lambda x: x, state.runner,
            state.key, config.num_steps,
        )  # fmt: skip
        return _depending(state._replace(runner=runner), *jax.tree.leaves(seen))

    def products(state: State) -> State:
        """The forward and the two backward products of every layer, without anything between."""
        width = config.hidden[0]
        rows = config.steps_per_update // config.num_minibatches
        sizes = [
            pair
            for last in (2, 1)
            for pair in itertools.pairwise((state.runner.observation.shape[1], width, width, last))
        ]
        keys = jax.random.split(state.key, (len(sizes), 2))
        layers = [  # inputs and weights
            (
                jax.random.normal(one, (rows, fan_in)),
                jax.random.normal(two, (fan_in, fan_out)) / math.sqrt(fan_in),
            )
            for (one, two), (fan_in, fan_out) in zip(keys, sizes, strict=True)
        ]

        def once(layers: Any, _: None) -> tuple[Any, None]:
            # Every product goes into the next pass: else XLA leaves it out, or takes it once.
            forward = [x @ w for x, w in layers]
            backward = [
                (y @ w.T, w + 1e-9 * (x.T @ y)) for y, (x, w) in zip(forward, layers, strict=True)
            ]
            return backward, None

        layers, _ = jax.lax.scan(once, layers, length=config.num_epochs * config.num_minibatches)
        return _depending(state, *jax.tree.leaves(layers))

    return {
        "iteration": iteration,
        "random numbers": random_numbers,
        "environments": environments,
        "environments and policy": collecting,
        "matrix products": products,
    }


def _depending(state: State, *results: jax.Array) -> State:
    """`state` with a key that depends on all `results`, so that XLA cannot leave them out."""
    total = sum(jnp.sum(result.astype(jnp.float32)) for result in results)
    seed = jax.lax.bitcast_convert_type(jnp.asarray(total, jnp.float32), jnp.uint32)
    return state._replace(key=jax.random.fold_in(state.key, seed))


def _compiled(part: Callable[[State], State], state: State) -> Callable[[State], State]:
    """A compiled program of `ITERATIONS` repetitions of a part, already run once."""

    def several(state: State) -> State:
        return jax.lax.scan(lambda s, _: (part(s), None), state, length=ITERATIONS)[0]

    program = jax.jit(several).lower(state).compile()
    jax.block_until_ready(program(state))
    return program


if __name__ == "__main__":
    main()
