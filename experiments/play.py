"""Plays one episode of a saved policy, and draws it.

python -m experiments.play RUN [--out FILE]     RUN is the folder of a run, or a policy's .npz file
    --stage NAME      stage whose policy plays; by default the first
    --seed N          seed whose policy plays; by default the first
    --episode-key N   seed of the episode's random numbers; by default 0
    --stochastic      sample the actions; by default they are the modes of the distributions
    --max-steps N     largest number of steps; by default 1000
    --out FILE        .gif; .html, a 3D view (brax only); or .png (flying base stations only); by
                      default beside the policy
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import rendering, uav_figures
from experiments.runtime.building import build
from experiments.runtime.config import check_config, read_config
from experiments.runtime.targets import ConfigError, nearest_name
from trustjax._checks import FieldError
from trustjax.agents import load_policy
from trustjax.agents.policy import Policy
from trustjax.envs import Environment, MultiUAV
from trustjax.envs.brax import Brax
from trustjax.envs.joint import Joint


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
    """Plays one episode to its end, or for `max_steps` steps.

    Of several agents the observations stand side by side, and rewards are means.
    """
    env: Any = policy.environment
    several = isinstance(env, Joint)

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
            shown = observation, info["final_observation"]
            if several:
                shown = shown[0]["agents"].ravel(), shown[1]["agents"].ravel()
            seen = *shown, jnp.mean(reward), ended, _scene(env, state)
            return (after, next_state, memory), seen

        start = observation, state, policy.initial_carry()
        return jax.lax.scan(step, start, jax.random.split(key_steps, max_steps))[1]

    observations, finals, rewards, ended, scenes = jax.tree.map(np.asarray, steps(key))
    length = int(np.argmax(ended)) + 1 if ended.any() else max_steps
    return rendering.Episode(
        np.concatenate([observations[:length], finals[length - 1 : length]]),
        rewards[:length],
        bool(ended.any()),
        jax.tree.map(lambda x: x[:length], scenes),
    )


def draw(policy: Policy, episode: rendering.Episode, out: Path) -> None:
    """Writes the episode to `out`, whose suffix is one of `suffixes`."""
    env: Any = policy.environment
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(env.unwrapped, MultiUAV):
        on_map = uav_figures.draw_flight if out.suffix == ".png" else uav_figures.write_flight_gif
        on_map(env.unwrapped, episode.scenes, out)
        return
    write = rendering.write_html if out.suffix == ".html" else rendering.write_gif
    write(env, episode, out)


def suffixes(env: Environment) -> tuple[str, ...]:
    """Suffixes of the files that an episode is drawn in, the default first."""
    if _has_bodies(env):
        return (".html", ".gif")
    return (".gif", ".png") if isinstance(env.unwrapped, MultiUAV) else (".gif",)


def _scene(env: Environment, state: Any) -> Any:
    """What is drawn of a state in place of its observation."""
    if _has_bodies(env):
        return state.now.pipeline_state.x
    return state if isinstance(env.unwrapped, MultiUAV) else None


def _has_bodies(env: Environment) -> bool:
    return isinstance(env, Brax) and hasattr(env.unwrapped, "sys")


def _load(path: Path, out: Path | None) -> tuple[Policy, Path]:
    """The policy, and the file for its episode. Raises ConfigError."""
    try:
        policy = _policy(path)
        allowed = suffixes(policy.environment)
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error
    out = out or path.with_suffix(allowed[0])
    if out.suffix not in allowed:
        raise ConfigError(
            f"--out: got {str(out)!r}, allowed for {policy.env}: names that end in "
            f"{' or '.join(allowed)}"
        )
    return policy, out


def _policy(path: Path) -> Policy:
    """The policy in a file; of several agents, whose networks the file does not hold, in a run.

    Raises ValueError and ModuleNotFoundError.
    """
    try:
        return load_policy(path)
    except FieldError as error:
        config = path.absolute().parents[2] / "config.yaml"
        if error.field not in ("env", "actor") or not config.is_file():
            raise
    task: Any = build(check_config(read_config(config).config)["task"], "task")
    stage = next(each for each in task.stages() if each.name == path.absolute().parent.name)
    agent = stage.config.agent()
    return load_policy(path, env=agent.env, actor=agent.actor)


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
        help=".gif, .html (brax only) or .png (flying base stations only); "
        "default: beside the policy",
    )
    given = parser.parse_args()
    if given.max_steps < 1:
        parser.error(f"--max-steps: got {given.max_steps}, allowed: 1 or more")
    if not 0 <= given.episode_key < 2**32:
        parser.error(f"--episode-key: got {given.episode_key}, allowed: 0 to {2**32 - 1}")
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
