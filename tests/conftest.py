"""Fixtures of all tests. XLA is told before JAX starts: eight CPU devices are simulated, and it
compiles quickly rather than well, as tests compile more than they compute. What one process has
compiled, the others and the next run find in .jax_cache, which may be deleted at any time."""

import gc
import importlib.metadata
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# It halves the time of compiling; XLA ends the process at a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", choices=("some", "one", "all"), default="some",
        help="of the cases of a test: a third, if it is marked `table`; one; or all",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)  # of the cases that -m and -k have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses cases by the names of tests, so that tests of one table take different rows."""
    wanted = config.getoption("cases")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set[pytest.Item] = set()
    for name, each in cases.items():
        first = zlib.crc32(name.encode())
        if wanted == "one":
            chosen.add(each[first % len(each)])
        elif wanted == "some" and each[0].get_closest_marker("table"):
            chosen.update(each[first % min(3, len(each)) :: 3])
        else:
            chosen.update(each)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules and tests stay to the end: the collector shall not walk through them each time."""
    del session
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def strict() -> Iterator[None]:
    """Strict dtype and rank promotion.

    For our own pure functions and transforms only: Optax, gymnax, brax and Flashbax break under it.
    """
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test, for golden values given to many digits."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the programs that are compiled from here on."""
    jax.clear_caches()  # or programs that another test has compiled are missing
    names: list[str] = []

    def listener(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)
