"""Rewards and advantages of groups against verl's and TRL's, worked numbers, and extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_trust_mask import GIVEN, GOLDEN, MASK, NEW, OLD

from trustjax.losses import (
    group_relative,
    informative_groups,
    kl_estimate,
    leave_one_out,
    reduce_tokens,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    rloo_loss,
    soft_overlong_penalty,
    token_rewards,
    trust_grpo_advantages,
    trust_weight,
)

VERL = GOLDEN["advantages"]
REWARDS, SIZE = np.array(VERL["rewards"]), VERL["group_size"]
REFERENCE = GIVEN["reference_log_probs"]
NAN = np.nan

advantages_of = jax.jit(
    trust_grpo_advantages, static_argnames=("ddof", "form", "scale", "schedule", "use_trust")
)


# ---- the libraries' functions


def test_group_advantages_agree_with_verl(x64):
    grouped = {"group_size": SIZE}

    @jax.jit
    def advantages(rewards):
        return {
            "grpo": group_relative(rewards, **grouped),
            "dr_grpo": group_relative(rewards, scale="none", **grouped),
            "rloo": leave_one_out(rewards, **grouped),
            "rloo_vectorized": leave_one_out(rewards, **grouped),
        }

    for name, found in advantages(REWARDS).items():
        spread = np.asarray(found)[:, None] * MASK
        np.testing.assert_allclose(spread, VERL[name], rtol=1e-12, atol=1e-15)


def test_reinforce_plus_plus_agrees_with_verl(x64):
    """Token rewards with a KL, returns over the gaps of tools, and the form with a baseline."""
    rewards = jax.jit(token_rewards)(
        REWARDS, MASK, log_probs=OLD, reference_log_probs=REFERENCE, beta=VERL["beta"]
    )
    np.testing.assert_allclose(rewards, VERL["token_rewards"], rtol=1e-12, atol=1e-15)
    advantages = jax.jit(reinforce_plus_plus_advantages)
    for case in VERL["reinforce_plus_plus"]:
        found = advantages(rewards, MASK, discount=case["discount"])
        # verl adds 1e-8 to the number of tokens.
        np.testing.assert_allclose(found, case["advantages"], rtol=1e-8, atol=1e-8)
    baseline = functools.partial(reinforce_plus_plus_baseline_advantages, group_size=SIZE)
    found = jax.jit(baseline)(REWARDS, MASK)
    expected = VERL["reinforce_plus_plus_baseline"]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("library", ["trl", "verl"])
def test_rloo_agrees(library, x64):
    """TRL clips the ratio of the answer; verl has REINFORCE on the sum of its tokens."""
    old = OLD if library == "trl" else None
    numbers = {"clip": 0.2, "clip_high": 0.28} if library == "trl" else {}
    loss = lambda new: rloo_loss(new, old, GIVEN["advantages"], MASK, **numbers)
    value, slope = jax.jit(jax.value_and_grad(loss))(NEW)
    golden = GOLDEN["rloo"][library]
    np.testing.assert_allclose(value, golden["value"], rtol=1e-12)
    rows = MASK.any(-1)
    np.testing.assert_allclose(slope[rows], golden["gradient"], rtol=1e-11, atol=1e-15)
    assert not np.any(slope[~rows])


@pytest.mark.parametrize("kind", GOLDEN["kl"])
def test_kl_estimates_agree_with_verl(kind, x64):

    def total(new):
        values = kl_estimate(new, REFERENCE, kind)
        return jnp.sum(values), values

    slope, values = jax.jit(jax.grad(total, has_aux=True))(NEW)
    golden = GOLDEN["kl"][kind]
    np.testing.assert_allclose(values, golden["values"], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(slope, golden["gradient"], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("reduction", GOLDEN["reductions"])
def test_reductions_agree_with_verl(reduction, x64):
    """An answer without a token does not count; verl adds 1e-8 to the length."""
    found = jax.jit(functools.partial(reduce_tokens, reduction=reduction))(NEW, MASK)
    np.testing.assert_allclose(found, GOLDEN["reductions"][reduction], rtol=1e-8)


def test_kl_estimates_in_expectation(x64):
    """Over the actions of a small policy: means of k1 and k3 are the KL, and the mean gradient of
    k2 is that of the KL; under samples of the old policy k3 is not quite the KL."""
    old, new = np.log([0.5, 0.3, 0.2]), np.log([0.6, 0.25, 0.15])
    reverse, forward = 0.0206602340, 0.0210721031  # KL(new || old) and KL(old || new)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)

    estimate = jax.jit(kl_estimate, static_argnames="kind")

    def mean(kind, of):
        return np.sum(np.exp(of) * estimate(new, old, kind))

    near(mean("k1", new), reverse)
    near(mean("k3", new), reverse)
    near(np.sum(np.exp(old) * estimate(old, new, "k3")), forward)
    near(mean("k3", old), 0.0222612302)
    # Pinsker's bound of a pair of answers, which the root of the trust region follows.
    distance = np.abs(np.exp(old) - np.exp(new)).sum() / 2
    near((distance, np.sqrt(2 * forward)), (0.1, 0.2052905411))

    def slope(kind):
        """The mean gradient of the estimate by the logits of the policy."""
        each = jax.jacobian(lambda x: kl_estimate(jax.nn.log_softmax(x), old, kind))
        return np.exp(new) @ jax.jit(each)(new)

    kl = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - old))
    exact = jax.jit(jax.grad(kl))(new)
    near(slope("k2"), exact)
    near(slope("k3+"), exact)
    near(slope("k1"), 0)
    near(slope("k3"), np.exp(new) - np.exp(old))  # that of KL(old || new)


# ---- worked numbers of the fact sheet


def test_worked_trust_grpo(x64):
    """Sections 6.2 A to E and the scale trap; B to D are in test_group.py as well."""
    near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    advantages = functools.partial(advantages_of, total_steps=1500)
    outcome, thinking = np.array([1.0, 1, 0, 0]), np.array([0.9, 0.7, 0.3, 0.5])
    assert trust_weight(outcome, thinking) == 1
    a = [0.911111750639, 0.81845631837, -0.911111750639, -0.81845631837]
    near(advantages(outcome, thinking, step=0), a)
    a = [1.052060977651, 0.945071725687, -1.052060977651, -0.945071725687]
    near(advantages(outcome, thinking, step=0, ddof=0), a)
    # The rewards themselves: 1.27, 1.21, 0.09, 0.15.
    centred = np.array([1.27, 1.21, 0.09, 0.15]) - 0.68
    near(advantages(outcome, thinking, step=0, scale="none"), centred)
    # B, without gamma: the ablation of the paper without trust; at the start there is no annealing.
    outcome, thinking = np.array([1.0, 0, 0, 1]), np.array([0.2, 0.8, 0.9, 0.4])
    untrusted = advantages(outcome, thinking, step=0, scale="none", use_trust=False)
    near(untrusted, np.array([1.06, 0.24, 0.27, 1.12]) - 0.6725)
    # E, graded outcomes: the paper's form, and the released code's with T = 12000.
    outcome, thinking = np.array([0.8, 0.4, 0.3, 0.6]), np.array([0.2, 0.8, 0.9, 0.4])
    rewards = np.array([0.820996264947, 0.483985059787, 0.39448319226, 0.641992529893])
    near(advantages(outcome, thinking, step=750, scale="none"), rewards - rewards.mean())
    found = advantages_of(outcome, thinking, step=750, total_steps=12000, form="code")
    near(found, [1.268303202116, -0.523944317673, -1.020183573968, 0.275824689525])
    rewards = np.array([0.832519651308, 0.53007860523, 0.446338430884, 0.665039302615])
    found = advantages_of(outcome, thinking, step=750, total_steps=12000, form="code", scale="none")
    near(found, rewards - rewards.mean())


def test_scale_trap(x64):
    """Equal outcomes: dividing by the deviation undoes the annealing; without it, it acts."""
    outcome, thinking = np.ones(4), np.array([0.9, 0.5, 0.7, 0.3])
    advantages = functools.partial(advantages_of, outcome, thinking, total_steps=1500)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=6e-6)
    near(advantages(step=0), [1.16188, -0.38729, 0.38729, -1.16188])
    near(advantages(step=5000), [1.16147, -0.38716, 0.38716, -1.16147])
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=6e-9)
    near(advantages(step=0, scale="none"), [0.09, -0.03, 0.03, -0.09])
    near(
        advantages(step=5000, scale="none"),
        [0.00321066, -0.00107022, 0.00107022, -0.00321066],
    )
    assert not np.any(advantages(step=0, form="code"))
    # The paper's Figure 4: gamma is 0.49 where the means differ by -0.71335.
    found = trust_weight(np.array([1.0, 0]), np.array([0.0, 0.71335]))
    np.testing.assert_allclose(found, 0.49, atol=1e-6)


def test_worked_group_advantages(x64):
    """Section 6.3: the deviations are 0.4916 (ddof 1) and 0.4488 (ddof 0)."""
    rewards = np.array([1, 0, 0, 1, 0.5, 0])
    near = functools.partial(np.testing.assert_allclose, rtol=1e-10)
    low, high, half = -0.847577655392, 1.186608717548, 0.169515531078
    near(group_relative(rewards), [high, low, low, high, half, low])
    low, high, half = -0.928474621924, 1.299864470694, 0.185694924385
    near(group_relative(rewards, ddof=0), [high, low, low, high, half, low])
    low, high, half = -0.416666666667, 0.583333333333, 0.083333333333
    near(group_relative(rewards, scale="none"), [high, low, low, high, half, low])
    near(leave_one_out(rewards), [0.7, -0.5, -0.5, 0.7, 0.1, -0.5])
    # Success rate p: sqrt((1 - p) / p) and -sqrt(p / (1 - p)) with ddof 0.
    found = group_relative(np.array([1.0, 0, 0, 0]), ddof=0, epsilon=0.0)
    near(found, [np.sqrt(3), *[-np.sqrt(1 / 3)] * 3])


def test_schedules(x64):
    """The share of the thinking reward that is left after a third of the steps and at the end."""
    outcome, thinking = np.array([1.0, 0]), np.array([1.0, 0])
    for schedule, third, end in (
        ("exponential", np.exp(-1 / 3), np.exp(-1)),
        ("linear", 2 / 3, 0),
        ("cosine", 0.75, 0),
        ("constant", 1, 1),
        (lambda p: p, 1 / 3, 1),
    ):
        for step, expected in ((1, third), (3, end)):
            found = advantages_of(
                outcome, thinking, step=step, total_steps=3, schedule=schedule, scale="none"
            )
            np.testing.assert_allclose(found[0], (1 + 0.3 * expected) / 2, rtol=1e-12)


def test_bounds_belong_to_their_sets(x64):
    """Outcomes of exactly 0.5, 0.2, 0.9 and 0.1, and rewards that differ by the tolerance."""
    thinking = np.array([0.0, 1])
    weight = jax.jit(trust_weight)
    np.testing.assert_allclose(weight(np.array([0.5, 0]), thinking), np.exp(-1), rtol=1e-12)
    assert weight(np.array([0.49, 0]), thinking) == 1  # none is correct
    assert weight(np.ones(2), -thinking) == 1  # none is wrong
    code = jax.jit(
        functools.partial(trust_grpo_advantages, form="code", step=0, total_steps=1, scale="none")
    )
    for outcome, expected in (
        ([0.5, 0.2], [0.5, 0.2 + 0.3 * np.exp(-1)]),
        ([0.5, 0.19], [0.5, 0.19]),
        ([0.95, 0.9], [0.95, 0.9]),
        ([0.95, 0.89], [0.95, 1.19]),
        ([0.05, 0.1], [0.05, 0.1]),
    ):
        near = np.array(expected) - np.mean(expected)
        np.testing.assert_allclose(code(np.array(outcome), thinking), near, rtol=1e-12, atol=1e-15)
    close = np.array([[0.0, 0.25], [0.0, 0.5]])
    found = informative_groups(close, tolerance=0.25)
    np.testing.assert_array_equal(found, [[False] * 2, [True] * 2])
    equal = np.array([0.0, 0.25])
    assert not np.any(group_relative(equal, tolerance=0.25))
    assert np.all(group_relative(equal, tolerance=0.24))


# ---- extremes


def test_batch_scale(x64):
    """One deviation for all groups, around their common mean; over devices it is the same."""
    rewards = np.random.default_rng(0).normal(size=16)
    found = group_relative(rewards, scale="batch", group_size=2)
    centred = rewards - rewards.reshape(8, 2).mean(-1).repeat(2)
    np.testing.assert_allclose(found, centred / (rewards.std(ddof=1) + 1e-6), rtol=1e-12)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    many = jax.shard_map(
        functools.partial(group_relative, scale="batch", group_size=2, axis_name="d"),
        mesh=mesh, in_specs=P("d"), out_specs=P("d"),
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(many)(rewards), found, rtol=1e-12)


def test_reinforce_plus_plus_over_eight_devices(x64):
    random = np.random.default_rng(0)
    rewards, mask = random.normal(size=(16, 4)), random.random((16, 4)) < 0.6
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))

    def both(rewards, mask, **options):
        baseline = reinforce_plus_plus_baseline_advantages(
            rewards[:, 0], mask, group_size=2, **options
        )
        return reinforce_plus_plus_advantages(rewards, mask, **options), baseline

    many = jax.shard_map(
        functools.partial(both, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    for found, expected in zip(jax.jit(many)(rewards, mask), both(rewards, mask), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


BY_GROUP = {
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "baseline": lambda x, *, group_size: reinforce_plus_plus_baseline_advantages(
        x, np.ones((len(x), 2)), group_size=group_size
    ),
}


@pytest.mark.parametrize("name", BY_GROUP)
def test_groups_must_be_whole_on_a_device(name):
    """Eight devices hold two answers each: groups of two are whole, groups of four are not."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    rewards = np.arange(16, dtype=np.float32)
    split = jax.device_put(rewards, NamedSharding(mesh, P("d")))
    function = BY_GROUP[name]
    expected = jax.jit(functools.partial(function, group_size=2))(rewards)
    np.testing.assert_allclose(function(split, group_size=2), expected, rtol=1e-6)
    message = "^rewards must have whole groups of 4 on every device along axis 0, got 2 entries"
    with pytest.raises(ValueError, match=message):
        function(split, group_size=4)
    inside = jax.shard_map(
        functools.partial(function, group_size=4), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    with pytest.raises(ValueError, match=message):
        inside(rewards)
    with pytest.raises(ValueError, match=r"^rewards must have whole groups of 5"):
        function(rewards, group_size=5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_and_empty_groups(dtype):
    """Groups of equal rewards and of one answer have no advantage; huge rewards stay finite."""
    equal = jnp.full((3, 4), 0.1, dtype)
    for scale in ("std", "batch"):
        function = jax.jit(functools.partial(group_relative, scale=scale))
        found = function(equal)
        assert found.dtype == jnp.float32
        assert not np.any(found)
        assert not np.any(function(equal[:, :1]))
        assert function(equal[:0]).shape == (0, 4)
    found = jax.jit(group_relative)(jnp.array([1e4, -1e4, 0, 0], dtype))
    np.testing.assert_allclose(found, [1.2247449, -1.2247449, 0, 0], atol=1e-3)
    assert not np.any(informative_groups(equal))
    assert not np.any(informative_groups(jnp.ones((2, 1), dtype)))


def test_no_tokens():
    """Answers without a token have no reward, and a batch without a token no advantages."""
    whitened = jax.jit(reinforce_plus_plus_advantages)
    nothing, rewards = np.zeros((2, 3), bool), np.full((2, 3), NAN, np.float32)
    assert not np.any(whitened(rewards, nothing))
    assert not np.any(jax.jit(token_rewards)(rewards[:, 0], nothing))
    baseline = jax.jit(reinforce_plus_plus_baseline_advantages, static_argnames="group_size")
    assert not np.any(baseline(np.ones(2, np.float32), nothing, group_size=2))
    # One token has no deviation: its advantage is 0, as it is its own mean.
    one = np.array([[True, False, False], [False] * 3])
    assert not np.any(whitened(np.where(one, 5, rewards), one))


def test_token_rewards_of_worked_numbers():
    """The reward is on the last token that counts, the KL on all that do."""
    mask = np.array([[1, 1, 0], [1, 0, 1]])
    found = token_rewards(np.array([2.0, 3.0]), mask)
    np.testing.assert_array_equal(found, [[0, 2, 0], [0, 0, 3]])
    new, old = np.array([[-1, -2, NAN], [-1, NAN, -3]]), np.array([[-2, -2, NAN], [0, NAN, -1]])
    found = token_rewards(
        np.array([2.0, 3.0]), mask, log_probs=new, reference_log_probs=old, beta=0.1
    )
    np.testing.assert_allclose(found, [[-0.1, 2, 0], [0.1, 0, 3.2]], rtol=1e-6)
    slope = jax.grad(
        lambda x: jnp.sum(token_rewards(jnp.ones(2), mask, log_probs=x, reference_log_probs=old))
    )(new)
    assert not np.any(slope)


def test_advantages_are_constants():
    rewards, mask = jnp.array([[1.0, 2, 4], [0, 1, 5]]), jnp.ones((2, 3))
    for function in (
        group_relative,
        leave_one_out,
        lambda x: reinforce_plus_plus_advantages(x, mask),
        lambda x: reinforce_plus_plus_baseline_advantages(x[:, 0], mask, group_size=2),
        lambda x: trust_grpo_advantages(x, x**2, step=1, total_steps=2),
        lambda x: trust_weight(x / 5, x),
        lambda x: token_rewards(x[:, 0], mask),
    ):
        slope = jax.grad(lambda x, f=function: jnp.sum(jnp.square(f(x) + 1)))
        assert not np.any(jax.jit(slope)(rewards))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: soft_overlong_penalty(jnp.ones(2), cache=0), "cache must be > 0"),
        (lambda: soft_overlong_penalty(jnp.ones(2), max_length=128), "cache must be <= 128"),
        (lambda: soft_overlong_penalty(jnp.ones(2), factor=-1.0), "factor must be >= 0"),
        (lambda: token_rewards(OLD, MASK), "rewards must have the shape"),
        (
            lambda: reinforce_plus_plus_baseline_advantages(OLD, MASK, group_size=4),
            "rewards must have the shape",
        ),
        (lambda: soft_overlong_penalty(jnp.ones(2), max_length=0), "max_length must be > 0"),
        (lambda: informative_groups(jnp.ones(2), tolerance=-1.0), "tolerance must be >= 0"),
        (lambda: token_rewards(jnp.ones(2), MASK[:2], beta=-1.0), "beta must be >= 0"),
        (lambda: token_rewards(jnp.ones(2), MASK[:2], log_probs=OLD[:2]), "reference_log_probs"),
        (lambda: token_rewards(jnp.ones(3), MASK[:2]), "rewards must have the shape"),
        (lambda: reinforce_plus_plus_advantages(OLD, MASK, discount=1.1), "discount must be <= 1"),
        (lambda: trust_weight(jnp.ones(2), jnp.ones(3)), "thinking_rewards must have"),
        (lambda: _trust(form="draft"), "form must be one of"),
        (lambda: _trust(step=-1), "step must be >= 0"),
        (lambda: _trust(total_steps=0), "total_steps must be > 0"),
        (lambda: _trust(alpha=-0.1), "alpha must be >= 0"),
        (lambda: _trust(schedule="step"), "schedule must be one of"),
        (lambda: group_relative(jnp.ones(2), ddof=2), "ddof must be 0 or 1"),
        (lambda: group_relative(jnp.ones(2), tolerance=-1.0), "tolerance must be >= 0"),
        (lambda: group_relative(jnp.ones(2), axis_name="d"), "axis_name must be None"),
        (lambda: group_relative(jnp.ones(2), group_size=0), "group_size must be"),
    ],
)
def test_errors(call, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        call()


def _trust(**changes):
    given = {"step": 0, "total_steps": 1} | changes
    return trust_grpo_advantages(jnp.ones(2), jnp.zeros(2), **given)
