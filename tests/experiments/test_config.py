"""The root configuration, overrides, and what a resumed run may change."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments import config
from experiments.config import check_config, check_override, experiments, resumed_config
from experiments.targets import ConfigError


@pytest.mark.parametrize(
    ("given", "for_hydra"),
    [
        ("seed=3", "seed=3"),
        ("seed=1,2", "seed=1,2"),
        ("exp=a", "+exp=a"),
        ("+exp=a", "+exp=a"),
        ("task.steps=3", "++task.steps=3"),
        ("+task.a.b=3", "++task.a.b=3"),
        ("++task.a=3", "++task.a=3"),
        ("~task.a", "~task.a"),
        ("tracker=csv", "tracker=csv"),
        ("tracker.a.b=1", "++tracker.a.b=1"),
        ("hydra.run.dir=x", "hydra.run.dir=x"),
        ("checkpoint.every=${seed}", "checkpoint.every=${seed}"),
    ],
)
def test_overrides_for_hydra(given: str, for_hydra: str) -> None:
    assert check_override(given) == for_hydra


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sead=1", "sead: unknown key, the nearest is seed"),
        ("resum=x", "the nearest is resume"),
        ("checkpoint.evry=1", r"checkpoint\.evry: unknown key, the nearest is checkpoint\.every"),
        ("seed=abc", "seed: got 'abc', allowed: an integer"),
        ("seed=1,abc", "seed: got 'abc', allowed: an integer"),
        ("seed=1.5", "seed: got 1.5, allowed: an integer"),
        ("deterministic=1", "deterministic: got 1, allowed: true or false"),
        ("precision=float16", "precision: got 'float16', allowed: float32 or bfloat16 or float64"),
        ("tracker=cvs", "tracker: got 'cvs', the nearest is csv"),
        ("task=3", "task: got 3, allowed: keys"),
        ("checkpoint=3", "checkpoint: got 3, allowed: the keys every, keep"),
        ("hydra.callbacks.x._target_=os.system", r"hydra\.callbacks\.x\._target_: got"),
        ("+hydra.callbacks={x:{_target_: os.system}}", r"hydra\.callbacks: got"),
    ],
)
def test_wrong_overrides(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_override(given)


def composed(**changes: Any) -> dict[str, Any]:
    task = {
        "_target_": "experiments.tasks.two_minima.TwoMinima",
        "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.1},
        "methods": {},
        "radii": [0.1],
    }
    root = {"task": task, "exp": "x", "seed": 0, "num_seeds": 5, "tracker": {}}
    root |= {"precision": "float32", "deterministic": True}
    return {**root, "checkpoint": {"every": 1, "keep": 2}, **changes}


def test_plain_defaults_of_the_task_are_filled_in() -> None:
    checked = check_config(composed())
    assert checked["task"]["steps"] == 400
    assert checked["task"]["precision"] == "float32"


def test_nodes_of_config_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optimizer").mkdir()
    monkeypatch.setattr(config, "CONF", tmp_path)
    node = {"_target_": "optax.sgd", "learning_rate": 0.1}
    assert "optimizer" not in check_config(composed(optimizer=node))  # the task has taken it
    with pytest.raises(ConfigError, match=r"^optimizer\.x: unknown key"):
        check_config(composed(optimizer={**node, "x": 1}))
    with pytest.raises(ConfigError, match=r"^optimiser: unknown key, the nearest is optimizer"):
        check_config(composed(optimiser=node))
    assert check_override("optimizer.momentum=0.9") == "++optimizer.momentum=0.9"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "abc"}, "seed: got 'abc', allowed: an integer"),
        ({"checkpoint": {"evry": 0}}, r"checkpoint\.evry: unknown key"),
        ({"precision": "float16"}, "precision: got 'float16'"),
        ({"task": 3}, "task: got 3"),
        ({"seed": -1}, "seed: got -1, allowed: an integer >= 0"),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"num_seeds": 0}, "num_seeds: got 0, allowed: an integer >= 1"),
        ({"checkpoint": {"every": 0, "keep": 2}}, r"checkpoint\.every: got 0"),
        ({"checkpoint": {"every": 1, "keep": 0}}, r"checkpoint\.keep: got 0"),
        ({"task": {}}, r"task\._target_: missing"),
        ({"task": {"_target_": "optax.identity"}}, r"task\._target_: got .* allowed: a dataclass"),
        ({"tracker": {"x": {"_target_": "os.system"}}}, r"tracker\.x\._target_: got 'os.system'"),
        ({"tracker": {"x": 1}}, "tracker: got"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_config(composed(**changes))


def test_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "b.yaml").write_text("# @package _global_\n\n# What b does\n# more\n")
    (tmp_path / "exp" / "a.yaml").write_text("# @package _global_\nseed: 1  # not this\n")
    monkeypatch.setattr(config, "CONF", tmp_path)
    assert experiments() == {"a": "", "b": "What b does"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    node = {"_target_": "experiments.trackers.TensorBoard", "_partial_": True}
    saved = composed(tracker={"tensorboard": node})
    saved["task"]["mesh"] = {"data": 1, "model": 2}
    OmegaConf.save(OmegaConf.create(saved), tmp_path / "config.yaml")
    return tmp_path


def test_what_a_resumed_run_may_change(folder: Path) -> None:
    given = ["task.steps=9", "task.pretrain_steps=8", "tracker=csv", "mesh.data=4"]
    resumed = resumed_config(folder, given)
    assert (resumed["task"]["steps"], resumed["task"]["pretrain_steps"]) == (9, 8)
    assert resumed["tracker"] == {}
    assert resumed["task"]["mesh"] == {"data": 4, "model": 2}
    assert resumed["seed"] == 0
    assert list(resumed_config(folder, ["tracker=default"])["tracker"]) == ["tensorboard"]


@pytest.mark.parametrize(
    "given",
    [
        "seed=1",
        "+exp=two_minima",
        "num_seeds=3",
        "task.noise=2",
        "task.optimizer.cg_steps=3",
        "task.steps_per_chunk=3",
        "task.steps=1,2",
        "~task.steps",
        "checkpoint.every=2",
        "hydra.run.dir=x",
    ],
)
def test_what_a_resumed_run_may_not_change(given: str, folder: Path) -> None:
    key = given.strip("+~").split("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}: got .*allowed with resume"):
        resumed_config(folder, [given])


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        resumed_config(tmp_path, [])
