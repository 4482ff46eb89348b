"""ESAM: the leaves that it attacks, the examples on which it descends, and SAM as its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import SOFTMAX, array, check_golden, cross_entropies, softmax_loss

from trustjax.optim import alternating, esam, sam, two_pass_step
from trustjax.optim._attack import example_mean

RHO = 0.5


def test_all_leaves_and_examples_are_sam(precision, strict):
    """Both forms are then SAM."""
    for form in ("paper", "released"):
        tx = esam(0.05, beta=1.0, gamma=1.0, form=form)
        _, state = check_golden(tx, softmax_loss, SOFTMAX, SOFTMAX["steps"]["sam"])
        np.testing.assert_allclose([state.radius, state.distance], 0.05, rtol=1e-6)


# ---- leaves: a gradient of three leaves of length 1, 2 and 2

GRADIENT = {"a": np.array([1.0]), "b": np.array([0.0, 2.0]), "c": np.array([-2.0])}
PARAMS = {"a": np.array([3.0]), "b": np.array([-1.0, 0.5]), "c": np.array([2.0])}


def attacks(form, beta, seeds, **arguments):
    """Attacks on PARAMS, [seeds, ...], and the states after them."""

    def attack(seed):
        tx = esam(RHO, beta, gamma=1.0, form=form, seed=seed, **arguments)
        move = lambda attacked: jax.tree.map(jnp.subtract, attacked, PARAMS)
        return tx.update(GRADIENT, tx.init(PARAMS), PARAMS, grad_fn=move)

    return jax.device_get(jax.jit(jax.vmap(attack))(np.arange(seeds)))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_leaves_are_dropped_and_the_others_lengthened(form, x64):
    """The attacks agree with NumPy for every draw that came up."""
    attack, state = attacks(form, 0.6, 200)
    drawn = set()
    for seed in range(200):
        kept = {name: bool(np.any(attack[name][seed] != 0)) for name in GRADIENT}
        drawn.add(tuple(kept.values()))
        rest = {name: g * kept[name] for name, g in GRADIENT.items()}
        norm_of = GRADIENT if form == "paper" else rest
        norm = np.sqrt(sum(np.sum(g**2) for g in norm_of.values())) or 1.0
        expected = {name: RHO / 0.6 * g / norm for name, g in rest.items()}
        for name in GRADIENT:
            np.testing.assert_allclose(attack[name][seed], expected[name], rtol=1e-12)
        length = np.sqrt(sum(np.sum(e**2) for e in expected.values()))
        np.testing.assert_allclose(state.distance[seed], length, rtol=1e-12)
    assert len(drawn) == 8
    np.testing.assert_allclose(state.radius, RHO / 0.6)
    assert np.all(state.distance <= state.radius * (1 + 1e-12))


def test_the_mean_attack_is_that_of_sam(x64):
    """They agree within four standard errors; with the released code's norm they do not."""
    seeds, beta = 2000, 0.6
    expected = {name: RHO * g / 3 for name, g in GRADIENT.items()}
    for form, agrees in (("paper", True), ("released", False)):
        attack, _ = attacks(form, beta, seeds)
        error = np.abs(np.mean(attack["c"]) - expected["c"][0])
        assert (error < 4 * np.std(attack["c"]) / seeds**0.5) == agrees
        kept = np.mean(np.asarray(attack["a"]) != 0)
        assert abs(kept - beta) < 4 * (beta * (1 - beta) / seeds) ** 0.5


def test_scaled_and_masked(x64):
    """Norms are those of ASAM's ball; a leaf outside of the mask is not drawn and in no norm."""
    mask = {"a": True, "b": True, "c": False}
    attack, state = attacks("paper", 0.5, 40, adaptive=True, eta=0.1, mask=mask)
    scale = {name: np.abs(p) + 0.1 for name, p in PARAMS.items()}
    norm = np.sqrt(sum(np.sum((scale[n] * GRADIENT[n]) ** 2) for n in ("a", "b")))
    np.testing.assert_array_equal(attack["c"], 0)
    for name in ("a", "b"):
        full = RHO / 0.5 * scale[name] ** 2 * GRADIENT[name] / norm
        kept = np.any(attack[name] != 0, axis=1)
        assert 0 < kept.sum() < 40
        np.testing.assert_allclose(attack[name][kept], np.tile(full, (kept.sum(), 1)), rtol=1e-12)
    lengths = np.sqrt(sum(np.sum((attack[n] / scale[n]) ** 2, -1) for n in ("a", "b")))
    np.testing.assert_allclose(state.distance, lengths, rtol=1e-12)


def test_every_step_draws_anew(x64):
    """Steps differ in their draws, and the same seed repeats them."""

    @jax.jit
    def run(seed):
        tx = esam(RHO, 0.5, gamma=1.0, seed=seed)
        move = lambda attacked: jax.tree.map(jnp.subtract, attacked, PARAMS)
        step = lambda state, _: tx.update(GRADIENT, state, PARAMS, grad_fn=move)[::-1]
        return jax.lax.scan(step, tx.init(PARAMS), length=30)[1]

    first, again, other = (
        np.stack([np.any(leaf != 0, -1) for leaf in jax.tree.leaves(run(seed))])
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert all(0 < np.sum(leaf) < 30 for leaf in first)
    assert not np.array_equal(first[0], first[2])  # every leaf has its own draw


# ---- examples


def selected(rise, gamma, form="paper", where=None):
    """The mask that `grad_fn` gets if the losses rise by `rise`."""
    tx, w, seen = esam(RHO, 1.0, gamma, form=form), jnp.ones(1), []
    grad_fn = lambda p, where: seen.append(where) or p
    arguments = {"losses_fn": lambda p: jnp.asarray(rise), "losses": jnp.zeros(len(rise))}
    tx.update(w, tx.init(w), w, grad_fn=grad_fn, where=where, **arguments)
    return np.asarray(seen[0])


RISE = np.array([0.3, -0.1, 0.5, 0.0, 0.2, 0.9, 0.1, 0.4, -0.3, 0.6], np.float32)


@pytest.mark.parametrize(
    ("gamma", "quota"), [(0.5, 5), (0.7, 7), (0.29, 2), (0.3, 3), (0.1, 1), (0.01, 1), (0.98, 9)]
)
def test_the_examples_that_rise_most(gamma, quota):
    """The share is rounded down to at least one example; the released code has one fewer."""
    falling = np.argsort(-RISE)
    for form, number in (("paper", quota), ("released", quota - 1)):
        chosen = np.flatnonzero(selected(RISE, gamma, form))
        np.testing.assert_array_equal(chosen, np.sort(falling[:number]))


def test_ties():
    """The share is filled; the released code drops all examples that tie with its last one."""
    tied = np.array([1.0, 2.0, 1.0, 1.0], np.float32)
    assert selected(tied, 0.5).sum() == 2
    assert selected(tied, 0.5)[1]
    np.testing.assert_array_equal(selected(tied, 0.5, "released"), [False, True, False, False])
    assert not selected(np.zeros(4, np.float32), 0.5, "released").any()


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_traced_share(form):
    gammas = jnp.array([0.5, 0.7, 1.0])
    traced = jax.jit(jax.vmap(lambda gamma: jnp.asarray(_traced(gamma, form))))(gammas)
    concrete = [selected(RISE, gamma, form) for gamma in (0.5, 0.7)]
    np.testing.assert_array_equal(traced, [*concrete, np.ones(10, bool)])


def _traced(gamma, form):
    tx, w, seen = esam(RHO, 1.0, gamma, form=form), jnp.ones(1), []
    grad_fn = lambda p, where: seen.append(where) or p
    tx.update(w, tx.init(w), w, grad_fn=grad_fn, losses_fn=lambda p: RISE * (p[0] - 1) / RHO)
    return seen[0]


def test_examples_that_do_not_count():
    """The share is taken of the examples in `where`."""
    where = np.arange(10) % 2 == 0  # rises 0.3 0.5 0.2 0.1 -0.3
    expected = np.isin(np.arange(10), [0, 2])
    np.testing.assert_array_equal(selected(RISE, 0.4, where=where), expected)
    assert not selected(RISE, 0.4, where=np.zeros(10, bool)).any()


def softmax_step(w, gamma, form="paper", where=None):
    """A step at learning rate 1 from losses and gradients of single examples."""
    counted = np.ones(3, bool) if where is None else where
    per_example = jax.jit(jax.jacobian(cross_entropies))
    g = np.mean(per_example(w)[counted], 0)
    attacked = w + RHO * g / np.linalg.norm(g)
    rise = np.asarray(cross_entropies(attacked) - cross_entropies(w))
    quota = int(counted.sum() * gamma + 1e-9) - (form == "released")
    chosen = np.flatnonzero(counted)[np.argsort(-rise[counted])[:quota]]
    return w - np.mean(per_example(attacked)[chosen], 0), chosen


@pytest.mark.parametrize("form", ["paper", "released"])
def test_two_pass_step_descends_on_the_selection(form, x64):
    """The other terms of the loss stay, here a penalty on the weights."""
    w, share = array(SOFTMAX["w"]), 0.7
    decay = lambda w: 0.05 * jnp.sum(jnp.square(w - array(SOFTMAX["w"])))  # zero slope at w

    def loss_fn(w):
        losses = cross_entropies(w)
        return losses.mean() + decay(w), {"losses": losses}

    tx = optax.chain(esam(RHO, 1.0, share, form=form), optax.sgd(1.0))
    new, _, loss, _ = jax.jit(two_pass_step(loss_fn, tx))(w, tx.init(w))
    expected, chosen = softmax_step(w, share, form)
    assert len(chosen) == (2 if form == "paper" else 1)
    attack = RHO * jax.grad(softmax_loss)(w) / np.linalg.norm(jax.grad(softmax_loss)(w))
    np.testing.assert_allclose(new, expected - 0.1 * attack, rtol=1e-12)
    np.testing.assert_allclose(loss, SOFTMAX["loss"], rtol=1e-12)


def test_two_pass_step_with_a_mask(x64):
    w, where = array(SOFTMAX["w"]), np.array([True, False, True])

    def loss_fn(w):
        losses = cross_entropies(w)
        return example_mean(losses, where), {"losses": losses, "where": where}

    tx = optax.chain(esam(RHO, 1.0, 0.5), optax.sgd(1.0))
    new = jax.jit(two_pass_step(loss_fn, tx))(w, tx.init(w)).params
    expected, chosen = softmax_step(w, 0.5, where=where)
    assert len(chosen) == 1
    np.testing.assert_allclose(new, expected, rtol=1e-12)


# ---- errors and combinations


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: esam(-0.1), "rho must be >= 0, got -0.1"),
        (lambda: esam(beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: esam(beta=1.5), "beta must be <= 1, got 1.5"),
        (lambda: esam(gamma=0.0), "gamma must be > 0, got 0.0"),
        (lambda: esam(gamma=1.5), "gamma must be <= 1, got 1.5"),
        (lambda: esam(eta=-1.0), "eta must be >= 0, got -1.0"),
        (lambda: esam(form="code"), "form must be one of 'paper', 'released', got 'code'"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_losses_are_needed_for_a_selection():
    w, tx = jnp.ones(2), esam()
    with pytest.raises(ValueError, match=r"needs losses_fn, unless gamma is 1: call .*losses_fn="):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: p)
    step = two_pass_step(lambda p: jnp.sum(p), optax.chain(tx, optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"aux\['losses'\]"):
        step(w, (tx.init(w), (optax.EmptyState(), optax.EmptyState())))
    with pytest.raises(ValueError, match=r"must have the shape \[batch\], got \(\) and \(\)"):
        tx.update(w, tx.init(w), w, grad_fn=lambda p, where: p, losses_fn=jnp.sum)


def test_alternating_takes_it_without_a_selection():
    w = array(SOFTMAX["w"])
    grads = jax.grad(softmax_loss)(w)
    calls = {
        "esam": alternating(esam(0.05, beta=1.0, gamma=1.0), optax.sgd(0.1)),
        "sam": alternating(sam(0.05), optax.sgd(0.1)),
    }
    moves = {
        name: jax.jit(lambda w, tx=tx: tx.update(grads, tx.init(w), w)[0])(w)
        for name, tx in calls.items()
    }
    np.testing.assert_allclose(moves["esam"], moves["sam"], rtol=1e-6)
    tx = alternating(esam(0.05, gamma=0.5), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"gamma must be 1 in alternating, .* got 0\.5"):
        tx.update(grads, tx.init(w), w)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_loss_that_breaks_is_among_the_selected(form):
    """Sorted last, it would be left out, and nothing would be reported."""
    chosen, w = [], jnp.ones(2)

    def grad_fn(params, where):
        chosen.append(where)
        return jnp.where(where[0], jnp.nan, params)

    tx = esam(0.05, 1.0, 0.7, form=form)
    losses = lambda params: jnp.array([jnp.nan, 0.0, 1.0, 0.5])
    where = jnp.array([True, True, False, True])
    _, state = tx.update(
        w, tx.init(w), w, grad_fn=grad_fn, losses_fn=losses, losses=jnp.zeros(4), where=where
    )
    assert chosen[0][0]
    assert not chosen[0][2]
    assert state.nonfinite_count == 1
