"""Planners of vehicles, and the experiment that compares them with multi-agent methods."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import play as playing
from experiments import run
from experiments.tasks import uav_report
from experiments.tasks.uav import Vehicles
from experiments.tasks.uav_nash import Deviations
from experiments.tasks.uav_play import PLANNERS, clusters, play, toward
from trustjax.agents.multi import hatrpo
from trustjax.envs import MultiUAV
from trustjax.envs.joint import joint

KEY = jax.random.key(0)
ENV = joint(MultiUAV(num_uavs=2, num_users=4, max_steps_in_episode=5))


def test_clusters_settle_on_the_means():
    users = jnp.array([[0.0, 0.0], [2.0, 0.0], [10.0, 10.0], [10.0, 12.0]])
    found = clusters(jnp.array([[9.0, 9.0], [1.0, 1.0], [500.0, 500.0]]), users)
    np.testing.assert_allclose(found, [[10, 11], [1, 0], [500, 500]], rtol=1e-6)


@pytest.mark.slow
def test_a_vehicle_flies_to_its_target_at_full_power():
    _, state = ENV.reset(KEY)
    env = ENV.unwrapped
    far = jnp.clip(state.vehicles[:, :2] + jnp.array([[400.0, 0.0], [0.0, -400.0]]), 0, 1000)
    for targets, moved in ((far, env.max_speed * env.time_step), (state.vehicles[:, :2], 0.0)):
        actions = toward(ENV, state, targets, KEY)
        after = env.step_env(KEY, state, ENV.actions(actions))[1]
        before = jnp.linalg.norm(state.vehicles[:, :2] - targets, axis=-1)
        now = jnp.linalg.norm(after.vehicles[:, :2] - targets, axis=-1)
        np.testing.assert_allclose(before - now, np.minimum(moved, before), atol=20)
        np.testing.assert_allclose(after.power, env.max_power, rtol=1e-6)


def test_planners_are_better_than_a_random_walk_and_begin_alike():
    @jax.jit
    def measure(key):
        return {name: play(ENV, make(ENV), key, num_episodes=32) for name, make in PLANNERS.items()}

    found = measure(KEY)
    means = {name: float(np.mean(each["return"])) for name, each in found.items()}
    assert means["greedy"] > means["random_walk"] + 0.05
    for each in found.values():
        assert all(values.shape == (32,) for values in each.values())
        assert np.all((each["jain"] > 0) & (each["jain"] <= 1 + 1e-6))
        assert np.all(each["energy"] > 0)
    assert np.mean(found["k_means"]["sum_rate"]) > np.mean(found["random_walk"]["sum_rate"])


def row(stage, seed, value):
    return {"stage": stage, "seed": seed, "step": 1} | {
        f"final/{measure}": value for measure in uav_report.MEASURES
    }


def test_differences_are_paired_by_seed():
    rows = [row("a", 0, 1.0), row("a", 1, 3.0), row("b", 1, 4.5), row("b", 0, 2.5)]
    found = uav_report.summarize(rows, ["a", "b"], "title").values
    assert found["b"]["return"]["mean"] == 3.5
    assert found["b"]["return"]["seeds"] == [2.5, 4.5]
    assert found["b"]["return"]["difference"] == {"mean": 1.5, "low": 1.5, "high": 1.5}
    assert found["a"]["jain"]["difference"]["mean"] == 0


TASK = Vehicles(
    agents={"hatrpo": lambda **given: hatrpo.Config(**given, num_envs=2, num_steps=5)},
    planners=["k_means"], env="trustjax:MultiUAV?max_steps_in_episode=5",
    optimizer=optax.adam, seed=0, num_seeds=2, precision="float32", only=[], total_steps=20,
    steps_per_chunk=10, evaluation_episodes=2,
)  # fmt: skip


def test_a_run_that_ends_before_its_first_episode_has_figures(tmp_path):
    final = {f"final/{measure}": 1.0 for measure in uav_report.MEASURES}
    rows = [{"stage": "a", "step": 10, "seed": 0, "entropy": 1.0},
            {"stage": "a", "step": 10, "seed": 0, "final/modes": 1.0, **final},
            {"stage": "greedy", "step": 0, "seed": 0, **final}]  # fmt: skip
    uav_report.plot(rows, ["a"], ["greedy"], tmp_path)
    assert (tmp_path / "learning.png").is_file()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"env": "trustjax:MultiUAV?actions=continuous"}, "env must be trustjax:MultiUAV with"),
        ({"env": "gymnax:CartPole-v1"}, "env must be"),
        ({"env": "trustjax:MultiUAV?end_on_collision=true"}, "env must have end_on_collision=Fal"),
        ({"planners": ["oracle"]}, "planners must be one of 'random_walk', 'k_means', 'greedy'"),
        ({"only": ["ppo"]}, "only must be one of 'hatrpo', got 'ppo'"),
        ({"evaluation_episodes": 0}, "evaluation_episodes must be >= 1"),
        ({"precision": "bfloat16"}, "precision must be one of 'float32'"),
    ],
)
def test_bad_input_names_the_field(fields, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(TASK, **fields).validate()


def test_every_method_is_trained_with_each_reward_of_the_environment():
    fields = {field.name: getattr(TASK, field.name) for field in dataclasses.fields(TASK)}
    task = Deviations(**fields, rewards=["team", "individual"], responses={"num_episodes": 2})
    trainings = task.stages()[:2]
    assert task.names == ["hatrpo_team", "hatrpo_individual", "k_means"]
    for stage, reward in zip(trainings, task.rewards, strict=True):
        assert stage.config.reward == stage.config.environment.unwrapped.reward == reward
        assert stage.config.environment.unwrapped.max_steps_in_episode == 5
    with pytest.raises(ValueError, match="rewards must be one of 'team', 'individual'"):
        dataclasses.replace(task, rewards=["mine"]).validate()


def test_gains_by_seed():
    """The largest gain of a vehicle is taken seed by seed."""
    numbers = {"nash/return_0": 1.0, "nash/return_1": 3.0, "nash/gain_0": 0.5, "nash/gain_1": 0.0}
    rows = [{"stage": "a", "seed": 1, "nash/conv": 0.5, **numbers}]
    rows += [{"stage": "a", "seed": 0, "nash/conv": 0.75, **numbers, "nash/gain_1": 0.25}]
    rows += [{"stage": "a", "seed": 0, "episode/return": 1.0}]
    expected = {"return": [2, 2], "largest_gain": [0.5, 0.5], "nash_conv": [0.75, 0.5]}
    assert uav_report.gains(rows, "a") == expected


@pytest.mark.slow
def test_a_run_leaves_figures_and_policies(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny = [
        "+exp=ga_matr_uav", "hydra.run.dir=run", "num_seeds=2", "task.only=[ga_matr]",
        'env.name="trustjax:MultiUAV?max_steps_in_episode=5"', "task.total_steps=80",
        "task.steps_per_chunk=40", "task.evaluation_episodes=2",
        "task.agents.ga_matr.num_envs=4", "task.agents.ga_matr.num_steps=5",
        "task.agents.ga_matr.critic.gru_size=4", "checkpoint.every=80",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["run", *tiny])
    run.main()
    found = json.loads((tmp_path / "run/summary.json").read_text())["result"]
    assert list(found) == ["ga_matr", "random_walk", "k_means", "greedy"]
    assert len(found["greedy"]["return"]["seeds"]) == 2
    assert len(found["ga_matr"]["modes"]["seeds"]) == 2
    assert "modes" not in found["greedy"]
    for name in ("learning.png", "measures.png", "attention.png"):
        assert (tmp_path / "run/plots" / name).stat().st_size > 5000
    assert (tmp_path / "run/policies/ga_matr/seed_1.npz").is_file()
    # The networks of several agents are not in the file of a policy, but those of its run.
    monkeypatch.setattr(sys, "argv", ["play", "run", "--seed", "1"])
    playing.main()
    assert (tmp_path / "run/policies/ga_matr/seed_1.gif").is_file()
