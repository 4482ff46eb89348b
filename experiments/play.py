"""Plays one episode of a saved policy, and draws it.

python -m experiments.play RUN [--out FILE]     RUN is the folder of a run, or a policy's .npz file
    --stage NAME      stage whose policy plays; by default the first
    --seed N          seed whose policy plays; by default the first
    --episode-key N   seed of the episode's random numbers; by default 0
    --stochastic      sample the actions; by default they are the modes of the distributions
    --max-steps N     largest number of steps; by default 1000
    --out FILE        .html, a 3D view (brax only), or .gif; by default beside the policy
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from experiments.analysis import rendering
from experiments.runtime.targets import ConfigError, nearest_name
from trustjax.agents import load_policy
from trustjax.agents.policy import Policy
from trustjax.envs.brax import Brax


def find_policy(run: Path, stage: str | None = None, seed: int | None = None) -> Path:
    """The file of a policy: `run` itself, or policies/STAGE/seed_SEED.npz in that folder.

    Raises ConfigError, which names the policies that exist, if there is no such policy.
    """
    if run.is_file():
        for option, given in (("--stage", stage), ("--seed", seed)):
            if given is not None:
                raise ConfigError(f"{option}: got {given!r}, but {run} is one policy already")
        return run
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such file or folder")
    stages: dict[str, dict[int, Path]] = {}
    for path in sorted(run.glob("policies/*/seed_*.npz")):
        number = re.fullmatch(r"seed_(\d+)", path.stem)
        if number:
            stages.setdefault(path.parent.name, {})[int(number[1])] = path
    if not stages:
        raise ConfigError(f"{run}: holds no policies (no policies/STAGE/seed_N.npz)")
    if stage is None:
        stage = next(iter(stages))
    elif stage not in stages:
        raise _unknown("--stage", stage, nearest_name(stage, stages), stages)
    seeds = stages[stage]
    if seed is None:
        seed = min(seeds)
    elif seed not in seeds:
        nearest = min(seeds, key=lambda known: abs(known - seed))
        raise _unknown("--seed", seed, nearest, seeds)
    return seeds[seed]


def _unknown(
    option: str, given: object, nearest: object, known: Iterable[str] | Iterable[int]
) -> ConfigError:
    names = ", ".join(map(str, sorted(known)))
    return ConfigError(f"{option}: got {given!r}, the nearest is {nearest} (there are: {names})")


def play(
    policy: Policy, key: jax.Array, *, deterministic: bool = True, max_steps: int = 1000
) -> rendering.Episode:
    """Plays one episode to its end, or for `max_steps` steps."""
    env = policy.environment
    bodies = isinstance(env, Brax) and hasattr(env.unwrapped, "sys")

    @jax.jit
    def steps(key: jax.Array) -> Any:
        key_reset, key_steps = jax.random.split(key)
        observation, state = env.reset(key_reset, policy.env_params)
        if env.draws_starts:  # only one episode is shown, which needs no reset in every step
            state = env.draw_start(key_reset, state, policy.env_params)

        def step(carry: Any, key: jax.Array) -> Any:
            observation, state, memory = carry
            key_act, key_step = jax.random.split(key)
            action, memory = policy.act(observation, key_act, memory, deterministic=deterministic)
            after, next_state, reward, terminated, truncated, info = env.step(
                key_step, state, action, policy.env_params
            )
            ended = terminated | truncated
            poses = state.now.pipeline_state.x if bodies else None
            seen = observation, info["final_observation"], reward, ended, poses
            return (after, next_state, memory), seen

        start = observation, state, policy.initial_carry()
        return jax.lax.scan(step, start, jax.random.split(key_steps, max_steps))[1]

    observations, finals, rewards, ended, poses = jax.tree.map(np.asarray, steps(key))
    length = int(np.argmax(ended)) + 1 if ended.any() else max_steps
    return rendering.Episode(
        np.concatenate([observations[:length], finals[length - 1 : length]]),
        rewards[:length],
        bool(ended.any()),
        jax.tree.map(lambda x: x[:length], poses),
    )


def draw(policy: Policy, episode: rendering.Episode, out: Path) -> None:
    """Writes the episode to `out`, whose suffix is .html (brax only) or .gif."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write = rendering.write_html if out.suffix == ".html" else rendering.write_gif
    write(policy.environment, episode, out)


def _load(path: Path, out: Path | None) -> tuple[Policy, Path]:
    """The policy, and the file for its episode. Raises ConfigError."""
    try:
        policy = load_policy(path)
        env = policy.environment
        bodies = isinstance(env, Brax) and hasattr(env.unwrapped, "sys")
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error
    allowed = (".html", ".gif") if bodies else (".gif",)
    out = out or path.with_suffix(allowed[0])
    if out.suffix not in allowed:
        raise ConfigError(
            f"--out: got {str(out)!r}, allowed for {policy.env}: names that end in "
            f"{' or '.join(allowed)}"
        )
    return policy, out


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Runs the command line; ends the process with exit code 2 for a wrong argument."""
    parser = _Parser(prog="python -m experiments.play", allow_abbrev=False)
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, or a policy's .npz file"
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="stage whose policy plays (default: the first)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, help="seed whose policy plays (default: the first)"
    )
    parser.add_argument(
        "--episode-key", metavar="N", type=int, default=0, help="seed of the episode (default: 0)"
    )
    parser.add_argument("--stochastic", action="store_true", help="sample the actions")
    parser.add_argument(
        "--max-steps",
        metavar="N",
        type=int,
        default=1000,
        help="largest number of steps (default: 1000)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help=".html (brax only) or .gif (default: beside the policy)",
    )
    given = parser.parse_args()
    if given.max_steps < 1:
        parser.error(f"--max-steps: got {given.max_steps}, allowed: 1 or more")
    try:
        path = find_policy(given.run, given.stage, given.seed)
        policy, out = _load(path, given.out)
        episode = play(
            policy, jax.random.key(given.episode_key), deterministic=not given.stochastic,
            max_steps=given.max_steps,
        )  # fmt: skip
        draw(policy, episode, out)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    end = "" if episode.ended else ", where it was stopped"
    print(f"{out}: return {episode.rewards.sum():.6g} in {len(episode.rewards)} steps{end}")


if __name__ == "__main__":
    main()
