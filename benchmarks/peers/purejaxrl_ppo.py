"""Times purejaxrl's PPO in the environment of `build.sh purejaxrl`; prints one line of JSON.

PUREJAXRL=FOLDER python purejaxrl_ppo.py --environment CartPole-v1 --steps 1000000 --num-envs 64
    [--num-seeds N] [--seed N] [--repeat N]

FOLDER is a checkout of luchris429/purejaxrl at 31756b1, which is on no package index: `git clone`
it from GitHub. An iteration has 128 steps of every environment, 4 epochs and 4 minibatches. The
tanh networks of 64 and 64 units are its own; the other settings are those of its CartPole script.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    if "PUREJAXRL" not in os.environ:
        parser.error("PUREJAXRL must name a checkout of luchris429/purejaxrl")
    sys.path.insert(0, str(Path(os.environ["PUREJAXRL"]) / "purejaxrl"))
    sys.modules["navix"] = MagicMock()  # its wrappers import it for grid worlds
    from ppo import make_train

    config = {
        "LR": 2.5e-4,
        "NUM_ENVS": given.num_envs,
        "NUM_STEPS": 128,
        "TOTAL_TIMESTEPS": given.steps,
        "UPDATE_EPOCHS": 4,
        "NUM_MINIBATCHES": 4,
        "GAMMA": 0.99,
        "GAE_LAMBDA": 0.95,
        "CLIP_EPS": 0.2,
        "ENT_COEF": 0.01,
        "VF_COEF": 0.5,
        "MAX_GRAD_NORM": 0.5,
        "ACTIVATION": "tanh",
        "ENV_NAME": given.environment,
        "ANNEAL_LR": True,
        "DEBUG": False,
    }
    train = jax.jit(jax.vmap(make_train(config)))
    per_update = 128 * given.num_envs
    steps = given.steps // per_update * per_update

    def keys(index: int) -> jax.Array:
        return jax.random.split(jax.random.PRNGKey(given.seed + index), given.num_seeds)

    started = time.perf_counter()
    train = train.lower(keys(0)).compile()
    compiled = time.perf_counter() - started
    jax.block_until_ready(train(keys(0)))
    seconds = []
    for index in range(given.repeat):
        started = time.perf_counter()
        found = jax.block_until_ready(train(keys(1 + index)))
        seconds.append(time.perf_counter() - started)
    metrics = found["metrics"]
    ended = np.asarray(metrics["returned_episode"])
    returns = np.asarray(metrics["returned_episode_returns"])
    axes = tuple(axis for axis in range(ended.ndim) if axis != 1)
    mean = (returns * ended).sum(axes) / np.maximum(ended.sum(axes), 1)
    curve = [[(index + 1) * per_update, float(value)] for index, value in enumerate(mean)]
    about = {
        "peer": "purejaxrl",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "gymnax", "flax")},
        "environment": given.environment,
        "num_seeds": given.num_seeds,
        "steps": steps,
        "compile_seconds": compiled,
        "seconds": seconds,
        "steps_per_second": [given.num_seeds * steps / each for each in seconds],
        "returns": curve[:: max(1, len(curve) // 50)],
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main()
