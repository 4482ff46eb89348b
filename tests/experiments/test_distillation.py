"""Distillation: where each student's loss is least, the ranking measure, and a whole training."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.metrics import ndcg_score
from test_adaptation import train

from experiments.optimizers import Optimizer
from experiments.runtime.config import CONF
from experiments.tasks.distillation import Distillation
from experiments.tasks.students import Anchored, Plain, Seen, log_densities, ndcg
from trustjax.agents import sac
from trustjax.agents.algorithm import adam
from trustjax.distributions import DiagonalGaussian
from trustjax.losses import ema_anchor

FILES = sorted((CONF / "student").glob("*.yaml"))
STUDENTS = {
    "kd": Plain(),
    "adpo_uniform": Anchored("uniform"),
    "adpo_teacher": Anchored("teacher", temperature=3.0),
    "adpo_ema": Anchored("weights", anchor=ema_anchor(0.9)),
}
SMALL = Distillation(
    teacher=functools.partial(
        sac.Config, hidden=(8,), learning_starts=64, num_envs=4, num_steps=16, batch_size=16,
        buffer_size=1024, gradient_steps=1,
    ),
    env="gymnax:Pendulum-v1",
    students=STUDENTS,
    optimizer=Optimizer(adam),
    seed=0,
    num_seeds=2,
    precision="float32",
    only=(),
    teacher_steps=256,
    steps_per_chunk=128,
    visited_envs=4,
    visited_steps=60,
    candidates=8,
    steps=400,
    student_steps_per_chunk=200,
    learning_rate=1e-2,
    batch_size=64,
    evaluation_episodes=2,
)  # fmt: skip


def gaussian(mean: Any, std: Any) -> DiagonalGaussian:
    shape = (5, 2)
    return DiagonalGaussian(jnp.full(shape, mean), jnp.log(jnp.full(shape, std)))


def slopes(loss: Any, means: Any, stds: Any, anchor: DiagonalGaussian) -> list[jax.Array]:
    """Sizes of the gradients of means and log deviations, [case]; the teacher is N(1, 0.5)."""
    candidates = 1 + jax.random.normal(jax.random.key(0), (5, 8, 2))
    teacher = gaussian(1.0, 0.5)

    @jax.jit
    @jax.vmap
    def sizes(mean: jax.Array, std: jax.Array) -> Any:
        def value(student: DiagonalGaussian) -> jax.Array:
            return loss(Seen(student, teacher, anchor, candidates))[0]

        return jax.tree.map(lambda x: jnp.abs(x).max(), jax.grad(value)(gaussian(mean, std)))

    return [*sizes(jnp.array(means), jnp.array(stds))]


def test_the_optimum_of_each_loss() -> None:
    """Products of Gaussians, whose precisions add: on any candidates, both gradients are 0 there.

    Fails with anchor and target exchanged, with a temperature that multiplies, and with densities
    of the tanh.
    """
    first = gaussian(-1.0, 2.0)  # precisions: 1/4 of the anchor, 4 of the teacher
    tau = 3.0
    precision = 0.25 + 4 * tau
    cases = [
        (Plain(), 1.0, 0.5),
        (Plain("reverse"), 1.0, 0.5),
        (Anchored("uniform"), 1.0, 0.5),
        (Anchored("teacher", "uniform", tau), 1.0, 0.5),
        (Anchored("teacher", temperature=tau), 1.0, 0.5 / np.sqrt(1 + tau)),
        (Anchored("weights", temperature=tau), (4 * tau - 0.25) / precision, precision**-0.5),
    ]
    for loss, mean, std in cases:
        of_mean, of_std = slopes(loss, [mean, mean + 0.1, mean], [std, std, 1.3 * std], first)
        assert max(of_mean[0], of_std[0]) < 2e-5, loss
        assert min(of_mean[1], of_std[2]) > 1e-3, loss


def test_ndcg_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores, gains = random.normal(size=(6, 5)), random.random((6, 5))
    each = [ndcg_score(g[None], s[None]) for g, s in zip(gains, scores, strict=True)]
    np.testing.assert_allclose(ndcg(jnp.array(scores), jnp.array(gains)), each, rtol=1e-5)
    candidates = jnp.array(random.normal(size=(5, 3, 2)))
    found = log_densities(gaussian(0.0, 1.0), candidates)
    expected = -0.5 * np.sum(candidates**2, -1) - np.log(2 * np.pi)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def students_of(name: str) -> Any:
    """Rows and the last state of students of two random teachers."""
    agent = SMALL._config.agent()
    keys = jax.random.split(jax.random.key(3), 2)
    params = jax.vmap(lambda key: agent.actor.init(key, jnp.zeros((1, 3))))(keys)
    # Nearly alike in all states, so that few states tell how a teacher acts in others.
    params = jax.tree.map(lambda x: 0.3 * x, params)
    stage = SMALL._student(name)
    state = stage.init({"teacher": SimpleNamespace(params={"actor": params}, observations=None)})
    for step in range(0, stage.num_steps, stage.steps_per_chunk):
        state, rows = stage.advance(state, None, step, stage.steps_per_chunk)
    return rows, state


@pytest.mark.slow
def test_students_learn_and_are_as_sharp_as_derived() -> None:
    """Fails with the gradient's sign flipped, without a step, and with states that do not match."""
    rows, state = students_of("adpo_teacher")
    for row in rows:
        assert abs(row["std/ratio"] - 0.5) < 0.05  # 1 / sqrt(1 + 3)
        assert row["ndcg"] > 0.99
        assert row["trust/radius"] > 0
    assert state.train.observations.shape == (2, 3 * 60, 3)
    assert state.held_out.observations.shape == (2, 60, 3)
    assert not np.array_equal(state.train.mean[0], state.train.mean[1])  # a teacher for each seed


@pytest.mark.slow
def test_plain_distillation_and_the_control_give_back_the_teacher() -> None:
    (plain, one), (control, other) = students_of("kd"), students_of("adpo_uniform")
    for row in (*plain, *control):
        assert row["kl/teacher_student"] < 0.05
        assert abs(row["std/ratio"] - 1) < 0.1
    jax.tree.map(np.testing.assert_array_equal, one.train, other.train)  # the same states


@pytest.mark.slow
def test_a_whole_training(tmp_path: Path) -> None:
    rows, final = train(SMALL)
    values, table = SMALL.summarize(rows)
    assert [row[0] for row in table.rows] == ["teacher", *STUDENTS]
    lost = values["kd"]["loss_of_return"]["seeds"]
    assert lost == pytest.approx(
        np.subtract(
            values["teacher"]["final/return"]["seeds"], values["kd"]["final/return"]["seeds"]
        )
    )
    assert values["adpo_ema"]["std/ratio"]["mean"] < values["kd"]["std/ratio"]["mean"] - 0.1
    SMALL.plot(rows, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"students.png", "learning_curves.png"}
    SMALL._student("kd").save(final["kd"], tmp_path)
    assert len([*(tmp_path / "policies" / "kd").iterdir()]) == 2


def test_every_file_of_conf_is_in_the_experiment() -> None:
    lines = (CONF / "exp" / "adpo_distill.yaml").read_text().splitlines()
    named = {line.rpartition(": ")[2] for line in lines if "/student@" in line}
    assert named == {path.stem for path in FILES}
    made = {path.stem: instantiate(OmegaConf.load(path)) for path in FILES}
    assert made["kd"] == Plain()
    assert made["adpo_teacher_uniform"] == Anchored("teacher", "uniform")
    params = jnp.ones(3)
    moved = made["adpo_ema"].anchor.update(made["adpo_ema"].anchor.init(params), 2 * params)
    np.testing.assert_allclose(moved.params, 1.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, "candidates must be >= 2"),
        ({"visited_envs": 3}, "visited_envs must be >= 4"),
        ({"candidates": 5}, "candidates must be even"),
        ({"env": "gymnax:CartPole-v1"}, "env must be one in JAX with continuous actions"),
        ({"env": "gymnax:Nothing"}, "env must be an environment"),
        ({"only": ("x",)}, "only must name students of"),
    ],
)
def test_wrong_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes).validate()


def test_wrong_fields_of_a_student() -> None:
    with pytest.raises(ValueError, match="direction must be"):
        Plain("sideways")
    with pytest.raises(ValueError, match="reference must be"):
        Anchored("self")
    with pytest.raises(ValueError, match="anchor must be left out with the reference 'teacher'"):
        Anchored("teacher", anchor=ema_anchor())
