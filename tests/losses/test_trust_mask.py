"""Masks and weights of trust regions against verl's and TRL's, worked numbers, and extremes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trustjax.losses import (
    divergence_mask,
    off_policy_mask,
    rollout_weights,
    sequence_trust_mask,
    token_divergence,
    trust_metrics,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "group_masks.json").read_text(encoding="utf-8")
)
GIVEN = {name: np.array(values) for name, values in GOLDEN["arguments"].items()}
NEW, OLD, MASK = (GIVEN[name] for name in ("log_probs", "old_log_probs", "mask"))
ADVANTAGES, NAN = GIVEN["advantages"], np.nan

# Two answers of three and two tokens; their probabilities under both policies.
OLD_SMALL = np.log([[0.5, 0.2, 0.8], [0.4, 0.1, 1.0]])
NEW_SMALL = np.log([[0.6, 0.1, 0.8], [0.2, 0.4, 1.0]])
MASK_SMALL = np.array([[1, 1, 1], [1, 1, 0]])

trust_mask = jax.jit(sequence_trust_mask, static_argnames=("criterion", "divergence"))
weights_of = jax.jit(rollout_weights, static_argnames=("level", "mode"))
near_tokens = jax.jit(divergence_mask, static_argnames="divergence")
near_answers = jax.jit(off_policy_mask)
metrics_of = jax.jit(trust_metrics, static_argnames=("criterion", "divergence"))


# ---- the libraries' functions


@pytest.mark.parametrize(
    "case", GOLDEN["trust_masks"], ids=lambda case: case["criterion"] + "_" + case["divergence"]
)
def test_sequence_trust_mask_agrees_with_verl(case, x64):
    numbers = {name: case[name] for name in ("radius", "criterion", "divergence")}
    found = trust_mask(NEW, OLD, MASK, **numbers)
    np.testing.assert_array_equal(found, case["mask"])
    assert 0 < np.sum(found) < np.sum(MASK)


@pytest.mark.parametrize("case", GOLDEN["weights"], ids=lambda case: str(case["numbers"]))
def test_rollout_weights_agree_with_verl(case, x64):
    found = weights_of(NEW, OLD, MASK, **case["numbers"])
    np.testing.assert_allclose(found, case["weights"], rtol=1e-12)


@pytest.mark.parametrize("case", GOLDEN["off_policy"], ids=lambda case: str(case["radius"]))
def test_off_policy_mask_agrees_with_trl(case, x64):
    found = near_answers(NEW, OLD, ADVANTAGES, MASK, radius=case["radius"])
    np.testing.assert_array_equal(found, np.array(case["mask"])[:, None] * MASK)


# ---- worked numbers


def test_token_divergences(x64):
    """tv = |p - q| and kl = q log(q/p) + (1-q) log((1-q)/(1-p)); k1 to k3 with log(q/p)."""
    p, q = np.exp(NEW_SMALL), np.exp(OLD_SMALL)
    d = OLD_SMALL - NEW_SMALL
    with np.errstate(divide="ignore", invalid="ignore"):
        other = np.where(q < 1, (1 - q) * np.log((1 - q) / (1 - p)), 0)
    for kind, expected in {
        "tv": np.abs(p - q),
        "kl": q * d + other,
        "k1": d,
        "k2": d**2 / 2,
        "k3": np.exp(-d) + d - 1,
    }.items():
        found = jax.jit(token_divergence, static_argnames="kind")(NEW_SMALL, OLD_SMALL, kind)
        # 1e-8 stands in the logarithms of kl.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert token_divergence(NEW_SMALL, OLD_SMALL)[1, 1] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # |log q/p| is 0.182, 0.693, 0 in the first answer and 0.693, 1.386 in the second.
        ("token", [[1, 1, 1], [1, 0, 0]]),
        ("max", [[1, 1, 1], [0, 0, 0]]),
        ("sum", [[1, 1, 1], [1, 1, 0]]),  # 0.511 and -0.693
        ("mean", [[1, 1, 1], [1, 1, 0]]),
    ],
)
def test_criteria(criterion, expected):
    found = trust_mask(
        NEW_SMALL, OLD_SMALL, MASK_SMALL, radius=0.7, criterion=criterion, divergence="k1"
    )
    np.testing.assert_array_equal(found, expected)
    # The sums are 0.511 and -0.693: between them only the second answer is too far.
    near = functools.partial(trust_mask, NEW_SMALL, OLD_SMALL, MASK_SMALL, radius=0.6)
    np.testing.assert_array_equal(near(criterion="sum", divergence="k1"), [[1, 1, 1], [0, 0, 0]])


def test_divergence_mask_keeps_what_moves_back(x64):
    """Beyond the radius a token is left out only where its advantage drives it further away."""
    kept = functools.partial(near_tokens, NEW_SMALL, OLD_SMALL, mask=MASK_SMALL)
    # p - q is 0.1, -0.1, 0 and -0.2, 0.3.
    for advantage, radius, expected in (
        (1.0, 0.05, [[0, 1, 1], [1, 0, 0]]),
        (-1.0, 0.05, [[1, 0, 1], [0, 1, 0]]),
        (0.0, 0.05, [[1, 0, 1], [0, 1, 0]]),
        (1.0, 0.2, [[1, 1, 1], [1, 0, 0]]),
        (1.0, 0.35, [[1, 1, 1], [1, 1, 0]]),
    ):
        found = kept(advantages=np.full(2, advantage), radius=radius)
        np.testing.assert_array_equal(found, expected)
    # The radius of A > 0 is `radius_high`, that of A < 0 `radius`.
    found = kept(advantages=np.array([1.0, -1.0]), radius=0.05, radius_high=0.35)
    np.testing.assert_array_equal(found, [[1, 1, 1], [0, 1, 0]])


def test_off_policy_mask_of_worked_numbers():
    """The mean log-ratios sampler / policy are 0.170 and -0.347; both answers are bad."""
    kept = functools.partial(near_answers, NEW_SMALL, OLD_SMALL, mask=MASK_SMALL)
    for advantages, radius, expected in (
        ([-1, -1], 0.2, [1, 1]),
        ([-1, -1], 0.1, [0, 1]),
        ([-1, -1], -0.4, [0, 0]),
        ([0, -1], -0.4, [1, 0]),
    ):
        found = kept(advantages=np.array(advantages, float), radius=radius)
        np.testing.assert_array_equal(found, np.array(expected)[:, None] * MASK_SMALL)


def test_rollout_weights_of_worked_numbers(x64):
    """The ratios are 1.2, 0.5, 1 and 0.5, 4; their products 0.6 and 2."""
    found = functools.partial(weights_of, NEW_SMALL, OLD_SMALL, MASK_SMALL)
    for numbers, expected in (
        ({}, [[1.2, 0.5, 1], [0.5, 2, 0]]),
        ({"highest": None}, [[1.2, 0.5, 1], [0.5, 4, 0]]),
        ({"lowest": 0.8}, [[1.2, 0.8, 1], [0.8, 2, 0]]),
        ({"mode": "mask"}, [[1.2, 0.5, 1], [0.5, 0, 0]]),
        ({"mode": "mask", "lowest": 0.8}, [[1.2, 0, 1], [0, 0, 0]]),
        ({"level": "sequence", "highest": 1.5}, [[0.6] * 3, [1.5, 1.5, 0]]),
        ({"level": "sequence", "highest": 1.5, "mode": "mask"}, [[0.6] * 3, [0] * 3]),
    ):
        np.testing.assert_allclose(found(**numbers), expected, rtol=1e-12)


def test_metrics_of_worked_numbers(x64):
    """Five tokens, whose r is 1.2, 0.5, 1, 0.5 and 4; A < 0 where r is 0.5."""
    given = (NEW_SMALL, OLD_SMALL, np.array([[1.0, -1, 1], [-1, 1, 0]]), MASK_SMALL)
    metrics = metrics_of(*given, clip=0.3, clip_high=0.1, divergence="k1", radius=0.5)
    d = np.abs(OLD_SMALL - NEW_SMALL)[MASK_SMALL == 1]
    expected = {
        "trust/radius": 0.5,
        "trust/distance": d.mean(),
        "trust/used": d.mean() / 0.5,
        "clip/low": 0.4,
        "clip/high": 0.4,
        "clip": 0.8,
        "masked": 0,
        "ratio/mean": 7.2 / 5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9)
    weights = np.array([[0, 1, 1], [0, 2, 0]])
    masked = metrics_of(*given, clip=0.15, weights=weights)
    np.testing.assert_allclose(masked["masked"], 0.4)
    assert masked["trust/radius"] == 0.15
    np.testing.assert_allclose(masked["clip/high"], 0.4)  # 1.2 is above 1.15
    # An answer counts once, whatever its length: sums of log q/p are 0.511 and -0.693.
    of_answers = metrics_of(*given, criterion="sum", divergence="k1", radius=1.0)
    np.testing.assert_allclose(of_answers["trust/distance"], (0.5108256 + 0.6931472) / 2, rtol=1e-6)


# ---- extremes

ALL = {
    "divergence_tv": lambda new, old, a, mask: divergence_mask(new, old, a, mask, radius=0.1),
    "divergence_kl": lambda new, old, a, mask: divergence_mask(
        new, old, a, mask, radius=0.1, divergence="kl"
    ),
    **{
        f"sequence_{criterion}_{kind}": functools.partial(
            lambda new, old, a, mask, **numbers: sequence_trust_mask(
                new, old, mask, radius=0.1, **numbers
            ),
            criterion=criterion,
            divergence=kind,
        )
        for criterion, kind in (("max", "k2"), ("mean", "k3"), ("sum", "k1"), ("token", "tv"))
    },
    "off_policy": lambda new, old, a, mask: off_policy_mask(new, old, a, mask, radius=0.1),
    "weights_token": lambda new, old, a, mask: rollout_weights(new, old, mask, highest=None),
    "weights_sequence": lambda new, old, a, mask: rollout_weights(
        new, old, mask, level="sequence", mode="mask", lowest=0.5
    ),
}
each = pytest.mark.parametrize("function", ALL.values(), ids=ALL)


@pytest.mark.table
@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes(function, dtype):
    """Log-ratios of 1e4, an answer without a token, NaN in masked places: finite, and 0 there.

    The same without the NaN; constants for gradients; near answers are kept at full weight.
    """
    far = np.array([[1e4, -1e4, NAN], [-1e4, 1e4, 1e4], [NAN] * 3, [-1, -2, NAN]])
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]])
    old = np.where(mask == 1, 0, NAN)
    old[3] = far[3]
    advantages = np.array([1.0, -1.0, NAN, -1.0], np.float32)

    @jax.jit
    def found(new, old, advantages):
        total = lambda *x: jnp.sum(function(*x, mask).astype(jnp.float32))
        slopes = jax.grad(total, (0, 1, 2))(new, old, advantages)
        return function(new, old, advantages, mask), slopes

    weights, slopes = found(jnp.asarray(far, dtype), jnp.asarray(old, dtype), advantages)
    assert weights.dtype in (bool, jnp.float32)
    assert np.isfinite(weights).all()
    assert not np.any(np.where(mask == 1, 0, weights))
    np.testing.assert_array_equal(weights[3], [1, 1, 0])
    assert not any(np.any(slope) for slope in slopes)
    clean, _ = found(*(jnp.nan_to_num(jnp.asarray(x, dtype)) for x in (far, old)), advantages)
    np.testing.assert_array_equal(weights, clean)


def test_what_is_far_is_left_out():
    """At log-ratios of 1e4, in the direction of the advantage, whatever the criterion."""
    new, old = np.full((2, 2), [[-1e4], [0.0]], np.float32), np.full((2, 2), [[0.0], [-1e4]])
    mask, advantages = np.ones((2, 2)), np.array([-1.0, 1.0])
    assert not np.any(near_tokens(new, old, advantages, mask, radius=0.5))
    assert np.all(near_tokens(new, old, -advantages, mask, radius=0.5))
    for criterion in ("token", "max", "mean", "sum"):
        assert not np.any(trust_mask(new, old, mask, radius=1.0, criterion=criterion))
    kept = near_answers(new, old, np.array([-1.0, -1.0]), mask, radius=1.0)
    np.testing.assert_array_equal(kept, [[0, 0], [1, 1]])
    weights = weights_of(new, old, mask, highest=None)
    np.testing.assert_allclose(weights, [[0, 0], [np.exp(20)] * 2], rtol=1e-5)


@pytest.mark.parametrize("criterion", ["token", "mean"])
def test_metrics_of_nothing(criterion):
    """No token at all: distances and shares are 0."""
    nothing = jnp.full((2, 3), NAN)
    found = metrics_of(nothing, nothing, jnp.ones(2), jnp.zeros((2, 3)), criterion=criterion)
    assert {name for name, value in found.items() if value != 0} == {"trust/radius"}


# ---- devices and errors


def test_metrics_over_eight_devices(x64):
    random = np.random.default_rng(0)
    new, old = random.normal(-1, 0.5, (2, 16, 4))
    mask = random.random((16, 4)) < 0.6
    given = (new, old, random.normal(size=16), mask)
    metrics = functools.partial(trust_metrics, criterion="mean", weights=None)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    many = jax.shard_map(
        functools.partial(metrics, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P()
    )
    one, several = jax.jit(metrics)(*given), jax.jit(many)(*given)
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda *g: divergence_mask(*g, radius=0.0), "radius must be > 0"),
        (lambda *g: divergence_mask(*g, radius=0.1, radius_high=0.0), "radius_high must be > 0"),
        (lambda *g: divergence_mask(*g, radius=0.1, divergence="k3"), "divergence must be one of"),
        (lambda n, o, _, m: sequence_trust_mask(n, o, m, radius=-1.0), "radius must be > 0"),
        (
            lambda n, o, _, m: sequence_trust_mask(n, o, m, radius=1.0, criterion="min"),
            "criterion must be one of",
        ),
        (
            lambda n, o, _, m: sequence_trust_mask(n, o[:1], m, radius=1.0),
            "old_log_probs must have the shape",
        ),
        (lambda n, o, _, m: rollout_weights(n, o, m, level="batch"), "level must be one of"),
        (lambda n, o, _, m: rollout_weights(n, o, m, mode="clip"), "mode must be one of"),
        (lambda n, o, _, m: rollout_weights(n, o, m, highest=0.0), "highest must be > 0"),
        (lambda n, o, _, m: rollout_weights(n, o, m, lowest=0.0), "lowest must be > 0"),
        (lambda n, o, a, m: off_policy_mask(n, o, a[:1], m, radius=1.0), "advantages must have"),
        (lambda *g: trust_metrics(*g, radius=0.0), "radius must be > 0"),
        (lambda *g: trust_metrics(*g, divergence="js"), "divergence must be one of"),
    ],
)
def test_errors(call, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        call(NEW_SMALL, OLD_SMALL, np.ones(2), MASK_SMALL)
