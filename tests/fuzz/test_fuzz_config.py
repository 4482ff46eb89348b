"""A config.yaml that was damaged or made up: a run that resumes from it ends in one line."""

import json
import random
from pathlib import Path
from typing import Any

import odd
import pytest
import yaml
from commands import call, guarded
from guard import fuzz

from experiments.runtime.config import check_config, save_config
from experiments.runtime.digests import _seal
from experiments.runtime.overrides import composed

EXPERIMENTS = ("two_minima", "mirror_descent", "ppo_cartpole", "sam_vision", "auon_equivalence")


def _flip(text: bytes, draw: random.Random) -> bytes:
    """Some bits, bytes or pieces are other ones."""
    data = bytearray(text)
    for _ in range(draw.choice([1, 1, 2, 8])):
        if not data:
            break
        at, kind = draw.randrange(len(data)), draw.randrange(6)
        if kind < 3:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 3:
            data[at : at + draw.choice([0, 1, 20])] = draw.randbytes(draw.choice([0, 1, 4]))
        elif kind == 4:
            signs = [
                b"\t",
                b"*a",
                b"&a ",
                b"!!x ",
                b"{",
                b"[",
                b"'",
                b"- ",
                b"? ",
                b": ",
                b"\n---\n",
            ]
            data[at:at] = draw.choice([*signs, b"${seed}", b"\0", b"\xff", b"<<: ", b"%YAML 9\n"])
        else:
            del data[at:]
            data += b"x"
    return bytes(data)


def _lines(text: bytes, draw: random.Random) -> bytes:
    """Lines are lost, doubled, moved or indented."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw.choice([1, 1, 3])):
        at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
        kind = draw.randrange(4)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(to, lines[at])
        elif kind == 2:
            lines[at], lines[to] = lines[to], lines[at]
        else:
            lines[at] = b"  " + lines[at]
    return b"".join(lines)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((value, key))
        if isinstance(item, dict | list):
            _places(item, found)
    return found


def _edit(text: bytes, draw: random.Random) -> bytes:
    """Values are other values, and nodes name other targets."""
    config = yaml.load(text, yaml.CSafeLoader)
    for _ in range(draw.choice([1, 1, 2, 4])):
        places = _places(config, [])
        if not places:
            break
        parent, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind < 4:
            parent[key] = odd.value(draw)
        elif kind < 6:
            nodes = [p for p, k in places if k == "_target_"] or [config]
            node = draw.choice(nodes)
            node["_target_"] = draw.choice(odd.TARGETS)
            if draw.random() < 0.5:
                node[draw.choice(odd.NAMES)] = odd.value(draw)
        elif kind == 6:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw.choice(odd.NAMES)] = odd.value(draw)
    if draw.random() < 0.3:
        return json.dumps(config).encode()
    return _dumped(config)


def _dumped(config: Any) -> bytes:
    class Plain(yaml.CSafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    try:
        return yaml.dump(config, Dumper=Plain, sort_keys=False, allow_unicode=True).encode()
    except RecursionError:  # nested too deep for this library, not for the one under test
        return json.dumps(config).encode()


# What a resume may change.
OVERRIDES = ("task.steps=7", "tracker=csv", "tracker=default", "mesh=data", "mesh={}")


@pytest.mark.slow
@pytest.mark.parametrize("meant", [False, True], ids=["resume", "edited"])
def test_fuzz_config(meant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a digest that fits or not; where an edit is meant, it need not."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    texts = []
    for exp in EXPERIMENTS:
        save_config(check_config(composed([f"+exp={exp}"])), tmp_path / "config.yaml")
        texts.append((tmp_path / "config.yaml").read_bytes())
    folder = tmp_path / "run"
    folder.mkdir()
    file = folder / "config.yaml"
    command = [f"resume={folder}", *(["edited=config.yaml"] if meant else [])]

    def attempt(seed: int) -> str:
        draw = random.Random(seed)
        change = draw.choice([_flip, _flip, _lines, _edit, _edit, _edit])
        content = change(draw.choice(texts), draw)
        file.write_bytes(content if meant or draw.random() < 0.2 else content + _seal(content))
        overrides = draw.sample(OVERRIDES, draw.randrange(3)) if draw.random() < 0.1 else []
        return call(*command, *overrides)

    with guarded(folder):
        for text in texts:  # as it was; also imports what the tasks need
            file.write_bytes(text)
            assert call(*command) == "exit code 0"
        fuzz("resume edited=config.yaml" if meant else "resume", folder, attempt)
