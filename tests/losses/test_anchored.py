"""ADPO against worked numbers, the author's code and the losses that it contains."""

import functools
import json
import pathlib

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trustjax.losses import (
    adpo_loss,
    adpo_metrics,
    adpo_optimum,
    adpo_pairwise_loss,
    bradley_terry_targets,
    kl_estimate,
    masked_mean,
    mesa_penalty,
    reward_targets,
    sequence_log_ratios,
    smooth_hybrid_temperature,
    target_entropy_temperature,
)
from trustjax.parallel import make_mesh

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "anchored.json").read_text(encoding="utf-8")
)
# The worked example of a list, and two pairs: lengths, policy and reference.
POLICY, ANCHOR = np.log([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1]])
TARGET = np.array([0.6, 0.25, 0.1, 0.05])
PAIRS = np.array([[-12, -20.5], [-14, -19], [-13, -20], [-13.5, -19.5]], float)
NAN, INF = np.nan, np.inf
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
worked = functools.partial(np.testing.assert_allclose, rtol=2e-9, atol=2e-10)


def batch(*shape, seed=0):
    """Log-probabilities of policy and anchor, and targets."""
    random = np.random.default_rng(seed)
    policy, anchor, rewards = random.normal(0, 2, (3, *shape))
    return policy, anchor, np.asarray(jax.nn.softmax(rewards.astype(float)), float)


metrics_of = jax.jit(adpo_metrics)
loss_of = jax.jit(adpo_loss)


def loss_and_slope(loss, x):
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(x))))(x)


# ---- worked numbers


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_list(wrap, x64, strict):
    loss = lambda x: adpo_loss(x, ANCHOR, TARGET, temperature=0.8)
    value, slope = wrap(jax.value_and_grad(loss))(POLICY)
    worked(value, 1.175873222)
    worked(slope, [-0.2474499014, 0.0382566728, -0.0075800504, 0.2167732790])
    optimum = adpo_optimum(ANCHOR, TARGET, temperature=0.8)
    worked(np.exp(optimum), [0.5173887619, 0.2568313283, 0.1974312857, 0.0283486241])
    worked(loss(optimum), 1.033114088)  # the entropy of the target
    metrics = adpo_metrics(POLICY, ANCHOR, TARGET, temperature=0.8)
    worked(metrics["adpo/target_kl"], 0.1427591348)


def test_curvature_is_the_fisher_metric_over_the_squared_temperature(x64):
    """Not over its fourth power, as the paper's draft prints."""
    loss = lambda x: adpo_loss(x, ANCHOR, TARGET, temperature=0.8)
    hessian = jax.jit(jax.hessian(loss))(POLICY)
    p = np.exp(POLICY - ANCHOR) ** (1 / 0.8)
    p /= p.sum()
    close(hessian, (np.diag(p) - np.outer(p, p)) / 0.8**2)
    worked(np.diag(hessian), [0.3756310216, 0.3154155975, 0.1329874924, 0.2710980344])
    worked(hessian[0, 1], -0.1762728005)
    found = np.linalg.eigvalsh(hessian)
    worked(found, [0, 0.1757203665, 0.3839854596, 0.5354263199])
    assert found.max() <= 1 / (2 * 0.8**2)
    # Near the optimum the excess is the quadratic form of the Fisher metric at q.
    optimum = np.asarray(adpo_optimum(ANCHOR, TARGET, temperature=0.8))
    move = 1e-4 * np.array([1.0, -2.0, 0.5, 1.0])
    fisher = np.diag(TARGET) - np.outer(TARGET, TARGET)
    excess = loss(optimum + move) - loss(optimum)
    np.testing.assert_allclose(excess, move @ fisher @ move / (2 * 0.8**2), rtol=1e-3)


def test_larger_temperatures_have_optima_further_from_the_anchor(x64):
    temperatures = np.array([0.1, 0.5, 1, 2])
    tiled = (np.tile(x, (4, 1)) for x in (POLICY, ANCHOR, TARGET))
    metrics = metrics_of(*tiled, temperature=temperatures)
    radii = [0.003486050071, 0.08607623075, 0.3068353405, 0.7959991089]
    worked(metrics["trust/radius"], radii)
    pi, ref = np.exp([POLICY, ANCHOR])
    close(metrics["trust/distance"], np.full(4, np.sum(pi * np.log(pi / ref))))
    close(metrics["trust/used"], metrics["trust/distance"] / metrics["trust/radius"])


def test_masked_group(x64):
    """A fourth, padded candidate does not count, whatever its numbers."""
    where = np.array([True, True, True, False])
    target = reward_targets(np.array([1, 0, 0.5, NAN]), scale="none", temperature=1.0, where=where)
    worked(target, [0.5064803911, 0.1863237232, 0.3071958857, 0])
    policy = np.array([0.5, -0.25, 0.375, NAN])
    loss = lambda x: adpo_loss(x, np.array([0, 0, 0, NAN]), target, temperature=1.0, where=where)
    value, slope = loss_and_slope(loss, policy)
    worked(value, 1.034625023)
    assert slope[3] == 0
    assert np.isfinite(slope).all()
    metrics = metrics_of(policy, np.zeros(4), target, temperature=1.0, where=where)
    worked(metrics["adpo/target_kl"], 0.01443368644)


def test_pairs(x64, strict):
    loss = functools.partial(jax.jit(adpo_pairwise_loss), *PAIRS)
    worked(loss(temperature=10.0), [0.6209570478, 0.7443966601])
    worked(loss(temperature=1.0), [0.2014132780, 1.3132616875])
    soft = np.array([0.8, 0.3])
    worked(loss(temperature=10.0, target=soft), [0.6509570478, 0.6743966601])
    target = bradley_terry_targets(np.array([1, 0.1]), np.array([0.2, 0.5]))
    worked(target, [0.6899744811, 0.4013123399])
    masked = loss(temperature=10.0, where=np.array([True, False]))
    worked(masked, [0.6209570478, 0])


def test_first_step_on_policy(x64):
    """The loss is log P, but its gradient is not 0."""
    target = reward_targets(np.array([1.0, 0, 0, 0]))
    loss = lambda x: adpo_loss(x, x, target, temperature=0.8)
    value, slope = loss_and_slope(loss, np.zeros(4))
    worked(value, 1.386294361)
    worked(slope, [-0.8723937373, *[0.2907979124] * 3])


def test_tokens(x64, strict):
    policy = np.array([[-1, -0.5, -0.2], [-0.7, -1.1, NAN], [-0.3, -0.4, -0.9], [-2, -0.1, -0.6]])
    old = np.array([[-1.2, -0.6, -0.3], [-0.6, -1, 0], [-0.5, -0.4, -1], [-1.8, -0.2, -0.5]])
    target = reward_targets(np.array([1.0, 0, 1, 0]))
    worked(target, [0.4848244540, 0.0151755460, 0.4848244540, 0.0151755460])
    ratios_of = jax.jit(sequence_log_ratios, static_argnames="reduction")
    for reduction, ratios, expected in (
        ("sum", np.array([0.5, -0.25, 0.375, -0.25]) * 0.8, 1.122663812),
        ("mean", np.array([0.1666666667, -0.125, 0.125, -0.0833333333]) * 0.8, 1.276891372),
    ):
        found = ratios_of(policy, old, np.isfinite(policy), reduction=reduction)
        worked(found, ratios)
        worked(loss_of(found, jnp.zeros(4), target, temperature=0.8), expected)
    # The released metrics: a KL per token, and what is called one.
    worked(masked_mean(kl_estimate(policy, old, "k3"), np.isfinite(policy)), 0.008520608244)
    sums = ratios_of(policy, old, np.isfinite(policy), reduction="sum")
    worked(np.abs(sums).mean(), 0.275)


def test_no_tokens():
    """Rows without a response have no ratio, and no gradient."""
    total = lambda x: jnp.sum(sequence_log_ratios(x, jnp.ones((2, 3)), jnp.zeros((2, 3))))
    value, slope = jax.value_and_grad(total)(jnp.full((2, 3), NAN))
    assert value == 0
    assert not slope.any()


# ---- the author's code


def in_groups(x):
    return jnp.reshape(x, GOLDEN["groups"])


def by_us(name, log_probs, given):
    """The loss of the trainer `name`, from this project's parts."""
    sums = name != "b79d8f45"
    rewards = in_groups(given["rewards"])
    first, second = name.startswith("88f702e7"), name.startswith("8f11e858")
    if first or second:
        target = reward_targets(rewards)
    elif sums:
        target = reward_targets(rewards, scale="none")
    else:
        target = reward_targets(rewards, scale="none", temperature=0.3)
    temperature = {"fixed": 1.0, "adaptive": 1.0, "b79d8f45": 0.5}.get(name, 0.8)
    # The mean entropy of the tokens, estimated by their log-probabilities in the second trainer.
    mask = given["mask"]
    tokens = -log_probs if second else given["entropies"]
    entropy = in_groups(jnp.sum(tokens * mask, -1) / jnp.sum(mask, -1)).mean(-1) / jnp.log(50)
    if name == "88f702e7_adaptive":
        temperature = target_entropy_temperature(target, base=0.8)
    elif name == "8f11e858_adaptive":
        temperature = smooth_hybrid_temperature(
            entropy, rewards, base=0.8, alpha=0.5, beta=0.5, minimum=0.05, maximum=5.0
        )
    elif name == "adaptive":
        temperature = smooth_hybrid_temperature(
            entropy, rewards, base=1.0, alpha=0.5, beta=1.0, minimum=0.1, maximum=5.0
        )
    ratios = sequence_log_ratios(
        log_probs, given["old_log_probs"], mask, reduction="sum" if sums else "mean"
    )
    ratios = in_groups(ratios)
    return jnp.mean(adpo_loss(ratios, jnp.zeros_like(ratios), target, temperature=temperature))


@pytest.mark.parametrize("name", [*GOLDEN["verlm"], *GOLDEN["trl_adpo"]])
def test_trainers(name, x64):
    """wk222/verlm in three generations and wk222/TRL-ADPO: values and gradients of the tokens."""
    given = {key: np.array(value) for key, value in GOLDEN["inputs"].items()}
    value_and_slope = jax.jit(jax.value_and_grad(functools.partial(by_us, name)))
    value, slope = value_and_slope(given["log_probs"], given)
    golden = (GOLDEN["verlm"] | GOLDEN["trl_adpo"])[name]
    close(value, golden["value"])
    close(slope, golden["gradient"])


# ---- special cases


def test_supervised(x64):
    """A one-hot target, a uniform anchor and temperature 1."""
    policy, _, _ = batch(6, 5)
    labels = np.arange(6) % 5
    ours = lambda x: adpo_loss(
        jax.nn.log_softmax(x), jnp.zeros((6, 5)), jax.nn.one_hot(labels, 5), temperature=1.0
    )
    theirs = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels)
    close(*(loss_and_slope(loss, policy)[1] for loss in (ours, theirs)))
    close(*jax.jit(lambda x: (ours(x), theirs(x)))(policy))


def test_distillation(x64):
    """Target and temperature of the teacher, with a uniform anchor: T^2 KL up to a constant."""
    policy, teacher, _ = batch(6, 5)
    target = jax.nn.softmax(teacher / 3)
    ours = lambda x: adpo_loss(x, jnp.zeros((6, 5)), target, temperature=3.0)
    theirs = lambda x: mesa_penalty(x, teacher, temperature=3.0) / 9
    entropy = np.sum(jax.scipy.special.entr(target), -1)
    found, expected = jax.jit(lambda x: (ours(x), theirs(x)))(policy)
    close(found, expected + entropy)
    close(loss_and_slope(ours, policy)[1], loss_and_slope(theirs, policy)[1])


def test_maximum_entropy(x64):
    """Its optimum maximises the expected value plus alpha times the entropy."""
    values, alpha = batch(6, 5)[0], 0.7
    target = jax.nn.softmax(values / alpha)
    optimum = adpo_optimum(jnp.zeros((6, 5)), target, temperature=1.0)
    close(optimum, jax.nn.log_softmax(values / alpha))
    earned = jnp.sum(jnp.exp(optimum) * (values - alpha * optimum), -1)
    close(earned, alpha * jax.nn.logsumexp(values / alpha, -1))  # which is the maximum
    loss = lambda x: adpo_loss(x, jnp.zeros((6, 5)), target, temperature=1.0)
    close(loss_and_slope(loss, optimum)[1], 0)


def test_rewards_alone_give_the_regularised_optimum(x64):
    """pi_ref exp(R tau / beta_r); with pi_ref in the target as well, it counts 1 + tau times."""
    rewards, anchor = np.array([1.0, 0, -0.5, 0.2]), np.log([0.25, 0.25, 0.4, 0.1])
    found = adpo_optimum(anchor, jax.nn.softmax(rewards / 0.5), temperature=0.8)
    close(found, jax.nn.log_softmax(anchor + rewards / 0.625))
    twice = adpo_optimum(anchor, jax.nn.softmax(anchor + rewards / 0.5), temperature=0.8)
    close(twice, jax.nn.log_softmax(1.8 * anchor + rewards / 0.625))


def test_distilling_a_teacher_that_is_the_anchor_too(x64):
    """The student becomes sharper than the teacher, pi^(1 + tau); a uniform target recovers it."""
    teacher = np.log([0.5, 0.3, 0.2])
    twice = adpo_optimum(teacher, np.exp(teacher), temperature=1.0)
    np.testing.assert_allclose(np.exp(twice), [0.6579, 0.2368, 0.1053], atol=5e-5)
    close(adpo_optimum(teacher, np.full(3, 1 / 3), temperature=1.0), teacher)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(smoothing, x64):
    """Pairs with temperature 1 / beta: DPO, and cDPO with a soft target."""
    beta = 0.1
    pairs = np.random.default_rng(0).normal(-20, 5, (4, 7))

    def theirs(chosen, rejected, *reference):
        margin = beta * (chosen - rejected - (reference[0] - reference[1]))
        sigmoid = jax.nn.log_sigmoid
        return -(1 - smoothing) * sigmoid(margin) - smoothing * sigmoid(-margin)

    ours = functools.partial(adpo_pairwise_loss, temperature=1 / beta, target=1 - smoothing)
    close(ours(*pairs), theirs(*pairs))
    total = lambda loss: jax.jit(jax.grad(lambda *pairs: jnp.sum(loss(*pairs)), (0, 1)))
    close(total(ours)(*pairs), total(theirs)(*pairs))


# ---- properties

numbers = st.floats(-50, 50, allow_subnormal=False)
groups = arrays.arrays(np.float64, (4, 5), elements=numbers)


@jax.jit
def at_once(policy, anchor, rewards, shift, temperature, where, order):
    """The loss and its gradient, as is and with changes that should not matter."""
    target = reward_targets(rewards, scale="none", temperature=10.0, where=where)

    def slope(*arrays, where=where):
        loss = lambda x: jnp.sum(adpo_loss(x, *arrays[1:], temperature=temperature, where=where))
        return jax.value_and_grad(loss)(arrays[0])

    plain = slope(policy, anchor, target)
    shifted = slope(policy + shift, anchor - shift, target)
    turned = slope(*(x[:, order] for x in (policy, anchor, target)), where=where[:, order])
    optimum = adpo_optimum(anchor, target, temperature=temperature, where=where)
    least = slope(jnp.where(where, optimum, 0), anchor, target)
    metrics = adpo_metrics(policy, anchor, target, temperature=temperature, where=where)
    return plain, shifted, turned, least, metrics, target


@hypothesis.given(
    groups, groups, groups, numbers, st.floats(0.05, 20), arrays.arrays(bool, (4, 5)),
    st.permutations(range(5)),
)  # fmt: skip
@hypothesis.settings(deadline=None, max_examples=40)
def test_properties(policy, anchor, rewards, shift, temperature, where, order):
    where[:, 0] |= ~where.any(-1)
    with jax.enable_x64(True):
        found = at_once(policy, anchor, rewards, shift, temperature, where, np.array(order))
    plain, shifted, turned, least, metrics, target = jax.tree.map(np.asarray, found)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
    near(plain[0], shifted[0])
    near(plain[1], shifted[1])
    near(plain[0], turned[0])
    near(plain[1][:, order], turned[1])
    near(np.sum(plain[1], -1), 0)
    assert not plain[1][~where].any()
    near(least[1], 0)
    assert least[0] <= plain[0] + 1e-8
    assert all((x >= 0).all() for x in metrics.values())
    entropy = np.sum(-target * np.log(np.where(target > 0, target, 1)))
    near(np.sum(metrics["adpo/target_kl"]), plain[0] - entropy)


def test_temperatures_per_group(x64):
    policy, anchor, target = batch(2, 3, 5)
    taus = np.array([[0.5, 1, 2], [0.1, 3, 0.7]])
    each = [
        [loss_of(*(x[i, j] for x in (policy, anchor, target)), temperature=taus[i, j])
         for j in range(3)]
        for i in range(2)
    ]  # fmt: skip
    for temperature in (taus, taus[..., None]):
        close(loss_of(policy, anchor, target, temperature=temperature), each)


def test_only_the_policy_has_a_gradient():
    """Even where anchor, target and temperature are made of it."""
    policy, anchor, target = batch(3, 4)

    def total(x):
        own = jax.nn.softmax(x)
        temperature = target_entropy_temperature(own)
        return jnp.sum(adpo_loss(x, 2 * x + anchor, own * target, temperature=temperature))

    slope = jax.jit(jax.grad(total))(policy)
    own = jax.nn.softmax(policy)
    constants = functools.partial(
        adpo_loss, anchor_logits=2 * policy + anchor, target=own * target,
        temperature=target_entropy_temperature(own),
    )  # fmt: skip
    np.testing.assert_allclose(slope, loss_and_slope(constants, policy)[1], rtol=1e-6)
    by_others = jax.grad(lambda a, q, t: jnp.sum(adpo_loss(policy, a, q, temperature=t)), (0, 1, 2))
    others = jax.jit(by_others)(anchor, target, 1.5)
    assert not any(np.any(slope) for slope in others)
    measured = lambda x: jax.tree.leaves(adpo_metrics(x, anchor, target, temperature=1.0))
    assert not loss_and_slope(lambda x: jnp.stack(measured(x)), policy)[1].any()


# ---- extremes


@pytest.mark.table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_far_ratios(dtype, temperature):
    """Finite in value and gradient, for every target and mask."""
    far = np.array([[1e4, -1e4, 0, 5e3], [-1e4, -1e4, -1e4, -1e4], [0, 0, 1e4, 1e4], [0, 0, 0, 0]])
    target = np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0, 0, 0.5, 0.5]])

    @jax.jit
    def numbers(policy, where):
        loss = lambda x: adpo_loss(
            x, jnp.zeros((4, 4), dtype), jnp.asarray(target, dtype), temperature=temperature,
            where=where,
        )  # fmt: skip
        metrics = adpo_metrics(policy, 0 * policy, target, temperature=temperature, where=where)
        return loss(policy), loss_and_slope(loss, policy)[1], metrics

    for where in (np.ones((4, 4), bool), np.tri(4, k=-1) > 0, far < 1e4):
        value, slope, metrics = numbers(jnp.asarray(far, dtype), where)
        assert value.dtype == jnp.float32
        assert slope.dtype == dtype
        for x in jax.tree.leaves((value, slope, metrics)):
            assert np.isfinite(np.asarray(x, np.float32)).all()


def test_half_precision_subtracts_in_float32():
    """Log-probabilities of long sequences keep the digits that bfloat16 has given them."""
    policy, anchor = (jnp.asarray(x, jnp.bfloat16) for x in ([-1000, -1008], [-1004, -1000]))
    found = adpo_loss(policy, anchor, jnp.array([1.0, 0.0]), temperature=1.0)
    np.testing.assert_allclose(found, np.log1p(np.exp(-12)), atol=1e-7)


def test_a_group_without_candidates():
    """It has no loss, no gradient and no distance, and NaN in it stays there."""
    policy, anchor, target = batch(3, 4)
    for array in (policy, anchor, target):
        array[1] = NAN
    where = np.array([[True], [False], [True]])
    loss = lambda x: adpo_loss(x, anchor, target, temperature=0.5, where=where)
    value, slope = jax.jit(loss)(policy), loss_and_slope(loss, policy)[1]
    assert value[1] == 0
    assert not slope[1].any()
    assert np.isfinite(slope).all()
    metrics = metrics_of(policy, anchor, target, temperature=0.5, where=where)
    assert {float(x[1]) for x in metrics.values()} == {0.0}
    assert np.isfinite(list(metrics.values())).all()


def test_one_candidate():
    loss = lambda x: adpo_loss(x, jnp.zeros(1), jnp.ones(1), temperature=1.0)
    assert loss_and_slope(loss, jnp.array([-3.0])) == (0, 0)


def test_impossible_candidates():
    """Impossible under the policy without a target, or under both: nothing but their absence."""
    policy, anchor = np.array([-1.0, -INF, -2.0, -INF]), np.array([-1.0, -3.0, -1.0, -INF])
    target = np.array([0.5, 0, 0.5, 0])
    loss = lambda x: adpo_loss(x, anchor, target, temperature=1.0)
    value, slope = loss_and_slope(loss, policy)
    np.testing.assert_allclose(value, np.log(2 + np.exp(-1)) + 0.5, rtol=1e-6)
    assert np.isfinite(slope).all()
    assert adpo_loss(policy, anchor, np.eye(4)[1], temperature=1.0) == INF


def test_nan_is_seen():
    policy, anchor, target = batch(3, 4)
    for spoilt in range(3):
        given = [np.array(x) for x in (policy, anchor, target)]
        given[spoilt][1, 2] = NAN
        found = np.isnan(adpo_loss(*given, temperature=1.0))
        np.testing.assert_array_equal(found, [False, True, False])


# ---- bad input


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"anchor_logits": np.zeros(5)}, "anchor_logits must have the shape"),
        ({"target": np.zeros((1, 4))}, "target must have the shape"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": -1}, "temperature must be > 0"),
        ({"temperature": NAN}, "temperature must be > 0"),
        ({"temperature": np.ones(4)}, "temperature must be a number or one per group"),
        ({"logits": np.float32(1)}, "logits must have at least 1 candidates"),
    ],
)
def test_errors(change, field):
    arguments = {"logits": POLICY, "anchor_logits": ANCHOR, "target": TARGET, "temperature": 1.0}
    for function in (adpo_loss, adpo_metrics):
        with pytest.raises(ValueError, match=field):
            function(**(arguments | change))


def test_errors_of_pairs():
    with pytest.raises(ValueError, match="target must be <= 1"):
        adpo_pairwise_loss(*PAIRS, temperature=1.0, target=1.5)
    with pytest.raises(ValueError, match="reference_rejected must have the shape"):
        adpo_pairwise_loss(*PAIRS[:3], PAIRS[3, :1], temperature=1.0)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        sequence_log_ratios(PAIRS, PAIRS, PAIRS, reduction="max")


# ---- devices


def test_devices(x64):
    """Eight devices with two groups each agree with one; groups that are split raise."""
    mesh = make_mesh(8)
    given = batch(16, 8)
    loss = lambda *given: adpo_loss(*given, temperature=0.8)
    slope = lambda *given: jax.grad(lambda x: jnp.sum(loss(x, *given[1:])))(given[0])
    rows, columns = PartitionSpec("data"), PartitionSpec(None, "data")
    split = jax.device_put(given, NamedSharding(mesh, rows))
    mapped = jax.jit(jax.shard_map(slope, mesh=mesh, in_specs=rows, out_specs=rows))
    for found in (jax.jit(slope)(*split), mapped(*split)):
        close(found, slope(*given))
    for which in ("logits", "anchor_logits", "target"):
        arguments = dict(zip(("logits", "anchor_logits", "target"), given, strict=True))
        arguments[which] = jax.device_put(arguments[which], NamedSharding(mesh, columns))
        with pytest.raises(ValueError, match=f"{which} must hold every group whole"):
            adpo_loss(**arguments, temperature=0.8)


def test_groups_split_in_explicit_meshes():
    """There the shardings are part of the types, and seen under jit."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    policy, anchor, target = (x.astype(np.float32) for x in batch(16, 8))
    with jax.set_mesh(mesh):
        split = jax.device_put(policy, NamedSharding(mesh, PartitionSpec(None, "data")))
        with pytest.raises(ValueError, match="logits must hold every group whole"):
            jax.jit(lambda x: adpo_loss(x, anchor, target, temperature=0.8))(split)
