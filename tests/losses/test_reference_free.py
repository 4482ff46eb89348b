"""CPO, SimPO, AlphaPO, ORPO and likelihoods against TRL's own code and worked numbers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trustjax.losses import alphapo_loss, cpo_loss, nll_loss, orpo_loss, simpo_loss

ALL = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text(encoding="utf-8")
)
GOLDEN = ALL["reference_free"]
CHOSEN, REJECTED = np.array([-12.0, -20.5]), np.array([-14.0, -19.0])
NUM_CHOSEN, NUM_REJECTED = np.array([10, 16]), np.array([12, 14])
LENGTHS = {"chosen_lengths": NUM_CHOSEN, "rejected_lengths": NUM_REJECTED}
x64 = pytest.mark.usefixtures("x64")


@x64
def test_worked_examples():
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=6e-10)
    near(cpo_loss(CHOSEN, REJECTED, cpo_alpha=0.0), [0.5981388694, 0.7709570478])
    near(cpo_loss(CHOSEN, REJECTED, chosen_lengths=NUM_CHOSEN).mean(), 1.934547959)
    near(nll_loss(CHOSEN, NUM_CHOSEN).mean(), 1.25)
    numbers = {"beta": 2.5, "gamma": 1.375}
    near(simpo_loss(CHOSEN, REJECTED, **LENGTHS, **numbers), [1.6674782862, 1.4519798061])
    means = CHOSEN / NUM_CHOSEN, REJECTED / NUM_REJECTED
    slope = jax.grad(lambda x: simpo_loss(x, means[1], **numbers).sum())(means[0])
    near(slope, [-2.0281940752, -1.9147341404])
    near(alphapo_loss(CHOSEN, REJECTED, **LENGTHS), [0.8047662075, 0.6145686349])
    odds = orpo_loss(*means, beta=1.0, nll_reduction="none")
    near(odds, [0.7174609197, 0.6426870200])
    near(orpo_loss(CHOSEN, REJECTED, **LENGTHS).mean(), 1.318007397)


def ours(case, chosen, rejected, num_chosen, num_rejected):
    options = case["options"]
    lengths = {"chosen_lengths": num_chosen, "rejected_lengths": num_rejected}
    if case["name"] == "orpo":
        return orpo_loss(chosen, rejected, beta=options["beta"], **lengths)
    shared = {k: options[k] for k in ("beta", "label_smoothing")}
    if case["name"] == "simpo":
        gamma = options["simpo_gamma"]
        alpha = {"alpha": options["alpha"]} if options["alpha"] else {}
        loss = alphapo_loss if alpha else simpo_loss
        return loss(chosen, rejected, gamma=gamma, **alpha, **shared, **lengths)
    if options["loss_type"] != "ipo":
        del lengths["rejected_lengths"]
    return cpo_loss(
        chosen, rejected, variant=options["loss_type"], cpo_alpha=options["cpo_alpha"],
        **shared, **lengths,
    )  # fmt: skip


@x64
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_agrees_with_trl(case):
    sums, lengths = (np.split(np.array(GOLDEN[name]), 2) for name in ("sums", "lengths"))
    mean = lambda sums: ours(case, *sums, *lengths).mean()
    value, slope = jax.jit(jax.value_and_grad(mean))(sums)
    rtol = 1e-5 if case["name"] == "orpo" else 1e-11  # TRL's odds are in float32
    np.testing.assert_allclose(value, case["mean"], rtol=rtol)
    np.testing.assert_allclose(np.concatenate(slope), case["gradient"], rtol=rtol, atol=1e-8)


@x64
def test_likelihood_agrees_with_trl():
    golden = ALL["dpo"]
    sums, lengths = (np.array(golden[name])[:6] for name in ("sums", "lengths"))
    case = next(case for case in golden["cases"] if case["variant"] == "sft")
    value, slope = jax.value_and_grad(lambda x: nll_loss(x, lengths).mean())(sums)
    np.testing.assert_allclose(value, case["mean"], rtol=1e-12)
    np.testing.assert_allclose(slope, case["gradient"][:6], rtol=1e-12)
    each = nll_loss(sums, lengths, reduction="sequence")
    np.testing.assert_allclose(each, -sums / lengths, rtol=1e-12)


LOSSES = {
    "cpo": lambda w, r, where, n: cpo_loss(w, r, chosen_lengths=n, where=where),
    "cpo_ipo": lambda w, r, where, n: cpo_loss(
        w, r, variant="ipo", chosen_lengths=n, rejected_lengths=n, where=where
    ),
    "simpo": lambda w, r, where, n: simpo_loss(
        w, r, chosen_lengths=n, rejected_lengths=n, where=where
    ),
    "alphapo": lambda w, r, where, n: alphapo_loss(
        w, r, chosen_lengths=n, rejected_lengths=n, where=where
    ),
    "orpo": lambda w, r, where, n: orpo_loss(
        w, r, chosen_lengths=n, rejected_lengths=n, where=where
    ),
    "orpo_none": lambda w, r, where, n: orpo_loss(w, r, nll_reduction="none", where=where),
    "orpo_sequence": lambda w, r, where, n: orpo_loss(w, r, nll_reduction="sequence", where=where),
}


@pytest.mark.table
@pytest.mark.parametrize("name", LOSSES)
def test_far_and_excluded(name):
    """Certain and impossible answers, answers without tokens, and NaN in what is left out."""
    far = np.array([-1e4, -1e-3, 0.0, -1e4, 0.0, np.nan])
    other = np.array([-1e-3, -1e4, -1.0, -1e4, 0.0, 1.0])
    lengths, where = np.array([1, 3, 2, 1, 0, 4]), np.arange(6) < 5

    @jax.jit
    def value_and_slopes(*policy):
        loss = lambda *policy: LOSSES[name](*policy, where, lengths)
        return loss(*policy), jax.grad(lambda *x: loss(*x).sum(), (0, 1))(*policy)

    for dtype in (jnp.float32, jnp.bfloat16):
        value, slopes = value_and_slopes(jnp.asarray(far, dtype), jnp.asarray(other, dtype))
        slopes = np.asarray(slopes, np.float32)
        assert value.dtype == jnp.float32
        assert np.isfinite(value).all()
        assert value[5] == 0
        assert np.isfinite(slopes).all()
        assert not slopes[:, 5].any()
        assert slopes[0][0] < 0  # a chosen answer that is impossible is made more likely


@x64
def test_tokens_are_counted_over_eight_devices():
    random = np.random.default_rng(0)
    policy, lengths = -random.exponential(9, (2, 16)), random.integers(1, 20, (2, 16))
    where = random.random(16) > 0.5
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    losses = {
        "cpo": lambda p, n, where, **axis: cpo_loss(*p, chosen_lengths=n[0], where=where, **axis),
        "orpo": lambda p, n, where, **axis: orpo_loss(
            *p, chosen_lengths=n[0], rejected_lengths=n[1], where=where, **axis
        ),
    }
    for loss in losses.values():
        spread = jax.shard_map(
            functools.partial(loss, axis_name="data"), mesh=mesh,
            in_specs=(P(None, "data"), P(None, "data"), P("data")), out_specs=P("data"),
        )  # fmt: skip
        one, eight = (
            jax.jit(lambda p, f=f: (
                f(p, lengths, where), jax.grad(lambda p: f(p, lengths, where).sum())(p)
            ))(policy)
            for f in (loss, spread)
        )  # fmt: skip
        np.testing.assert_allclose(one[0], eight[0], rtol=1e-12)
        np.testing.assert_allclose(one[1], eight[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "loss", "options"),
    [
        ("variant", cpo_loss, {"variant": "simpo"}),
        ("chosen_lengths", cpo_loss, {}),
        ("chosen_lengths", cpo_loss, {"cpo_alpha": 0.0, "chosen_lengths": NUM_CHOSEN}),
        ("axis_name", cpo_loss, {"cpo_alpha": 0.0, "axis_name": "data"}),
        ("rejected_lengths", cpo_loss, LENGTHS),
        ("rejected_lengths", cpo_loss, {"variant": "ipo", "chosen_lengths": NUM_CHOSEN}),
        ("label_smoothing", cpo_loss, {"variant": "hinge", "label_smoothing": 0.1}),
        ("cpo_alpha", cpo_loss, {"cpo_alpha": -1.0}),
        ("beta", simpo_loss, {"beta": 0.0}),
        ("label_smoothing", simpo_loss, {"label_smoothing": 2.0}),
        ("rejected_lengths", simpo_loss, {"chosen_lengths": NUM_CHOSEN}),
        ("chosen_lengths", simpo_loss, LENGTHS | {"chosen_lengths": np.array([1])}),
        ("beta", orpo_loss, {"beta": -1.0}),
        ("nll_reduction", orpo_loss, {"nll_reduction": "mean"}),
        ("chosen_lengths", orpo_loss, {}),
        ("axis_name", orpo_loss, {"nll_reduction": "none", "axis_name": "data"}),
    ],
)
def test_bad_arguments(field, loss, options):
    with pytest.raises(ValueError, match=f"^{field} must "):
        loss(CHOSEN, REJECTED, **options)
