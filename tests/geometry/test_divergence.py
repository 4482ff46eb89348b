"""Divergences against SciPy, against integrals, and where numbers cancel or overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.spatial.distance
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.geometry import (
    gaussian_kl,
    gaussian_renyi,
    jensen_shannon,
    kl_divergence,
    l2_distance,
    mmd,
    renyi_divergence,
    reverse_kl,
    symmetric_kl,
    tsallis_divergence,
)

ORDERS = (0.3, 0.5, 1.5, 2.0, 3.0)
# Between softmaxes of logits, per example.
DIVERGENCES = {
    "kl": kl_divergence,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jensen_shannon": jensen_shannon,
    "tsallis_half": functools.partial(tsallis_divergence, order=0.5),
    "tsallis_two": functools.partial(tsallis_divergence, order=2.0),
    "renyi_half": functools.partial(renyi_divergence, order=0.5),
    "renyi_two": functools.partial(renyi_divergence, order=2.0),
}
EACH = pytest.mark.parametrize("name", DIVERGENCES)


@jax.jit
def all_of(logits_p, logits_q):
    return {name: divergence(logits_p, logits_q) for name, divergence in DIVERGENCES.items()}


@jax.jit
def all_gradients(logits_p, logits_q):
    total = lambda divergence: lambda p, q: jnp.sum(divergence(p, q))
    return {name: jax.grad(total(f), (0, 1))(logits_p, logits_q) for name, f in DIVERGENCES.items()}


def random_logits(*shape, scale=2.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(2, *shape))


# ---- values


def test_by_hand(x64):
    """p = (1/4, 3/4), q = (1/2, 1/2)."""
    p, q = np.log([0.25, 0.75]), np.array([7.0, 7.0])  # constants do not matter
    actual = all_of(p, q)
    expected = {
        "kl": 0.25 * np.log(0.5) + 0.75 * np.log(1.5),
        "reverse_kl": 0.5 * np.log(2.0) + 0.5 * np.log(2 / 3),
        "symmetric_kl": 0.25 * np.log(3.0),
        # m = (3/8, 5/8)
        "jensen_shannon": 0.5 * (0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5))
        + 0.5 * (0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)),
        # sum sqrt(p q) = (1 + sqrt 3) / sqrt 8;  sum p^2 / q = 5 / 4
        "tsallis_half": 2 * (1 - (1 + np.sqrt(3)) / np.sqrt(8)),
        "renyi_half": -2 * np.log((1 + np.sqrt(3)) / np.sqrt(8)),
        "tsallis_two": 0.25,
        "renyi_two": np.log(1.25),
    }
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-14), actual, expected)


def scipy_divergences(p, q):
    tsallis = lambda order: (np.sum(p**order * q ** (1 - order), -1) - 1) / (order - 1)
    renyi = lambda order: np.log(np.sum(p**order * q ** (1 - order), -1)) / (order - 1)
    kl, reverse = scipy.stats.entropy(p, q, axis=-1), scipy.stats.entropy(q, p, axis=-1)
    return {
        "kl": kl,
        "reverse_kl": reverse,
        "symmetric_kl": kl + reverse,
        "jensen_shannon": np.square(scipy.spatial.distance.jensenshannon(p, q, axis=-1)),
        "tsallis_half": tsallis(0.5),
        "tsallis_two": tsallis(2.0),
        "renyi_half": renyi(0.5),
        "renyi_two": renyi(2.0),
    }


@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
def test_against_scipy(scale, x64):
    logits_p, logits_q = random_logits(3, 6, 5, scale=scale)
    p, q = scipy.special.softmax(logits_p, -1), scipy.special.softmax(logits_q, -1)
    actual = all_of(logits_p, logits_q)
    compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-15)
    jax.tree.map(compare, actual, scipy_divergences(p, q))
    assert actual["kl"].shape == (3, 6)


def test_orders(x64):
    """Traced orders on both sides of 1 give the definitions, and Rényi grows with the order."""
    logits_p, logits_q = random_logits(5)
    p, q = scipy.special.softmax(logits_p), scipy.special.softmax(logits_q)
    both = lambda order: (
        tsallis_divergence(logits_p, logits_q, order=order),
        renyi_divergence(logits_p, logits_q, order=order),
    )
    tsallis, renyi = jax.jit(jax.vmap(both))(jnp.array(ORDERS))
    sums = np.array([np.sum(p**a * q ** (1 - a)) for a in ORDERS])
    excess = np.array(ORDERS) - 1
    np.testing.assert_allclose(tsallis, (sums - 1) / excess, rtol=1e-12)
    np.testing.assert_allclose(renyi, np.log(sums) / excess, rtol=1e-12)
    assert np.all(np.diff(renyi) > 0)


def test_order_one_is_kl_and_the_limit(x64):
    logits_p, logits_q = random_logits(5)
    kl = jax.jit(kl_divergence)(logits_p, logits_q)
    both = jax.jit(
        lambda order: (
            tsallis_divergence(logits_p, logits_q, order=order),
            renyi_divergence(logits_p, logits_q, order=order),
        )
    )
    np.testing.assert_array_equal(both(1.0), kl)
    for step in (1e-3, 1e-6, 1e-9, 1e-12):
        for order in (1 - step, 1 + step):
            np.testing.assert_allclose(both(order), kl, rtol=100 * step + 1e-12)


def test_limit_of_the_order_in_float32():
    """d = 1e-6 would lose all digits in (sum p^a q^(1-a) - 1) / d."""
    logits_p, logits_q = random_logits(4, 5).astype(np.float32)
    values = jax.jit(
        lambda order: (
            kl_divergence(logits_p, logits_q),
            tsallis_divergence(logits_p, logits_q, order=order),
            renyi_divergence(logits_p, logits_q, order=order),
        )
    )
    for order in (1 - 1e-3, 1 - 1e-6, 1 + 1e-6, 1 + 1e-3):
        kl, tsallis, renyi = values(np.float32(order))
        np.testing.assert_allclose(tsallis, kl, rtol=1e-2)
        np.testing.assert_allclose(renyi, kl, rtol=1e-2)


def test_l2_distance(x64):
    logits_p, logits_q = random_logits(4, 3)
    where = np.array([True, False, True])
    norm = lambda x: np.linalg.norm(x, axis=-1)
    expected = norm(logits_p - logits_q), norm((logits_p - logits_q)[:, where])
    actual = jax.jit(lambda p, q: (l2_distance(p, q), l2_distance(p, q, where=where)))(
        logits_p, logits_q
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_axis_and_class_mask(x64):
    """The mask restricts both distributions to its classes, and only these have gradients."""
    logits_p, logits_q = random_logits(4, 5)
    where = np.array([True, False, True, True, False])
    logits_p[:, 1], logits_q[:, 4] = np.inf, np.nan  # what is masked is not looked at
    divergences = {**DIVERGENCES, "l2": l2_distance}
    each = lambda call: {name: call(divergence) for name, divergence in divergences.items()}
    masked, transposed, small = jax.jit(
        lambda p, q: (
            each(lambda f: f(p, q, where=where)),
            each(lambda f: f(p.T, q.T, axis=0, where=where[:, None])),
            each(lambda f: f(p[:, where], q[:, where])),
        )
    )(logits_p, logits_q)
    compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12)
    jax.tree.map(compare, masked, small)
    jax.tree.map(compare, transposed, small)
    total = lambda p, q: kl_divergence(p, q, where=where).sum()
    for gradient in jax.jit(jax.grad(total, (0, 1)))(logits_p, logits_q):
        np.testing.assert_array_equal(gradient != 0, np.broadcast_to(where, (4, 5)))


# ---- properties


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-30, 30, width=32), min_size=16, max_size=16))
def test_properties(values):
    """In float32 they are >= 0, bounded, symmetric, invariant to constants, and ordered."""
    logits_p, logits_q = np.array(values, np.float32).reshape(2, 2, 4)
    actual, swapped = all_of(logits_p, logits_q), all_of(logits_q, logits_p)
    shifted = all_of(logits_p + np.float32(3), logits_q - np.float32(5))
    for name, value in actual.items():
        assert np.all(value >= 0)
        assert np.all(np.isfinite(value)) or name == "tsallis_two"
        np.testing.assert_allclose(shifted[name], value, rtol=1e-3, atol=1e-5)
    for name in ("symmetric_kl", "jensen_shannon", "tsallis_half", "renyi_half"):
        np.testing.assert_allclose(swapped[name], actual[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(swapped["kl"], actual["reverse_kl"])
    assert np.all(actual["jensen_shannon"] <= np.log(2) * (1 + 1e-6))
    assert np.all(actual["tsallis_half"] <= 2 * (1 + 1e-6))
    at_most = lambda small, large: np.all(small <= large * (1 + 1e-5) + 1e-6)
    assert at_most(actual["renyi_half"], actual["kl"])
    assert at_most(actual["kl"], actual["renyi_two"])
    assert at_most(actual["jensen_shannon"], actual["symmetric_kl"] / 4)


def test_zero_with_zero_gradient_at_equality():
    """Value and gradient are exactly 0 in float32."""
    for seed in range(10):
        logits = random_logits(2, 4, seed=seed)[0].astype(np.float32)
        values, gradients = all_of(logits, logits), all_gradients(logits, logits)
        assert all(np.all(value == 0) for value in values.values())
        assert all(np.all(gradient == 0) for gradient in jax.tree.leaves(gradients))
    distance = lambda p: l2_distance(p, logits).sum()
    value, gradient = jax.jit(jax.value_and_grad(distance))(logits)
    assert value == 0
    assert np.all(gradient == 0)


FACTORS = {
    "kl": 1, "reverse_kl": 1, "symmetric_kl": 2, "jensen_shannon": 1 / 4,
    "tsallis_half": 1 / 2, "tsallis_two": 2, "renyi_half": 1 / 2, "renyi_two": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "kl" else pytest.param(name, marks=pytest.mark.slow) for name in FACTORS],
)
def test_hessian_at_equality_is_the_fisher_matrix(name, x64):
    """Of softmax logits, diag(p) - p p', times the order of the divergence; for both arguments."""
    logits = jnp.array([0.2, -0.1, 0.4])
    p = jax.nn.softmax(logits)
    for argument in (0, 1):
        hessian = jax.jit(jax.hessian(DIVERGENCES[name], argnums=argument))(logits, logits)
        expected = FACTORS[name] * (jnp.diag(p) - jnp.outer(p, p))
        np.testing.assert_allclose(hessian, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_gradients_against_differences(x64):
    logits, step = random_logits(2, 4), 1e-6 * random_logits(2, 4, seed=1)
    higher, lower = all_of(*(logits + step)), all_of(*(logits - step))
    for name, gradients in all_gradients(*logits).items():
        slope = np.sum(np.array(gradients) * step)
        np.testing.assert_allclose(np.sum(higher[name] - lower[name]) / 2, slope, rtol=1e-7)


# ---- floating point


def test_small_moves_in_float32(x64):
    """Logits that differ by 1e-3: the divergence is 1e-7, which the plain sum cannot resolve."""
    logits_p = random_logits(200, 10, scale=1.0)[0].astype(np.float32)
    logits_q = logits_p + (1e-3 * random_logits(200, 10, scale=1.0, seed=1)[0]).astype(np.float32)

    @jax.jit
    def naive(logits_p, logits_q):
        log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

    wide = (logits_p.astype(np.float64), logits_q.astype(np.float64))
    exact = all_of(*wide)
    assert 1e-8 < exact["kl"].min() < exact["kl"].max() < 1e-5
    # All of them are f''(1) / 2 times chi squared here: KL itself at half, say, of Jeffreys.
    np.testing.assert_allclose(2 * exact["kl"], exact["symmetric_kl"], rtol=1e-2)
    error = lambda value, reference: np.max(np.abs(np.asarray(value) - reference) / reference)
    for name, value in all_of(logits_p, logits_q).items():
        assert value.dtype == np.float32
        assert error(value, exact[name]) < 5e-3, name
    assert error(naive(*wide), exact["kl"]) < 1e-6
    assert error(naive(logits_p, logits_q), exact["kl"]) > 0.1
    assert np.min(naive(logits_p, logits_q)) < 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_impossible_classes(dtype, x64):
    """Logits of -inf: values by the conventions 0 log 0 = 0, and finite gradients."""
    inf = np.inf
    logits_p = np.array([[0.0, 1.0, -inf, -inf], [-inf, -inf, 0.0, 0.0]], dtype)
    logits_q = np.array([[1.0, 0.0, 0.5, -inf], [-inf, 0.0, 0.0, 0.0]], dtype)
    values, gradients = all_of(logits_p, logits_q), all_gradients(logits_p, logits_q)
    p, q = scipy.special.softmax(logits_p, -1), scipy.special.softmax(logits_q, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.nansum(scipy.special.rel_entr(p, q), -1)
        half = np.sum(np.sqrt(p * q), -1)
        square = np.nansum(p**2 / q, -1)
    middle = (p + q) / 2
    js = (scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)).sum(-1) / 2
    expected = {
        "kl": kl,
        "jensen_shannon": js,
        "tsallis_half": 2 - 2 * half,
        "renyi_half": -2 * np.log(half),
        "tsallis_two": square - 1,
        "renyi_two": np.log(square),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5)
        for gradient in gradients[name]:
            assert np.all(np.isfinite(gradient)), name
    # q has what p excludes.
    assert np.all(np.isinf(values["reverse_kl"]))
    assert np.all(np.isinf(values["symmetric_kl"]))


def test_nothing_in_common():
    """With disjoint support a divergence is infinite or its largest value, never NaN."""
    logits = np.array([[0.0, 0.0, -np.inf, -np.inf], [-np.inf, -np.inf, -np.inf, 0.0]], np.float32)
    logits_p, logits_q = logits, logits[::-1]
    values = all_of(logits_p, logits_q)
    bounded = {"jensen_shannon": np.log(2), "tsallis_half": 2.0}
    for name, value in values.items():
        np.testing.assert_allclose(value, bounded.get(name, np.inf), rtol=1e-6)
    gradients = all_gradients(logits_p, logits_q)
    for name in bounded:
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients[name])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_huge_logits(dtype, x64):
    """Logits up to 1e4 overflow neither the value nor the gradient."""
    logits_p = np.array([[1e4, 0.0, 0.0, -1e4], [1e4, 1.0, 0.0, -1e4]], dtype)
    logits_q = np.array([[0.0, 1e4, 0.0, -1e4], [1e4, 0.0, 1.0, -1e4]], dtype)
    values, gradients = all_of(logits_p, logits_q), all_gradients(logits_p, logits_q)
    apart = {
        "kl": 1e4,
        "reverse_kl": 1e4,
        "symmetric_kl": 2e4,
        "jensen_shannon": np.log(2),
        "tsallis_half": 2.0,
        "tsallis_two": np.inf,
        "renyi_half": 1e4,
        "renyi_two": 1e4,
    }
    for name, (first, second) in values.items():
        np.testing.assert_allclose(first, apart[name], rtol=1e-3)
        assert second == 0
        if np.isfinite(apart[name]):
            assert all(np.all(np.isfinite(gradient)) for gradient in gradients[name]), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = jnp.asarray(random_logits(2, 4), dtype)
    wide = logits.astype(jnp.float32)
    values, expected = all_of(*logits), all_of(*wide)
    assert {value.dtype for value in values.values()} == {jnp.dtype("float32")}
    compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5)
    jax.tree.map(compare, values, expected)
    both = jax.jit(lambda p, q: (mmd(p, q), l2_distance(p, q)))(*logits)
    assert {value.dtype for value in both} == {jnp.dtype("float32")}


# ---- maximum mean discrepancy


def mmd_by_hand(x, y):
    bandwidths = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    kernel = lambda a, b: sum((b_**2 + np.sum((a - b) ** 2)) ** -0.5 for b_ in bandwidths)
    mean = lambda a, b: np.mean([[kernel(a_i, b_j) for b_j in b] for a_i in a])
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd(x64):
    x, y = random_logits(6, 3)
    where = np.array([True, False, True, True, False, True])
    whole, masked, tokens, empty, same, shuffled = jax.jit(
        lambda x, y: (
            mmd(x, y),
            mmd(x, y, where=where),
            mmd(x.reshape(2, 3, 3), y.reshape(2, 3, 3), where=where.reshape(2, 3)),
            mmd(x, y, where=np.zeros(6, bool)),
            mmd(x, x),
            mmd(x, y[::-1]),
        )
    )(x, y)
    np.testing.assert_allclose(whole, mmd_by_hand(x, y), rtol=1e-12)
    np.testing.assert_allclose(masked, mmd_by_hand(x[where], y[where]), rtol=1e-12)
    np.testing.assert_allclose(tokens, masked, rtol=1e-12)
    np.testing.assert_allclose(shuffled, whole, rtol=1e-12)  # batches are compared as sets
    assert empty == 0
    assert 0 <= same < 1e-13
    one = jax.jit(lambda x, y: mmd(x, y, bandwidths=(2.0,)))(x[:1], y[:1])
    distance = np.sum((x[0] - y[0]) ** 2)
    np.testing.assert_allclose(one, 2 * (0.5 - (4 + distance) ** -0.5), rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12))
def test_mmd_is_not_negative(values):
    x, y = np.array(values, np.float32).reshape(2, 3, 2)
    value, gradient = MMD_AND_GRADIENT(x, y)
    assert 0 <= value < np.inf
    assert np.all(np.isfinite(gradient))


MMD_AND_GRADIENT = jax.jit(jax.value_and_grad(mmd))


# ---- Gaussians

MEAN_P, MEAN_Q = np.array([0.3, -1.0]), np.array([0.5, 0.2])
LOG_STD_P, LOG_STD_Q = np.array([-0.4, 0.1]), np.array([0.2, 0.3])


def integral(integrand, i):
    p = scipy.stats.norm(MEAN_P[i], np.exp(LOG_STD_P[i]))
    q = scipy.stats.norm(MEAN_Q[i], np.exp(LOG_STD_Q[i]))
    return scipy.integrate.quad(lambda x: integrand(p.logpdf(x), q.logpdf(x)), -15, 15)[0]


@pytest.mark.parametrize("order", [0.5, 0.9, 1.0, 2.0])
def test_gaussians_against_integrals(order, x64):
    if order == 1.0:
        integrand = lambda log_p, log_q: np.exp(log_p) * (log_p - log_q)
        expected = sum(integral(integrand, i) for i in range(2))
        kl = jax.jit(gaussian_kl)(MEAN_P, LOG_STD_P, MEAN_Q, LOG_STD_Q)
        np.testing.assert_allclose(kl, expected, rtol=1e-9)
    else:
        integrand = lambda log_p, log_q: np.exp(order * log_p + (1 - order) * log_q)
        expected = sum(np.log(integral(integrand, i)) / (order - 1) for i in range(2))
    renyi = jax.jit(functools.partial(gaussian_renyi, order=order))
    np.testing.assert_allclose(renyi(MEAN_P, LOG_STD_P, MEAN_Q, LOG_STD_Q), expected, rtol=1e-9)


def test_gaussian_shapes_and_limits(x64):
    arguments = tuple(np.stack([a] * 3) for a in (MEAN_P, LOG_STD_P, MEAN_Q, LOG_STD_Q))
    one = (MEAN_P, LOG_STD_P, MEAN_Q, LOG_STD_Q)
    for divergence in (gaussian_kl, functools.partial(gaussian_renyi, order=2.0)):
        single = jax.jit(divergence)(*one)
        np.testing.assert_allclose(jax.jit(divergence)(*arguments), [single] * 3, rtol=1e-14)
        # One standard deviation for all dimensions and examples; another axis.
        shared = (arguments[0], np.array(0.1), arguments[2], np.array([0.1, 0.1]))
        full = (arguments[0], np.full((3, 2), 0.1), arguments[2], np.full((3, 2), 0.1))
        expected = jax.jit(divergence)(*full)
        np.testing.assert_allclose(jax.jit(divergence)(*shared), expected, rtol=1e-14)
        transposed = jax.jit(functools.partial(divergence, axis=0))(*(a.T for a in full))
        np.testing.assert_allclose(transposed, expected, rtol=1e-14)
        # Equal: zero with zero gradient.
        value, gradients = jax.jit(jax.value_and_grad(divergence, (0, 1, 2, 3)))(*one[:2] * 2)
        np.testing.assert_allclose([value, *np.ravel(gradients)], 0, atol=1e-15)
    near = [jax.jit(functools.partial(gaussian_renyi, order=a))(*one) for a in (1 - 1e-7, 1 + 1e-7)]
    np.testing.assert_allclose(near, jax.jit(gaussian_kl)(*one), rtol=1e-5)


def test_gaussian_renyi_diverges_where_its_integral_does():
    """The order is 4 and p much wider than q; the gradient is not NaN."""
    args = tuple(np.array([x], np.float32) for x in (0.0, 1.0, 0.5, 0.0))
    divergence = functools.partial(gaussian_renyi, order=4.0)
    value, gradients = jax.jit(jax.value_and_grad(divergence, (0, 1, 2, 3)))(*args)
    assert value == np.inf
    assert np.all(np.isfinite(gradients))


def test_gaussians_in_float32():
    """Small moves keep their digits, and bfloat16 is computed in float32."""
    mean, log_std = random_logits(100, 4, scale=1.0).astype(np.float32)
    shift = np.float32(1e-3)
    kl = jax.jit(gaussian_kl)(mean, log_std, mean, log_std + shift)
    # Per dimension: log_ratio = -2 s, (exp(-2 s) - 1 + 2 s) / 2 = s^2 + ...
    np.testing.assert_allclose(kl, 4 * 1e-6, rtol=1e-2)
    half = (jnp.asarray(x, jnp.bfloat16) for x in (mean, log_std, mean, log_std))
    assert jax.jit(gaussian_kl)(*half).dtype == jnp.float32


# ---- arguments


@pytest.mark.table
@EACH
def test_strict_promotion(name, strict):
    logits = random_logits(3, 4).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        pair = [jnp.asarray(x, dtype) for x in logits]
        shape = jax.eval_shape(DIVERGENCES[name], *pair)
        assert (shape.shape, shape.dtype) == ((3,), jnp.dtype("float32"))
        jax.eval_shape(lambda p, q: DIVERGENCES[name](p, q, where=np.ones((1, 4), bool)), *pair)
        jax.eval_shape(jax.grad(lambda p, q: DIVERGENCES[name](p, q).sum()), *pair)


def test_strict_promotion_of_the_others(strict):
    p, q = jnp.asarray(random_logits(3, 4), jnp.float32)
    where = np.ones(3, bool)
    jax.eval_shape(lambda p, q: (l2_distance(p, q), mmd(p, q), mmd(p, q, where=where)), p, q)
    jax.eval_shape(
        lambda p, q: (gaussian_kl(p, q, q, p), gaussian_renyi(p, q, q, p, order=2)), p, q
    )


def test_batch_is_vmap():
    logits_p, logits_q = random_logits(2, 4).astype(np.float32)
    one_by_one = jax.jit(jax.vmap(all_of))(logits_p, logits_q)
    compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)
    jax.tree.map(compare, one_by_one, all_of(logits_p, logits_q))


@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "renyi_two"])
def test_eager_is_jit(name):
    logits_p, logits_q = random_logits(2, 4).astype(np.float32)
    compiled = all_of(logits_p, logits_q)[name]
    np.testing.assert_allclose(DIVERGENCES[name](logits_p, logits_q), compiled, rtol=1e-5)


@pytest.mark.parametrize("divergence", [*DIVERGENCES.values(), l2_distance, mmd])
def test_shapes_must_agree(divergence):
    with pytest.raises(ValueError, match=r"logits_p and logits_q .* got \(2, 3\) and \(2, 4\)"):
        divergence(np.ones((2, 3)), np.ones((2, 4)))


def test_gaussian_shapes_must_agree():
    ones = np.ones(3)
    with pytest.raises(ValueError, match=r"mean_p and mean_q .* got \(3,\) and \(2,\)"):
        gaussian_kl(ones, ones, np.ones(2), ones)


@pytest.mark.parametrize("order", [0.0, -1.0, float("nan")])
def test_orders_must_be_positive(order):
    one = np.ones(2)
    for call in (
        lambda: tsallis_divergence(one, one, order=order),
        lambda: renyi_divergence(one, one, order=order),
        lambda: gaussian_renyi(one, one, one, one, order=order),
    ):
        with pytest.raises(ValueError, match=f"order must be > 0, got {order}"):
            call()


@pytest.mark.table
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("log_std", [(50.0, -50.0), (-50.0, 50.0), (-100.0, -100.0), (60.0, 0.0)])
def test_gaussians_of_very_different_widths(order, log_std):
    """float32 gives the numbers of float64 or infinity; slopes at equal means are not NaN."""
    shift = 0.0 if min(log_std) < -60 else 1e3

    def divergence(mean_p, log_std_p, mean_q, log_std_q):
        return gaussian_renyi(mean_p, log_std_p, mean_q, log_std_q, order=order)

    arguments = [np.array([x]) for x in (shift, log_std[0], 0.0, log_std[1])]
    value, slopes = jax.value_and_grad(divergence, (0, 1, 2, 3))(
        *(jnp.asarray(x, jnp.float32) for x in arguments)
    )
    with jax.enable_x64(True):
        exact = divergence(*map(jnp.asarray, arguments))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(value, np.float32(exact), rtol=1e-5)
    assert not np.isnan(slopes).any()
