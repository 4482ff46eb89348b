"""Steps per second with several agents: environments, MAPPO against JaxMARL, trust regions.

bash benchmarks/peers/build.sh jaxmarl FOLDER
JAXMARL=CHECKOUT python -m benchmarks.multi_agent --peers FOLDER --out FILE [--rounds N]
    [--only QUESTION ...]

A step is one step of one environment, of all its agents together. The programs of a question take
turns; against JaxMARL each training has a process of its own, as in `benchmarks.rl_throughput`.
CHECKOUT is that of benchmarks/peers/jaxmarl_mappo.py. The questions are:

    environments    steps with random actions of 1, 16, 256 and 1024 environments
    jaxmarl         MAPPO on simple spread against JaxMARL's script, with its sizes
    trust           HAPPO, HATRPO and GA-MATR against MAPPO on the same rollout of base stations
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import environment
from benchmarks.rl_throughput import Numbers, Programs, rows, take_turns
from experiments.runtime.files import write_text
from trustjax.agents.multi import ga_matr, happo, hatrpo, mappo
from trustjax.envs.joint import Joint, joint
from trustjax.envs.registry import make_once

SPREAD, STATIONS = "jaxmarl:MPE_simple_spread_v3", "trustjax:MultiUAV"
COUNTS = (1, 16, 256, 1024)
# The sizes of JaxMARL's script, which has one dense layer before and one behind the GRU.
JAXMARL = ["num_steps=128", "num_epochs=4", "num_minibatches=4", "reward=individual",
           "hidden=(128,128)", "gru_size=128", "activation=relu", "learning_rate=2e-3",
           "discount=0.99"]  # fmt: skip
AGENTS: dict[str, Any] = {
    "mappo": mappo.Config, "happo": happo.Config, "hatrpo": hatrpo.Config,
    "ga_matr": ga_matr.Config,
}  # fmt: skip
SAME_ROLLOUT = {"num_steps": 100, "num_epochs": 5, "num_minibatches": 4}


def environments(programs: Programs, rounds: int) -> Numbers:
    """Steps per second with random actions, by environment and number of environments."""
    del programs
    found: Numbers = {}
    for name in (STATIONS, SPREAD):
        found[name] = {}
        for count in COUNTS:
            speeds = steps_per_second(joint(make_once(name)), count, rounds)
            found[name][count] = {"median": float(np.median(speeds)), "each": speeds}
            print(f"{name} {count}: {np.median(speeds):.3g} steps/s", flush=True)
    return found


def steps_per_second(env: Joint, count: int, rounds: int, num_steps: int = 200) -> list[float]:
    """The speed of `count` environments side by side, in each of `rounds` calls."""

    @jax.jit
    def play(key: jax.Array) -> jax.Array:
        key_reset, key_steps = jax.random.split(key)
        _, state = jax.vmap(env.reset)(jax.random.split(key_reset, count))

        def step(state: object, key: jax.Array) -> tuple[object, jax.Array]:
            key_act, key_step = jax.random.split(key)
            shape = count, env.num_agents
            actions = jax.random.randint(key_act, shape, 0, jnp.array(env.num_actions), jnp.int32)
            keys = jax.random.split(key_step, count)
            observation, state, reward, *_ = jax.vmap(env.step)(keys, state, actions)
            # Observations are summed, so that they are made.
            return state, sum(map(jnp.sum, jax.tree.leaves(observation)), jnp.sum(reward))

        return jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))[1]

    jax.block_until_ready(play(jax.random.key(0)))
    speeds = []
    for index in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(play(jax.random.key(1 + index)))
        speeds.append(count * num_steps / (time.perf_counter() - started))
    return speeds


def jaxmarl(programs: Programs, rounds: int) -> Numbers:
    """MAPPO on simple spread: as many steps, epochs, minibatches and parameters."""
    shared = ["--steps", "20480", "--num-envs", "16"]
    return rows(take_turns({
        "trustjax": programs.ours(
            "--agent", "mappo", *shared, "--environment", SPREAD, "--set", *JAXMARL
        ),
        "jaxmarl": programs.peer("jaxmarl", *shared, agent="mappo"),
    }, rounds))  # fmt: skip


def trust(programs: Programs, rounds: int) -> Numbers:
    """The price of updates one after the other, and of trust regions, on the same rollout.

    All programs are in this process, and each turn has them in a new random order.
    """
    del programs
    found: Numbers = {}
    compiled: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in AGENTS}
    for name, config in AGENTS.items():
        agent = config(env=STATIONS, total_steps=16_000, num_envs=32, **SAME_ROLLOUT).agent()
        started = time.perf_counter()
        compiled[name] = jax.jit(agent.train).lower(jax.random.key(0)).compile()
        found[name] = {"compile_seconds": time.perf_counter() - started}
        jax.block_until_ready(compiled[name](jax.random.key(0)))
    order = np.random.default_rng(0)
    for index in range(rounds):
        for name in order.permutation(list(AGENTS)):
            started = time.perf_counter()
            jax.block_until_ready(compiled[name](jax.random.key(1 + index)))
            seconds[name].append(time.perf_counter() - started)
    for name, each in seconds.items():
        found[name] |= {
            "steps_per_second": float(16_000 / np.median(each)),
            "time_over_mappo": float(np.median(np.divide(each, seconds["mappo"]))),
            "seconds": each,
        }
    return found


QUESTIONS = {"environments": environments, "jaxmarl": jaxmarl, "trust": trust}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.multi_agent",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, allowed: an integer >= 1")
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for name in given.only:
        print(f"== {name}", flush=True)
        answer = QUESTIONS[name](Programs(given.peers.absolute()), given.rounds)
        found |= {"environment": environment(), name: answer}
        write_text(given.out, json.dumps(found, indent=2) + "\n")
        print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
