import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.models import MLP

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).random((5, 4, 4, 1), np.float32))


def test_matches_numpy(variables_of: Callable[..., Any]) -> None:
    model = MLP(2, hidden=(3,), activation="tanh")
    variables = variables_of(model, IMAGES)
    parameters = jax.tree.map(np.asarray, variables["params"])
    hidden, head = parameters["dense_0"], parameters["head"]
    x = np.tanh(np.reshape(IMAGES, (5, 16)) @ hidden["kernel"] + hidden["bias"])
    expected = x @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(model.apply(variables, IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_parameter_count(hidden: tuple[int, ...]) -> None:
    variables = jax.eval_shape(MLP(3, hidden=hidden).init, KEY, IMAGES)
    widths = [16, *hidden, 3]
    expected = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_activation_may_be_a_function(variables_of: Callable[..., Any]) -> None:
    variables = variables_of(MLP(2), IMAGES)
    named = MLP(2, activation="silu").apply(variables, IMAGES)
    np.testing.assert_array_equal(MLP(2, activation=jax.nn.silu).apply(variables, IMAGES), named)
    assert not np.allclose(MLP(2, activation="relu").apply(variables, IMAGES), named)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of 'relu'.* got 'rellu'"):
        MLP(2, activation="rellu")
