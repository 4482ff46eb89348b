"""The root of every experiment's configuration, and the checks of what the user gave."""

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from experiments.files import write_text
from experiments.targets import (
    ConfigError,
    check_nodes,
    fits,
    locate,
    makes,
    nearest_name,
    unknown_key,
    wrong_value,
)
from experiments.trackers.rows import Tracker


def _conf_folder() -> Path:
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


CONF = _conf_folder()


class Precision(StrEnum):
    """The dtype that a task computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


@dataclass
class Checkpoint:
    """When checkpoints are written.

    Attributes:
      every: steps between two checkpoints of a stage, rounded up to the end of a chunk.
      keep: how many of a stage stay on disk, the newest.
    """

    every: int = 1000
    keep: int = 2


@dataclass
class Root:
    """The keys that every experiment has.

    Attributes:
      task: `_target_`, a dataclass with the methods of `experiments.loop.Task`, and its fields.
      exp: name of the experiment, a file in conf/exp.
      seed: root of all randomness, 0 to 2**32 - 1.
      num_seeds: seeds trained together.
      precision: the dtype that the task computes in.
      deterministic: let XLA use only deterministic operations on GPU.
      tracker: what records the metrics beside metrics.csv: name to `folder -> Tracker`.
      checkpoint: when checkpoints are written.
    """

    task: dict[str, Any] = field(default_factory=dict)
    exp: str = "${hydra:runtime.choices.exp}"
    seed: int = 0
    num_seeds: int = 5
    precision: Precision = Precision.float32
    deterministic: bool = True
    tracker: dict[str, Callable[[Path], Tracker]] = field(default_factory=dict)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


# As plain data: OmegaConf would refuse the nodes that config groups such as data/ add to a typed
# root. The types are checked below, in the same words as those of the task.
ConfigStore.instance().store(name="root", node=dataclasses.asdict(Root()))


def experiments() -> dict[str, str]:
    """The experiments in conf/exp: name to the first comment line that says something."""
    found = {}
    for path in sorted((CONF / "exp").glob("*.yaml")):
        comments = re.findall(r"^#\s*(?!@package)(\S.*)$", path.read_text(), re.MULTILINE)
        found[path.stem] = comments[0] if comments else ""
    return found


def _parse(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def check_override(text: str) -> str:
    """Checks one override `key=value` before Hydra composes it, and returns it for Hydra.

    Keys within nodes (`task.x`, `data.x`) are checked later, against what their `_target_` takes;
    Hydra may add them without a plus. Raises ConfigError for a key that the root does not have, for
    a value that does not fit it, and for a `_target_` within Hydra's own configuration.
    """
    override = _parse(text)
    key = override.key_or_group
    first = re.split(r"[./@]", key)[0]
    if first == "hydra":
        if "_target_" in text:
            raise ConfigError(f"{key}: got {text!r}, allowed: Hydra's own plugins, by name")
        return text
    if first == "exp":
        return f"+{text.lstrip('+')}"
    swept = override.is_discrete_sweep()
    values = list(override.sweep_iterator() if swept else [override.value()])
    if (CONF / key).is_dir():
        for value in values:
            _check_choice(key, str(value))
    elif first in ("task", *_groups()) and key != first:
        return text if override.is_delete() else f"++{text.lstrip('+')}"
    else:
        for value in values:
            for part in reversed(key.split(".")):
                value = {part: value}
            _check_values(value, Root)
    return text


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def _check_choice(group: str, choice: str) -> None:
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if choice not in choices:
        raise ConfigError(
            f"{group}: got {choice!r}, the nearest is {nearest_name(choice, choices)} "
            f"(allowed: {', '.join(choices)})"
        )


def _check_values(value: Any, annotation: Any, key: str = "") -> None:
    """Checks the values below a key of the root, whose type is `annotation`."""
    if isinstance(value, str) and "${" in value:
        return
    if not dataclasses.is_dataclass(annotation):
        if key == "task" and isinstance(value, Mapping):  # `check_config` asks what it makes
            return
        if not fits(value, annotation):
            raise wrong_value(key, value, annotation)
        return
    names = typing.get_type_hints(annotation)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: got {value!r}, allowed: the keys {', '.join(names)}")
    groups = [] if key else _groups()  # their nodes stand in the root until the task takes them
    for name, item in value.items():
        place = f"{key}.{name}" if key else name
        if name in names:
            _check_values(item, names[name], place)
        elif name in groups:
            check_nodes(item, place)
        else:
            also = [] if key else ["resume", *groups]
            raise unknown_key(place, dict.fromkeys([*names, *also]))


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a composed config (plain data) and returns what a run needs of it.

    Nodes from config groups are left out, as the task has taken them; defaults of the task's plain
    fields are added. Targets are imported, so this may import JAX. Raises ConfigError.
    """
    _check_values(config, Root)
    for key, value, least in (
        ("seed", config["seed"], 0),
        ("num_seeds", config["num_seeds"], 1),
        ("checkpoint.every", config["checkpoint"]["every"], 1),
        ("checkpoint.keep", config["checkpoint"]["keep"], 1),
    ):
        if value < least:
            raise ConfigError(f"{key}: got {value}, allowed: an integer >= {least}")
    if config["seed"] >= 2**32:
        raise ConfigError(f"seed: got {config['seed']}, allowed: an integer < 2**32")
    check_nodes(config["tracker"], "tracker")
    from experiments.loop import Task  # imports JAX

    task = config["task"]
    if "_target_" not in task:
        raise ConfigError("task._target_: missing, allowed: a task such as experiments.tasks.NAME")
    check_nodes(task, "task")
    task_class = locate(task["_target_"], "task._target_")
    if not dataclasses.is_dataclass(task_class):
        raise ConfigError(f"task._target_: got {task['_target_']!r}, allowed: a dataclass")
    if not makes(task_class, Task) or "_partial_" in task:
        raise ConfigError(f"task._target_: got {task['_target_']!r}, which is no task")
    checked = {each.name: config[each.name] for each in dataclasses.fields(Root)}
    return {**checked, "task": {**_plain_defaults(task_class), **task}}


def _plain_defaults(task_class: Any) -> dict[str, Any]:
    defaults = {}
    for each in dataclasses.fields(task_class):
        makes = each.default_factory
        value = each.default if makes is dataclasses.MISSING else makes()
        if _is_plain(value):
            defaults[each.name] = value
    return defaults


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by their full keys, such as `task.optimizer.learning_rate`.

    Lists and empty nodes are values.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": item for inner, item in flat(value).items()}
        else:
            found[key] = value
    return found


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Writes `config` as YAML, whole or not at all."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


# Lengths: fields of the task itself whose names end in "steps", such as task.pretrain_steps.
_MAY_CHANGE = re.compile(r"task\.\w*steps|(task\.)?mesh(\..+)?|tracker(\..+)?")


def resumed_config(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The config of the run in `folder` (plain data), with the few overrides that a resume allows.

    Allowed are `tracker`, `mesh` (the task's) and lengths: fields of the task itself whose names
    end in "steps". Raises ConfigError for any other, and where `folder` holds no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: got {str(folder)!r}, which holds no run (no config.yaml)")
    config = OmegaConf.load(path)
    for override in map(_parse, arguments):
        key = override.key_or_group
        if not _MAY_CHANGE.fullmatch(key) or override.is_sweep_override() or override.is_delete():
            raise ConfigError(
                f"{key}: got {override.input_line!r}, allowed with resume: tracker, mesh, and "
                "fields of the task that end in steps"
            )
        value = override.value()
        if (CONF / key).is_dir():
            _check_choice(key, str(value))
            with initialize_config_dir(str(CONF), version_base="1.3"):
                value = compose(overrides=[f"+{key}={value}"]).get(key, {})
        place = f"task.{key}" if key.startswith("mesh") else key
        OmegaConf.update(config, place, value, merge=False, force_add=True)
    return to_plain(config)


def to_plain(config: Any) -> dict[str, Any]:
    """A composed config as plain data, interpolations resolved. Raises where a value is missing."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    return typing.cast("dict[str, Any]", plain)
