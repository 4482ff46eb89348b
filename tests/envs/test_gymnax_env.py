"""Environments of gymnax: its own steps to the bit, and what happens at the ends of episodes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rolling import check_interface, rollout, still

import trustjax.envs.gymnax
from trustjax.envs import make
from trustjax.envs.third_party import building, default_promotion, import_extra

gymnax = import_extra("gymnax", install="gymnax")


def left(t, state):
    return jnp.zeros([], jnp.int32)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "shape", "limit"),
    [
        ("CartPole-v1", (4,), 4),
        ("Pendulum-v1", (3,), 4),
        ("Breakout-MinAtar", (10, 10, 4), 4),
        ("FrozenLake-misc", (16,), 4),
        ("MemoryChain-bsuite", (3,), 4),
    ],
)
def test_a_step_is_that_of_gymnax(name, shape, limit):
    env = make(f"gymnax:{name}", max_steps_in_episode=limit)
    assert env.observation_shape == shape
    with building():
        inner, params = gymnax.make(name)
    params = params.replace(max_steps_in_episode=limit)

    def seen(observation):
        if name == "FrozenLake-misc":
            return np.eye(16, dtype=np.float32)[observation]
        return np.asarray(observation, np.float32)

    key = jax.random.key(3)
    step = jax.jit(env.step)
    observation, state = env.reset(key, params)
    with default_promotion():
        expected, inner_state = inner.reset(key, params)
    np.testing.assert_array_equal(observation, seen(expected), strict=True)
    ends = 0
    for key in jax.random.split(jax.random.key(4), 6):
        action = jnp.full_like(still(env), 1)
        observation, state, reward, terminated, truncated, info = step(key, state, action, params)
        with default_promotion():
            expected, inner_state, *rest, inner_info = inner.step(
                key, inner_state, action.reshape(inner.action_space(params).shape), params
            )
        np.testing.assert_array_equal(observation, seen(expected), strict=True)
        np.testing.assert_array_equal(
            info["final_observation"], seen(inner_info["final_observation"]), strict=True
        )
        assert reward == rest[0]
        assert terminated == rest[1]
        assert truncated == (rest[2] and not rest[1])
        jax.tree.map(np.testing.assert_array_equal, state, inner_state)
        ends += terminated | truncated
    assert ends  # so that a reset is among these steps


def test_the_time_limit():
    env = make("gymnax:CartPole-v1?max_steps_in_episode=3")
    found = rollout(env, left, 8)
    np.testing.assert_array_equal(found.truncated, [0, 0, 1, 0, 0, 1, 0, 0])
    assert not found.terminated.any()
    cut = found.truncated
    # Where an episode goes on the final observation is the observation; where it was cut, it is one
    # step of physics from the one before: x + tau * velocity, and far from the start.
    np.testing.assert_array_equal(found.final[~cut], found.after[~cut])
    np.testing.assert_allclose(
        found.final[:, 0], found.before[:, 0] + 0.02 * found.before[:, 1], rtol=1e-6
    )
    assert (found.final[cut, 1] < -0.5).all()  # pushed to the left three times
    assert (np.abs(found.after[cut]) <= 0.05).all()  # where episodes start


def test_the_end_of_an_episode_wins_over_the_time_limit():
    env = make("gymnax:CartPole-v1", max_steps_in_episode=1, x_threshold=0.0)
    key = jax.random.key(0)
    _, state = env.reset(key)
    *_, terminated, truncated, _ = env.step(key, state, jnp.int32(0))
    with default_promotion():
        assert env.unwrapped.step(key, state, 0, env.default_params)[4]  # gymnax says both
    assert terminated
    assert not truncated


def test_parameters_under_vmap():
    env = make("gymnax:CartPole-v1")

    def lengths(limit, gravity):
        params = env.default_params.replace(max_steps_in_episode=limit, gravity=gravity)
        return jax.vmap(lambda key: steps(key, params))(jax.random.split(jax.random.key(0), 2))

    def steps(key, params):
        def one(state, key):
            _, state, _, _, truncated, info = env.step(key, state, jnp.int32(0), params)
            return state, (truncated, info["final_observation"])

        return jax.lax.scan(one, env.reset(key, params)[1], jax.random.split(key, 4))[1]

    truncated, seen = jax.jit(jax.vmap(lengths))(jnp.array([1, 2, 3]), jnp.array([9.8, 9.8, 1.6]))
    np.testing.assert_array_equal(truncated[:, 0], [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]])
    np.testing.assert_array_equal(truncated[:, 0], truncated[:, 1])
    assert (seen[0, :, 0] == seen[1, :, 0]).all()
    assert (seen[0, :, 0] != seen[2, :, 0]).any()


@pytest.mark.parametrize("name", ["MemoryChain-bsuite", "Pendulum-v1"])
def test_interface(name):
    check_interface(make(f"gymnax:{name}"))


def test_keys_of_both_kinds():
    env = make("gymnax:CartPole-v1")
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    observation, state = env.reset(old)
    np.testing.assert_array_equal(observation, env.reset(new)[0])
    jax.tree.map(
        np.testing.assert_array_equal,
        env.step(old, state, jnp.int32(1)),
        env.step(new, state, jnp.int32(1)),
    )


@pytest.mark.parametrize("name", ["Pendulum-v1", "MemoryChain-bsuite"])
def test_strict_promotion(name, strict):
    env = make(f"gymnax:{name}")
    jax.eval_shape(lambda key: env.step(key, env.reset(key)[1], still(env)), jax.random.key(0))


def test_bounds_of_actions():
    env = make("gymnax:PointRobot-misc")
    np.testing.assert_allclose(env.action_high, [0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(env.action_low, [-0.1, -0.1], rtol=1e-6)
    assert env.num_actions is None
    assert make("gymnax:Acrobot-v1").num_actions == 3


def test_arguments_of_the_constructor_change_the_defaults():
    env = make("gymnax:DeepSea-bsuite?size=5&unscaled_move_cost=0.5")
    assert env.observation_shape == (5, 5)
    assert env.default_params.max_steps_in_episode == 5
    assert env.default_params.unscaled_move_cost == 0.5


def fake(monkeypatch, **spaces):
    """CartPole with other spaces, as "Fake"; it sees its place only."""
    with building():
        base = type(gymnax.make("CartPole-v1")[0])

    class Fake(base):
        def observation_space(self, params):
            return spaces.get("seen", gymnax.environments.spaces.Box(-1, 1, ()))

        def action_space(self, params=None):
            return spaces.get("actions", gymnax.environments.spaces.Box(-1, 1, ()))

        def get_obs(self, state, params=None, key=None):
            return state.x

    package = types.SimpleNamespace(
        make=lambda name: (Fake(), Fake().default_params), registered_envs=["Fake"]
    )
    monkeypatch.setattr(trustjax.envs.gymnax, "_package", lambda: package)
    return make("gymnax:Fake")


def test_scalars(monkeypatch):
    env = fake(monkeypatch)
    assert env.observation_shape == ()
    assert env.action_low.shape == env.action_high.shape == (1,)
    check_interface(env)


@pytest.mark.parametrize("kind", ["seen", "actions"])
def test_spaces_in_parts(kind, monkeypatch):
    parts = gymnax.environments.spaces.Dict({})
    with pytest.raises(ValueError, match="one discrete space or one box, got Dict"):
        fake(monkeypatch, **{kind: parts})
