"""Fisher SAM and TRAM-Fisher against numbers worked out elsewhere, and their ellipse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    QUADRATIC,
    SOFTMAX,
    array,
    assert_close,
    check_golden,
    cross_entropies,
    quadratic,
    softmax_loss,
)

from trustjax.optim import fisher_sam, sam, tram_fisher

NOISE = SOFTMAX["noise"]["z"]
FISHER_GRADS = {
    "batch_mean": lambda w: jax.grad(softmax_loss)(w, NOISE),
    "per_example": lambda w: jax.jacobian(cross_entropies)(w, NOISE),
}


@pytest.mark.parametrize("make", [fisher_sam, tram_fisher])
def test_quadratic(make, precision, strict):
    """Fisher SAM and TRAM-Fisher without noise make the same step."""
    clean = lambda w: {"fisher_grads": jax.grad(quadratic)(w)}
    _, state = check_golden(
        make(0.1, 0.1), quadratic, QUADRATIC, QUADRATIC["fisher"], arguments=clean
    )
    assert_close([state.radius, state.distance], [0.1, 0.1])


@pytest.mark.parametrize("name", FISHER_GRADS)
def test_softmax_eager(name, x64, strict):
    check_softmax(name, lambda f: f)


@pytest.mark.table
@pytest.mark.parametrize("name", FISHER_GRADS)
def test_softmax(name, precision, strict):
    check_softmax(name, jax.jit)


def check_softmax(name, wrap):
    row = SOFTMAX["fisher"][name]
    noised = lambda w: {"fisher_grads": FISHER_GRADS[name](w)}
    numbers, _ = check_golden(
        tram_fisher(0.1, 0.1), softmax_loss, SOFTMAX, row, arguments=noised, wrap=wrap
    )
    # The attack ends on the ellipse of radius gamma.
    squares = np.square(numbers["attack"]).ravel()
    np.testing.assert_allclose(np.sum(squares * (1 + 0.1 * np.array(row["fisher"]))), 0.01, 1e-5)
    fisher = np.square(wrap(FISHER_GRADS[name])(array(SOFTMAX["w"]))).reshape(-1, 4).mean(0)
    assert_close(fisher, row["fisher"])


def test_noised_gradient_for_both_is_fisher_sam_on_the_noised_batch(x64):
    """With the first gradient from the noised batch too, two passes are enough, not three."""
    w, tx = array(SOFTMAX["w"]), tram_fisher(0.1, 0.1)
    noised = jax.jit(lambda w: jax.grad(softmax_loss)(w, NOISE))(w)
    call = lambda g: tx.update(g, tx.init(w), w, grad_fn=lambda p: p, fisher_grads=g)[0]
    moved = jax.jit(call)(noised)
    inverse = 1 / (1 + 0.1 * np.square(noised))
    expected = 0.1 * inverse * noised / np.sqrt(np.sum(noised * inverse * noised))
    np.testing.assert_allclose(moved - w, expected, rtol=1e-12)


def test_no_metric_is_sam():
    w, grad = array(SOFTMAX["w"]), jax.grad(softmax_loss)
    ours, theirs = tram_fisher(0.05, eta=0.0), sam(0.05)
    actual, expected = jax.jit(
        lambda w: (
            ours.update(grad(w), ours.init(w), w, grad_fn=grad, fisher_grads=100 * grad(w))[0],
            theirs.update(grad(w), theirs.init(w), w, grad_fn=grad)[0],
        )
    )(w)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_mask_and_schedule():
    """A leaf outside of the mask is not in the norm; the radius follows the count."""
    params = {"a": array([3.0]), "b": array([4.0])}
    loss = lambda p: jnp.sum(p["a"] * p["b"])
    tx = tram_fisher(lambda count: 1.0 + count, 0.0, mask={"a": True, "b": False})
    grad = jax.grad(loss)
    state = tx.init(params)
    for step in range(2):
        gradient, state = tx.update(
            grad(params), state, params, grad_fn=grad, fisher_grads=grad(params)
        )
        assert float(gradient["a"][0]) == 4.0
        assert float(gradient["b"][0]) == 4.0 + step  # a moved by gamma
        assert float(state.radius) == float(state.distance) == 1.0 + step


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fisher_sam(-0.1), "gamma must be >= 0, got -0.1"),
        (lambda: tram_fisher(eta=-1.0), "eta must be >= 0, got -1.0"),
    ],
)
def test_bad_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_fisher_grads_are_required():
    tx, w = optax.chain(tram_fisher(), optax.sgd(0.1)), array(SOFTMAX["w"])
    with pytest.raises(ValueError, match=r"tram_fisher needs fisher_grads: call .*fisher_grads="):
        tx.update(w, tx.init(w), w, grad_fn=jax.grad(softmax_loss))
