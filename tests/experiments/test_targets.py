"""Which targets a config may name, and what they may be given."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import optax
import pytest
from jax.sharding import Mesh

from experiments.penalties import Penalty
from experiments.runtime.building import build
from experiments.runtime.config import Precision
from experiments.runtime.targets import (
    ROOMS,
    ConfigError,
    check_nodes,
    describe,
    fits,
    locate,
)
from experiments.trackers import Tracker


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
        "experiments.runtime.config.OverridesParser",
        "experiments.trackers.Path",
        "flax.io.rmtree",
        "flax.linen.jax.numpy.sum",
        "optax.__builtins__.get",
        "optax.sgd.__globals__.get",
        "optax.sgd.__class__",
        "optax._src.alias.sgd",
        "experiments.trackers._means",
        # methods and what else hangs on a class
        "trustjax.agents.policy.Policy.save",
        "trustjax.agents.Policy.save",
        "optax.GradientTransformation.init",
        "optax.MultiSteps.init",
        "flax.linen.Dense.apply",
        "flax.linen.Module.tabulate",
        "experiments.optimizers.Method.at",
        # entry points
        "experiments.run.main",
        "experiments.sweep.sweep",
        "experiments.sweep.main",
        "experiments.play.draw",
        "experiments.report.main",
        "experiments.runtime.session.train_in_folder",
        # what reads, writes, deletes or ends
        "trustjax.models.save_pretrained",
        "trustjax.models.checkpoint.save_pretrained",
        "trustjax.models.save_transformer",
        "trustjax.models.convert_gguf",
        "trustjax.models.text_checkpoint.save_transformer",
        "trustjax.models.checkpoint.os.system",
        "trustjax.agents.load_policy",
        "trustjax.agents.policy.load_policy",
        "experiments.runtime.files.write_text",
        "experiments.runtime.config.save_config",
        "experiments.analysis.plots.save",
        "experiments.analysis.rendering.write_gif",
        "experiments.runtime.checkpoint.Checkpoints",
        "experiments.trackers.Csv",
        "experiments.trackers.csv.Csv",
        "experiments.trackers.read_rows",
        "experiments.trackers.services.require",
        "experiments.trackers.services.Starts",
        "experiments.tasks.adaptation_report.plot",
        "experiments.tasks.reinforcement.Path",
        "experiments.tasks.reinforcement.make",
        "experiments.runtime.stopping.StopSignals",
        "flax.serialization.to_bytes",
        "flax.training.checkpoints.save_checkpoint",
        "flax.linen.tabulate",
        "flax.linen.enable_named_call",
        "flax.nnx.display",
        "optax.jnp.save",
        "optax.contrib.jnp.save",
        "optax.losses.jnp.save",
        "optax.numpy.save",
        "jax.numpy.save",
        "numpy.save",
        "trustjax.optim.jax.numpy.save",
        "trustjax.agents.mdpo.np.save",
        # re-exported, private, or hidden in other characters
        "trustjax.agents.mdpo.NamedTuple",
        "trustjax.agents.mdpo.mdpo_loss",
        "experiments.optimizers.dataclass",
        "experiments.optimizers.optax.sgd",
        "experiments.tasks.mirror.partial",
        "experiments.runtime.config.Root",
        "trustjax.optim._attack.attack",
        "trustjax._checks.check_number",
        "optax.__class__",
        "optax.sgd.func",
        "optax.sgd ",
        "optax\u00b7sgd",
        "\uff4fptax.sgd",
        "optax.sgd\n",
        "OPTAX.sgd",
        "optax/sgd",
        "optax:sgd",
        "optax.experimental.x",
        "tests.conftest.x",
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
    with pytest.raises(ConfigError, match=r"allowed: factories of trustjax\.optim, "):
        locate("flax.linen.module.jax.experimental.ode.odeint", "task.x")


def test_unknown_name_has_a_hint() -> None:
    with pytest.raises(ConfigError, match="no 'sgdd', the nearest is sgd"):
        locate("optax.sgdd", "task.x")


SGD = {"_target_": "optax.sgd", "learning_rate": 0.1}
BOARD = {"_target_": "experiments.trackers.TensorBoard"}
OS = {"_target_": "os.system"}
LINEAR = {"_target_": "trustjax.models.MLP", "num_classes": 2, "hidden": [2]}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


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
        ({"_target_": ["optax.sgd"]}, r"^task\._target_: got"),
        ({**SGD, "_partial_": "yes"}, r"^task\._partial_: got 'yes', allowed: true or false"),
        ({**SGD, "_partial_": {"a": 1}}, r"^task\._partial_: got"),
        ({**SGD, "_args_": 3}, r"^task\._args_: got 3, allowed: a list"),
        ({**SGD, "_args_": {"a": 3}}, r"^task\._args_: got"),
        ({"_target_": "optax.sgd", "_args_": ["abc"]}, r"^task\._args_: got 'abc'"),
        ({"_target_": "optax.chain", "_args_": [3]}, r"^task\._args_: got "),
        (
            {"_target_": "optax.chain", "_args_": [{"_target_": "os.system"}]},
            r"^task\._args_\[0\]\._target",
        ),
        ({**SGD, "_recursive_": False}, r"^task\._recursive_: unknown key"),
        ({**SGD, "_convert_": "all"}, r"^task\._convert_: unknown key"),
        ({**SGD, "_mode_": "x"}, r"^task\._mode_: unknown key"),
        ({**SGD, "__init__": 1}, r"^task\.__init__: unknown key"),
        (
            {**SGD, "momentum": LINEAR},
            r"^task\.momentum: got trustjax\.models\.MLP, which makes MLP",
        ),
        (
            {"_target_": "optax.adamw", "learning_rate": "x"},
            r"^task\.learning_rate: got 'x', allowed: a number",
        ),
        ({"a": "???"}, r"^task\.a: got '\?\?\?'"),
        *(
            ({"a": {name: {"x": 1}}}, rf"^task\.a\.{name}: unknown key, as task\.a has no _target_")
            for name in ("_recursive_", "_convert_", "_partial_", "_args_")
        ),
        ({"a": {1: 2}}, r"^task\.a: got the name 1, allowed: names that are text"),
        ({"a": 2**63}, r"^task\.a: got 9223372036854775808, allowed: integers of 64 bits"),
        ({"a": 10**5000}, r"^task\.a: got an integer of 16610 bits, allowed"),
        ({"a": nested(40)}, r"^task\.a\[0\].* nested more than 32 levels deep"),
    ],
)
def test_wrong_nodes(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_nodes(node, "task")


def factories() -> Iterator[tuple[str, Any]]:
    """Every target that a config may name."""
    for room in ROOMS:
        parent = importlib.import_module(room.removesuffix(".*"))
        names = [room]
        if room.endswith(".*"):
            found = pkgutil.iter_modules(parent.__path__)
            names = [f"{parent.__name__}.{each.name}" for each in found if each.name[0] != "_"]
        for name in names:
            module = importlib.import_module(name)
            for last, value in vars(module).items():
                with contextlib.suppress(ConfigError):
                    assert locate(f"{name}.{last}", "x") is value
                    yield f"{name}.{last}", value


def test_no_factory_takes_a_place_to_write_to() -> None:
    """Files that a config may name are data and pre-trained weights, which are read."""
    words = re.compile(r"(^|_)(path|file|filename|folder|dir|directory|save|key_path)(_|$)")
    found = {}
    data = ("hugging_face", "hugging_face_instructions", "hugging_face_preferences",
            "hugging_face_puzzles", "hugging_face_questions",
            "hugging_face_text", "text_folder")  # fmt: skip
    questions = ("knights_folder", "numbers_folder")
    reads = {
        "trustjax.models.PretrainedViT", *(f"trustjax.data.{name}" for name in data),
        *(f"experiments.tasks.reasoning_questions.{name}" for name in questions),
        "experiments.tasks.genres.Genres", "experiments.tasks.languages.treebanks",
        "experiments.tasks.languages.xnli",
    }  # fmt: skip
    for name, target in factories():
        taken = [each for each in inspect.signature(target).parameters if words.search(each)]
        if taken and name not in reads:
            found[name] = taken
    for name, taken in found.items():
        assert name.startswith("experiments.trackers."), f"{name} takes {taken}"
        annotation = inspect.signature(locate(name, "x")).parameters["folder"].annotation
        assert annotation in (Path, "Path")  # the run gives it: text is no Path
    for node in ({**BOARD, "folder": "/tmp/x"}, {**BOARD, "_args_": ["/tmp/x"]}):
        with pytest.raises(ConfigError, match=r"^tracker\.x\.(folder|_args_): got '/tmp/x'"):
            check_nodes({"x": node}, "tracker")


def test_every_target_of_conf_is_a_factory() -> None:
    for path in (Path(__file__).parents[2] / "conf").rglob("*.yaml"):
        for name in re.findall(r"_target_: *([\w.]+)", path.read_text()):
            assert callable(locate(name, str(path)))


@pytest.mark.parametrize(
    ("node", "annotation", "expected"),
    [
        (SGD, optax.GradientTransformation, True),
        ({**SGD, "_partial_": True}, optax.GradientTransformation, False),
        ({**SGD, "_partial_": True}, Callable[..., optax.GradientTransformation], True),
        ({**SGD, "_partial_": False}, Callable[..., optax.GradientTransformation], False),
        ({**SGD, "_partial_": True}, Callable[..., nn.Module], False),
        (SGD, nn.Module, False),
        (SGD, float, False),
        (SGD, str | None, False),
        (SGD, list[float], False),
        (SGD, Mapping[str, float], False),
        (LINEAR, nn.Module, True),
        (LINEAR, Mesh | None, False),
        ({"_target_": "optax.constant_schedule", "value": 0.1}, optax.ScalarOrSchedule, True),
        ({"_target_": "optax.constant_schedule", "value": 0.1}, float, False),
        ({"_target_": "experiments.penalties.UnderNoise"}, Penalty | None, True),
        (SGD, Penalty | None, False),
        (LINEAR, Penalty | None, False),
        (
            {"_target_": "experiments.trackers.TensorBoard", "_partial_": True},
            Callable[[Path], Tracker],
            True,
        ),
        ({"_target_": "experiments.trackers.TensorBoard"}, Callable[[Path], Tracker], False),
        ({**LINEAR, "_partial_": True}, Callable[[Path], Tracker], False),
        ({"_target_": "os.system"}, float, True),  # `check_nodes` tells
    ],
)
def test_what_a_node_makes(node: dict[str, Any], annotation: Any, expected: bool) -> None:
    assert fits(node, annotation) is expected


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
        (SGD, Callable[[int], int], False),
        (float("nan"), float, True),
        (True, Literal[1, 2], False),
        ([], Precision, False),
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
