"""The root of every experiment's configuration, and the checks of its values."""

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.runtime.digests import sealed
from experiments.runtime.files import write_text
from experiments.runtime.targets import (
    ConfigError,
    check_nodes,
    fits,
    locate,
    makes,
    shown,
    unknown_key,
    wrong_value,
)
from experiments.trackers.rows import Tracker

CONF = Path(__file__).parents[2] / "conf"
MOST_SEEDS = 10_000  # the most seeds that one run trains together


class Precision(StrEnum):
    """The dtype that a task computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


@dataclass
class Checkpoint:
    """When checkpoints are written, and how many are kept.

    Attributes:
      every: Number of steps between two checkpoints of a stage, at least 1. Checkpoints are
        written at the end of a chunk.
      keep: Number of checkpoints per stage that stay on disk, the newest, at least 1.
    """

    every: int = 1000
    keep: int = 2


@dataclass
class Root:
    """The keys that every experiment has.

    Attributes:
      task: The task: `_target_`, a dataclass with the methods of `runtime.task.Task`, and its
        fields.
      exp: Name of the experiment, a file in conf/exp.
      seed: Seed of all random numbers, from 0 to 2**32 - 1.
      num_seeds: Number of seeds that are trained together, from 1 to 10,000.
      precision: Dtype of the computation.
      deterministic: Whether XLA may use only deterministic operations on GPU.
      tracker: Functions `folder -> Tracker` by name, which record metrics beside metrics.csv.
      checkpoint: When checkpoints are written.
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
    """The experiments in conf/exp by name, each with the first comment line that describes it."""
    found = {}
    for path in sorted((CONF / "exp").glob("*.yaml")):
        comments = re.findall(r"^#\s*(?!@package)(\S.*)$", path.read_text(), re.MULTILINE)
        found[path.stem] = comments[0] if comments else ""
    return found


def groups() -> list[str]:
    """The config groups: the folders in conf."""
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def check_values(value: Any, annotation: Any, key: str = "", *, whole: bool = False) -> None:
    """Raises ConfigError unless the value of a key of the root fits its type, `annotation`.

    With `whole`, no key of a dataclass may be missing.
    """
    if isinstance(value, str) and "${" in value:
        return
    if not dataclasses.is_dataclass(annotation):
        if key == "task" and isinstance(value, Mapping):  # `check_config` asks what it makes
            return
        check_nodes(value, key)
        if not fits(value, annotation):
            raise wrong_value(key, value, annotation)
        return
    names = typing.get_type_hints(annotation)
    if not isinstance(value, Mapping):
        raise ConfigError.at(key, f"got {shown(value)}, allowed: the keys {', '.join(names)}")
    nodes = [] if key else groups()  # they stand in the root until the task takes them
    for name, item in value.items():
        full_key = f"{key}.{name}" if key else name
        if name in names:
            check_values(item, names[name], full_key, whole=whole)
        elif name in nodes:
            check_nodes(item, full_key)
        else:
            also = [] if key else ["resume", *nodes]
            raise unknown_key(full_key, dict.fromkeys([*names, *also]))
    for name in names if whole else ():
        if name not in value:
            raise ConfigError.at(f"{key}.{name}" if key else name, "missing")


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a composed config (plain data), and returns the part that a run needs.

    The nodes of config groups are left out, as the task holds them by now; the defaults of the
    task's plain fields are added. This imports the targets, and JAX with them. Raises ConfigError.
    """
    check_values(config, Root, whole=True)
    for key, value, least in (
        ("seed", config["seed"], 0),
        ("num_seeds", config["num_seeds"], 1),
        ("checkpoint.every", config["checkpoint"]["every"], 1),
        ("checkpoint.keep", config["checkpoint"]["keep"], 1),
    ):
        if value < least:
            raise ConfigError.at(key, f"got {value}, allowed: an integer >= {least}")
    # Seeds share one program and its memory: a number with a digit too many would work for hours
    # before it fails.
    if config["num_seeds"] > MOST_SEEDS:
        raise ConfigError.at(
            "num_seeds",
            f"got {config['num_seeds']}, allowed: an integer <= {MOST_SEEDS}; more "
            "seeds are further runs, each with another seed",
        )
    if config["seed"] >= 2**32:
        raise ConfigError.at("seed", f"got {config['seed']}, allowed: an integer < 2**32")
    check_nodes(config["tracker"], "tracker")
    from experiments.runtime.task import Task  # imports JAX

    task = config["task"]
    if "_target_" not in task:
        raise ConfigError.at(
            "task._target_", "missing, allowed: a task such as experiments.tasks.NAME"
        )
    check_nodes(task, "task")
    task_class = locate(task["_target_"], "task._target_")
    if not dataclasses.is_dataclass(task_class):
        raise ConfigError.at("task._target_", f"got {task['_target_']!r}, allowed: a dataclass")
    if not makes(task_class, Task) or "_partial_" in task:
        raise ConfigError.at("task._target_", f"got {task['_target_']!r}, which is no task")
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

    Lists and empty nodes count as values.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": item for inner, item in flat(value).items()}
        else:
            found[key] = value
    return found


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Writes `config` as YAML, whole or not at all, and its digest in a comment at the end."""
    write_text(path, sealed(OmegaConf.to_yaml(OmegaConf.create(dict(config)))))


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
_MOST_BYTES = 512 * 1024
_DEEPEST = 40


class Saved(NamedTuple):
    """The config.yaml of a run folder as plain data, and the line number of each full key."""

    path: Path
    config: dict[str, Any]
    lines: dict[str, int]

    def locate(self, error: ConfigError) -> ConfigError:
        """The error with the file, and with the line of its key or of the nearest one above it."""
        key = error.key
        while key and key not in self.lines:
            key = re.sub(r"\[?[^.\[]*$", "", key).rstrip(".")
        text = f"{self.path}, line {self.lines.get(key)}: {error}"
        return ConfigError(text, error.key) if key else error


def read_config(path: Path) -> Saved:
    """Reads a config.yaml that a run has written, and that a user may have edited.

    Raises ConfigError, with the file and the line, unless it is one mapping of plain values. Not
    allowed are anchors, aliases, tags, interpolations, duplicate names, names that are not text,
    more than 40 levels, and more than 512 KiB. `check_config` checks the keys later.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: has {path.stat().st_size} bytes, allowed: {_MOST_BYTES}")
        text = path.read_bytes().decode()
        _check_events(text, path)
        config = OmegaConf.to_container(OmegaConf.create(text))
        lines = _lines(yaml.compose(text, _LOADER))
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from error
    except (OSError, ValueError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"{path}: got no keys, allowed: keys with values, as a run writes them")
    return Saved(path, typing.cast("dict[str, Any]", config), lines)


def _check_events(text: str, path: Path) -> None:
    """Raises ConfigError for YAML that could grow large or deep, or that is more than data.

    It reads events alone: nothing is composed before it is known to be harmless.
    """
    depth = 0
    for event in yaml.parse(text, _LOADER):
        line = f"{path}, line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:  # of an alias, too
            raise ConfigError(f"{line}: got the anchor or alias {event.anchor!r}, allowed: none")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{line}: got the tag {event.tag!r}, allowed: none")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise ConfigError(f"{line}: got {shown(event.value)}, allowed: text without ${{")
        if depth == 0 and isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
            raise ConfigError(
                f"{line}: got no keys, allowed: keys with values, as a run writes them"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ConfigError(f"{line}: nested more than {_DEEPEST} levels deep")


def _lines(node: yaml.Node | None, key: str = "") -> dict[str, int]:
    """The line number of every full key below `key`, such as `task.radii[0]`."""
    found = {key: node.start_mark.line + 1} if node and key else {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            full_key = f"{key}.{name.value}" if key else str(name.value)
            found |= _lines(value, full_key) | {full_key: name.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found |= _lines(value, f"{key}[{index}]")
    return found


def to_plain(config: Any) -> dict[str, Any]:
    """A composed config as plain data with interpolations resolved.

    Raises OmegaConfBaseException if a value is missing.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    return typing.cast("dict[str, Any]", plain)
