"""Overrides on the command line: they are parsed, checked and composed to a configuration."""

import contextlib
import math
import re
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.runtime.config import CONF, Root, check_values, flat, groups, read_config, to_plain
from experiments.runtime.targets import ConfigError, nearest_name, shown, unknown_key

MOST_JOBS = 10_000
_LONGEST = 20_000  # characters; Hydra's parser takes a second for so many
_DEEPEST = 20  # brackets; its parser recurses


def parse(text: str) -> Override:
    """Reads one override `key=value`. Raises ConfigError, naming the key and how to quote it."""
    key, _, value = text.partition("=")
    key = key.lstrip("+~")
    if not re.fullmatch(r"[\w./@:$-]+", key, re.ASCII):
        names = [*typing.get_type_hints(Root), "resume", *groups()]
        raise ConfigError(f"{shown(key)}: no key, the nearest is {nearest_name(key, names)}")
    if len(text) > _LONGEST:
        raise ConfigError.at(key, f"got {len(text)} characters, allowed: {_LONGEST}")
    depth = deepest = 0
    for letter in value:
        depth += (letter in "[{(") - (letter in "]})")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise ConfigError.at(key, f"got brackets {deepest} deep, allowed: {_DEEPEST}")
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError.at(
            key,
            f"cannot read {shown(value)} ({_first_line(error)}); text with signs or letters "
            f"beyond a-z stands in quotes, and these in quotes for the shell: {quoted(key, value)}",
        ) from error


def quoted(key: str, value: str) -> str:
    """The override that gives `key` exactly the text `value`, quoted for a shell."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)  # a backslash counts before a quote alone
    escaped += "\\" * (len(value) - len(value.rstrip("\\")))
    return shlex.quote(f'{key}="{escaped}"')


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def values(override: Override) -> list[Any]:
    """The values that an override gives its key: several in a sweep. Raises ConfigError."""
    if not override.is_discrete_sweep():
        return [override.value()]
    found = list(islice(override.sweep_iterator(), MOST_JOBS + 1))
    if len(found) > MOST_JOBS:
        raise ConfigError.at(override.key_or_group, f"more than {MOST_JOBS} values")
    return found


def check_overrides(texts: Sequence[str]) -> list[str]:
    """Checks overrides before Hydra composes them, and returns them in Hydra's form.

    If a key is given twice, Hydra takes the last value. Raises ConfigError as `check_override`
    does, and for a sweep of more than 10,000 jobs.
    """
    checked = [check_override(text) for text in texts]
    jobs = math.prod(len(values(parse(text))) for text in texts)
    if jobs > MOST_JOBS:
        raise ConfigError(f"the values make {jobs} jobs, allowed: {MOST_JOBS}")
    return checked


def check_override(text: str) -> str:
    """Checks one override `key=value` before Hydra composes it, and returns it in Hydra's form.

    Keys inside nodes (`task.x`, `data.x`) are checked later, against the arguments of their
    `_target_`; Hydra may add them without a plus. Raises ConfigError if the text cannot be parsed,
    if the root has no such key, if the value does not fit the key, and for a `_target_` in Hydra's
    own configuration.
    """
    override = parse(text)
    key = override.key_or_group
    first = re.split(r"[./@]", key)[0]
    if first == "hydra":
        if "_target_" in text:
            raise ConfigError.at(key, f"got {text!r}, allowed: Hydra's own plugins, by name")
        return text
    if first == "exp":
        return f"+{text.lstrip('+')}"
    found = values(override)
    if key in groups():
        for value in found:
            check_choice(key, str(value))
    elif first in ("task", *groups()) and key != first:
        return text if override.is_delete() else f"++{text.lstrip('+')}"
    else:
        for value in found:
            for part in reversed(key.split(".")):
                value = {part: value}
            check_values(value, Root)
    return text


def check_choice(group: str, choice: str) -> None:
    """Raises ConfigError unless conf/GROUP has a file CHOICE.yaml."""
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if choice not in choices:
        raise ConfigError.at(
            group,
            f"got {choice!r}, the nearest is {nearest_name(choice, choices)} "
            f"(allowed: {', '.join(choices)})",
        )


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a run with these overrides; its nodes are not checked yet.

    Raises ConfigError for overrides that `check_overrides`, Hydra or `check_read` refuse.
    """
    checked = check_overrides(overrides)
    try:
        config, choices = compose(checked)
    except Exception as error:
        raise explained(error, checked) from error
    check_read(config, choices)
    config["exp"] = choices["exp"]
    return to_plain(config)


def compose(checked: Sequence[str]) -> tuple[DictConfig, Mapping[str, str]]:
    """The config that Hydra composes of checked overrides, and the file chosen in each group."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", list(checked), return_hydra_config=True)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, typing.cast("Mapping[str, str]", choices)


def explained(error: Exception, checked: Sequence[str]) -> ConfigError:
    """An error that Hydra raised in composing, as one that names the override."""
    found = re.match(r"Could not override '([\w/]+)(@[\w.]*)?'", str(error.__cause__ or error))
    if found:
        group = found[1]
        rest = [text for text in checked if re.split("[=@]", text.lstrip("+"))[0] != group]
        with contextlib.suppress(Exception):  # something else is wrong, too
            choices = compose(rest)[1]
            return ConfigError.at(group, f"{_nothing(choices)} chooses one{_where(group, choices)}")
    if isinstance(error, HydraException):
        return ConfigError(one_line(error))
    exp = [text for text in checked if text.startswith("+exp=")]
    for text in checked:  # OmegaConf's own errors do not tell which one it is
        try:
            compose([*exp, text] if text not in exp else exp)
        except Exception as cause:
            return ConfigError.at(parse(text).key_or_group, f"got {shown(text)}: {cause}")
    return ConfigError(f"{' '.join(checked)}: {error}")


def check_read(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raises ConfigError for a key of the composed config that the task does not take.

    Nodes of config groups stand in the root, and the task takes them by interpolation.
    """
    raw = typing.cast("dict[str, Any]", OmegaConf.to_container(config))
    taken = {*_references(raw)}
    own = {*typing.get_type_hints(Root)}
    keys = flat(raw)
    read = [
        key
        for key in keys
        if key.partition(".")[0] in own or any(f"{key}.".startswith(f"{each}.") for each in taken)
    ]
    for key in keys:
        if key in read:
            continue
        group = key.partition(".")[0]
        if choices.get(group) and not any(each.partition(".")[0] == group for each in taken):
            raise ConfigError.at(group, f"{_nothing(choices)} reads it{_where(group, choices)}")
        last = key.rpartition(".")[2]
        same = [other for other in read if other.rpartition(".")[2] == last and other not in own]
        likest = sorted(same, key=lambda other: -len({*other.split(".")} & {*key.split(".")}))
        if not likest:
            likest = [nearest_name(key, read)]
        more = f" and {len(likest) - 3} more" if len(likest) > 3 else ""
        raise ConfigError.at(
            key, f"{_nothing(choices)} reads it; see {', '.join(likest[:3])}{more}"
        )


def _nothing(choices: Mapping[str, str]) -> str:
    return f"nothing in +exp={choices.get('exp')}"


def _where(group: str, choices: Mapping[str, str]) -> str:
    found = [f"{each}=NAME" for each in choices if each.startswith(f"{group}@")]
    return f"; set {' or '.join(found[:3])}" if found else ""


def _references(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The full keys that interpolations in `value` refer to, such as `env.name`."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _references(item, (*path, str(name)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _references(item, (*path, str(index)))
    elif isinstance(value, str):
        for dots, name in re.findall(r"\$\{\s*(\.*)([\w.\[\]-]+)\s*\}", value):
            above = path[: len(path) - len(dots)] if dots else ()
            yield ".".join((*above, re.sub(r"\[(.+?)\]", r".\1", name).lstrip(".")))


# Lengths: fields of the task itself whose names end in "steps", such as task.pretrain_steps.
_LENGTH = re.compile(r"task\.\w*steps")
_MAY_CHANGE = re.compile(rf"{_LENGTH.pattern}|(task\.)?mesh(\..+)?|tracker(\..+)?")


def fixed_part(config: Mapping[str, Any], *, lengths: bool = False) -> dict[str, Any]:
    """The values that a resumed run must keep, by their full keys; with `lengths`, these too."""
    return {
        key: value
        for key, value in flat(config).items()
        if not _MAY_CHANGE.fullmatch(key) or (lengths and _LENGTH.fullmatch(key))
    }


def resumed_config(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The config of the run in `folder` (plain data), with the overrides that a resume allows.

    Allowed are `tracker`, `mesh` (the task's) and lengths: fields of the task itself whose names
    end in "steps". Raises ConfigError for other overrides, if `folder` holds no run, and if its
    config.yaml cannot be read or has unknown keys.
    """
    try:
        here = (folder / "config.yaml").exists()
    except (OSError, ValueError) as error:  # a name that is too long, or no name
        raise ConfigError.at("resume", f"got {shown(str(folder))}: {error}") from error
    if not here:
        raise ConfigError.at("resume", f"got {str(folder)!r}, which holds no run (no config.yaml)")
    saved = read_config(folder / "config.yaml")
    own = [*typing.get_type_hints(Root)]
    for name in saved.config:
        if name not in own:
            raise saved.locate(unknown_key(str(name), own))
    config = OmegaConf.create(saved.config)
    for override in map(parse, arguments):
        key = override.key_or_group
        if not _MAY_CHANGE.fullmatch(key) or override.is_sweep_override() or override.is_delete():
            raise ConfigError.at(
                key,
                f"got {override.input_line!r}, allowed with resume: tracker, mesh, and "
                "fields of the task that end in steps",
            )
        value = override.value()
        if key in groups():
            check_choice(key, str(value))
            with initialize_config_dir(str(CONF), version_base="1.3"):
                value = hydra.compose(overrides=[f"+{key}={value}"]).get(key, {})
        full_key = f"task.{key}" if key.startswith("mesh") else key
        try:
            OmegaConf.update(config, full_key, value, merge=False, force_add=True)
        except (ValueError, TypeError, OmegaConfBaseException) as error:  # no keys where it belongs
            raise ConfigError.at(full_key, f"{_first_line(error)}") from error
    return to_plain(config)


def one_line(error: Exception) -> str:
    """An error of this package, Hydra or OmegaConf as one line that begins with the key."""
    if isinstance(error, OmegaConfBaseException):  # its other lines tell of types inside OmegaConf
        return f"{error.full_key}: {_first_line(error)}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        return one_line(error.__cause__)
    return str(error)
