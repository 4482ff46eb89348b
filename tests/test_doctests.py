"""The examples in docstrings give the output that they show."""

import doctest
import importlib
from pathlib import Path

import pytest

import trustjax

ROOT = Path(trustjax.__file__).parent
ROOMS = ("agents", "envs", "geometry", "losses", "optim")
MODULES = [
    ".".join(("trustjax", *path.relative_to(ROOT).with_suffix("").parts))
    for room in ROOMS
    for path in sorted((ROOT / room).glob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
# Examples that train an agent.
SLOW = tuple(f"trustjax.agents.{name}" for name in ("on_policy", "off_policy", "training"))


@pytest.mark.table
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODULES],
)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
