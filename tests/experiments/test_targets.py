"""Which targets a config may name, and what they may be given."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import optax
import pytest

from experiments.config import Precision
from experiments.targets import ConfigError, build, check_nodes, describe, fits, locate


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "hydra.utils.get_method",
        "subprocess.run",
        "jax.numpy.sum",
        "optax.os.system",
        "optax.jax.numpy.sum",
        "optax.abc",
        "experiments.trackers.csv.writer",
        "experiments.config.OverridesParser",
        "experiments.trackers.Path",
        "flax.io.rmtree",
        "flax.linen.jax.numpy.sum",
        "optax.__builtins__.get",
        "optax.sgd.__globals__.get",
        "optax.sgd.__class__",
        "optax._src.alias.sgd",
        "experiments.trackers._means",
        "optaxx.sgd",
        "optax",
        "optax.",
        ".optax.sgd",
        "optax..sgd",
        "",
        3,
        None,
    ],
)
def test_forbidden_targets(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^task\.x: got "):
        locate(name, "task.x")


@pytest.mark.parametrize(
    ("name", "expected"), [("optax.sgd", optax.sgd), ("flax.linen.Dense", nn.Dense)]
)
def test_allowed_targets(name: str, expected: Any) -> None:
    assert locate(name, "task.x") is expected


def test_foreign_modules_are_not_walked_through() -> None:
    with pytest.raises(ConfigError, match="leads through the module jax"):
        locate("flax.linen.module.jax.experimental.ode.odeint", "task.x")


def test_unknown_name_has_a_hint() -> None:
    with pytest.raises(ConfigError, match="no 'sgdd', the nearest is sgd"):
        locate("optax.sgdd", "task.x")


SGD = {"_target_": "optax.sgd", "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({**SGD, "momentun": 0.9}, r"^task\.momentun: unknown key, the nearest is task\.momentum "),
        ({"a": {"b": [SGD, {**SGD, "x": 1}]}}, r"^task\.a\.b\[1\]\.x: unknown key"),
        ({**SGD, "learning_rate": "abc"}, r"^task\.learning_rate: got 'abc', allowed: a number or"),
        ({**SGD, "nesterov": 1}, r"^task\.nesterov: got 1, allowed: true or false"),
        ({"_target_": "optax.sgd"}, r"^task: missing a required argument: 'learning_rate'"),
        ({**SGD, "_args_": [1, 2]}, r"^task: multiple values for argument 'learning_rate'"),
        ({**SGD, "momentum": {"_target_": "os.system"}}, r"^task\.momentum\._target_: got 'os"),
        ({"a": "${oc.create:{_target_: os.system}}"}, r"^task\.a: got .* allowed: text without"),
        ({"_target_": {"_target_": "optax.sgd"}}, r"^task\._target_: got"),
    ],
)
def test_wrong_nodes(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_nodes(node, "task")


def test_nothing_is_called_by_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optax, "sgd", functools.wraps(optax.sgd)(lambda learning_rate: 1 / 0))
    check_nodes(SGD, "task")


def test_build() -> None:
    node = {
        "tx": {"_target_": "optax.chain", "_args_": [{"_target_": "optax.clip", "max_delta": 1}]},
        "factory": {"_target_": "optax.sgd", "_partial_": True, "momentum": 0.9},
        "list": [1, {"a": SGD}],
    }
    built = build(node, "task")
    assert isinstance(built["tx"], optax.GradientTransformation)
    assert isinstance(built["factory"](0.1), optax.GradientTransformation)
    assert isinstance(built["list"][1]["a"], optax.GradientTransformation)


def test_what_a_target_raises_has_its_key() -> None:
    node = {"inner": [{"_target_": "optax.contrib.sam", "optimizer": SGD, "x": SGD}]}
    with pytest.raises(ConfigError, match=r"^task\.inner\[0\]\.x: unknown"):
        build(node, "task")
    with pytest.raises(ConfigError, match=r"^task\.inner\.rho must be >= 0, got -1"):
        build({"inner": {"_target_": "trustjax.optim.sam", "rho": -1}}, "task")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (None, float, False),
        (None, float | None, True),
        (0, bool, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ("bfloat16", Precision, True),
        ("float16", Precision, False),
        ([1, 2.5], Sequence[float], True),
        ([1, "a"], list[float], False),
        ("ab", Sequence[str], False),
        ([1, 2], tuple[int, int], True),
        ([1], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        (3, Callable[[int], int], False),
        (SGD, Callable[[int], int], True),
        (3, optax.GradientTransformation, False),
        (3, optax.ScalarOrSchedule, True),
        ("abc", optax.ScalarOrSchedule, False),
        (object(), Any, True),
    ],
)
def test_fits(value: Any, annotation: Any, expected: bool) -> None:
    assert fits(value, annotation) is expected


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "an integer or null"),
        (Literal["a", "b"], "a or b"),
        (Precision, "float32 or bfloat16 or float64"),
        (list[float], "a list of (a number)"),
        (dict[str, bool], "keys, each with true or false"),
        (optax.GradientTransformation, "a node with _target_"),
    ],
)
def test_describe(annotation: Any, words: str) -> None:
    assert describe(annotation) == words
