"""Imports point one way, in the layers of docs/design.md, and no module imports itself in the end.

Only imports that run with the module count: one inside a function is made on purpose, for what is
needed late or may be missing. Imports for types alone count too, as they would hide a circle.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import from, besides itself. Underscored modules are below all others.
LAYERS = {
    "trustjax._dtypes": set(),
    "trustjax._checks": set(),
    "trustjax._files": {"trustjax._checks"},
    "trustjax._loops": {"trustjax._dtypes"},
    "trustjax._sharding": {"trustjax._dtypes"},
    "trustjax.geometry": set(),
    "trustjax.distributions": {"trustjax.geometry"},
    "trustjax.trust": set(),
    "trustjax.losses": {"trustjax.geometry", "trustjax.distributions", "trustjax.trust"},
    "trustjax.optim": {"trustjax.geometry", "trustjax.losses"},
    "trustjax.models": {"trustjax.geometry", "trustjax.distributions", "trustjax.data"},
    "trustjax.data": set(),
    "trustjax.envs": {"trustjax.data"},
    "trustjax.parallel": set(),
    "trustjax.agents": {
        "trustjax.geometry", "trustjax.distributions", "trustjax.losses", "trustjax.optim",
        "trustjax.models", "trustjax.envs", "trustjax.parallel", "trustjax.trust",
    },
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package in ("trustjax", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that are imported when this one is."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                inside = f"{child.module}.{alias.name}"
                yield inside if inside in MODULES else child.module
        else:
            yield from imported(child)


MODULES = modules()
GRAPH = {
    name: {other for other in imported(ast.parse(path.read_text())) if other in MODULES}
    for name, path in MODULES.items()
}


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_circles() -> None:
    """Nor through the `__init__` of a package, which gathers its names for users."""
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names one


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers(name: str) -> None:
    private = {other for other in LAYERS if other.split(".")[1].startswith("_")}
    allowed = LAYERS[name] | {name, "trustjax"} | (set() if name in private else private)
    for module, others in GRAPH.items():
        if part(module) == name:
            wrong = {other for other in others if part(other) not in allowed}
            assert not wrong, f"{module} imports {sorted(wrong)}"


def test_every_part_has_a_layer() -> None:
    parts = {part(name) for name in MODULES if name.startswith("trustjax.")}
    assert parts == set(LAYERS)


def test_the_library_does_not_know_the_experiments() -> None:
    for module, others in GRAPH.items():
        if module.startswith("trustjax"):
            assert not [other for other in others if other.startswith("experiments")], module
