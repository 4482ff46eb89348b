"""The variants of DPO against TRL's own code and worked numbers; what they read; far log-ratios."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trustjax.losses import dpo_loss
from trustjax.losses.dpo import _VARIANTS

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text(encoding="utf-8")
)["dpo"]
# The worked example: log-probabilities of two pairs, and numbers of tokens.
CHOSEN, REJECTED = np.array([-12.0, -20.5]), np.array([-14.0, -19.0])
REFERENCES = np.array([-13.0, -20.0]), np.array([-13.5, -19.5])
LENGTHS = {"chosen_lengths": np.array([10, 16]), "rejected_lengths": np.array([12, 14])}
SMOOTH, EXO = {"label_smoothing": 0.1}, {"label_smoothing": 1e-3}
OPTIONS = {"sigmoid_norm": LENGTHS, "exo_pair": EXO, "robust": SMOOTH}
x64 = pytest.mark.usefixtures("x64")


def worked(variant="sigmoid", policy=(CHOSEN, REJECTED), references=REFERENCES, **options):
    return dpo_loss(*policy, *references, beta=0.1, variant=variant, **options)


@x64
@pytest.mark.parametrize(
    ("variant", "options", "expected", "at_zero"),
    [
        ("sigmoid", {}, [0.6209570478, 0.7443966601], np.log(2)),
        ("sigmoid", SMOOTH, [0.6359570478, 0.7343966601], np.log(2)),
        ("robust", SMOOTH, [0.6022070478, 0.7568966601], np.log(2)),
        ("hinge", {}, [0.85, 1.1], 1),
        ("ipo", {}, [12.25, 36], 25),
        ("ipo", LENGTHS, [23.6034027778, 25.6741270727], 25),
        ("sigmoid_norm", LENGTHS, [0.6860889338, 0.6965010001], np.log(2)),
        ("exo_pair", EXO, [2.5055165555, 2.9350042708], 2.761230709),
        ("nca_pair", {}, [1.3508248141, 1.4119192960], 2 * np.log(2)),
        ("bco_pair", {}, [1.3128563081, 1.4369192960], 2 * np.log(2)),
        ("sppo_hard", {}, [36.25, 60.5], 50),
        ("apo_zero", {}, [0.9625234160, 1.0249947930], 1),
        ("apo_down", {}, [0.9875493421, 1.0124817910], 1),
        ("discopop", {}, [0.8493375793, 0.7874020058], 0.8465735903),
        ("aot", {}, [0.7443966601, 0.6209570478], np.log(2)),
        ("aot_unpaired", {}, [0.6931471806, 0.6684596480], np.log(2)),
        ("sigmoid", {"f_divergence_type": "forward_kl"}, [0.6311543836, 0.7466137987], np.log(2)),
        ("sigmoid", {"f_divergence_type": "js_divergence"}, [0.6606521625, 0.718459648], np.log(2)),
        ("sigmoid", {"f_divergence_type": "alpha_divergence"}, [0.6276909471, 0.744945361],
         np.log(2)),
    ],
)  # fmt: skip
def test_worked_examples(variant, options, expected, at_zero):
    np.testing.assert_allclose(worked(variant, **options), expected, rtol=0, atol=6e-11)
    near = worked(variant, policy=REFERENCES, **options)
    np.testing.assert_allclose(near, [at_zero] * 2, rtol=0, atol=6e-10)


@x64
def test_without_a_reference():
    found = worked(references=(None, None))
    np.testing.assert_allclose(found, [0.5981388694, 0.7709570478], atol=6e-11)


@x64
@pytest.mark.parametrize(
    ("variant", "options", "expected"),
    [
        ("sigmoid", {}, [-0.0462570155, -0.0524979187]),
        ("sigmoid", SMOOTH, [-0.0362570155, -0.0424979187]),
        ("robust", SMOOTH, [-0.0587570155, -0.0649979187]),
        ("ipo", {}, [-7, -12]),
    ],
)
def test_worked_gradients(variant, options, expected):
    total = lambda *policy: jnp.sum(worked(variant, policy=policy, **options))
    chosen, rejected = jax.grad(total, (0, 1))(CHOSEN, REJECTED)
    np.testing.assert_allclose(chosen, expected, rtol=0, atol=6e-11)
    np.testing.assert_allclose(rejected, -chosen, rtol=1e-12)


@pytest.mark.table
@x64
@pytest.mark.parametrize(
    "case", [case for case in GOLDEN["cases"] if case["variant"] != "sft"],
    ids=lambda case: "-".join([case["variant"], case["options"].get("f_divergence_type", "")]),
)  # fmt: skip
def test_agrees_with_trl(case):
    """Values of the pairs, and gradients of their mean."""
    sums, reference, lengths = (
        np.split(np.array(GOLDEN[name]), 2) for name in ("sums", "reference", "lengths")
    )
    options = dict(case["options"])
    if case["variant"] in ("ipo", "sigmoid_norm"):
        options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    loss = functools.partial(dpo_loss, beta=GOLDEN["beta"], variant=case["variant"], **options)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if case["float32"] else {"rtol": 1e-12, "atol": 1e-14}
    values = jax.jit(loss)(*sums, *reference)
    np.testing.assert_allclose(values.mean(), case["mean"], **tolerance)
    if case["each"] is not None:
        np.testing.assert_allclose(values, case["each"], **tolerance)
    mean = lambda policy: jnp.mean(loss(*policy, *reference))
    gradient = np.concatenate(jax.grad(mean)(sums))
    np.testing.assert_allclose(gradient, case["gradient"], **tolerance)


@x64
def test_properties():
    """cDPO has a finite optimum, robust DPO has none; EXO is a KL, the reverse of cDPO's."""
    at = lambda logit, variant, **options: dpo_loss(
        jnp.asarray(logit, float), 0.0 * jnp.asarray(logit), None, None,
        beta=1.0, variant=variant, **options,
    )  # fmt: skip
    optimum = np.log(9)
    assert jax.grad(lambda x: at(x, "sigmoid", **SMOOTH))(optimum) == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(at(optimum, "sigmoid", **SMOOTH), 0.3250829734, atol=6e-11)
    found = at([5.0, 20, 50], "robust", **SMOOTH)
    np.testing.assert_allclose(found, [-0.6182846515, -2.4999999979, -6.25], atol=6e-11)
    np.testing.assert_allclose(at(optimum, "exo_pair", **SMOOTH), 0, atol=1e-15)


def test_no_gradient_to_references_and_labels():
    references = jax.grad(lambda *r: worked(references=r).sum(), (0, 1))(*REFERENCES)
    label = jax.grad(lambda e: worked(label_smoothing=e).sum())(0.1)
    assert not np.any(references)
    assert label == 0


@pytest.mark.table
@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence",
                                        "alpha_divergence"])  # fmt: skip
def test_far_log_ratios(variant, divergence):
    """Finite in value and gradient; what went too far the wrong way is driven back."""
    if divergence != "reverse_kl" and "f_divergence_type" not in _VARIANTS[variant].reads:
        pytest.skip("not read")
    far = np.array([1e4, -1e4, 1e4, -1e4, 0, 0, 50.0, -50.0], np.float32)
    other = np.array([1e4, -1e4, -1e4, 1e4, 1e4, -1e4, -90.0, 90.0], np.float32)
    lengths = {key: np.array([1, 2] * 4) for key in LENGTHS}
    options = {"sigmoid_norm": lengths, "exo_pair": EXO, "robust": SMOOTH}.get(variant, {})
    if divergence != "reverse_kl":
        options = options | {"f_divergence_type": divergence}

    @jax.jit
    def value_and_slopes(*policy):
        zeros = jnp.zeros(8, policy[0].dtype)
        loss = lambda *policy: dpo_loss(
            *policy, zeros, zeros, beta=0.1, variant=variant, **options
        )  # fmt: skip
        return loss(*policy), jax.grad(lambda *x: loss(*x).sum(), (0, 1))(*policy)

    for dtype in (jnp.float32, jnp.bfloat16):
        value, slopes = value_and_slopes(jnp.asarray(far, dtype), jnp.asarray(other, dtype))
        assert value.dtype == jnp.float32
        assert slopes[0].dtype == dtype
        assert np.isfinite(value).all()
        assert np.isfinite(np.asarray(slopes, np.float32)).all()
        if divergence == "forward_kl" and variant in ("sigmoid", "hinge", "ipo"):
            assert slopes[0][3] < 0


@pytest.mark.table
@pytest.mark.parametrize("variant", _VARIANTS)
def test_excluded_pairs(variant):
    """They hold NaN and change nothing; NaN in an included pair stays."""
    nan, options = np.nan, OPTIONS.get(variant, {})
    inside = np.array([False, True, True])
    longer = lambda x: np.concatenate([[nan], x]).astype(np.float32)
    policy, references = [longer(CHOSEN), longer(REJECTED)], [longer(x) for x in REFERENCES]
    if variant == "sigmoid_norm":
        options = {name: np.concatenate([[7], x]) for name, x in LENGTHS.items()}
    loss = lambda policy: worked(variant, policy, references, where=inside, **options)
    expected = worked(variant, **OPTIONS.get(variant, {}))
    np.testing.assert_allclose(loss(policy), [0, *expected], rtol=1e-5)
    gradient = jax.grad(lambda policy: loss(policy).sum())(policy)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[:, 0])
    policy[0][1] = nan
    assert np.isnan(loss(policy)[1:]).any()


@pytest.mark.table
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("variant", _VARIANTS)
def test_strict_promotion_and_traced_numbers(variant):
    policy, references = (tuple(map(np.float32, x)) for x in ((CHOSEN, REJECTED), REFERENCES))
    options = OPTIONS.get(variant, {})
    loss = lambda beta: dpo_loss(*policy, *references, beta=beta, variant=variant, **options)
    found = jax.vmap(loss)(jnp.array([0.1, 0.2], jnp.float32))
    np.testing.assert_allclose(found[0], worked(variant, **options), rtol=1e-5)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "variant", "options"),
    [
        ("variant", "cdpo", {}),
        ("beta", "sigmoid", {"beta": 0.0}),
        *[("label_smoothing", name, SMOOTH) for name, row in _VARIANTS.items()
          if row.smoothing is None and name != "sigmoid_norm"],
        ("label_smoothing", "robust", {"label_smoothing": 0.5}),
        ("label_smoothing", "sigmoid", {"label_smoothing": -0.1}),
        ("label_smoothing", "exo_pair", {}),
        ("chosen_lengths", "sigmoid", LENGTHS),
        ("chosen_lengths", "sigmoid_norm", {}),
        ("rejected_lengths", "ipo", {"chosen_lengths": LENGTHS["chosen_lengths"]}),
        ("chosen_lengths", "ipo", LENGTHS | {"chosen_lengths": np.array([3])}),
        ("discopop_tau", "sigmoid", {"discopop_tau": 0.05}),
        ("discopop_tau", "discopop", {"discopop_tau": 0.0}),
        ("axis_name", "sigmoid", {"axis_name": "data"}),
        *[("f_divergence_type", name, {"f_divergence_type": "forward_kl"})
          for name, row in _VARIANTS.items() if "f_divergence_type" not in row.reads],
        ("f_divergence_type", "sigmoid", {"f_divergence_type": "kl"}),
        ("f_alpha_divergence_coef", "sigmoid", {"f_alpha_divergence_coef": 0.5}),
        ("where", "sigmoid", {"where": np.ones(3, bool)}),
    ],
)  # fmt: skip
def test_bad_arguments(field, variant, options):
    with pytest.raises(ValueError, match=rf"^{field} must ") as raised:
        dpo_loss(CHOSEN, REJECTED, *REFERENCES, **({"beta": 0.1, "variant": variant} | options))
    assert raised.value.field == field


def test_bad_shapes():
    for name in ("policy_rejected", "reference_chosen"):
        given = {"policy_chosen": CHOSEN, "policy_rejected": REJECTED, "reference_chosen": CHOSEN,
                 "reference_rejected": REJECTED, name: np.zeros(3)}  # fmt: skip
        with pytest.raises(ValueError, match=name):
            dpo_loss(**given, beta=0.1)
    with pytest.raises(ValueError, match="reference_rejected must"):
        dpo_loss(CHOSEN, REJECTED, CHOSEN, None, beta=0.1)


@x64
@pytest.mark.parametrize("variant", ["aot", "aot_unpaired"])
def test_transport_over_eight_devices(variant):
    """Sorting reaches over all devices, of which some hold excluded pairs."""
    random = np.random.default_rng(1)
    policy, references = random.normal(0, 3, (2, 24)), random.normal(0, 3, (2, 24))
    where = random.random(24) > 0.3
    options = {"beta": 0.3, "variant": variant, "label_smoothing": 0.1}

    def losses(policy, references, where, **options):
        return dpo_loss(*policy, *references, where=where, **options)

    spread = jax.shard_map(
        functools.partial(losses, **options, axis_name="data"),
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",)),
        in_specs=(P(None, "data"), P(None, "data"), P("data")), out_specs=P("data"),
    )  # fmt: skip

    def value_and_gradient(f):
        weighed = lambda policy: jnp.sum(jnp.arange(24) * f(policy, references, where))
        return f(policy, references, where), jax.grad(weighed)(policy)

    alone = functools.partial(losses, **options)
    results = (jax.jit(functools.partial(value_and_gradient, f))() for f in (alone, spread))
    for one, eight in zip(*results, strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-12, atol=1e-15)
