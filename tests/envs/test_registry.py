"""Names of environments: what they say, and what is said to who gets them wrong."""

import subprocess
import sys

import pytest

from trustjax.envs import Environment, make, names
from trustjax.envs.arguments import split_name

SOURCES = ("gymnax", "brax", "probe")


def test_parts_of_a_name():
    text = "brax:hopper?a=1&b=spring&c=True&d=none&e=1e-3&f=[1, 2]&g=false&h=a=b"
    options = {"a": 1, "b": "spring", "c": True, "d": None, "e": 1e-3, "f": [1, 2], "g": False}
    assert split_name(text) == ("brax", "hopper", {**options, "h": "a=b"})
    assert split_name("probe:both") == ("probe", "both", {})


@pytest.mark.parametrize("source", SOURCES)
def test_names(source):
    known = {"gymnax": "CartPole-v1", "brax": "hopper", "probe": "memory"}[source]
    assert known in names(source)
    assert len(set(names(source))) == len(names(source))


@pytest.mark.parametrize(
    "name", ["gymnax:CartPole-v1", "brax:inverted_pendulum?backend=spring", "probe:memory"]
)
def test_make(name):
    env = make(name, max_steps_in_episode=7)
    assert isinstance(env, Environment)
    assert env.default_params.max_steps_in_episode == 7
    assert env.name == name.partition("?")[0]
    with pytest.raises(ValueError, match="max_steps_in_episode must be >= 1, got 0"):
        make(name, max_steps_in_episode=0)
    with pytest.raises(ValueError, match="max_steps_in_episode must be a whole number"):
        make(name, max_steps_in_episode=7.5)
    with pytest.raises(
        ValueError, match=r"unknown argument of .*'max_steps'.*max_steps_in_episode"
    ):
        make(name, max_steps=7)
    with pytest.raises(ValueError, match=r"unknown argument of .*'name'"):
        make(name, **{"name": "x"})
    again = f"{name}{'&' if '?' in name else '?'}max_steps_in_episode=3"
    assert make(again).default_params.max_steps_in_episode == 3
    with pytest.raises(ValueError, match="max_steps_in_episode is given twice"):
        make(again, max_steps_in_episode=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:CartPole-v1", "unknown source of environments in 'gym:CartPole-v1'; write gymnax:"),
        ("CartPole-v1", "unknown source of environments in 'CartPole-v1'"),
        ("gymnax:cartpole", "unknown environment of gymnax 'cartpole'; did you mean CartPole-v1"),
        ("brax:hoper", "unknown environment of brax 'hoper'; did you mean hopper"),
        ("probe:time", "unknown environment of probe 'time'; did you mean time_limit"),
        ("probe:xyzxyz", "unknown environment of probe 'xyzxyz'; there are action, both,"),
        ("probe:both?", "must be key=value, joined by &; got ''"),
        ("probe:both?limit", "must be key=value, joined by &; got 'limit'"),
        ("probe:both?limit=", "must be key=value, joined by &; got 'limit='"),
        ("probe:both?=3", "must be key=value, joined by &; got '=3'"),
        ("probe:both?a=1&a=2", "a is given twice in"),
        ("gymnax:CartPole-v1?gravity=high", "gravity must be a number, got 'high'"),
        ("gymnax:Acrobot-v1?available_torque=[1, 2]", r"must have shape \(3,\), got \(2,\)"),
    ],
)
def test_errors(name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_names_of_an_unknown_source():
    with pytest.raises(ValueError, match="unknown source of environments in 'atari'"):
        names("atari")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    with pytest.raises(ModuleNotFoundError, match="pip install playground"):
        make("playground:CartpoleBalance")


def test_silence():
    """A process that imports and makes an environment of brax prints nothing."""
    code = "import trustjax.envs as e; e.make('brax:inverted_pendulum?backend=spring')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
