"""Agents as experiments: what a run leaves, resume, other optimizers, numbers that blow up."""

import functools
import json
import os
import sys

import jax
import numpy as np
import optax
import pytest

from experiments import run
from experiments.optimizers import Optimizer
from experiments.runtime.task import Diverged
from experiments.tasks import reinforcement_training
from experiments.tasks.reinforcement import Reinforcement
from experiments.tasks.reinforcement_training import Training
from experiments.trackers import read_rows
from trustjax.agents import load_policy, mdpo, ppo

TINY = (
    "+exp=ppo_cartpole",
    "env.name=probe:action",
    "num_seeds=2",
    "task.total_steps=1024",
    "task.steps_per_chunk=256",
    "task.evaluation_episodes=4",
    "task.agents.ppo.num_envs=8",
    "task.agents.ppo.num_steps=16",
    "task.agents.ppo.hidden=[8]",
    "task.agents.ppo.learning_rate=0.03",
    "checkpoint.every=512",
)
EVALUATED = (*TINY, "task.evaluation_every=400")  # at the ends of the chunks in which it falls
TINY_REPLAY = (
    "+exp=mdpo_vs_sac",
    "env.name=probe:continuous",
    "task.only=[mdpo]",
    "num_seeds=2",
    "task.total_steps=1024",
    "task.steps_per_chunk=256",
    "task.evaluation_episodes=4",
    "task.agents.mdpo.num_steps=16",
    "task.agents.mdpo.hidden=[8]",
    "task.agents.mdpo.gradient_steps=1",
    "task.agents.mdpo.batch_size=16",
    "task.agents.mdpo.buffer_size=600",
    "task.agents.mdpo.learning_starts=100",
    "checkpoint.every=512",
)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the command line in a folder of its own; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        try:
            run.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.mark.slow
def test_a_run_leaves_policies_that_act(call, tmp_path, capsys):
    """The reward of the probe is that of the action: fails with the advantage's sign flipped."""
    assert call(*EVALUATED, "hydra.run.dir=run") == 0
    assert "probe:action, 1024 steps" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["result"]["ppo"]
    assert found["final/return"]["seeds"] == [1.0, 1.0]
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert list(rows[0])[:4] == ["stage", "step", "seed", "episode/return"]
    trained = [(row["step"], row["seed"]) for row in rows if "time/seconds" in row]
    assert trained == [(128 * i, seed) for i in range(1, 9) for seed in range(2)]  # iterations
    assert {"trust/radius", "trust/distance", "trust/used", "kl/new_old"} <= set(rows[0])
    evaluated = [row for row in rows if "evaluation/return" in row]
    points = [(row["step"], row["seed"]) for row in evaluated]
    assert points == [(step, seed) for step in (512, 1024) for seed in range(2)]
    assert [row["evaluation/return"] for row in evaluated[-2:]] == [1, 1]
    for name in ("seed_0", "seed_1", "seed_0_best", "seed_1_best"):
        policy = load_policy(tmp_path / "run" / "policies" / "ppo" / f"{name}.npz")
        shape = policy.environment.observation_shape
        action, _ = policy.act(np.ones(shape), jax.random.key(0), deterministic=True)
        assert action == 1
    for name in ("learning_curves.png", "trust_region.png"):
        assert (tmp_path / "run" / "plots" / name).stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize(("tiny", "agent"), [(EVALUATED, "ppo"), (TINY_REPLAY, "mdpo")])
def test_resume_gives_the_same_numbers(call, tmp_path, monkeypatch, capsys, tiny, agent):
    """A run that was cut off goes on with the same bits.

    Keys, environments, the replay and the best policy are saved.
    """
    assert call(*tiny, "hydra.run.dir=whole") == 0
    advance = Training.advance

    def cut_off(stage, state, batches, step, num_steps):
        if step == 768:
            raise Diverged("cut off")
        return advance(stage, state, batches, step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", cut_off)
        assert call(*tiny, "hydra.run.dir=cut") == 1
    assert f"stage {agent}: cut off; last checkpoint: step 512 of " in capsys.readouterr().err
    assert call("resume=cut") == 0
    whole, cut = (
        [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in read_rows(tmp_path / name / "metrics.csv")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut
    policies = {
        name: {
            path.name: path.read_bytes()
            for path in (tmp_path / name / "policies" / agent).glob("*.npz")
        }
        for name in ("whole", "cut")
    }
    assert len(policies["whole"]) == (4 if tiny is EVALUATED else 2)  # with the best ones
    assert policies["whole"] == policies["cut"]


def task(**changes):
    agents = {
        "mdpo": lambda **given: mdpo.Config(
            num_envs=8, num_steps=16, num_minibatches=4, hidden=(8,), **given
        ),
        "ppo": lambda **given: ppo.Config(num_envs=8, num_steps=16, hidden=(8,), **given),
    }
    fields = {
        "agents": agents,
        "env": "probe:both",
        "optimizer": Optimizer(optax.adam),
        "seed": 0,
        "num_seeds": 2,
        "precision": "float32",
        "only": (),
        "total_steps": 512,
        "steps_per_chunk": 256,
        "evaluation_episodes": 2,
    }
    return Reinforcement(**{**fields, **changes})


@pytest.mark.parametrize(
    ("total", "chunk", "length"), [(640, 256, 2), (704, 256, 1), (384, 512, 2)]
)
def test_one_program_serves_all_chunks(monkeypatch, total, chunk, length):
    """A replay's first chunk is shorter by what `init` did. Fails with a call for each chunk."""
    calls = []

    def advance(state, count):
        calls.append(count)
        names = ("episode/return", "episode/length")
        ends = state + 1 + np.arange(count)  # every iteration tells its number
        return state + count, {name: np.tile(ends, (2, 1)) for name in names}

    replay = functools.partial(mdpo.OffPolicyConfig, num_envs=4, num_steps=16, learning_starts=128)
    monkeypatch.setattr(reinforcement_training, "data_parallel", lambda *_, **__: (None, advance))
    (stage,) = task(agents={"mdpo": replay}, total_steps=total, steps_per_chunk=chunk).stages()
    state, step, rows = 2, 0, []  # `init` has taken the two random iterations of 64 steps
    while step < stage.num_steps:
        end = min(step + stage.steps_per_chunk, stage.num_steps)
        state, new = stage.advance(state, None, step, end - step)
        rows, step = [*rows, *new], end
    assert {*calls} == {length}
    assert [row["episode/return"] for row in rows[::2]] == [*range(3, total // 64 + 1)]
    assert [row["step"] for row in rows[::2]] == [64 * row["episode/return"] for row in rows[::2]]


def test_numbers_that_blow_up_stop_the_run():
    """With the step at which it happened, and what it was."""
    broken = Optimizer(lambda learning_rate: optax.scale(float("nan")))
    stage = task(optimizer=broken).stages()[1]
    with pytest.raises(Diverged, match=r"of seed 0 is nan at step 128"):
        stage.advance(stage.init({}), None, 0, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "gymnax:CartPole-v2"}, "env must be an environment: .*CartPole-v2.*CartPole-v1"),
        ({"only": ("sac",)}, r"only must name agents of \['mdpo', 'ppo'\], got 'sac'"),
        ({"total_steps": 100}, "total_steps must be at least num_envs"),
        ({"num_seeds": 0}, "num_seeds must be >= 1"),
    ],
)
def test_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        task(**changes).validate()


def test_an_environment_on_the_host_is_refused():
    """Its seeds could be trained together, but not evaluated: it would fail after the training."""
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    with pytest.raises(ValueError, match=r"env must be an environment in JAX, .*'gymnasium:CartPo"):
        task(env="gymnasium:CartPole-v1").validate()


def test_what_is_wrong_is_one_line(call, capsys):
    """Named by its full key, exit code 2."""
    assert call(*TINY, "task.agents.ppo.num_minibatches=3") == 2
    assert "task.agents.ppo.num_minibatches must divide the 8" in capsys.readouterr().err
    assert call(*TINY, "task.agents.ppo.clip=-1") == 2
    assert "task.agents.ppo.clip must be >= 0, got -1" in capsys.readouterr().err
    assert call(*TINY, "env.name=brax:hoper") == 2
    assert "hopper" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sam", "auon", "mirror_descent"])
def test_other_optimizers_are_an_override(optimizer, call):
    assert call(*TINY, f"optimizer={optimizer}", "task.total_steps=256", "hydra.run.dir=run") == 0


def _search(grid, **changes):
    """A task that searches numbers of a tiny PPO."""
    config = functools.partial(
        ppo.Config, num_envs=8, num_steps=16, num_epochs=1, num_minibatches=2, hidden=(8,),
        normalize_observations=False, normalize_rewards=False,
    )  # fmt: skip
    return Reinforcement(**{
        "agents": {"ppo": config}, "env": "probe:action", "optimizer": Optimizer(optax.adam),
        "seed": 0, "num_seeds": 2, "precision": "float32", "only": (), "total_steps": 512,
        "steps_per_chunk": 256, "evaluation_episodes": 4, "grid": grid, **changes,
    })  # fmt: skip


def _trained(task):
    """Rows of the only stage of a task, and those of its end."""
    (stage,) = task.stages()
    state = stage.init({})
    state, first = stage.advance(state, None, 0, 256)
    state, second = stage.advance(state, None, 256, 256)
    return [*first, *second], stage.finish(state)


@pytest.mark.slow
def test_a_trial_is_the_training_with_its_numbers():
    grid = {"ppo": {"learning_rate": [1e-3, 3e-2], "clip": [0.1, 0.3]}}
    rows, finals = _trained(_search(grid))
    config = functools.partial(
        ppo.Config, num_envs=8, num_steps=16, num_epochs=1, num_minibatches=2, hidden=(8,),
        normalize_observations=False, normalize_rewards=False, learning_rate=3e-2, clip=0.1,
    )  # fmt: skip
    alone, finals_alone = _trained(_search(None, agents={"ppo": config}))
    for found, expected in ((rows, alone), (finals, finals_alone)):
        own = [row for row in found if row["learning_rate"] == 0.03 and row["clip"] == 0.1]
        assert len(found) == 4 * len(own)
        for row, other in zip(own, expected, strict=True):
            assert set(row) == {*other, "learning_rate", "clip"}
            for name, value in other.items():
                np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_search_finds_the_better_rate_and_bears_a_trial_that_diverges():
    task = _search({"ppo": {"learning_rate": [1e-6, 3e-2, 1e30]}}, total_steps=4096)
    task.validate()
    (stage,) = task.stages()
    state, rows = stage.advance(stage.init({}), None, 0, 4096)
    assert stage.learned(state) == ()
    found = [{"stage": "ppo", **row} for row in (*rows, *stage.finish(state))]
    assert any(row.get("diverged") for row in found if row["learning_rate"] > 1)
    best = task.summarize(found).values["best"]["ppo"]
    assert best["learning_rate"] == 0.03
    assert best["return"] > 0.9  # of 1; the lowest rate stays near 0


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"ppo": {"num_envs": [8]}}, r"grid.ppo must name some of \[.*'learning_rate'.*num_envs"),
        ({"ppo": {"clip": [0.1, -1.0]}}, r"grid.ppo: clip must be >= 0, got -1"),
        ({}, r"grid must give every method equally many trials, got \{'ppo': 0\}"),
    ],
)
def test_searches_that_cannot_run_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        _search(grid).validate()
