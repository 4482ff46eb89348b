"""The root configuration, overrides, and what a resumed run may change."""

from pathlib import Path
from typing import Any

import pytest

from experiments.runtime import config
from experiments.runtime.config import check_config, experiments, read_config, save_config
from experiments.runtime.targets import ConfigError


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
        (
            {"num_seeds": 10**9},
            "num_seeds: got 1000000000, allowed: an integer <= 10000; more seeds",
        ),
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


ALIASES = "a: &a [1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(9 * ['*' + chr(97 + i)])}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no keys"),
        (b"\n# nothing\n", "got no keys"),
        (b"3", ", line 1: got no keys"),
        (b"- seed: 1", ", line 1: got no keys"),
        (b"a: 1\n---\nb: 2\n", ", line 2: but found another document"),
        (b"a: 1\nb: [1\n", r", line 3: .*expected ',' or '\]'"),
        (b"a: 1\n  b: 2", ", line 2: mapping values are not allowed "),
        (b"a: 1\na: 2\n", ", line 2: found duplicate key a"),
        (b"a: \xff", "cannot be read: 'utf-8' codec can't decode"),
        (b"a: \0", "characters are not allowed"),
        (ALIASES.encode(), ", line 1: got the anchor or alias 'a', allowed: none"),
        (b"a: *b", ", line 1: got the anchor or alias 'b', allowed: none"),
        (b"a: &b 1", ", line 1: got the anchor or alias 'b', allowed: none"),
        (b"a:\n  b: !!python/object/apply:os.system [x]", ", line 2: got the tag 'tag:yaml.org"),
        (b"a: !!binary AA==", ", line 1: got the tag "),
        (b"a: !x 3", ", line 1: got the tag '!x'"),
        (b"a: " + 300 * b"[" + 300 * b"]", ", line 1: nested more than 40 levels deep"),
        (b"a: " + 300 * b"{b: " + 300 * b"}", ", line 1: nested more than 40 levels deep"),
        (b"a: ${oc.env:HOME}", r", line 1: got '\$\{oc.env:HOME\}', allowed: text without"),
        (b"a: 1\n${seed}: 2", ", line 2: got "),
        (b"a: " + 5000 * b"9", "cannot be read: Exceeds the limit"),
        (b"? [a]\n: 1", "found unhashable key"),
        (b"a: =", "could not determine a constructor"),
        (b"a: " + 600_000 * b"b", "has 600003 bytes, allowed: 524288"),
    ],
    ids=range(24),
)
def test_unreadable_configs(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(str(path))


def test_no_config(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(ConfigError, match="there is no such file"):
            read_config(path)


def test_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 0\ntask:\n  a: [1,\n    2]\n  p_1.1: {b: 2}\n")
    saved = read_config(path)
    assert saved.config == {"seed": 0, "task": {"a": [1, 2], "p_1.1": {"b": 2}}}
    for key, line in (
        ("seed", 1), ("task.a[1]", 4), ("task.a", 3), ("task.p_1.1.b", 5),
        ("task.p_1.1.c", 5), ("task.z.y[3].x", 2), ("task", 2),
    ):  # fmt: skip
        error = saved.locate(ConfigError.at(key, "got x"))
        assert str(error) == f"{path}, line {line}: {key}: got x"
    for text in ("stage x", "/tmp/x is in use", ""):
        assert str(saved.locate(ConfigError(text))) == text


def test_a_written_config_is_read_again(tmp_path: Path) -> None:
    config = check_config(composed())
    save_config(config, tmp_path / "config.yaml")
    assert check_config(read_config(tmp_path / "config.yaml").config) == config
