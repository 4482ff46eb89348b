"""TRPA against its authors' code and worked numbers, its invariants, and groups over devices."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trustjax.losses import (
    pairs_from_levels,
    preference_levels,
    trpa_loss,
    trpa_metrics,
    trpa_trust_region,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text(encoding="utf-8")
)["trpa"]
x64 = pytest.mark.usefixtures("x64")
# The worked example: two prompts with four answers each.
LOG_PROBS, REFERENCE, OLD = -np.array(
    [
        [[0.5, 1, 0.2, 0.3], [1.2, 0.7, 0.9, 0], [0.4, 0.6, 0, 0], [2, 1.5, 0.5, 1],
         [0.3, 0.8, 0.1, 0], [0.9, 1.1, 0.4, 0.6], [0.2, 0.4, 0, 0], [1, 0.5, 0.7, 0.3]],
        [[0.7, 1.1, 0.4, 0.6], [1, 0.8, 0.6, 0], [0.5, 0.9, 0, 0], [1.5, 1.4, 0.6, 0.8],
         [0.3, 0.8, 0.1, 0], [0.8, 1, 0.5, 0.5], [0.3, 0.5, 0, 0], [0.9, 0.6, 0.6, 0.4]],
        [[0.6, 1, 0.3, 0.4], [1.1, 0.7, 0.8, 0], [0.4, 0.7, 0, 0], [1.9, 1.5, 0.5, 0.9],
         [0.3, 0.8, 0.1, 0], [0.9, 1, 0.4, 0.5], [0.3, 0.4, 0, 0], [1, 0.6, 0.7, 0.4]],
    ]
)  # fmt: skip
MASK = np.arange(4) < np.array([4, 3, 2, 4, 3, 4, 2, 4])[:, None]
LEVELS, GROUPS = np.array([1, 2, 1, 4, 2, 2, 3, 4]), np.repeat([0, 1], 4)
OF_DELTA = [-0.023893959142, 0.018969352383, -0.023893959142, 0.028818565902,
            -0.010024999792, -0.010049999271, 0.00508749888, 0.014987500182]  # fmt: skip
OF_TOKENS = [[-0.005969829686, -0.005973489786, -0.005969829686, -0.005969829686],
             [0.006319072426, 0.006323117461, 0.006319072426, 0],
             [-0.011946979571, -0.011943319472, 0, 0]]  # fmt: skip


NAMES = ("anisotropy", "log_ratio", "reduction", "no_pairs", "trust_region")
compiled = jax.jit(trpa_loss, static_argnames=NAMES)


def example(
    log_probs=LOG_PROBS, old=OLD, reference=REFERENCE, rows=slice(None), loss=trpa_loss, **options
):
    given = (x[rows] for x in (log_probs, old, reference, LEVELS, GROUPS, MASK))
    return loss(*given, **options)


def alone(**options):
    return example(trust_coefficient=0.0, loss=compiled, **options)


@x64
def test_worked_examples():
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-13)
    near(alone(), 0.6766295629129071)
    near(alone(reduction="prompt"), 0.6766295629129071)  # both prompts have five pairs
    near(alone(rows=slice(4)), 0.6581006953400867)
    near(alone(rows=slice(4, 8)), 0.6951584304857275)
    near(alone(rows=slice(7)), (5 * 0.6581006953400867 + 0.698159680508 + 0.700675305296) / 7,
         atol=1e-12)  # fmt: skip
    uneven = (0.6581006953400867 + (0.698159680508 + 0.700675305296) / 2) / 2
    near(alone(rows=slice(7), reduction="prompt"), uneven, atol=1e-12)
    near(example(), 0.6766320585834728)
    near(example(trust_region="root"), 0.6771320523859965)
    near(alone(log_ratio="sum"), 0.6415033608988889)
    near(alone(anisotropy="response"), 0.6810755015249482)
    near(alone(anisotropy="response", log_ratio="sum"), 0.6559258186265848)
    near(trpa_trust_region(LOG_PROBS, OLD, MASK), 0.0024956705656)
    slopes = jax.jit(jax.grad(example))(LOG_PROBS)
    near(slopes[:3], OF_TOKENS, atol=1e-12)
    near(jax.grad(lambda x: alone(log_probs=x))(LOG_PROBS).sum(1), OF_DELTA, atol=1e-12)


@x64
def test_without_pairs():
    given = [x[:4] for x in (LOG_PROBS, OLD, REFERENCE)]
    for level, expected in ((1, 0.6856956486832059), (2, 0.7086123153498726)):
        loss = functools.partial(
            trpa_loss, *given, np.full(4, level), GROUPS[:4], MASK[:4], trust_coefficient=0.0
        )
        np.testing.assert_allclose(loss(), expected, rtol=1e-14)
        assert loss(no_pairs="zero") == 0


@x64
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"root={case['root']}")
def test_agrees_with_the_authors(case):
    """Shuffled groups, values and gradients; the last two cases have no pair."""
    log_probs, reference, old = (np.array(GOLDEN[k]) for k in ("log_probs", "reference", "old"))
    mask = np.arange(log_probs.shape[1]) < np.array(GOLDEN["lengths"])[:, None]
    form = "root" if case["root"] else "k3"
    loss = lambda x: trpa_loss(
        x, old, reference, np.array(case["levels"]), np.array(GOLDEN["group_ids"]), mask,
        trust_region=form, **GOLDEN["numbers"],
    )  # fmt: skip
    value, slope = jax.jit(jax.value_and_grad(loss))(log_probs)
    np.testing.assert_allclose(value, case["total"], rtol=1e-12)
    np.testing.assert_allclose(slope, case["gradient"], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(trpa_trust_region(log_probs, old, mask), case["kl"], rtol=1e-12)


@x64
def test_invariants():
    """Shifts within a group and order-preserving relabelling change nothing; at pi_ref it is ln 2;
    where the old policy is the policy, the trust region is inert."""
    shifted = LOG_PROBS + np.where(GROUPS == 0, 0.7, -0.3)[:, None]
    np.testing.assert_allclose(alone(log_probs=shifted), alone(), rtol=1e-12)
    assert (
        abs(alone(log_probs=shifted, anisotropy="response") - alone(anisotropy="response")) > 1e-3
    )
    relabelled = trpa_loss(
        LOG_PROBS, OLD, REFERENCE, np.where(LEVELS > 1, 3 * LEVELS, 1), GROUPS, MASK
    )
    np.testing.assert_allclose(relabelled, example(), rtol=1e-15)
    np.testing.assert_allclose(alone(log_probs=REFERENCE), np.log(2), rtol=1e-15)
    inert = lambda x: trpa_trust_region(x, LOG_PROBS, MASK)
    value, slope = jax.value_and_grad(inert)(LOG_PROBS)
    assert value == 0
    assert not np.any(slope)


def test_no_gradient_to_references():
    slopes = jax.grad(lambda old, reference: example(old=old, reference=reference), (0, 1))(
        OLD, REFERENCE
    )
    assert not np.any(slopes)


@pytest.mark.table
@pytest.mark.parametrize("options", [
    {}, {"trust_region": "root", "max_kl": None}, {"anisotropy": "response", "log_ratio": "sum"},
    {"reduction": "prompt", "max_kl": None},
])  # fmt: skip
def test_far_ratios_and_masked_nan(options):
    """Finite at log-ratios of 1e4; masked places and wholly masked answers may hold NaN."""
    far = np.where(np.arange(8)[:, None] % 2, 1e4, -1e4) * np.array([1, -1, 1, 1])
    log_probs = np.where(MASK, far, np.nan)
    mask = MASK.copy()
    mask[2] = False

    @jax.jit
    def value_and_slope(x):
        zeros = jnp.where(mask, jnp.zeros_like(x), jnp.nan)
        loss = lambda x: trpa_loss(x, zeros, zeros, LEVELS, GROUPS, mask, **options)
        return jax.value_and_grad(loss)(x)

    for dtype in (jnp.float32, jnp.bfloat16):
        value, slope = value_and_slope(jnp.asarray(log_probs, dtype))
        slope = np.asarray(slope, np.float32)
        assert np.isfinite(value)
        assert value.dtype == jnp.float32
        assert np.isfinite(slope).all()
        assert not slope[~mask].any()
    nothing = trpa_loss(*3 * (jnp.zeros((8, 4)),), LEVELS, GROUPS, 0 * MASK, **options)
    assert np.isfinite(nothing)


def test_levels_and_pairs():
    flags = np.array(np.meshgrid(*3 * [[False, True]], indexing="ij")).reshape(3, 8)
    found = preference_levels(*flags)
    assert found.tolist() == [4, 4, 4, 4, 3, 3, 2, 1]
    assert found.dtype == jnp.int32
    pairs = np.asarray(pairs_from_levels(LEVELS, GROUPS))
    assert list(zip(*np.nonzero(pairs), strict=True)) == [
        (0, 1), (0, 3), (1, 3), (2, 1), (2, 3), (4, 6), (4, 7), (5, 6), (5, 7), (6, 7)
    ]  # fmt: skip
    grouped = pairs_from_levels(LEVELS.reshape(2, 4))
    np.testing.assert_array_equal(grouped, [pairs[:4, :4], pairs[4:, 4:]])
    assert pairs_from_levels(np.tile([1, 2, 3, 4], 4)).sum() == 96
    without = pairs_from_levels(LEVELS, GROUPS, where=np.arange(8) != 3)
    assert without.sum() == 7


@x64
def test_metrics():
    metrics = trpa_metrics(LOG_PROBS, OLD, REFERENCE, LEVELS, GROUPS, MASK, kl_target=0.01)
    np.testing.assert_allclose(metrics["trust/used"], 0.24956705656, rtol=1e-9)
    np.testing.assert_allclose(metrics["trpa/margin"], 1.258333333333 / 10, rtol=1e-9)
    assert (metrics["trpa/pairs"], metrics["trpa/accuracy"]) == (10, 0.6)


@x64
@pytest.mark.parametrize("reduction", ["pair", "prompt"])
def test_groups_over_eight_devices(reduction):
    """Answers of a prompt need not be on the same device."""
    random = np.random.default_rng(0)
    arrays = random.normal(0, 1, (3, 16, 3))
    levels, groups = random.integers(1, 4, 16), random.integers(0, 4, 16)
    mask = random.random((16, 3)) > 0.3
    loss = functools.partial(trpa_loss, reduction=reduction, trust_coefficient=0.2)
    spread = jax.shard_map(
        functools.partial(loss, axis_name="data"),
        mesh=Mesh(np.array(jax.devices()[:8]), ("data",)), in_specs=P("data"), out_specs=P(),
    )  # fmt: skip
    one, eight = (
        jax.jit(jax.value_and_grad(lambda x, f=f: f(x, *arrays[1:], levels, groups, mask)))(
            arrays[0]
        )
        for f in (loss, spread)
    )
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-12)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("beta", {"beta": 0.0}),
        ("kappa", {"kappa": -1.0}),
        ("anisotropy", {"anisotropy": "loser"}),
        ("log_ratio", {"log_ratio": "max"}),
        ("reduction", {"reduction": "token_mean"}),
        ("no_pairs", {"no_pairs": "nan"}),
        ("trust_region", {"trust_region": "k2"}),
        ("trust_coefficient", {"trust_coefficient": -1.0}),
        ("max_kl", {"max_kl": 0.0}),
        ("reference_log_probs", {"reference": REFERENCE[:, :2]}),
    ],
)
def test_bad_arguments(field, options):
    with pytest.raises(ValueError, match=f"^{field} must "):
        example(**options)


def test_bad_shapes():
    for name in ("levels", "group_ids"):
        given = {"levels": LEVELS, "group_ids": GROUPS} | {name: LEVELS[:3]}
        with pytest.raises(ValueError, match=f"^{name} must "):
            trpa_loss(LOG_PROBS, OLD, REFERENCE, **given, mask=MASK)
