"""Times rejax's PPO in the environment that `build.sh rejax` makes; prints one line of JSON.

python rejax_ppo.py --environment CartPole-v1 --steps 1000000 --num-envs 64 [--num-seeds N]
    [--seed N] [--repeat N]

The settings are those of our own benchmark: 128 steps of every environment, 4 epochs, 4
minibatches, tanh networks of 64 and 64 units. The learning rate is that of rejax for CartPole.
rejax evaluates as a part of training, which costs time that is not learning; here it does so once,
at the end.
"""

import argparse
import importlib.metadata
import json
import time

import jax
import numpy as np
from rejax import PPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    per_update = 128 * given.num_envs
    steps = given.steps // per_update * per_update
    algorithm = PPO.create(
        env=given.environment,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        num_envs=given.num_envs,
        num_steps=128,
        num_epochs=4,
        num_minibatches=4,
        learning_rate=7.5e-4,
        max_grad_norm=0.5,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
    )
    train = jax.jit(jax.vmap(algorithm.train))

    def keys(index: int) -> jax.Array:
        return jax.random.split(jax.random.PRNGKey(given.seed + index), given.num_seeds)

    started = time.perf_counter()
    train = train.lower(keys(0)).compile()
    compiled = time.perf_counter() - started
    jax.block_until_ready(train(keys(0)))
    seconds = []
    for index in range(given.repeat):
        started = time.perf_counter()
        _, (_, returns) = jax.block_until_ready(train(keys(1 + index)))
        seconds.append(time.perf_counter() - started)
    found = {
        "peer": "rejax",
        "versions": {name: importlib.metadata.version(name) for name in ("rejax", "jax", "gymnax")},
        "environment": given.environment,
        "num_seeds": given.num_seeds,
        "steps": steps,
        "compile_seconds": compiled,
        "seconds": seconds,
        "steps_per_second": [given.num_seeds * steps / each for each in seconds],
        "returns": [[steps, float(np.mean(np.asarray(returns)[:, -1]))]],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
