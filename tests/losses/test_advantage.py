"""Advantages against worked numbers, direct sums and identities; the ends of episodes above all."""

import json
import pathlib

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.losses import gae, group_relative, lambda_returns, leave_one_out, vtrace

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "policy.json").read_text(encoding="utf-8")
)


def worked(case):
    """The transitions of a worked example; next values are those of final observations."""
    golden = GOLDEN["gae"]
    found = golden["cases"][case]
    values = np.array(golden["values"])
    next_values = np.append(values[1:], golden["last_value"])
    terminated, truncated = np.zeros((2, 5), bool)
    terminated[found["terminated"]] = True
    for step, value in found["truncated"].items():
        truncated[int(step)] = True
        next_values[int(step)] = value
    return (
        np.array(golden["rewards"], float),
        values,
        next_values,
        terminated,
        truncated,
    ), found


NUMBERS = {"discount": GOLDEN["gae"]["discount"], "lambda_": GOLDEN["gae"]["lambda_"]}


@pytest.mark.parametrize("case", GOLDEN["gae"]["cases"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_gae_golden(case, wrap, x64):
    transitions, found = worked(case)
    advantages = wrap(lambda *args: gae(*args, **NUMBERS))(*transitions)
    np.testing.assert_allclose(advantages, found["advantages"], rtol=1e-9)
    if "returns" in found:
        np.testing.assert_allclose(advantages + transitions[1], found["returns"], rtol=1e-9)


@st.composite
def rollouts(draw):
    length = draw(st.sampled_from((1, 9)))  # two shapes: each is compiled
    numbers = arrays.arrays(float, (length, 2), elements=st.floats(-3, 3))
    flags = arrays.arrays(bool, (length, 2))
    return draw(numbers), draw(numbers), draw(numbers), draw(flags), draw(flags)


rates = st.floats(0, 1)


@jax.jit
def all_three(rewards, values, next_values, terminated, truncated, **numbers):
    ends = terminated, truncated
    return (
        gae(rewards, values, next_values, *ends, **numbers),
        lambda_returns(rewards, next_values, *ends, **numbers),
        vtrace(jnp.zeros_like(rewards), rewards, values, next_values, *ends, **numbers),
    )


@hypothesis.given(rollouts(), rates, rates)
@hypothesis.settings(deadline=None, max_examples=30)
def test_gae_is_the_sum_of_its_errors(rollout, discount, lambda_):
    """Against the definition, a double loop in NumPy."""
    rewards, values, next_values, terminated, truncated = rollout
    expected = np.zeros_like(rewards)
    for env in range(2):
        for start in range(len(rewards)):
            weight = 1.0
            for t in range(start, len(rewards)):
                after = 0.0 if terminated[t, env] else next_values[t, env]
                error = rewards[t, env] + discount * after - values[t, env]
                expected[start, env] += weight * error
                if terminated[t, env] or truncated[t, env]:
                    break
                weight *= discount * lambda_
    with jax.enable_x64(True):
        found = all_three(*rollout, discount=discount, lambda_=lambda_)[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@hypothesis.given(rollouts(), rates, rates)
@hypothesis.settings(deadline=None, max_examples=30)
def test_returns_are_advantages_plus_values(rollout, discount, lambda_):
    """Where the next value is that of the next state, or the episode ends."""
    rewards, values, next_values, terminated, truncated = rollout
    inside = ~(terminated | truncated)
    next_values[:-1] = np.where(inside[:-1], values[1:], next_values[:-1])
    numbers = {"discount": discount, "lambda_": lambda_}
    with jax.enable_x64(True):
        advantages, returns, traced = all_three(
            rewards, values, next_values, terminated, truncated, **numbers
        )
    np.testing.assert_allclose(returns, np.asarray(advantages) + values, atol=1e-12)
    np.testing.assert_allclose(traced.targets, returns, atol=1e-12)


def test_termination_wins_over_truncation(x64):
    both, terminated = worked("both")[0], worked("terminated")[0]
    one, two = gae(*both, **NUMBERS), gae(*terminated, **NUMBERS)
    np.testing.assert_array_equal(one, two)
    one = lambda_returns(both[0], *both[2:], **NUMBERS)
    two = lambda_returns(terminated[0], *terminated[2:], **NUMBERS)
    np.testing.assert_array_equal(one, two)


def test_vtrace_is_its_sum(x64):
    """v_s - V = sum_t gamma^(t-s) (c_s ... c_(t-1)) rho_t delta_t, of one episode."""
    random = np.random.default_rng(0)
    rewards, values, log_ratios = random.normal(size=(3, 6))
    next_values = np.append(values[1:], 0.4)
    none = np.zeros(6, bool)
    discount, lambda_, clip_rho, clip_c = 0.9, 0.8, 1.3, 0.7
    found = vtrace(
        log_ratios,
        rewards,
        values,
        next_values,
        none,
        none,
        discount=discount,
        lambda_=lambda_,
        clip_rho=clip_rho,
        clip_c=clip_c,
    )
    rho = np.minimum(clip_rho, np.exp(log_ratios))
    c = lambda_ * np.minimum(clip_c, np.exp(log_ratios))
    delta = rho * (rewards + discount * next_values - values)
    expected = [
        values[s] + sum(discount ** (t - s) * np.prod(c[s:t]) * delta[t] for t in range(s, 6))
        for s in range(6)
    ]
    np.testing.assert_allclose(found.targets, expected, rtol=1e-12)
    after = np.append(expected[1:], 0.4)
    np.testing.assert_allclose(
        found.advantages, rho * (rewards + discount * after - values), rtol=1e-12
    )


def test_vtrace_bootstraps_at_a_truncation(x64):
    """The step before the reset looks at the final observation, not at the next episode."""
    transitions, _ = worked("truncated")
    changed = [np.copy(x) for x in transitions]
    changed[1][3:] += 10.0  # values of the next episode
    one, two = (vtrace(np.zeros(5), *each, **NUMBERS) for each in (transitions, changed))
    np.testing.assert_array_equal(one.targets[:3], two.targets[:3])
    np.testing.assert_array_equal(one.advantages[:3], two.advantages[:3])


@pytest.mark.parametrize("function", ["gae", "lambda_returns", "vtrace"])
def test_no_gradients(function):
    (rewards, values, next_values, *flags), _ = worked("truncated")

    def total(values, next_values):
        if function == "gae":
            return gae(rewards, values, next_values, *flags, **NUMBERS).sum()
        if function == "lambda_returns":
            return lambda_returns(rewards, next_values, *flags, **NUMBERS).sum()
        traced = vtrace(rewards, rewards, values, next_values, *flags, **NUMBERS)
        return (traced.targets + traced.advantages).sum()

    for gradient in jax.grad(total, (0, 1))(values, next_values):
        assert not np.any(gradient)


def test_dtypes_and_numbers_that_are_traced(strict):
    transitions = [jnp.asarray(x) for x in worked("truncated")[0]]
    narrow = [x.astype(jnp.bfloat16) if x.dtype != bool else x for x in transitions]
    assert jax.eval_shape(lambda *x: gae(*x, **NUMBERS), *narrow).dtype == jnp.float32
    one = jax.jit(lambda discount: gae(*transitions, discount=discount, lambda_=0.95))
    swept = jax.vmap(one)(jnp.array([0.9, 0.99]))
    np.testing.assert_allclose(swept[1], one(0.99), rtol=1e-6)
    ratios = jnp.zeros_like(transitions[0])
    found = jax.eval_shape(lambda *x: vtrace(*x, **NUMBERS), ratios, *transitions)
    assert found.targets.dtype == jnp.float32


def test_bad_input():
    rewards, values, next_values, terminated, truncated = worked("truncated")[0]
    with pytest.raises(ValueError, match=r"values must have the shape of rewards, \(5,\), got"):
        gae(rewards, values[:, None], next_values, terminated, truncated, **NUMBERS)
    with pytest.raises(ValueError, match=r"discount must be <= 1, got 1\.5"):
        gae(*worked("truncated")[0], discount=1.5, lambda_=0.95)
    with pytest.raises(ValueError, match="lambda_ must be >= 0"):
        gae(*worked("truncated")[0], discount=0.9, lambda_=-0.1)
    with pytest.raises(ValueError, match="time axis"):
        gae(*(x[0] for x in worked("truncated")[0]), **NUMBERS)


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_empty_axes(shape):
    empty, ends = jnp.ones(shape), jnp.zeros(shape, bool)
    for function in (
        lambda: gae(empty, empty, empty, ends, ends, **NUMBERS),
        lambda: lambda_returns(empty, empty, ends, ends, **NUMBERS),
        lambda: vtrace(empty, empty, empty, empty, ends, ends, **NUMBERS),
    ):
        with pytest.raises(ValueError, match=r"must have a time axis of at least one step, got"):
            function()
    for function, least in ((group_relative, 1), (leave_one_out, 2)):
        with pytest.raises(ValueError, match=f"rewards must have at least {least} entries along"):
            function(empty, axis=0)
        for axis in (2, -3):
            with pytest.raises(ValueError, match=f"axis must be an axis of rewards, .*got {axis}"):
                function(jnp.ones((2, 2)), axis=axis)
    # No environments are no step of none: there is nothing that could be wrong.
    assert gae(*(jnp.ones((3, 0)),) * 5, **NUMBERS).shape == (3, 0)


def test_groups(x64):
    golden = GOLDEN["group"]
    rewards = np.array(golden["rewards"])
    relative = jax.jit(group_relative, static_argnames=("axis", "scale"))
    for scale in ("std", "none"):
        found = relative(rewards, scale=scale)
        np.testing.assert_allclose(found, golden[scale], rtol=1e-11)
    found = jax.jit(leave_one_out)(rewards)
    np.testing.assert_allclose(found, golden["leave_one_out"], rtol=1e-12)
    stacked = np.stack([rewards, 2 * rewards])
    np.testing.assert_allclose(relative(stacked.T, axis=0).T, relative(stacked), rtol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1e8])
def test_equal_rewards_have_no_advantage(reward):
    rewards = jnp.full(7, reward)
    found, left_out = jax.jit(lambda x: (group_relative(x), leave_one_out(x)))(rewards)
    assert not np.any(found)
    np.testing.assert_allclose(left_out, 0, atol=1e-6 * max(reward, 1))
    assert not np.any(group_relative(jnp.ones(1)))
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(jnp.ones(1))
    with pytest.raises(ValueError, match="scale"):
        group_relative(rewards, scale="max")
