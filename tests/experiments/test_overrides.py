"""Overrides on the command line, what reads them, and what a resumed run may change."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.runtime.building import build
from experiments.runtime.config import Root, check_config, experiments, groups, to_plain
from experiments.runtime.overrides import (
    check_override,
    check_read,
    compose,
    composed,
    parse,
    quoted,
    resumed_config,
)
from experiments.runtime.targets import ConfigError


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


@pytest.mark.parametrize("value", [
    "a=b", "a#b", "(a", "[a", "a]", "\u00fc", "~x", "a b", "{a", "'a", '"', '\\\\"', "a\\\\",
    "$a", "a,b", "!", "*", "/tmp/a=b/#1 (2)", "a'b\"c", "\u65e5\u672c", "a:b",
    "%", "@", "^", "&", ";", "|", "<", ">", "?", "\\",
])  # fmt: skip
def test_text_with_signs(value: str) -> None:
    """What the error shows is typed in a shell, and gives the key that text."""
    (argument,) = shlex.split(quoted("data.path", value))
    assert parse(argument).value() == value
    try:
        parse(f"data.path={value}")
    except ConfigError as error:
        assert str(error).startswith("data.path: cannot read ")  # noqa: PT017
        assert str(error).endswith(quoted("data.path", value))  # noqa: PT017


@pytest.mark.table
@pytest.mark.parametrize("exp", experiments())
def test_every_experiment_reads_all_its_keys(exp: str) -> None:
    config, choices = compose([f"+exp={exp}"])
    config.exp = exp
    check_read(config, choices)
    assert [*check_config(to_plain(config))] == [*Root.__dataclass_fields__]
    for group in {*groups()} - {"exp", "tracker"}:
        more = copy.deepcopy(config)
        OmegaConf.update(more, f"{group}.nothing", 77, force_add=True)
        with pytest.raises(ConfigError, match=rf"^(task\.)?{group}"):
            check_config(to_plain(check_read(more, choices) or more))


@pytest.mark.parametrize(
    ("exp", "given", "message"),
    [
        ("ppo_cartpole", "agent.learning_rate=77", "agent.learning_rate: nothing in "
         "+exp=ppo_cartpole reads it; see task.agents.ppo.learning_rate"),
        ("tram_vision", "optimizer.learning_rate=99", "optimizer.learning_rate: nothing in "
         "+exp=tram_vision reads it; see methods.adamw.learning_rate, methods.sam.learning_rate, "
         "methods.asam.learning_rate and 4 more"),
        ("tram_vision", "optimizer.radius.rho=1", "optimizer.radius.rho: nothing in "
         "+exp=tram_vision reads it; see methods.sam.optimizer.radius.rho, "
         "methods.asam.optimizer.radius.rho"),
        ("ppo_cartpole", "+agent=mdpo", "agent: nothing in +exp=ppo_cartpole reads it; set "
         "agent@task.agents.ppo=NAME"),
        ("ppo_cartpole", "env.gravity=1", "env.gravity: nothing in +exp=ppo_cartpole reads it; "),
        ("tram_vision", "mesh.num=1", "mesh.num: unknown key, the nearest is mesh.num_devices "),
        ("two_minima", "+data=mnist", "data: nothing in +exp=two_minima reads it"),
        ("auon_orthogonality", "precision=bfloat16", "precision must be float32 or float64"),
    ],
)  # fmt: skip
def test_keys_that_nothing_reads(exp: str, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(check_config(composed([f"+exp={exp}", given]))["task"], "task").validate()


def test_a_group_that_the_experiment_does_not_have() -> None:
    overrides = ["+exp=ppo_cartpole", "agent=mdpo"]
    with pytest.raises(ConfigError) as error:
        composed(overrides)
    assert str(error.value) == (
        "agent: nothing in +exp=ppo_cartpole chooses one; set agent@task.agents.ppo=NAME"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    node = {"_target_": "experiments.trackers.TensorBoard", "_partial_": True}
    saved = composed(["+exp=two_minima"]) | {"tracker": {"tensorboard": node}}
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


@pytest.mark.table
@pytest.mark.parametrize("task", [[1, 2], [], 3, "x", None])
@pytest.mark.parametrize("given", ["task.steps=9", "mesh.data=4", "tracker.x=3"])
def test_a_change_within_what_has_no_keys(task: Any, given: str, folder: Path) -> None:
    """One line, here or where the values are checked."""
    saved = OmegaConf.load(folder / "config.yaml")
    saved["task"] = saved["tracker"] = task
    OmegaConf.save(saved, folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"^(task|tracker)"):
        check_config(resumed_config(folder, [given]))
