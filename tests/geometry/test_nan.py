"""One NaN in, NaN out: all public functions of divergences, norms, mirror maps and penalties."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax import geometry
from trustjax.losses import regularizer

# Each takes arrays [3, 4] of positive numbers; a row is a distribution for `simplex`.
MAPS = {
    "euclidean": geometry.euclidean(),
    "negative_entropy": geometry.negative_entropy(),
    "simplex": geometry.simplex(),
    "p_norm": geometry.p_norm(1.5),
    "separable_p": geometry.separable_p(3.0),
    "hypentropy": geometry.hypentropy(0.5),
    "spectral_hypentropy": geometry.spectral_hypentropy(0.5),
}
# Name of the public function -> calls of it and how many arrays they take.
TABLE = {
    **{
        name: [(getattr(geometry, name), 2)]
        for name in ("kl_divergence", "reverse_kl", "symmetric_kl", "jensen_shannon", "l2_distance")
    },
    "tsallis_divergence": [
        (functools.partial(geometry.tsallis_divergence, order=order), 2) for order in (0.5, 3.0)
    ],
    "renyi_divergence": [
        (functools.partial(geometry.renyi_divergence, order=order), 2) for order in (0.5, 3.0)
    ],
    "mmd": [(geometry.mmd, 2)],
    "gaussian_kl": [(geometry.gaussian_kl, 4)],
    "gaussian_renyi": [
        (functools.partial(geometry.gaussian_renyi, order=order), 4) for order in (0.5, 1.0, 1.1)
    ],
    "global_norm": [(geometry.global_norm, 1)],
    "linear_cka": [(geometry.linear_cka, 2)],
    "frobenius_normalize": [(geometry.frobenius_normalize, 1)],
    "newton_schulz": [(geometry.newton_schulz, 1)],
    "epsilon_sharpness": [
        (lambda x: geometry.epsilon_sharpness(lambda w: jnp.sum(jnp.square(w)), x), 1)
    ],
    "bregman_divergence": [
        (functools.partial(geometry.bregman_divergence, mirror_map), 2)
        for mirror_map in MAPS.values()
    ],
    "conjugate_gradient": [(lambda b: geometry.conjugate_gradient(lambda v: 2 * v, b).x, 1)],
    "fisher_vector_product": [
        (lambda v: geometry.fisher_vector_product(lambda w: jnp.sum(w**2), jnp.ones((3, 4)), v), 1)
    ],
    "fisher_product": [
        (lambda v: geometry.fisher_product(lambda w: jnp.sum(w**2), jnp.ones((3, 4)))(v), 1)
    ],
    **{
        name: [(functools.partial(lambda m, x, s: x + m.move(x, s), mirror_map), 2),
               (mirror_map.to_dual, 1), (mirror_map.to_primal, 1), (mirror_map.potential, 1)]
        for name, mirror_map in MAPS.items()
    },
    **{
        name: [(getattr(regularizer, name), 2)]
        for name in ("trpo_penalty", "mesa_penalty", "smart_penalty", "bregman_penalty")
    },
    "r3f_penalty": [
        (functools.partial(regularizer.r3f_penalty, symmetric=symmetric), 2)
        for symmetric in (False, True)
    ],
    "smart_perturbation": [
        (lambda x: regularizer.smart_perturbation(jnp.sin, x, jax.random.key(0)), 1)
    ],
}  # fmt: skip
CALLS = [(name, call, count) for name, calls in TABLE.items() for call, count in calls]


def public(module):
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and (module is geometry or value.__module__ == module.__name__)
    }


def test_the_table_is_complete():
    """Every public function is in the table, so a new one has to join it."""
    assert set(TABLE) == public(geometry) | public(regularizer)


@functools.cache
def compiled(index):
    _, call, count = CALLS[index]
    return jax.jit(lambda arrays: call(*arrays[:count]))


def positive(seed):
    drawn = np.exp(np.random.default_rng(seed).normal(size=(4, 3, 4)))
    return (drawn / drawn.sum(-1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99), array=st.integers(0, 3), row=st.integers(0, 2), entry=st.integers(0, 3)
)
def test_one_nan_in_nan_out(seed, array, row, entry):
    """A NaN in any array and place gives NaN; without it the result is finite."""
    clean = positive(seed)
    broken = clean.copy()
    broken[array, row, entry] = np.nan
    for index, (name, _, count) in enumerate(CALLS):
        before, after = compiled(index)(clean), np.asarray(compiled(index)(broken))
        assert np.all(np.isfinite(before)), name
        assert np.any(np.isnan(after)) == (array < count), name
        if after.shape == (3,):  # one value an example: the others do not see it
            assert np.sum(np.isnan(after)) == (array < count), name


MASKED_CLASSES = ("kl_divergence", "reverse_kl", "symmetric_kl", "jensen_shannon", "l2_distance",
                  "tsallis_divergence", "renyi_divergence")  # fmt: skip
MASKED_EXAMPLES = ("mmd", "trpo_penalty", "r3f_penalty", "mesa_penalty", "smart_penalty",
                   "bregman_penalty")  # fmt: skip


MASKED = [i for i, (name, *_) in enumerate(CALLS) if name in MASKED_CLASSES + MASKED_EXAMPLES]


@functools.cache
def masked(index):
    call = CALLS[index][1]
    total = lambda arrays, where: jnp.sum(call(*arrays, where=where))
    return jax.jit(jax.value_and_grad(total))


@pytest.mark.table
@pytest.mark.parametrize("index", MASKED)
def test_what_is_masked_does_not_leak(index):
    """Masked NaNs reach neither values nor gradients; a mask that excludes everything gives 0."""
    name = CALLS[index][0]
    where = np.array([True, True, False, True] if name in MASKED_CLASSES else [True, False, True])
    for value in (np.nan, np.inf, -np.inf):
        arrays = positive(0)[:2]
        if name in MASKED_CLASSES:
            arrays[:, :, ~where] = value
        else:
            arrays[:, ~where] = value
        found, gradient = masked(index)(arrays, where)
        assert np.isfinite(found)
        assert found > 0
        assert np.all(np.isfinite(gradient))
        found, gradient = masked(index)(arrays, np.zeros_like(where))
        assert found == 0
        assert np.all(gradient == 0)
