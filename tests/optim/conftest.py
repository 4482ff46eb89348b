"""Fixtures of the tests of transforms."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(params=["float32", "float64"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of golden numbers in both precisions, which `problems.array` follows."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param
