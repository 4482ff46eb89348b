"""Times brax.training's SAC in the environment that `build.sh brax` makes; prints one line of JSON.

python brax_sac.py --environment inverted_pendulum --steps 40000 --num-envs 8 [--seed N]
    [--epochs N] [--backend NAME] [--reward-scale S] [--normalize-observations]

The settings are those of our own benchmark: networks of 64 and 64 units, as many gradient steps as
transitions, batches of 128, 5000 steps before the first gradient, and a target entropy of half the
action dimensions. brax takes the first steps with its initial policy, not with random actions.

brax trains between evaluations and reports the speed of such an epoch without the evaluation. The
first epoch, which compiles, is left out.
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
    from brax.training.agents.sac import networks
    from brax.training.agents.sac import train as sac


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", default="inverted_pendulum")
    parser.add_argument("--backend", default="generalized")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="evaluations, at least 3")
    parser.add_argument("--reward-scale", type=float, default=1.0)
    parser.add_argument("--normalize-observations", action="store_true")
    given = parser.parse_args()
    reports: list[tuple[int, float, float]] = []
    started = time.perf_counter()

    def progress(steps: int, metrics: dict[str, Any]) -> None:
        speed = float(metrics.get("training/sps", math.nan))
        reports.append((int(steps), float(metrics["eval/episode_reward"]), speed))

    sac.train(
        environment=envs.get_environment(given.environment, backend=given.backend),
        num_timesteps=given.steps,
        episode_length=1000,
        num_envs=given.num_envs,
        grad_updates_per_step=given.num_envs,
        batch_size=128,
        learning_rate=1e-3,
        discounting=0.99,
        tau=0.005,
        reward_scaling=given.reward_scale,
        normalize_observations=given.normalize_observations,
        min_replay_size=5000,
        num_evals=given.epochs + 1,
        num_eval_envs=32,
        deterministic_eval=True,
        seed=given.seed,
        network_factory=functools.partial(networks.make_sac_networks, hidden_layer_sizes=(64, 64)),
        progress_fn=progress,
    )
    speeds = [speed for _, _, speed in reports if math.isfinite(speed)]
    typical = float(np.median(speeds[1:]))
    found = {
        "peer": "brax",
        "versions": {name: importlib.metadata.version(name) for name in ("brax", "jax")},
        "environment": f"{given.environment}?backend={given.backend}",
        "reward_scale": given.reward_scale,
        "normalize_observations": given.normalize_observations,
        "steps": reports[-1][0],
        "compile_seconds": (reports[1][0] - reports[0][0]) * (1 / speeds[0] - 1 / typical),
        "seconds": [time.perf_counter() - started],
        "steps_per_second": speeds[1:],
        "returns": [[steps, reached] for steps, reached, _ in reports],
        "evaluations": [reports[-1][1]],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
