"""Writes tests/golden/mpe.json: simple spread of mpe2, the original particles in NumPy.

mpe2 is a dependency of nothing here; it is installed beside the project, and its numbers are kept:
    pip install --target FOLDER mpe2==1.1.1
    PYTHONPATH=FOLDER python tests/golden/make_mpe.py
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
from mpe2 import simple_spread_v3  # type: ignore[import-not-found, unused-ignore]

STEPS = 12


def episode(num_agents: int, seed: int, spread: float) -> dict[str, Any]:
    """Steps of random actions; agents start within `spread` of the middle, so that some collide."""
    env = simple_spread_v3.parallel_env(N=num_agents, max_cycles=100)
    env.reset(seed=seed)
    world = env.unwrapped.world
    random = np.random.default_rng(seed)
    for agent in world.agents:
        agent.state.p_pos = random.uniform(-spread, spread, 2)
        agent.state.p_vel = random.uniform(-1, 1, 2)
    start = {
        "agents": [agent.state.p_pos.tolist() for agent in world.agents],
        "velocities": [agent.state.p_vel.tolist() for agent in world.agents],
        "landmarks": [landmark.state.p_pos.tolist() for landmark in world.landmarks],
    }
    actions, observations, rewards = [], [], []
    for _ in range(STEPS):
        action = {name: int(random.integers(5)) for name in env.agents}
        seen, reward, *_ = env.step(action)
        actions.append(list(action.values()))
        # In float64: the environment's own observations are rounded to float32.
        observations.append(
            [env.unwrapped.scenario.observation(each, world).tolist() for each in world.agents]
        )
        assert all(
            np.allclose(seen[a.name], o)
            for a, o in zip(world.agents, observations[-1], strict=True)
        )
        rewards.append(list(reward.values()))
    return {"start": start, "actions": actions, "observations": observations, "rewards": rewards}


def main() -> None:
    episodes = [episode(3, 0, 1.0), episode(3, 1, 0.2), episode(2, 2, 0.15)]
    # A reward is half of -1 for each collision, beside what all have in common.
    apart = [np.ptp(each["rewards"], axis=1).max() for each in episodes]
    assert apart[1] > 0
    about = f"mpe2 {importlib.metadata.version('mpe2')}, simple_spread_v3, float64"
    golden = {"origin": about, "episodes": episodes}
    path = Path(__file__).with_name("mpe.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
