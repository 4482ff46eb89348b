"""Steps per second with several agents: environments, MAPPO against JaxMARL, trust regions.

bash benchmarks/peers/build.sh jaxmarl FOLDER
JAXMARL=CHECKOUT python -m benchmarks.multi_agent --peers FOLDER --out FILE [--rounds N]
    [--only QUESTION ...]

A step is one step of one environment, of all its agents together. The programs of a question take
turns in a new random order each; JaxMARL's has a process of its own. CHECKOUT is that of
benchmarks/peers/jaxmarl_mappo.py. The questions are:

    environments    steps with random actions of 1, 16, 256 and 1024 environments
    jaxmarl         MAPPO on simple spread against JaxMARL's script, with its sizes
    trust           HAPPO, HATRPO, GA-MATR and MATRPO against MAPPO on one rollout of base stations
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import take_turns
from benchmarks.peer import PeerProcess
from benchmarks.questions import Numbers, answer
from trustjax.agents.multi import ga_matr, happo, hatrpo, mappo, matrpo
from trustjax.envs.joint import Joint, joint
from trustjax.envs.registry import make_once

SPREAD, STATIONS = "jaxmarl:MPE_simple_spread_v3", "trustjax:MultiUAV"
COUNTS = (1, 16, 256, 1024)
# The sizes of JaxMARL's script, which has one dense layer before and one behind the GRU.
LIKE_JAXMARL: dict[str, Any] = {
    "num_steps": 128, "num_epochs": 4, "num_minibatches": 4, "reward": "individual",
    "hidden": (128, 128), "gru_size": 128, "activation": "relu", "learning_rate": 2e-3,
    "discount": 0.99,
}  # fmt: skip
AGENTS: dict[str, Any] = {
    "mappo": mappo.Config, "happo": happo.Config, "hatrpo": hatrpo.Config,
    "ga_matr": ga_matr.Config,
    "matrpo": functools.partial(matrpo.Config, num_exchanges=12, reward="team"),
}  # fmt: skip
SAME_ROLLOUT: dict[str, Any] = {"num_steps": 100, "num_epochs": 5, "num_minibatches": 4}


def environments(peers: Path, rounds: int) -> Numbers:
    """Steps per second with random actions, by environment and number of environments."""
    del peers
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


def jaxmarl(peers: Path, rounds: int) -> Numbers:
    """MAPPO on simple spread: as many steps, epochs, minibatches and parameters."""
    options = ["--steps", "4096", "--num-envs", "16", "--repeat", "0", "--turns"]
    peer = PeerProcess(peers / "jaxmarl" / "bin" / "python", "jaxmarl_mappo.py", options)
    assert peer.about["steps"] == 4096
    config = mappo.Config(env=SPREAD, total_steps=4096, num_envs=16, **LIKE_JAXMARL)
    compile_seconds, train = compiled(config)
    programs = {"trustjax": train, "jaxmarl": lambda: peer.run("train")}
    found = turns(programs, config.total_steps, rounds)
    peer.close()
    found["trustjax"]["compile_seconds"] = compile_seconds
    found["jaxmarl"] |= {name: peer.about[name] for name in ("compile_seconds", "versions")}
    return found


def trust(peers: Path, rounds: int) -> Numbers:
    """The price of updates one after the other, and of trust regions, on the same rollout."""
    del peers
    programs, compile_seconds = {}, {}
    for name, make_config in AGENTS.items():
        config = make_config(env=STATIONS, total_steps=6_400, num_envs=32, **SAME_ROLLOUT)
        compile_seconds[name], programs[name] = compiled(config)
    found = turns(programs, 6_400, rounds)
    for name, seconds in compile_seconds.items():
        found[name]["compile_seconds"] = seconds
    return found


def compiled(config: Any) -> tuple[float, Callable[[], float]]:
    """Seconds of compilation, and a function that trains a new seed and returns the seconds."""
    started = time.perf_counter()
    train = jax.jit(config.agent().train).lower(jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - started
    seeds = itertools.count()

    def run() -> float:
        key = jax.random.key(next(seeds))
        started = time.perf_counter()
        jax.block_until_ready(train(key))
        return time.perf_counter() - started

    return compile_seconds, run


def turns(
    programs: Mapping[str, Callable[[], float]], num_steps: int, rounds: int
) -> dict[str, Numbers]:
    """Speeds of programs that take turns.

    `time_over_first` is the median of the ratios within a turn.
    """
    seconds = take_turns(programs, rounds)
    first = next(iter(seconds.values()))
    return {
        name: {
            "steps_per_second": float(num_steps / np.median(each)),
            "time_over_first": float(np.median(each / first)),
            "quartiles": np.quantile(each / first, [0.25, 0.75]).tolist(),
            "seconds": each.tolist(),
        }
        for name, each in seconds.items()
    }


QUESTIONS = {"environments": environments, "jaxmarl": jaxmarl, "trust": trust}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    answer("multi_agent", __doc__, QUESTIONS, arguments)


if __name__ == "__main__":
    main()
