"""KTO, CR-DPO and the implicit rewards against TRL's own code and worked numbers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trustjax.losses import cr_dpo_loss, dpo_loss, kto_loss, preference_metrics

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text(encoding="utf-8")
)
PAIRS = tuple(map(np.array, ([-12.0, -20.5], [-14.0, -19.0], [-13.0, -20.0], [-13.5, -19.5])))
LENGTHS = np.array([10, 16])
LOG_RATIOS, LABELS = np.array([0.8, -0.4, 0.3, -1.2]), np.array([True, True, False, False])
KL, ZEROS = np.array([0.5, -0.1, 0.4, 0.2]), np.zeros(4)
EXPECTED = [0.4862534651, 0.5162442811, 0.5012499974, 0.4638133798]
x64 = pytest.mark.usefixtures("x64")


def mesh():
    return Mesh(np.array(jax.devices()[:8]), ("data",))


@x64
def test_kto_worked_example():
    loss = lambda x, **weights: kto_loss(x, ZEROS, LABELS, KL, ZEROS, **weights)
    np.testing.assert_allclose(loss(LOG_RATIOS), EXPECTED, rtol=0, atol=6e-11)
    heavier = loss(LOG_RATIOS, undesirable_weight=1.5).mean()
    np.testing.assert_allclose(heavier, 0.612523203, rtol=0, atol=6e-10)
    slope = jax.grad(lambda x: loss(x).sum())(LOG_RATIOS)
    np.testing.assert_allclose(slope[0], -0.02498110328, rtol=0, atol=6e-12)


@x64
@pytest.mark.parametrize("case", GOLDEN["kto"]["cases"], ids=lambda case: case["variant"])
def test_kto_agrees_with_trl(case):
    golden = {k: np.array(v) for k, v in GOLDEN["kto"].items() if k not in ("cases", "numbers")}
    kl = {"policy_kl": np.array(case["policy_kl"]), "reference_kl": golden["reference_kl"]}
    kl = kl if case["variant"] == "kto" else {}

    def mean(policy):
        return kto_loss(
            policy, golden["reference"], golden["labels"],
            **kl, **GOLDEN["kto"]["numbers"], variant=case["variant"],
        ).mean()  # fmt: skip

    value, slope = jax.jit(jax.value_and_grad(mean))(golden["policy"])
    np.testing.assert_allclose(value, case["mean"], rtol=1e-12)
    np.testing.assert_allclose(slope, case["gradient"], rtol=1e-11)


def test_kto_constants_masks_and_far_ratios():
    """z, labels and references carry no gradient; excluded rows may hold NaN, and are not in z."""
    longer = lambda x: np.append(x, np.nan).astype(np.float32)
    where, labels = np.append(LABELS | True, False), np.append(LABELS, True)
    loss = lambda x, reference, kl: kto_loss(
        x, reference, labels, kl, longer(ZEROS), where=where
    )  # fmt: skip
    given = longer(LOG_RATIOS), longer(ZEROS), longer(KL)
    np.testing.assert_allclose(jax.jit(loss)(*given), [*EXPECTED, 0], rtol=1e-5)
    slopes = jax.jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2)))(*given)
    assert np.isfinite(slopes[0]).all()
    assert slopes[0][4] == 0
    assert not np.any(slopes[1:])
    far = jnp.array([1e4, -1e4, 1e4, -1e4], jnp.bfloat16)
    total = lambda x: kto_loss(x, 0 * x, LABELS, far[::-1], 0 * far).sum()
    value, slope = jax.jit(jax.value_and_grad(total))(far)
    assert np.isfinite(value)
    assert value.dtype == jnp.float32
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("policy_kl", {"policy_kl": None}),
        ("reference_kl", {"variant": "apo_zero_unpaired", "policy_kl": None}),
        ("variant", {"variant": "dpo"}),
        ("beta", {"beta": 0}),
        ("undesirable_weight", {"undesirable_weight": -1}),
        ("desirable", {"desirable": LABELS[:2]}),
        ("policy_kl", {"policy_kl": KL[:2]}),
        ("axis_name", {"variant": "apo_zero_unpaired", "axis_name": "data", "policy_kl": None,
                       "reference_kl": None}),
    ],
)  # fmt: skip
def test_kto_bad_arguments(field, changes):
    given = {"policy": LOG_RATIOS, "reference": ZEROS, "desirable": LABELS, "policy_kl": KL,
             "reference_kl": ZEROS}  # fmt: skip
    with pytest.raises(ValueError, match=f"^{field} must "):
        kto_loss(**(given | changes))


def test_kto_refuses_a_single_example():
    """Its mismatched answer would be its own, and z its reward."""
    with pytest.raises(ValueError, match=r"^policy must have at least two"):
        kto_loss(*(x[:1] for x in (LOG_RATIOS, ZEROS, LABELS, KL, ZEROS)))


@x64
def test_kto_over_eight_devices():
    """One example a device, and a part that is left out: z is the mean of all."""
    random = np.random.default_rng(0)
    policy, where = random.normal(0, 1, 8), random.random(8) > 0.4
    loss = lambda policy, where, **options: kto_loss(
        policy, 0 * policy, policy > 0, policy + 1, 0 * policy, where=where, **options
    )
    spread = jax.shard_map(
        functools.partial(loss, axis_name="data"), mesh=mesh(), in_specs=P("data"),
        out_specs=P("data"),
    )  # fmt: skip
    one, eight = (
        jax.jit(lambda x, f=f: (f(x, where), jax.grad(lambda x: f(x, where).sum())(x)))(policy)
        for f in (loss, spread)
    )
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-12)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-12)


@x64
@pytest.mark.parametrize(
    ("weighted", "reduction", "alpha", "expected"),
    [
        ("nll", "batch_token", 1.0, 1.932676854),
        ("preference", "batch_token", 1.0, 1.932676854),
        ("nll", "sequence", 1.0, 1.923301854),
        ("preference", "batch_token", 0.5, 1.591338427),
        ("nll", "batch_token", 0.5, 1.307676854),
        ("nll", "batch_token", 0.0, 0.6826768539),
    ],
)
def test_cr_dpo_worked_examples(weighted, reduction, alpha, expected):
    losses = cr_dpo_loss(
        *PAIRS, LENGTHS, beta=0.1, rpo_alpha=alpha, weighted=weighted, nll_reduction=reduction
    )
    np.testing.assert_allclose(losses.mean(), expected, rtol=0, atol=6e-10)


@x64
def test_cr_dpo_agrees_with_trl():
    golden = GOLDEN["dpo"]
    sums, reference = (np.split(np.array(golden[name]), 2) for name in ("sums", "reference"))
    lengths = np.array(golden["lengths"])[:6]
    alpha = golden["rpo"]["rpo_alpha"]
    mean = lambda policy: cr_dpo_loss(
        *policy, *reference, lengths, beta=golden["beta"], rpo_alpha=alpha
    ).mean()  # fmt: skip
    value, slope = jax.value_and_grad(mean)(sums)
    np.testing.assert_allclose(value, golden["rpo"]["mean"], rtol=1e-12)
    np.testing.assert_allclose(np.concatenate(slope), golden["rpo"]["gradient"], rtol=1e-11)


def test_cr_dpo_bad_arguments():
    loss = functools.partial(cr_dpo_loss, *PAIRS, LENGTHS, beta=0.1)
    for field, options in {
        "weighted": {"weighted": "both"},
        "rpo_alpha": {"rpo_alpha": -1.0},
        "reduction": {"nll_reduction": "mean"},
        "axis_name": {"nll_reduction": "sequence", "axis_name": "data"},
    }.items():
        with pytest.raises(ValueError, match=f"^{field} must "):
            loss(**options)


def test_implicit_rewards():
    longer = [np.append(x, np.nan) for x in PAIRS]
    where = np.array([True, True, False])
    metrics = preference_metrics(*longer, beta=0.1, where=where)
    found = [metrics[f"rewards/{k}"] for k in ("chosen", "rejected", "margins", "accuracies")]
    np.testing.assert_allclose(found, [0.025, 0, 0.025, 0.5], atol=1e-6)


def test_minimum_moves_away_from_the_reference_as_beta_falls():
    """Soft labels have a finite optimum at D = log((1 - eps) / eps) / beta."""
    slope = jax.grad(
        lambda x, beta: dpo_loss(x, 0 * x, 0 * x, 0 * x, beta=beta, label_smoothing=0.1)
    )
    for beta in (0.1, 1.0):
        assert abs(slope(jnp.log(9.0) / beta, beta)) < 1e-7
