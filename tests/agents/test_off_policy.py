"""SAC and off-policy MDPO: what they have in common with each other, and with themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_table import OFF_POLICY
from agent_table import small_config as config

from trustjax.agents import action_samples, data_parallel, replay, select_seed, train_in_chunks
from trustjax.agents.off_policy import Learner
from trustjax.distributions import TanhGaussian
from trustjax.optim import sam
from trustjax.parallel import make_mesh


def plain(tree):
    """Without keys, which cannot be compared."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def check_close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=atol),
        plain(found), plain(expected),
    )  # fmt: skip


train = jax.jit(lambda config, key: config.agent().train(key))  # once for all numbers


@functools.cache
def trained(algorithm, **options):
    return train(config(algorithm, **options), jax.random.key(0))


def check_learned(state, history, num_updates=8):
    assert history["loss/critic"].shape == (num_updates,)
    assert int(state.iteration) == num_updates + 2  # of ten, two are random
    assert int(state.learner.gradient_steps) == num_updates * 20
    for name, values in history.items():
        if not name.startswith("episode/"):
            assert np.all(np.isfinite(values)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sac", {"env": "gymnax:CartPole-v1"}),
        ("sac", {"temperature_form": "log", "normalize_observations": True}),
        ("off_policy_mdpo", {"order": 1.5, "regularization": 0.001, "explore": "mode"}),
        ("off_policy_mdpo", {"order": 1.5, "env": "gymnax:CartPole-v1", "learn_temperature": True}),
        ("off_policy_mdpo", {"projection": "forward", "actor_critic": "first"}),
        ("off_policy_mdpo", {"projection": "forward", "env": "gymnax:CartPole-v1"}),
    ],
)
def test_all_options(algorithm, options):
    """Both kinds of actions; the buffer is full before the end."""
    check_learned(*trained(algorithm, **options))


@pytest.mark.parametrize("order", [1.0, 1.4, 2.0])
def test_densities_near_the_bounds(order):
    """Orders above 1 need densities, not logarithms: exact ones overflow where tanh is flat."""
    agent = config("off_policy_mdpo", order=order).agent()

    def soft_value(mean):
        policy = TanhGaussian(mean, jnp.zeros_like(mean))
        drawn = action_samples.sample_actions(
            policy, jax.random.split(jax.random.key(0), 4), epsilon=agent.tanh_epsilon
        )
        return jnp.mean(jnp.square(agent.entropy_log(drawn.log_prob)))

    value_and_gradient = jax.jit(jax.value_and_grad(soft_value))
    for mean in (0.0, 60.0, -200.0):
        value, gradient = value_and_gradient(jnp.full((16, 2), mean))
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


class TestIdentities:
    @pytest.mark.slow
    def test_with_the_largest_step_mdpo_is_sac(self, x64):
        """c = lambda: the same networks after every step, though pi_k is a copy of long ago."""
        fixed = {"temperature": 0.2, "learn_temperature": False}
        expected, _ = trained("sac", **fixed, num_steps=8, learning_starts=64)
        found, _ = trained(
            "off_policy_mdpo", temperature=0.2, step_size=5.0, num_steps=8, learning_starts=64
        )
        check_close(found.params, expected.params, 1e-9, 1e-9)

    @pytest.mark.parametrize("env", ["probe:both", "probe:continuous"])
    def test_a_temperature_above_one_over_t_is_sac(self, env):
        """t = 1 and a learned lambda = 5: the step in effect is 0.2, which does not repel."""
        keys = jax.random.split(jax.random.key(0), 4)
        number = jnp.linspace(-1.0, 1.0, 16)
        batch = replay.Replayed(
            number[:, None], number[:, None], number, number > 2, number[:, None]
        )

        @functools.partial(jax.jit, static_argnums=0)
        def losses(algorithm):
            agent = config(algorithm, env=env, learn_temperature=True).agent()
            actor, old = (agent.actor.init(key, batch.observation) for key in keys[:2])
            action = None if agent.env.num_actions else batch.action
            critics = [agent.critic.init(key, batch.observation, action) for key in keys[2:]]
            learner = agent._init_learner({"actor": old, "critics": critics})
            learner = learner._replace(log_temperature=jnp.log(5.0))
            return agent.policy_losses(actor, batch, keys, learner, critics)[0]

        expected = losses("sac")
        np.testing.assert_allclose(losses("off_policy_mdpo"), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("temperature", "expected"), [(0.0, 2.0), (0.5, 2.0), (0.8, 1.25), (5.0, 0.2)]
    )
    def test_step_size_in_effect(self, temperature, expected):
        """It is min(t, 1 / lambda) with t = 2, also for numbers that no check could see."""
        fixed = Learner(*[None] * 7)

        @jax.jit
        def step_size(temperature):
            agent = config("off_policy_mdpo", temperature=temperature, step_size=2.0).agent()
            return agent.step_size(fixed)

        np.testing.assert_allclose(step_size(temperature), expected, rtol=1e-6)

    @pytest.mark.slow
    def test_the_old_policy_is_a_copy_of_m_steps_ago(self):
        def old_and_new(policy_steps):
            state, history = trained("off_policy_mdpo", policy_steps=policy_steps)
            return state.learner.old_actor, state.params["actor"], history["trust/distance"]

        old, new, distance = old_and_new(1)
        check_close(old, new, 0, 0)
        np.testing.assert_allclose(distance, 0, atol=1e-12)
        _, _, distance = old_and_new(11)  # of which 20, 40, ..., 160 are no multiples
        assert np.all(distance > 0)

    @pytest.mark.slow
    def test_the_old_policy_holds_the_new_one(self):
        """The smaller the step, the nearer stays the policy to the one that never changes."""

        def last(step_size, key):
            agent = config("off_policy_mdpo", policy_steps=10**6, step_size=step_size).agent()
            return agent.train(key)[1]["trust/distance"][-1]

        keys = jax.random.split(jax.random.key(0), 5)
        train = jax.jit(jax.vmap(jax.vmap(last, (None, 0)), (0, None)))
        held, free = train(jnp.array([0.3, 5.0]), keys)
        assert np.all(held < 0.5 * free)


@pytest.mark.slow
def test_side_by_side_equal_single_runs():
    """Seeds, and the temperature, the step and m, in one program."""

    def one(key, temperature, step, policy_steps):
        numbers = {"temperature": temperature, "step_size": step, "policy_steps": policy_steps}
        return dataclasses.replace(config("off_policy_mdpo"), **numbers).agent().train(key)

    keys = jnp.stack([jax.random.key(0), jax.random.key(1), jax.random.key(0)])
    numbers = jnp.array([0.2, 0.2, 0.1]), jnp.array([1.0, 1.0, 0.5]), jnp.array([1000, 1000, 9])
    states, history = jax.jit(jax.vmap(one))(keys, *numbers)
    state, rows = trained("off_policy_mdpo")
    check_close(select_seed(states.params, 0), state.params, 1e-4, 1e-4)
    check_close(select_seed(history, 0), rows, 1e-3, 1e-3)
    _, rows = trained("off_policy_mdpo", temperature=0.1, step_size=0.5, policy_steps=9)
    np.testing.assert_allclose(history["entropy"][2], rows["entropy"], 1e-3)
    np.testing.assert_allclose(history["trust/distance"][2], rows["trust/distance"], 0.02)
    assert len(np.unique(history["entropy"][:, -1])) == 3


@pytest.mark.slow
def test_chunks_with_a_callback_give_the_same_numbers():
    agent = config("sac").agent()
    seen = []
    state, history = train_in_chunks(
        agent, jax.random.key(0), updates_per_chunk=4,
        callback=lambda state, metrics: seen.append(int(state.iteration)),
    )  # fmt: skip
    expected, rows = trained("sac")
    assert seen == [6, 10]
    check_close(state, expected, 1e-4, 1e-5)
    check_close(history, rows, 1e-4, 1e-5)


@pytest.mark.slow
def test_temperature_moves_towards_the_target():
    """Up while the entropy is below the target, down while it is above."""

    def temperatures(target_entropy):
        agent = config("sac", target_entropy=target_entropy).agent()
        return agent.train(jax.random.key(0))[1]["temperature"]

    up, down = jax.jit(jax.vmap(temperatures))(jnp.array([5.0, -5.0]))
    assert np.all(np.diff(up) > 0)
    assert np.all(np.diff(down) < 0)


@pytest.mark.slow
def test_any_optimizer():
    state, history = trained("sac", optimizer=lambda rate: optax.chain(sam(0.01), optax.adam(rate)))
    check_learned(state, history)
    for part in (state.learner.actor, state.learner.critics, state.learner.temperature):
        assert optax.tree.get(part, "radius") == np.float32(0.01)  # all are attacked


@pytest.mark.parametrize(
    "env",
    ["gymnax:Pendulum-v1", pytest.param("gymnax:CartPole-v1", marks=pytest.mark.slow)],
)
def test_policy_acts_and_is_saved(env, tmp_path):
    from trustjax.agents import load_policy

    agent = config("sac", env=env).agent()
    state, _ = trained("sac", env=env)
    agent.policy(state).save(tmp_path / "policy.npz")
    policy = load_policy(tmp_path / "policy.npz")
    assert hash(policy.actor) == hash(agent.actor)  # or `jax.jit` would not take the policy
    observation = jax.random.normal(jax.random.key(1), (5, *agent.env.observation_shape))
    for deterministic in (False, True):
        found, _ = policy.act(observation, jax.random.key(2), deterministic=deterministic)
        expected, _ = agent.act(state, observation, jax.random.key(2), deterministic=deterministic)
        np.testing.assert_array_equal(found, expected)
    if env.endswith("Pendulum-v1"):  # whose bounds are -2 and 2
        many, _ = policy.act(100 * observation, jax.random.key(3))
        assert np.all(np.abs(many) <= 2)
        assert np.any(np.abs(many) > 1)


@pytest.mark.slow
def test_eight_devices_equal_one(x64):
    """Networks, replay, environments, temperature and every metric, over four iterations."""

    def train_on(num_devices):
        small = config(
            "off_policy_mdpo", learn_temperature=True, num_envs=16, total_steps=6 * 64,
            learning_starts=64, num_steps=4, batch_size=32, normalize_observations=True,
        )  # fmt: skip
        init, advance = data_parallel(type(small).agent, small, make_mesh(num_devices))
        return advance(init(jax.random.key(0)), 4)

    found, expected = train_on(8), train_on(1)
    rows = found[0].replay.experience.reward.sharding
    assert len(rows.device_set) == 8
    assert not rows.is_fully_replicated
    used = [history.pop("trust/used", jnp.zeros([])) for _, history in (found, expected)]
    np.testing.assert_allclose(*used, rtol=1e-5)
    check_close(
        jax.tree.map(np.asarray, plain(found)), jax.tree.map(np.asarray, plain(expected)),
        1e-8, 1e-9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("sac", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ("sac", {"buffer_size": 79}, "buffer_size must be at least .* 80, got 79"),
        (
            "sac",
            {"learning_starts": 400, "buffer_size": 400},
            "total_steps must exceed learning_starts",
        ),
        ("sac", {"target_rate": 1.5}, "target_rate must be <= 1, got 1.5"),
        ("sac", {"temperature": 0.0}, "temperature must be > 0"),
        ("sac", {"log_std_range": (0.5, 2.0)}, "log_std_range must be two numbers with initial_lo"),
        ("sac", {"log_std_range": -5.0}, "log_std_range must be two numbers .* got -5"),
        ("sac", {"explore": "none"}, "explore must be one of 'sample', 'mode', got 'none'"),
        ("sac", {"env": "gymnax:Pendulum-v2"}, "Pendulum-v1"),
        ("off_policy_mdpo", {"step_size": -1.0}, "step_size must be > 0"),
        (
            "off_policy_mdpo",
            {"step_size": 6.0},
            "step_size must be at most 1 / temperature, 5, .*got 6",
        ),
        (
            "off_policy_mdpo",
            {"step_size": np.float32(6.0), "temperature": jnp.asarray(0.2)},
            "step_size must be at most 1 / temperature, 5, .*got 6",
        ),
        ("off_policy_mdpo", {"order": 2.5}, "order must be <= 2"),
        (
            "off_policy_mdpo",
            {"projection": "forward", "order": 2.0},
            "order must be 1 with projection",
        ),
    ],
)
def test_bad_input(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        config(algorithm, **options).agent()


def test_devices_that_cannot_share():
    mesh = make_mesh(8)
    for options, message in [
        ({"num_envs": 4}, "num_envs must be a multiple of 8 devices, got 4"),
        ({"num_envs": 8, "batch_size": 12}, "batch_size must be a multiple of 8 devices, got 12"),
    ]:
        with pytest.raises(ValueError, match=message):
            data_parallel(OFF_POLICY["sac"].agent, config("sac", **options), mesh)


def test_flashbax_missing(monkeypatch):
    """The error names the extra."""
    import sys

    monkeypatch.setitem(sys.modules, "flashbax", None)
    with pytest.raises(ModuleNotFoundError, match=r"trustjax\[rl\]"):
        replay._buffer(1, 1)
