"""Steps per second of reinforcement learning, with learning, against rejax, purejaxrl and brax.

bash benchmarks/peers/build.sh NAME FOLDER      once for each peer: rejax, purejaxrl, brax
python -m benchmarks.rl_throughput --peers FOLDER --out FILE [--rounds N] [--only QUESTION ...]

Every training runs in a process of its own. The programs of a question take turns, `rounds` times;
a ratio is the median of the ratios within a turn. The questions are:

    cartpole    PPO against rejax and purejaxrl: same network, samples, epochs and minibatches
    brax        PPO with brax's network sizes against brax, on inverted pendulum and hopper
    target      seconds to the same return, our defaults against brax's PPO
    seeds       16 seeds in one program against 16 programs of one seed
    agents      TRPO and MDPO against PPO on the same rollout: the price of the trust region
    sac_rejax   SAC against rejax on Pendulum: same updates and networks
    sac_brax    SAC against brax on the inverted pendulum: same updates and networks
    shuffle     returns of eighty seeds, with minibatches of environments and of transitions
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.questions import Numbers, answer
from experiments.analysis.statistics import mean_interval

HERE = Path(__file__).parent
DETAILS = ["normalize_observations=True", "normalize_rewards=True"]
NO_DETAILS = ["normalize_observations=False", "normalize_rewards=False"]
CARTPOLE = ["--environment", "gymnax:CartPole-v1", "--steps", "1000000", "--num-envs", "64"]
OUR_CARTPOLE = [*CARTPOLE, "--set", "num_steps=128", "num_epochs=4", "num_minibatches=4",
                "learning_rate=1e-3", *NO_DETAILS]  # fmt: skip
# The networks of brax and the iterations of peers/brax_ppo.py: 80 steps of 256 environments, in
# four epochs of 32 minibatches.
BRAX_SIZES = ["hidden=[32,32,32,32]", "critic_hidden=[256,256,256,256,256]", "activation=silu",
              "normalize_observations=True", "normalize_rewards=False", "num_steps=80",
              "num_minibatches=32", "num_epochs=4"]  # fmt: skip
SAC_SIZES = ["hidden=[64,64]", "learning_rate=1e-3"]
# By task: steps over which programs are timed, the return to reach, the most steps for reaching it.
TASKS = {
    "inverted_pendulum": (200_000, 500.0, 1_600_000),
    "hopper": (200_000, 450.0, 1_600_000),
}
# Neither task is solved on the quicker spring backend; see docs/environments.md.
BACKEND = "generalized"


class Programs:
    """Command lines of our programs and of the peers.

    Attributes:
      peers: Folder with one virtual environment per peer.
    """

    def __init__(self, peers: Path) -> None:
        self.peers = peers

    def ours(self, *arguments: str) -> list[str]:
        """The command line of one of our agents."""
        return [sys.executable, "-m", "benchmarks.rl_run", *arguments]

    def peer(self, name: str, *arguments: str, agent: str = "ppo") -> list[str]:
        """The command line of the peer `name`, in its own virtual environment."""
        python = self.peers / name / "bin" / "python"
        return [str(python), str(HERE / "peers" / f"{name}_{agent}.py"), *arguments]


def run(command: Sequence[str]) -> Numbers:
    """Runs a training, and returns the JSON of its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: Numbers = json.loads(done.stdout.splitlines()[-1])
    return found


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Numbers]]:
    """Runs every command once per round, in turn; all programs of a round have the same seed."""
    found: dict[str, list[Numbers]] = {name: [] for name in commands}
    for index in range(rounds):
        for name, command in commands.items():
            found[name].append(run([*command, "--seed", str(100 * index)]))
            print(f"{index + 1}/{rounds} {name}: {_speed(found[name][-1]):.3g} steps/s", flush=True)
    return found


def _speed(numbers: Numbers) -> float:
    return float(np.median(numbers.get("steps_per_second") or np.nan))


def rows(found: Mapping[str, list[Numbers]]) -> dict[str, Numbers]:
    """Speed, compile time and return of every program, and the ratio of the first one's speed."""
    # Ratios are taken within a round, as the machine's speed may drift between rounds.
    first = np.array([_speed(each) for each in next(iter(found.values()))])
    table = {}
    for name, rounds in found.items():
        speeds = np.array([_speed(each) for each in rounds])
        table[name] = {
            "steps_per_second": float(np.median(speeds)),
            "lowest": float(speeds.min()),
            "highest": float(speeds.max()),
            "first_over_this": float(np.median(first / speeds)),
            "compile_seconds": float(np.median([each["compile_seconds"] for each in rounds])),
            "last_return": rounds[-1]["returns"][-1:] or None,
            **_evaluated(rounds),
            "versions": rounds[-1]["versions"],
        }
    return table


def _evaluated(rounds: list[Numbers]) -> Numbers:
    """The mean return of the evaluations, if there are any."""
    reached = [each for numbers in rounds for each in numbers.get("evaluations", [])]
    return {"return": {**mean_interval(reached)._asdict(), "each": reached}} if reached else {}


def cartpole(programs: Programs, rounds: int) -> Numbers:
    """PPO against rejax and purejaxrl."""
    peer = [argument.removeprefix("gymnax:") for argument in CARTPOLE]
    return rows(take_turns({
        "trustjax": programs.ours(*OUR_CARTPOLE),
        "rejax": programs.peer("rejax", *peer),
        "purejaxrl": programs.peer("purejaxrl", *peer),
    }, rounds))  # fmt: skip


def brax(programs: Programs, rounds: int) -> Numbers:
    """PPO at brax's network sizes, with as many samples, epochs and minibatches."""
    found = {}
    for task, (steps, _, _) in TASKS.items():
        shared = ["--steps", str(steps), "--num-envs", "256"]
        found[task] = rows(take_turns({
            "trustjax": programs.ours(*shared, "--repeat", "1", "--environment", _like_brax(task),
                                      "--set", *BRAX_SIZES),
            "brax": programs.peer(
                "brax", *shared, "--environment", task, "--backend", BACKEND
            ),
        }, rounds))  # fmt: skip
    return found


def target(programs: Programs, rounds: int) -> Numbers:
    """Seconds of training to a return, our defaults against brax's.

    Every 20480 steps both play 16 episodes with noise, whose time is not counted.
    """
    found = {}
    for task, (_, wanted, most) in TASKS.items():
        each = take_turns({
            "trustjax": programs.ours(
                "--environment", _like_brax(task), "--steps", str(most), "--num-envs", "64",
                "--repeat", "0", "--target", str(wanted), "--set", "num_steps=32", *DETAILS,
                "num_epochs=10", "num_minibatches=16", "learning_rate=1e-3",
            ),
            "brax": programs.peer(
                "brax", "--environment", task, "--backend", BACKEND, "--steps", str(most),
                "--num-envs", "256",
                "--epochs", "78", "--target", str(wanted),
            ),
        }, rounds)  # fmt: skip
        found[task] = {
            "return": wanted,
            **{
                name: {
                    "seconds": [one["seconds_to_target"] for one in of],
                    "highest": [max(one["seen"]) for one in of],
                }
                for name, of in each.items()
            },
        }
    return found


def seeds(programs: Programs, rounds: int) -> Numbers:
    """16 seeds side by side, and one alone."""
    few = [argument if argument != "1000000" else "200000" for argument in OUR_CARTPOLE]
    options = few.index("--set")
    return rows(take_turns({
        "16 in one program": programs.ours(*few[:options], "--num-seeds", "16", *few[options:]),
        "one": programs.ours(*few),
    }, rounds))  # fmt: skip


def agents(programs: Programs, rounds: int) -> Numbers:
    """The three algorithms on Pendulum, with 2048 steps per iteration."""
    common = ["--environment", "gymnax:Pendulum-v1", "--steps", "200000", "--num-envs", "16"]
    shape = ["--set", "num_steps=128", "num_minibatches=16", *DETAILS]
    return rows(take_turns({
        "ppo, 10 epochs": programs.ours("--agent", "ppo", *common, *shape, "num_epochs=10"),
        "trpo": programs.ours("--agent", "trpo", *common, *shape),
        "mdpo": programs.ours("--agent", "mdpo", *common, *shape),
    }, rounds))  # fmt: skip


def sac_rejax(programs: Programs, rounds: int) -> Numbers:
    """SAC on Pendulum with one gradient step per transition; also returns of evaluations."""
    shared = ["--steps", "40000"]
    return rows(take_turns({
        "trustjax": programs.ours(
            "--agent", "sac", *shared, "--num-envs", "1", "--environment", "gymnax:Pendulum-v1",
            "--evaluate", "128", "--set", *SAC_SIZES, "batch_size=256", "learning_starts=2048",
        ),
        "rejax": programs.peer("rejax", *shared, agent="sac"),
    }, rounds))  # fmt: skip


def sac_brax(programs: Programs, rounds: int) -> Numbers:
    """SAC on the inverted pendulum with one gradient step per transition; also returns."""
    shared = ["--steps", "40000", "--num-envs", "8"]
    return rows(take_turns({
        "trustjax": programs.ours(
            "--agent", "sac", *shared, "--environment", _like_brax("inverted_pendulum"),
            "--evaluate", "32", "--deterministic", "--repeat", "1", "--set", *SAC_SIZES,
            "batch_size=128", "gradient_steps=8", "learning_starts=5000", "num_steps=25",
            "target_entropy=-0.5",
        ),
        "brax": programs.peer("brax", *shared, agent="sac"),
    }, rounds))  # fmt: skip


def shuffle(programs: Programs, rounds: int) -> Numbers:
    """Returns of eighty seeds, their mean and its interval."""
    del rounds
    found = {}
    for kind in ("environments", "transitions"):
        arguments = [*CARTPOLE, "--num-seeds", "80", "--repeat", "1", "--set", "num_steps=128",
                     "num_epochs=4", "learning_rate=1e-3", *DETAILS, f"shuffle={kind}"]  # fmt: skip
        numbers = run(programs.ours(*[a if a != "1000000" else "400000" for a in arguments]))
        found[kind] = {
            **mean_interval(numbers["final_returns"])._asdict(),
            "over_training": float(np.mean([mean for _, mean in numbers["returns"]])),
            "seeds": numbers["final_returns"],
            "curve": numbers["returns"],
        }
    return found


def _like_brax(task: str) -> str:
    """The environment as brax's own wrappers have it, which return to the first state."""
    return f"brax:{task}?backend={BACKEND}&fresh_resets=False"


QUESTIONS = {
    "cartpole": cartpole,
    "brax": brax,
    "target": target,
    "seeds": seeds,
    "agents": agents,
    "sac_rejax": sac_rejax,
    "sac_brax": sac_brax,
    "shuffle": shuffle,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    questions = {
        name: lambda peers, rounds, ask=ask: ask(Programs(peers), rounds)
        for name, ask in QUESTIONS.items()
    }
    answer("rl_throughput", __doc__, questions, arguments)


if __name__ == "__main__":
    main()
