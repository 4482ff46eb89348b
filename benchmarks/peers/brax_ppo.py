"""Times brax.training's PPO in the environment that `build.sh brax` makes; prints one line of JSON.

python brax_ppo.py --environment inverted_pendulum --steps 500000 --num-envs 256
    [--backend NAME] [--seed N] [--epochs N] [--discount GAMMA] [--target RETURN]

The networks are brax's own (policy 4 x 32, value 5 x 256). The settings are those of brax's
training notebook for the inverted pendulum and halfcheetah, which has 2048 environments; batches
are scaled to the number of environments here. The notebook has no settings for PPO on hopper:
unrolls of 20 steps and a reward scale of 5 are our choice, the rest is that of the pendulum.

brax trains between evaluations and reports the speed of such an epoch without the evaluation. The
first epoch, which compiles, is left out; seconds to a return are steps over the others' speed.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import math
import time
from typing import Any

import numpy as np

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from brax import envs
    from brax.training.agents.ppo import train as ppo

MINIBATCHES = 32
SETTINGS = {  # unroll length, reward scale, epochs, discount, weight of the entropy
    "inverted_pendulum": (5, 10.0, 4, 0.97, 1e-2),
    "hopper": (20, 5.0, 4, 0.97, 1e-2),
    "halfcheetah": (20, 1.0, 8, 0.95, 1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", choices=SETTINGS, default="inverted_pendulum")
    parser.add_argument("--backend", default="generalized")
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="evaluations, at least 3")
    parser.add_argument("--discount", type=float, help="in place of the setting")
    parser.add_argument("--target", type=float)
    given = parser.parse_args()
    unroll, reward_scaling, epochs, discount, entropy_cost = SETTINGS[given.environment]
    discount = discount if given.discount is None else given.discount
    num_steps = 80  # of every environment in an iteration
    reports: list[tuple[int, float, float]] = []
    started = time.perf_counter()

    def progress(steps: int, metrics: dict[str, Any]) -> None:
        speed = float(metrics.get("training/sps", math.nan))
        reports.append((int(steps), float(metrics["eval/episode_reward"]), speed))
        if given.target is not None and reports[-1][1] >= given.target and len(reports) > 3:
            raise StopIteration  # there is no other way out of brax's loop

    train = functools.partial(
        ppo.train,
        environment=envs.get_environment(given.environment, backend=given.backend),
        episode_length=1000,
        normalize_observations=True,
        num_minibatches=MINIBATCHES,
        num_updates_per_batch=epochs,
        unroll_length=unroll,
        batch_size=num_steps * given.num_envs // unroll // MINIBATCHES,
        discounting=discount,
        learning_rate=3e-4,
        entropy_cost=entropy_cost,
        reward_scaling=reward_scaling,
        num_envs=given.num_envs,
        num_evals=given.epochs + 1,
        num_eval_envs=16,
    )
    with contextlib.suppress(StopIteration):
        train(num_timesteps=given.steps, seed=given.seed, progress_fn=progress)
    speeds = [speed for _, _, speed in reports if math.isfinite(speed)]
    typical = float(np.median(speeds[1:]))
    first = (reports[1][0] - reports[0][0]) / speeds[0]
    found = {
        "peer": "brax",
        "versions": {name: importlib.metadata.version(name) for name in ("brax", "jax")},
        "environment": given.environment,
        "num_seeds": 1,
        "discount": discount,
        "steps": reports[-1][0],
        "per_update": {
            "num_steps": num_steps, "num_minibatches": MINIBATCHES, "num_epochs": epochs,
        },
        "compile_seconds": first - (reports[1][0] - reports[0][0]) / typical,
        "seconds": [time.perf_counter() - started],
        "steps_per_second": speeds[1:],
        "returns": [[steps, reached] for steps, reached, _ in reports],
    }  # fmt: skip
    if given.target is not None:
        reached_at = [steps for steps, reached, _ in reports if reached >= given.target]
        found["seconds_to_target"] = reached_at[0] / typical if reached_at else None
        found["seen"] = [reached for _, reached, _ in reports]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
