"""What the on-policy algorithms share, and what each of them promises of its steps."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_table import ON_POLICY, small_config

from trustjax.agents import load_policy, select_seed, train_in_chunks
from trustjax.agents import policy as policy_module
from trustjax.agents.algorithm import adam
from trustjax.agents.batch import draw_environments
from trustjax.envs import Environment
from trustjax.envs.brax import BraxParams
from trustjax.envs.probe import Probe
from trustjax.geometry import hypentropy
from trustjax.optim import auon, mirror_descent, sam, tram

KEY = jax.random.key(0)


def agent_of(algorithm, **options):
    return small_config(algorithm, **options).agent()


train = jax.jit(lambda config, key: config.agent().train(key))  # once for all numbers


def trained(algorithm, key=KEY, **options):
    return train(small_config(algorithm, **options), key)


def plain(tree):
    """Arrays of NumPy, with the data of keys for the keys."""

    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(one, tree)


def check_close(found, expected, rtol=0.0, atol=0.0):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=atol),
        plain(found),
        plain(expected),
    )


# ---- transformations


@pytest.mark.slow
def test_side_by_side_equal_single_runs():
    """Of a key and a rate each."""
    config = small_config("ppo")

    def one(learning_rate, key):
        return dataclasses.replace(config, learning_rate=learning_rate).agent().train(key)

    keys, rates = jax.random.split(KEY, 3), jnp.array([0.001, 0.001, 0.05])
    found = jax.jit(jax.vmap(one))(rates, keys)
    for place in (0, 2):
        single = trained("ppo", keys[place], learning_rate=float(rates[place]))
        check_close(select_seed(found, place), single, 1e-4, 1e-5)


def test_one_compilation_and_no_weak_types():
    agent = agent_of("trpo", normalize_observations=True, normalize_rewards=True)
    update = jax.jit(agent.update)
    state = jax.jit(agent.init)(KEY)
    for _ in range(3):
        state, _ = update(state)
    assert update._cache_size() == 1
    shapes = jax.eval_shape(agent.update, state)[0]
    assert not any(x.weak_type for x in jax.tree.leaves(shapes))


# ---- training in chunks


@pytest.mark.slow
def test_chunks_equal_one_scan():
    """Also with a length that does not divide."""
    agent, lengths = agent_of("mdpo"), []
    found = train_in_chunks(
        agent, KEY, updates_per_chunk=2,
        callback=lambda state, metrics: lengths.append(len(metrics["entropy"])),
    )  # fmt: skip
    assert lengths == [2, 2, 1]
    check_close(found, trained("mdpo"), 1e-6, 1e-7)


def test_callback_stops():
    agent = agent_of("mdpo")
    state, history = train_in_chunks(
        agent, KEY, updates_per_chunk=1, callback=lambda state, metrics: state.iteration == 2
    )
    assert state.iteration == 2
    assert history["entropy"].shape == (2,)
    with pytest.raises(ValueError, match="updates_per_chunk must be >= 1"):
        train_in_chunks(agent, KEY, updates_per_chunk=0, callback=lambda *_: None)


# ---- acting


@pytest.mark.table
@pytest.mark.parametrize("env", ["probe:both", "probe:continuous"])
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)])
def test_act_with_any_batch_shape(batch_shape, env):
    agent = agent_of("ppo", env=env, gru_size=4, initial_log_std=2.0)
    state = agent.init(KEY)
    action, carry = agent.act(state, jnp.ones((*batch_shape, 1)), KEY)
    assert carry.shape == (*batch_shape, 4)
    if env == "probe:both":
        assert action.shape == batch_shape
    else:
        assert action.shape == (*batch_shape, 1)
        assert np.all(np.abs(action) <= 1)


def test_act_checks_the_shape():
    agent = agent_of("ppo")
    with pytest.raises(ValueError, match=r"observation must be \[\.\.\., \*\(1,\)\], got \(3, 2\)"):
        agent.act(agent.init(KEY), jnp.ones((3, 2)), KEY)


def test_evaluate():
    """Rewards +1, -1, +1, ... until the limit of five steps, whatever the policy does."""
    agent = agent_of("ppo", env="probe:final_observation")
    returns, lengths = agent.evaluate(agent.init(KEY), KEY, 4)
    np.testing.assert_array_equal(returns, np.ones(4))
    np.testing.assert_array_equal(lengths, np.full(4, 5))
    params = Probe("final_observation").default_params._replace(max_steps_in_episode=4)
    shorter = agent_of("ppo", env="probe:final_observation", env_params=params)
    state = agent.init(KEY)
    found = shorter.evaluate(state, KEY, 2)
    np.testing.assert_array_equal(found.returns, np.zeros(2))
    np.testing.assert_array_equal(found.lengths, np.full(2, 4))
    assert np.all(found.finished)
    # The parameters belong to the policy, and can be replaced by those of a call.
    check_close(shorter.policy(state).evaluate(KEY, 2), found)
    longer = shorter.policy(state).evaluate(
        KEY, 2, env_params=params._replace(max_steps_in_episode=3)
    )
    np.testing.assert_array_equal(longer.lengths, np.full(2, 3))


class Endless(Environment):
    """Rewards of 1 without an end, with a time limit in its parameters that it does not keep."""

    name = "endless"
    observation_shape = (1,)
    num_actions = 2

    def __init__(self, default_params):
        self.default_params = default_params

    def reset(self, key, params=None):
        return jnp.zeros(1), jnp.zeros([])

    def step(self, key, state, action, params=None):
        never = jnp.zeros([], bool)
        observation = jnp.zeros(1)
        return observation, state, jnp.ones([]), never, never, {"final_observation": observation}


@pytest.mark.parametrize(
    ("params", "max_steps", "expected"),
    [
        ({}, 7, 7),
        ({}, None, 20),
        ({"max_steps_in_episode": 9}, None, 9),
        (BraxParams(6), None, 6),
        (BraxParams(6), 8, 8),
    ],
)
def test_evaluation_ends_where_episodes_do_not(params, max_steps, expected, monkeypatch):
    monkeypatch.setattr(policy_module, "MOST_STEPS", 20)
    agent = agent_of("ppo", env=Endless(params))
    found = agent.evaluate(agent.init(KEY), KEY, 2, max_steps=max_steps)
    np.testing.assert_array_equal(found.lengths, np.full(2, expected))
    np.testing.assert_array_equal(found.returns, np.full(2, expected))
    assert not np.any(found.finished)


def test_some_episodes_are_cut_off():
    agent = agent_of("ppo", env="probe:final_observation")
    state = agent.init(KEY)
    with pytest.raises(ValueError, match="max_steps must be >= 1, got 0"):
        agent.evaluate(state, KEY, 2, max_steps=0)
    limits = jax.vmap(lambda most: agent.evaluate(state, KEY, 1, max_steps=most).finished)
    np.testing.assert_array_equal(limits(jnp.array([4, 5, 6]))[:, 0], [False, True, True])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gru_size": 4, "dtype": jnp.bfloat16}], ids=str)
def test_saved_policy_acts_alike(options, tmp_path):
    agent = agent_of("ppo", env="probe:continuous", normalize_observations=True, **options)
    policy = agent.policy(jax.jit(agent.update)(agent.init(KEY))[0])
    policy.save(tmp_path / "policy.npz")
    found = load_policy(tmp_path / "policy.npz")
    hash(found.actor)  # or `jax.jit` would not take the policy
    observation = jnp.array([[1.0], [-2.0]])
    check_close(found.act(observation, KEY), policy.act(observation, KEY))
    assert found.env == policy.env


def test_no_policy_in_a_file(tmp_path):
    text, other = tmp_path / "text.npz", tmp_path / "other.npz"
    text.write_text("policy")
    np.savez(other, a=np.zeros(2))
    for path in (text, other):
        with pytest.raises(ValueError, match=f"{path.name} must be a policy saved by trustjax"):
            load_policy(path)


def test_failed_saving_leaves_what_was(tmp_path, monkeypatch):
    policy = agent_of("ppo").policy(agent_of("ppo").init(KEY))
    path = tmp_path / "policy.npz"
    policy.save(path)
    before = path.read_bytes()

    def fail(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        policy.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- schedules


@pytest.mark.parametrize("name", ON_POLICY)
def test_annealed_rate_stays_at_zero_past_the_end(name):
    """Five iterations of four steps; a negative rate would ascend the loss."""
    agent = agent_of(name, anneal_learning_rate=True)
    schedule = agent.make_optimizer(lambda rate: rate, 0.01, 4)
    rates = schedule(jnp.array([0, 3, 4, 19, 20, 24, 1000, 2**31 - 1]))
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.008, 0.002, 0, 0, 0, 0], rtol=1e-6)


def test_annealed_step_size_stays_positive_past_the_end():
    agent = agent_of("mdpo", step_size=2.0)
    found = jax.vmap(agent.step_size)(jnp.array([0, 4, 5, 6, 1000]))
    np.testing.assert_allclose(found, [2, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)


# ---- minibatches


def drawn(num_epochs=3, num_minibatches=4, **options):
    """Values of a batch, each 100 time + environment, by epoch and minibatch."""
    agent = agent_of("ppo", num_minibatches=num_minibatches, **options)
    state = agent.init(KEY)
    numbers = 100.0 * jnp.arange(4)[:, None] + jnp.arange(8)
    batch = jax.eval_shape(lambda: agent._batch(state, rollout_of(agent, state), None)[0])
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)._replace(value=numbers)

    def step(carry, part):
        return carry, part.value

    return np.array(agent.epochs(batch, KEY, num_epochs, num_minibatches, step, ())[1])


def rollout_of(agent, state):
    from trustjax.agents.rollout import collect

    return collect(
        agent.env, None, agent.actor, state.params["actor"], lambda x: x, state.runner, KEY, 4
    )[1]


@pytest.mark.parametrize("gru_size", [None, 4])
def test_minibatches_of_environments(gru_size):
    """Each environment once in an epoch at every step, one of every group in each minibatch."""
    epochs = drawn(gru_size=gru_size)
    assert epochs.shape == (3, 4, 4, 2)
    environments = epochs - 100 * np.arange(4)[:, None]
    np.testing.assert_array_equal(environments // 4, np.broadcast_to([0, 1], epochs.shape))
    at_each_step = np.moveaxis(environments, 2, 0).reshape(4, 3, 8)
    np.testing.assert_array_equal(np.sort(at_each_step), 4 * [3 * [list(range(8))]])
    assert len(np.unique(environments, axis=0)) > 1  # the epochs differ
    whole = (environments == environments[:, :, :1]).all()
    assert whole == (gru_size is not None)  # in time


def test_each_environment_is_as_likely_in_a_minibatch():
    """And does not depend on which ones there are of other groups and at other times."""
    draw = functools.partial(draw_environments, 3, 8, 4)
    first = np.array(jax.vmap(draw)(jax.random.split(KEY, 4000)))[:, 0] % 4  # [key, step, group]
    share = np.stack([np.mean(first == member, 0) for member in range(4)])
    np.testing.assert_allclose(share, 1 / 4, atol=0.03)  # four standard deviations
    for one, other in itertools.combinations(first.reshape(4000, 6).T, 2):
        together = np.histogram2d(one, other, bins=4)[0] / 4000
        np.testing.assert_allclose(together, 1 / 16, atol=0.016)


def test_minibatches_of_transitions():
    epochs = drawn(shuffle="transitions")
    assert epochs.shape == (3, 4, 1, 8)
    each = np.sort((100.0 * np.arange(4)[:, None] + np.arange(8)).reshape(-1))
    np.testing.assert_array_equal(np.sort(epochs.reshape(3, 32)), [each] * 3)


# ---- steps


@pytest.mark.parametrize("gru_size", [pytest.param(None, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("mdpo", marks=pytest.mark.slow)])
def test_first_ratio_is_one(algorithm, gru_size):
    """With hardly any rate the policy of learning is that of the rollout, over all iterations."""
    _, history = trained(
        algorithm, env="probe:memory", learning_rate=1e-12, gru_size=gru_size,
        normalize_observations=True, normalize_rewards=True, initial_log_std=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(history["kl/new_old"], 0, atol=1e-10)
    np.testing.assert_allclose(history["ratio/distance"], 0, atol=1e-6)


@pytest.mark.slow
def test_mdpo_step_sizes():
    _, history = trained("mdpo", step_size=2.0)
    np.testing.assert_allclose(history["step_size"], 2 * np.array([1, 0.8, 0.6, 0.4, 0.2]), 1e-6)
    assert np.all(trained("mdpo", step_size=2.0, anneal_step_size=False)[1]["step_size"] == 2)
    after = agent_of("mdpo").step_size(jnp.array(7))
    np.testing.assert_allclose(after, 1 / 5, 1e-6)


@pytest.mark.parametrize(
    ("policy_steps", "same"), [(1, True), pytest.param(10, False, marks=pytest.mark.slow)]
)
def test_mdpo_with_one_step_is_policy_gradient(policy_steps, same):
    """Then the step size does not matter, as the KL has no slope yet."""

    def kernel(step_size):
        agent = agent_of("mdpo", policy_steps=policy_steps, step_size=step_size)
        return agent.train(KEY)[0].params["actor"]["params"]["head"]["kernel"]

    small, large = jax.jit(jax.vmap(kernel))(jnp.array([1e-3, 1e3]))
    assert np.allclose(small, large, atol=1e-6) == same


def test_trpo_stays_within_the_radius():
    _, history = trained("trpo", radius=0.02, total_steps=20 * 32)
    assert np.all(history["kl/old_new"] <= 0.02 * (1 + 1e-4))
    np.testing.assert_allclose(history["trust/distance"], history["kl/old_new"], 1e-3, 1e-6)
    assert np.max(history["kl/old_new"]) > 0.01


def test_adaptive_coefficient_follows_the_rule():
    _, history = trained(
        "ppo", surrogate="adaptive_kl", kl_target=1e-3, kl_coefficient=3.0, total_steps=20 * 32
    )
    kl, beta = np.array(history["kl/old_new"]), np.array(history["kl_coefficient"])
    factor = np.where(kl > 1.5e-3, 2, np.where(kl < 1e-3 / 1.5, 0.5, 1))
    np.testing.assert_allclose(beta, 3 * np.cumprod(factor), 1e-6)
    assert {0.5, 2.0} <= set(factor)


def test_rate_falls_in_steps_of_an_iteration():
    """It is constant within an iteration, and the last one's is 1/K of the first."""
    agent = agent_of("ppo", learning_rate=1.0)
    rates = []
    agent.make_optimizer(lambda rate: rates.append(rate), 1.0, 4)
    found = [float(rates[0](count)) for count in range(20)]
    np.testing.assert_allclose(found, np.repeat([1, 0.8, 0.6, 0.4, 0.2], 4), 1e-6)


# ---- optimizers by configuration

OPTIMIZERS = {
    "sam": lambda rate: optax.chain(sam(0.05), optax.adam(rate)),
    "auon": auon,
    "mirror_descent": lambda rate: mirror_descent(rate, hypentropy(1.0)),
    "tram": lambda rate: optax.chain(tram("previous"), optax.adam(rate)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    state, history = trained("ppo", optimizer=OPTIMIZERS[name])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, history)))
    assert np.max(history["ratio/distance"]) > 0


@pytest.mark.slow
def test_second_gradient_of_sam_is_used():
    """At radius 0 it is Adam; elsewhere it is not."""

    def kernel(optimizer):
        state, _ = trained("ppo", optimizer=optimizer, total_steps=32)
        return state.params["critic"]["params"]["head"]["kernel"]

    expected = kernel(adam)
    at_zero, away = (
        kernel(lambda rate, radius=radius: optax.chain(sam(radius), adam(rate)))
        for radius in (0.0, 0.5)
    )
    np.testing.assert_allclose(at_zero, expected, atol=1e-6)
    assert np.max(np.abs(away - expected)) > 1e-4
