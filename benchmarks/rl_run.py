"""Times whole trainings of one of our agents; prints one line of JSON, as the peers' scripts do.

python -m benchmarks.rl_run --agent ppo --environment gymnax:CartPole-v1 --steps 1000000 \
    [--num-envs N] [--num-seeds N] [--seed N] [--repeat N] [--target RETURN] [--set FIELD=VALUE ...]
    [--evaluate N [--deterministic]]

The whole training is one compiled program, which runs once before it is timed. With --target a
second program trains in chunks of iterations until 16 episodes of the policy have at least that
mean return; it reports all means, and the seconds without compilation and these episodes. With
--evaluate the policy of every timed training plays N episodes.
"""

import argparse
import ast
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from trustjax.agents import Algorithm, mdpo, ppo, sac, trpo
from trustjax.agents.algorithm import mask_missing_episodes
from trustjax.agents.multi import ga_matr, happo, hatrpo, mappo, matrpo

CONFIGS: dict[str, Any] = {
    "ppo": ppo.Config, "trpo": trpo.Config, "mdpo": mdpo.Config, "sac": sac.Config,
    "mdpo_off_policy": mdpo.OffPolicyConfig, "mappo": mappo.Config, "happo": happo.Config,
    "hatrpo": hatrpo.Config, "ga_matr": ga_matr.Config, "matrpo": matrpo.Config,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_run", description=__doc__)
    parser.add_argument("--agent", choices=CONFIGS, default="ppo")
    parser.add_argument("--environment", default="gymnax:CartPole-v1")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--target", type=float)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    given = parser.parse_args(arguments)
    fields = dict(_field(text) for text in given.set)
    config = CONFIGS[given.agent](
        env=given.environment, total_steps=given.steps, num_envs=given.num_envs, **fields
    )
    agent = config.agent()
    found: dict[str, Any] = {}
    if given.repeat:
        found, states = measure(agent, given.seed, given.num_seeds, given.repeat)
        if given.evaluate:
            evaluate = jax.jit(
                functools.partial(
                    agent.evaluate, num_episodes=given.evaluate, deterministic=given.deterministic
                )
            )
            played = [evaluate(state, jax.random.key(given.seed)).returns for state in states]
            found["evaluations"] = [float(np.mean(returns)) for returns in played]
    if given.target is not None:
        found["seconds_to_target"], found["seen"] = seconds_to(agent, given.target, given.seed)
    about = {
        "peer": f"trustjax {given.agent}",
        "versions": {name: importlib.metadata.version(name) for name in ("trustjax", "jax")},
        "environment": given.environment,
        "num_seeds": given.num_seeds,
        "settings": {name: str(value) for name, value in fields.items()},
    }
    json.dump(about | found, sys.stdout)
    print()


def measure(
    agent: Algorithm[Any], seed: int, num_seeds: int, repeat: int
) -> tuple[dict[str, Any], list[Any]]:
    """Compile time, speed and learning curve of `repeat` trainings; and their final states."""
    train = jax.jit(jax.vmap(agent.train) if num_seeds > 1 else agent.train)

    def keys(index: int) -> jax.Array:
        key = jax.random.key(seed + index)
        return jax.random.split(key, num_seeds) if num_seeds > 1 else key

    started = time.perf_counter()
    train = train.lower(keys(0)).compile()
    compiled = time.perf_counter() - started
    _, history = jax.block_until_ready(train(keys(0)))  # the first call of a program is slower
    seconds, states = [], []
    for index in range(repeat):
        started = time.perf_counter()
        state, history = jax.block_until_ready(train(keys(1 + index)))
        states.append(state)
        seconds.append(time.perf_counter() - started)
    config = agent.config
    steps = config.num_updates * config.steps_per_update
    returns = mask_missing_episodes(history)["episode/return"].reshape(num_seeds, -1)
    curve = [
        [(index + 1) * config.steps_per_update, float(mean)]
        for index, mean in enumerate(returns.mean(0), config.first_update)
        if math.isfinite(mean)
    ]
    return {
        "steps": steps,
        "compile_seconds": compiled,
        "seconds": seconds,
        "steps_per_second": [num_seeds * steps / each for each in seconds],
        "returns": curve[:: max(1, len(curve) // 50)],
        "final_returns": returns[:, -1].tolist(),
    }, states


def seconds_to(
    agent: Algorithm[Any], target: float, seed: int, updates_per_chunk: int = 10
) -> tuple[float | None, list[float]]:
    """Seconds of training until the return is at least `target`, or None; and all mean returns."""
    state = jax.jit(agent.init)(jax.random.key(seed))
    advance = jax.jit(agent.advance, static_argnums=1, donate_argnums=0)
    program = advance.lower(state, updates_per_chunk).compile()
    evaluate = jax.jit(functools.partial(agent.evaluate, num_episodes=16, deterministic=False))
    seconds, seen = 0.0, []
    for index in range(agent.config.num_updates // updates_per_chunk):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(program(state))
        seconds += time.perf_counter() - started
        seen.append(float(np.mean(evaluate(state, jax.random.key(index)).returns)))
        if seen[-1] >= target:
            return seconds, seen
    return None, seen


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
