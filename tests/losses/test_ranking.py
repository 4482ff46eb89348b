"""Losses of rankings against worked numbers, the author's code and products of softmaxes."""

import functools
import itertools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_anchored import GOLDEN, PAIRS

from trustjax.losses import (
    adpo_loss,
    adpo_pairwise_loss,
    pl_dpo_loss,
    plackett_luce_loss,
    ranking_of,
)
from trustjax.parallel import make_mesh

NAN = np.nan
SCORES, RANKING = np.array([0.6, -0.2, 0.1, -0.9]), np.array([2, 0, 1, 3])
worked = functools.partial(np.testing.assert_allclose, rtol=2e-9, atol=2e-10)
compiled_loss = jax.jit(plackett_luce_loss, static_argnames=("top_k", "reduction"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2.241213389),
        ({"reduction": "mean"}, 0.7470711298),
        ({"reduction": "mean", "label_smoothing": 0.1}, 0.7909600186),
        ({"reduction": "mean", "label_smoothing": 0.1, "poly_epsilon": 1.0}, 1.304336563),
        ({"top_k": 1}, 1.3237322676),
        ({"top_k": 2}, 1.3237322676 + 0.5142950728),
        ({"top_k": 1, "label_smoothing": 0.1}, 1.3437322676),
        ({"top_k": 1, "label_smoothing": 0.1, "poly_epsilon": 1.0}, 2.0828620556),
    ],
)
def test_worked_numbers(options, expected, x64, strict):
    worked(compiled_loss(SCORES, RANKING, **options), expected)


def test_eager(x64, strict):
    worked(plackett_luce_loss(SCORES, RANKING), 2.241213389)


@pytest.mark.parametrize("case", GOLDEN["rankings"], ids=lambda case: str(case["options"]))
def test_author_code(case, x64):
    """wk222/verlm: values and gradients."""
    given = case["options"]
    options = {name: given[name] for name in ("temperature", "label_smoothing") if name in given}
    if "top_k" in given:
        options["top_k"] = given["top_k"]
    if given.get("use_poly_loss"):
        options["poly_epsilon"] = given.get("epsilon", 1.0)
    ranking = ranking_of(np.array(case["rewards"]))
    loss = lambda u: jnp.mean(plackett_luce_loss(u, ranking, reduction="mean", **options))
    value, slope = jax.jit(jax.value_and_grad(loss))(np.array(case["scores"]))
    worked(value, case["value"])
    np.testing.assert_allclose(slope, case["gradient"], rtol=1e-9, atol=1e-12)


def test_likelihoods_of_all_rankings_sum_to_one(x64):
    rankings = np.array(list(itertools.permutations(range(4))))
    losses = compiled_loss(np.tile(SCORES, (24, 1)), rankings)
    worked(np.sum(np.exp(-losses)), 1)


def test_two_responses_are_dpo(x64):
    worked(compiled_loss(np.array([0.15, 0]), np.array([0, 1])), 0.6209570478)
    policy, reference = np.stack(PAIRS[:2], -1), np.stack(PAIRS[2:], -1)
    first = np.tile([0, 1], (2, 1))
    loss = jax.jit(functools.partial(pl_dpo_loss, ranking=first, beta=0.1))
    worked(loss(policy, reference), adpo_pairwise_loss(*PAIRS, temperature=10.0))
    slopes = jax.jit(jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 1)))(policy, reference)
    worked(slopes[0][:, 0], [-0.0462570155, -0.0524979187])
    assert not slopes[1].any()


def test_the_first_position_is_adpo_with_a_hard_target(x64):
    policy, reference = np.random.default_rng(0).normal(size=(2, 5, 4))
    ranking = ranking_of(policy - 2 * reference)
    found = compiled_loss((policy - reference) / 0.7, ranking, top_k=1)
    target = jax.nn.one_hot(ranking[:, 0], 4)
    worked(found, adpo_loss(policy, reference, target, temperature=0.7))


@jax.jit
def with_slope(scores, ranking, where):
    loss = lambda u: jnp.sum(
        plackett_luce_loss(
            u, ranking, where=where, label_smoothing=0.1, poly_epsilon=0.5, top_k=3,
            reduction="mean",
        )
    )  # fmt: skip
    return jax.value_and_grad(loss)(scores)


elements = st.floats(-20, 20, allow_subnormal=False)


@hypothesis.given(
    arrays.arrays(np.float64, 6, elements=elements), st.permutations(range(6)),
    st.permutations(range(6)), st.integers(0, 4), elements,
)  # fmt: skip
@hypothesis.settings(deadline=None, max_examples=30)
def test_neither_names_nor_padding_nor_shifts_matter(scores, ranking, names, missing, shift):
    """The masked candidates may stand anywhere in the ranking."""
    ranking, names = np.array(ranking), np.array(names)
    where = np.isin(np.arange(6), ranking[:missing], invert=True)
    with jax.enable_x64(True):
        value, slope = with_slope(np.where(where, scores, NAN), ranking, where)
        renamed = with_slope(scores[names] + shift, np.argsort(names)[ranking], where[names])
        kept = np.flatnonzero(where)
        short = [np.flatnonzero(kept == name)[0] for name in ranking[missing:]]
        smaller = compiled_loss(
            scores[kept], np.array(short), label_smoothing=0.1, poly_epsilon=0.5, top_k=3,
            reduction="mean",
        )  # fmt: skip
    value, slope, renamed, smaller = jax.tree.map(np.asarray, (value, slope, renamed, smaller))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    near(value, renamed[0])
    near(slope[names], renamed[1])
    near(value, smaller)
    near(slope.sum(), 0)
    assert not slope[~where].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes(dtype):
    """Far scores, equal ones, and groups of one candidate and of none."""
    scores = np.array([[1e4, -1e4, 0, 1], [-1e4, 1e4, 1e4, -1e4], [2, 2, 2, 2], [NAN] * 4, [3] * 4])
    ranking = np.tile([1, 3, 0, 2], (5, 1))
    where = np.ones((5, 4), bool)
    where[3], where[4, 1:] = False, False
    value, slope = with_slope(jnp.asarray(scores, dtype), ranking, where)
    assert value.dtype == jnp.float32
    assert slope.dtype == dtype
    slope = np.asarray(slope, np.float32)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    assert not slope[3:].any()
    each = compiled_loss(jnp.asarray(scores, dtype), ranking, where=where)
    np.testing.assert_allclose(each[2:], [np.log(24), 0, 0], rtol=1e-6)
    assert each[0] > 1e4


def test_nan_is_seen():
    scores = np.ones((2, 3))
    scores[1, 2] = NAN
    ranking = np.tile(np.arange(3), (2, 1))
    np.testing.assert_array_equal(np.isnan(compiled_loss(scores, ranking)), [False, True])


def test_ties_keep_their_order_and_the_masked_come_last():
    rewards = np.array([[1.0, 2, 2, 0], [NAN, 1, 3, 2]])
    np.testing.assert_array_equal(ranking_of(rewards), [[1, 2, 0, 3], [2, 3, 1, 0]])
    where = np.array([[True, False, True, True], [True, True, True, False]])
    found = ranking_of(np.nan_to_num(rewards), where=where)
    np.testing.assert_array_equal(found, [[2, 0, 3, 1], [2, 1, 0, 3]])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ranking": RANKING[:3]}, "ranking must have the shape"),
        ({"ranking": RANKING.astype(float)}, "ranking must hold integers"),
        ({"ranking": np.array([2, 0, 0, 3])}, "ranking must be a permutation"),
        ({"ranking": RANKING + 1}, "ranking must be a permutation"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_k": 1.5}, "top_k must be an int"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"label_smoothing": 1.1}, "label_smoothing must be <= 1"),
        ({"poly_epsilon": -0.1}, "poly_epsilon must be >= 0"),
        ({"reduction": "none"}, "reduction must be one of 'sum', 'mean'"),
        ({"scores": np.ones(1), "ranking": np.zeros(1, int)}, "scores must have at least 2"),
    ],
)
def test_errors(change, field):
    with pytest.raises(ValueError, match=field):
        plackett_luce_loss(**({"scores": SCORES, "ranking": RANKING} | change))


def test_errors_of_dpo():
    with pytest.raises(ValueError, match="beta must be > 0"):
        pl_dpo_loss(SCORES, SCORES, RANKING, beta=0.0)
    with pytest.raises(ValueError, match="reference_logits must have the shape"):
        pl_dpo_loss(SCORES, SCORES[:2], RANKING, beta=1.0)


def test_groups_that_are_split():
    mesh = make_mesh(4)
    split = jax.device_put(SCORES, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match="scores must hold every group whole"):
        plackett_luce_loss(split, RANKING)
