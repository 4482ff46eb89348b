"""Times rejax's SAC in the environment that `build.sh rejax` makes; prints one line of JSON.

python rejax_sac.py --environment Pendulum-v1 --steps 40000 [--seed N] [--repeat N]

The settings are those of our own benchmark: one environment, one gradient step per step on a batch
of 256, networks of 64 and 64 units, 2048 steps before the first gradient. rejax takes these steps
with its initial policy, not with random actions. It evaluates as a part of training; here it does
so once, at the end, with 128 episodes of sampled actions.
"""

import argparse
import importlib.metadata
import json
import time

import jax
import numpy as np
from rejax import SAC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    algorithm = SAC.create(
        env=given.environment,
        hidden_layer_sizes=(64, 64),
        num_envs=1,
        num_epochs=1,
        batch_size=256,
        buffer_size=given.steps,
        fill_buffer=2048,
        learning_rate=1e-3,
        polyak=0.995,
        total_timesteps=given.steps,
        eval_freq=given.steps,
        skip_initial_evaluation=True,
    )
    train = jax.jit(algorithm.train)

    def key(index: int) -> jax.Array:
        return jax.random.PRNGKey(given.seed + index)

    started = time.perf_counter()
    train = train.lower(key(0)).compile()
    compiled = time.perf_counter() - started
    jax.block_until_ready(train(key(0)))
    seconds, reached = [], []
    for index in range(given.repeat):
        started = time.perf_counter()
        _, (_, returns) = jax.block_until_ready(train(key(1 + index)))
        seconds.append(time.perf_counter() - started)
        reached.append(float(np.mean(np.asarray(returns)[-1])))
    found = {
        "peer": "rejax",
        "versions": {name: importlib.metadata.version(name) for name in ("rejax", "jax", "gymnax")},
        "environment": given.environment,
        "steps": given.steps,
        "compile_seconds": compiled,
        "seconds": seconds,
        "steps_per_second": [given.steps / each for each in seconds],
        "returns": [[given.steps, reached[-1]]],
        "evaluations": reached,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
