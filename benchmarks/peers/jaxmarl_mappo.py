"""Times JaxMARL's MAPPO in the environment of `build.sh jaxmarl`; prints one line of JSON.

JAXMARL=FOLDER python jaxmarl_mappo.py --steps 1000000 [--num-envs N] [--width N] [--seed N]
    [--repeat N] [--cold] [--turns]

FOLDER is a checkout of FLAIROx/JaxMARL at c793d09, whose scripts are in no package: `git clone` it
from GitHub. The program is that of baselines/MAPPO/mappo_rnn_mpe.py with its own settings, on
MPE_simple_spread_v3; `--width` is that of its layers and GRUs. What it would send to Weights &
Biases in each iteration goes to a list. Returns are means over agents of what the environment pays:
the script logs them times the number of agents. With --cold no training comes before the timed
ones. With --turns it then trains once for every line of input, and prints the seconds: see
`benchmarks.peer`.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from omegaconf import OmegaConf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--turns", action="store_true")
    given = parser.parse_args()
    if "JAXMARL" not in os.environ:
        parser.error("JAXMARL must name a checkout of FLAIROx/JaxMARL")
    script = Path(os.environ["JAXMARL"]) / "baselines" / "MAPPO"
    logged: list[tuple[int, float]] = []

    def log(metric: dict[str, np.ndarray]) -> None:
        logged.append((int(metric["env_step"]), float(metric["returns"])))

    sys.path.insert(0, str(script))
    sys.modules["wandb"] = SimpleNamespace(log=log)
    # What JaxMARL prints is no result. Some of its imports set `sys.stdout` back.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from mappo_rnn_mpe import make_train

    config = dict(OmegaConf.load(script / "config" / "mappo_homogenous_rnn_mpe.yaml"))
    config |= {
        "TOTAL_TIMESTEPS": given.steps,
        "NUM_ENVS": given.num_envs,
        "FC_DIM_SIZE": given.width,
        "GRU_HIDDEN_DIM": given.width,
    }
    train = jax.jit(make_train(config))
    num_agents = config["NUM_ACTORS"] // given.num_envs
    per_update = config["NUM_STEPS"] * given.num_envs
    steps = given.steps // per_update * per_update

    def keys(index: int) -> jax.Array:
        return jax.random.PRNGKey(given.seed + index)

    started = time.perf_counter()
    train = train.lower(keys(0)).compile()
    compiled = time.perf_counter() - started
    if not given.cold:
        jax.block_until_ready(train(keys(0)))
    seconds, curves = [], []

    def run(index: int) -> None:
        jax.effects_barrier()
        logged.clear()
        started = time.perf_counter()
        jax.block_until_ready(train(keys(index)))
        jax.effects_barrier()
        seconds.append(time.perf_counter() - started)
        curves.append([[step + per_update, value / num_agents] for step, value in sorted(logged)])

    for index in range(given.repeat):
        run(1 + index)
    about = {
        "peer": "JaxMARL MAPPO",
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxmarl", "flax", "distrax")
        },
        "environment": "MPE_simple_spread_v3",
        "steps": steps,
        "compile_seconds": compiled,
        "seconds": seconds,
        "steps_per_second": [steps / each for each in seconds],
        "returns": curves[-1][:: max(1, len(curves[-1]) // 50)] if curves else [],
        "last_tenth": [last_tenth(curve) for curve in curves],
    }
    print(json.dumps(about), file=out, flush=True)
    if given.turns:
        for index, _ in enumerate(sys.stdin):
            run(1 + given.repeat + index)
            print(seconds[-1], file=out, flush=True)


def last_tenth(curve: list[list[float]]) -> float:
    """The mean return over the last tenth of the iterations."""
    values = [value for _, value in curve]
    return float(np.mean(values[-max(1, len(values) // 10) :]))


if __name__ == "__main__":
    main()
