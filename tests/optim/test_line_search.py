"""Backtracking, on losses and divergences that are functions of the fraction alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.optim._line_search import SearchResult, backtracking


def search(loss, divergence=lambda f: 0 * f, **changes) -> SearchResult:
    start = jnp.asarray(loss(jnp.zeros([])))
    options = {
        "expected_decrease": jnp.ones([]), "radius": jnp.ones([]), "has_direction": jnp.array(True),
        "backtrack": 0.5, "max_backtracks": 10, "accept_ratio": 0.0, "slack": 1.0,
    }  # fmt: skip
    run = jax.jit(
        lambda: backtracking(
            lambda f: (loss(f), divergence(f)), loss=start, **{**options, **changes}
        )
    )
    return run()


@pytest.mark.parametrize(
    ("loss", "divergence", "changes", "fraction", "num_tried"),
    [
        (lambda f: -f, lambda f: f, {}, 1.0, 1),
        (lambda f: (f - 0.2) ** 2, lambda f: f, {}, 0.25, 3),  # 1 and 0.5 end above 0.04
        (lambda f: -f, lambda f: 4 * f**2, {}, 0.5, 2),  # the trust region: 4, then 1
        (lambda f: -f, lambda f: 4 * f**2, {"slack": 4.0}, 1.0, 1),
        (lambda f: -f, lambda f: f, {"radius": jnp.asarray(0.1)}, 0.0625, 5),
        (lambda f: f**2 - f, lambda f: f, {"accept_ratio": 0.6}, 0.25, 3),  # falls by f - f^2
        (lambda f: jnp.where(f > 0.6, jnp.nan, -f), lambda f: f, {}, 0.5, 2),
        (lambda f: jnp.where(f > 0.6, -jnp.inf, -f), lambda f: f, {}, 0.5, 2),
        (lambda f: -f, lambda f: jnp.where(f > 0.6, jnp.nan, f), {}, 0.5, 2),
    ],
)
def test_the_first_step_that_is_allowed(loss, divergence, changes, fraction, num_tried) -> None:
    found = search(loss, divergence, **changes)
    assert found.accepted
    assert (float(found.fraction), int(found.num_tried)) == (fraction, num_tried)
    np.testing.assert_allclose(found.divergence, divergence(jnp.asarray(fraction)))


def test_a_step_of_the_full_radius_is_not_refused_for_its_rounding() -> None:
    radius = jnp.asarray(0.01)
    found = search(lambda f: -f, lambda f: f * radius * (1 + 1e-6), radius=radius)
    assert (found.accepted, found.fraction) == (True, 1)


@pytest.mark.parametrize(
    ("loss", "changes", "num_tried"),
    [
        (lambda f: f, {}, 10),
        (lambda f: 0 * f, {}, 10),  # the same number is no fall
        (lambda f: f, {"max_backtracks": 3}, 3),
        (lambda f: -f, {"has_direction": jnp.array(False)}, 10),  # nothing is tried
    ],
)
def test_no_step_is_accepted(loss, changes, num_tried) -> None:
    found = search(loss, **changes)
    assert not found.accepted
    assert found.num_tried == num_tried


def test_without_jit() -> None:
    with jax.disable_jit():
        found = search(lambda f: (f - 0.2) ** 2)
    assert found.fraction == 0.25
