"""Parameters for model tests, without compiling the initializers, which takes seconds a model."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest


def random_variables(model: nn.Module, images: jax.Array, seed: int = 0) -> Any:
    """Variables of the model's structure with random values around their usual ones.

    None is at a special value such as 0 or 1, or its place in the network would not show.
    """
    random = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        values = around + random.uniform(-0.5, 0.5, leaf.shape)
        return values.astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map_with_path(fill, shapes)


@pytest.fixture
def variables_of() -> Callable[..., Any]:
    return random_variables
