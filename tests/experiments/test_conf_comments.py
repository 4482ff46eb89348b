"""Every key in conf/ is explained, and every experiment says what it shows, its time and result."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from experiments.runtime.config import CONF, experiments, groups
from experiments.runtime.overrides import composed
from experiments.sweep import jobs

FILES = sorted(CONF.rglob("*.yaml"))
HYDRA = {"defaults", "_target_", "_partial_"}  # explained at the head of conf/config.yaml
COMMENT = re.compile(r"(?:^|\s)#\s*\w")


def keys(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Names of all keys below `node`, and their lines from 0 on."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield name.value, name.start_mark.line
            if name.value != "defaults":
                yield from keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from keys(value)


def header(text: str) -> list[str]:
    """The lines of comment at the head of a file, without their sign and Hydra's package."""
    block = re.match(r"(?:#.*\n)*", text)[0]  # type: ignore[index]  # it may be empty
    lines = [line.removeprefix("#").strip() for line in block.splitlines()]
    return [line for line in lines if not line.startswith("@package")]


@functools.cache
def explained(path: Path) -> set[str]:
    """The keys that have a comment beside or above them in a file or in those it is made of."""
    text = path.read_text()
    lines = text.splitlines()
    first = text[: re.match(r"(?:#.*\n)*", text).end()].count("\n")  # type: ignore[union-attr]
    names = {
        name
        for name, line in keys(yaml.compose(text))
        if COMMENT.search(lines[line]) or (line - 1 >= first and re.match(r"\s*#", lines[line - 1]))
    }
    return names.union(*map(explained, parts(path)))


def parts(path: Path) -> Iterator[Path]:
    """The files in the defaults of a file, and those that its comments refer to."""
    text = path.read_text()
    for name in re.findall(r"#.*\bconf/([\w/]+\.yaml)", text):
        yield CONF / name
    for entry in (yaml.safe_load(text) or {}).get("defaults", ()):
        group, name = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        group = group.removeprefix("override ").partition("@")[0]
        folder = CONF / group.removeprefix("/") if group.startswith("/") else path.parent / group
        if (folder / f"{name}.yaml").is_file():  # not _self_, nor what Hydra or the code registers
            yield folder / f"{name}.yaml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_a_comment(path: Path) -> None:
    assert header(path.read_text()), "its first line says what it is"
    # The nodes of an experiment are named after the groups whose files they change.
    known = HYDRA | explained(path) | {*groups(), "task"}
    missing = [f"{path}:{line + 1}: {name}" for name, line in keys(yaml.compose(path.read_text()))
               if name not in known]  # fmt: skip
    assert not missing


def test_the_keys_of_hydra_are_explained_once() -> None:
    text = " ".join(header((CONF / "config.yaml").read_text()))
    assert all(f"`{name}" in text for name in HYDRA)


@pytest.mark.table
@pytest.mark.parametrize("exp", experiments())
def test_every_experiment_says_what_it_shows(exp: str) -> None:
    what, *rest = header((CONF / "exp" / f"{exp}.yaml").read_text())
    assert what == experiments()[exp]
    assert len(what) <= 110
    assert what.endswith(".")
    found = dict(line.split(": ", 1) for line in rest if re.match(r"(Run|Time|Result): ", line))
    assert [*found] == ["Run", "Time", "Result"]
    assert re.search(r"\d|no run", found["Result"]), "a figure"
    command = [each for each in shlex.split(found["Run"]) if "=" in each]
    assert composed(jobs(command)[0].overrides)["exp"] == exp
