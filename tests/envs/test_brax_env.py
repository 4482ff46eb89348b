"""Environments of brax beside brax's own wrappers, and of MuJoCo Playground beside a stand-in."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rolling import Counting, Rollout, check_interface, rollout

from trustjax.agents import ppo
from trustjax.agents.rollout import act_randomly, collect, start
from trustjax.envs import make, names
from trustjax.envs.brax import Brax, BraxParams
from trustjax.envs.third_party import building, default_promotion, import_extra
from trustjax.models.actor_critic import Actor

training = import_extra("brax.envs.wrappers.training", install="brax")
Wrapper = import_extra("brax.envs.base", install="brax").Wrapper
GymnaxToBraxWrapper = import_extra("gymnax.wrappers.brax", install="gymnax").GymnaxToBraxWrapper

LIMIT = 8


def push(t, state=None):
    """Hard to the right until the pole has fallen, then gently to and fro."""
    return jnp.where(t < 16, 1.0, 0.0)[None].astype(jnp.float32)


@pytest.fixture(scope="module")
def pendulum():
    env = make(
        "brax:inverted_pendulum", backend="spring", max_steps_in_episode=LIMIT, fresh_resets=False
    )
    return env, jax.jit(env.reset), jax.jit(env.step)


def reference(key, length, *, limit, repeats):
    """Of brax's own wrappers: observations, rewards, done, truncation."""
    package = import_extra("brax.envs", install="brax")
    with building():
        env = package.get_environment("inverted_pendulum", backend="spring")
    env = training.AutoResetWrapper(training.EpisodeWrapper(env, limit * repeats, repeats))
    found = []
    with default_promotion():
        state = jax.jit(env.reset)(jax.random.key_data(key))
        step = jax.jit(env.step)
        for t in range(length):
            before, state = state.obs, step(state, push(jnp.int32(t)))
            found.append((before, state.obs, state.reward, state.done, state.info["truncation"]))
    return [np.stack(part) for part in zip(*found, strict=True)]


def check_against_brax(found, expected):
    before, after, reward, done, truncation = expected
    np.testing.assert_allclose(found.before, before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.after, after, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.reward, reward, rtol=1e-5)
    np.testing.assert_array_equal(found.truncated, truncation == 1)
    np.testing.assert_array_equal(found.terminated, (done == 1) & (truncation == 0))
    ended = done == 1
    np.testing.assert_array_equal(found.final[~ended], found.after[~ended])
    assert (np.abs(found.final - found.after)[ended].max(-1) > 1e-3).all()


def loop(env, reset, step, length, key, params):
    """As `rollout`, with functions that are compiled already."""
    rows = []
    observation, state = reset(key, params)
    for t in range(length):
        before = observation
        observation, state, *rest, info = step(key, state, push(jnp.int32(t)), params)
        rows.append((before, observation, *rest, info["final_observation"]))
    return Rollout(*(np.stack(part) for part in zip(*rows, strict=True)))


@pytest.mark.slow
def test_brax_numbers(pendulum):
    env, reset, step = pendulum
    assert env.observation_shape == (4,)
    key = jax.random.key(0)
    found = loop(env, reset, step, 30, key, BraxParams(LIMIT))
    check_against_brax(found, reference(key, 30, limit=LIMIT, repeats=1))
    assert found.truncated.any()


def test_an_episode_that_terminates(pendulum):
    """Without a limit the pole falls: the observation there is beyond what is allowed."""
    env, reset, step = pendulum
    found = loop(env, reset, step, 60, jax.random.key(0), BraxParams(1000))
    assert not found.truncated.any()
    assert found.terminated.any()
    np.testing.assert_array_equal(found.terminated, np.abs(found.final[:, 1]) > 0.2)
    np.testing.assert_array_equal(
        found.after[found.terminated],
        np.broadcast_to(found.before[0], (found.terminated.sum(), 4)),
    )
    # A limit at the very step: the end wins.
    first = int(np.argmax(found.terminated)) + 1
    again = loop(env, reset, step, first, jax.random.key(0), BraxParams(first))
    assert again.terminated[-1]
    assert not again.truncated.any()


@pytest.mark.slow
def test_action_repeat_like_brax():
    name = "brax:inverted_pendulum?backend=spring&action_repeat=2&fresh_resets=False"
    env = make(name, max_steps_in_episode=3)
    key = jax.random.key(1)
    found = rollout(env, push, 7, key)
    check_against_brax(found, reference(key, 7, limit=3, repeats=2))
    np.testing.assert_array_equal(found.truncated, [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(found.reward, 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["generalized", "positional", "mjx"])
def test_other_backends(backend):
    env = make(f"brax:inverted_pendulum?backend={backend}")

    @jax.jit
    def first_step(key):
        _, state = env.reset(key)
        observation, _, reward, *_ = env.step(key, state, jnp.ones(1))
        return observation, reward

    observation, reward = first_step(jax.random.key(0))
    assert np.isfinite(observation).all()
    assert reward == 1


def test_strict_promotion(strict):
    env = make("brax:inverted_pendulum?backend=spring")
    jax.eval_shape(lambda key: env.step(key, env.reset(key)[1], jnp.ones(1)), jax.random.key(0))


# What follows is the adapter's own, with an environment that counts.


def nothing(t, state):
    return jnp.zeros(1)


def counting(length=100, *, name="counting", recovers=False, keys=("state", "other"), **kwargs):
    return Brax(name, env=Counting(length, recovers=recovers, keys=keys), **kwargs)


@pytest.mark.parametrize("keys", [(), ("state", "privileged")])
def test_time_limit(keys):
    found = rollout(counting(keys=keys, max_steps_in_episode=3), nothing, 7)
    np.testing.assert_array_equal(found.truncated, [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(found.final[:, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(found.after[:, 0], [1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(found.reward, [1, 2, 3, 1, 2, 3, 1])
    assert not found.terminated.any()


def test_the_end_of_an_episode_wins_over_the_time_limit():
    found = rollout(counting(3, max_steps_in_episode=3), nothing, 6)
    np.testing.assert_array_equal(found.terminated, [0, 0, 1, 0, 0, 1])
    assert not found.truncated.any()


@pytest.mark.parametrize("recovers", [False, True])
def test_an_end_among_the_repeats(recovers):
    """At the fifth step of the simulation, the second of three in the second step of the agent."""
    found = rollout(counting(5, recovers=recovers, action_repeat=3), nothing, 4)
    np.testing.assert_array_equal(found.terminated, [0, 1, 0, 1])
    np.testing.assert_array_equal(found.reward, [1 + 2 + 3, 4 + 5, 6, 9])
    np.testing.assert_array_equal(found.final[:, 0], [3, 5, 3, 5])


@pytest.mark.parametrize("fresh", [None, False, True])
def test_resets(fresh):
    found = rollout(counting(max_steps_in_episode=2, fresh_resets=fresh), nothing, 8)
    starts = found.before[::2, 1]
    assert len(np.unique(starts)) == (1 if fresh is False else 4)
    np.testing.assert_array_equal(found.final[:, 1], found.before[:, 1])


@pytest.mark.parametrize("fresh", [False, True])
def test_what_stays_over_a_reset(fresh):
    env = counting(max_steps_in_episode=2, fresh_resets=fresh)
    key = jax.random.key(0)
    _, state = env.reset(key)
    for _ in range(3):
        *_, state, _, _, _, info = env.step(key, state, jnp.zeros(1))
    assert state.now.info["steps"] == (1 if fresh else 3)
    assert info["metrics"]["count"] == 1
    assert state.time == 1


# Of 2 environments in 192 steps, with 48 episodes of 4 steps each: the first start states, and
# those that are drawn every 32 steps; one for every episode; or the first ones alone.
STARTS = {None: 2 * (1 + 6), True: 2 * 48, False: 2}


@pytest.mark.parametrize("fresh", STARTS)
def test_start_states_of_agents(fresh):
    env = counting(max_steps_in_episode=4, fresh_resets=fresh)
    actor = Actor(hidden=(2,), num_actions=None, action_size=1)
    variables = actor.init(jax.random.key(0), jnp.zeros((1, 2)))

    def numbers(key):
        runner = start(env, None, key, 2, ((), ()))
        _, random = act_randomly(env, None, runner, key, 192, 1.0)
        _, rollout = collect(env, None, actor, variables, lambda x: x, runner, key, 192)
        return random.observation[..., 1], rollout.observation[..., 1]

    seeds = jax.vmap(numbers)  # where a condition on a batched value would become a select
    keys = jax.random.split(jax.random.key(0), 2)
    for seen in jax.jit(seeds)(keys):
        assert [len(np.unique(of_seed)) for of_seed in seen] == [STARTS[fresh]] * 2
    assert ("cond[" in str(jax.make_jaxpr(seeds)(keys))) == (fresh is None)


@pytest.mark.slow
def test_targets_of_reacher():
    """More of them than environments, by default."""
    env = make("brax:reacher?max_steps_in_episode=10&backend=generalized")
    runner = jax.jit(lambda key: start(env, None, key, 2, ((), ())))(jax.random.key(0))
    play = jax.jit(lambda runner, key: act_randomly(env, None, runner, key, 100, 1.0)[1])
    target = play(runner, jax.random.key(1)).observation[..., 4]
    assert len(np.unique(target.round(4))) >= 2 * 4


def test_limits_under_vmap():
    env = counting()
    cut = jax.vmap(lambda limit: _flags(env, BraxParams(limit)))(jnp.array([1, 2, 3]))
    np.testing.assert_array_equal(cut, [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]])


def _flags(env, params):
    def one(state, key):
        _, state, _, _, truncated, _ = env.step(key, state, jnp.zeros(1), params)
        return state, truncated

    keys = jax.random.split(jax.random.key(0), 4)
    return jax.lax.scan(one, env.reset(keys[0], params)[1], keys)[1]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("repeats", [1, 2])
def test_interface(fresh, repeats, strict):
    check_interface(counting(fresh_resets=fresh, action_repeat=repeats))


def test_keys_of_all_kinds():
    env = counting(fresh_resets=True, max_steps_in_episode=1)
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    observation, state = env.reset(old)
    np.testing.assert_array_equal(observation, env.reset(new)[0])
    np.testing.assert_array_equal(
        env.step(old, state, jnp.zeros(1))[0], env.step(new, state, jnp.zeros(1))[0]
    )
    other = [env.reset(jax.random.key(seed, impl="rbg"))[0][1] for seed in range(3)]
    assert len(np.unique(other)) == 3
    many, _ = jax.vmap(env.reset)(jax.random.split(new, 4))
    assert len(np.unique(many[:, 1])) == 4


def test_errors():
    with pytest.raises(ValueError, match='one named "state"; got left, right'):
        counting(keys=("left", "right"))
    with pytest.raises(ValueError, match="action_repeat must be >= 1"):
        counting(action_repeat=0)
    with pytest.raises(ValueError, match="action_repeat must be a whole number"):
        counting(action_repeat=1.5)
    with pytest.raises(ValueError, match="fresh_resets must be True or False"):
        counting(fresh_resets="yes")
    with pytest.raises(ValueError, match="backend must be one of"):
        make("brax:hopper?backend=bullet")
    with pytest.raises(ValueError, match="did you mean backend"):
        make("brax:hopper?bakend=spring")
    with pytest.raises(ValueError, match="env must not be given with a name"):
        make("brax:hopper", env=Counting())


class Renamed(training.AutoResetWrapper):
    """A wrapper of one's own that resets."""


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda env: training.AutoResetWrapper(env),
            "AutoResetWrapper, which loses the final observations",
        ),
        (lambda env: Renamed(env), "AutoResetWrapper, which loses"),
        (
            lambda env: training.EpisodeWrapper(env, 10, 1),
            "EpisodeWrapper, which ends episodes at its time",
        ),
        (
            lambda env: training.VmapWrapper(env),
            "VmapWrapper, which steps many environments at once",
        ),
        (lambda env: Wrapper(training.AutoResetWrapper(env)), "AutoResetWrapper, which loses"),
        (lambda env: GymnaxToBraxWrapper(env), "GymnaxToBraxWrapper, which loses"),
    ],
)
def test_wrappers_that_are_refused(wrap, message):
    with pytest.raises(ValueError, match=f"env must not be wrapped in {message}") as caught:
        Brax("mine", env=wrap(Counting()))
    assert "take that wrapper off" in str(caught.value)


def test_other_wrappers_are_not_refused():
    assert Brax("mine", env=Wrapper(Counting())).observation_shape == (2,)


@pytest.fixture
def loaded(monkeypatch):
    """A stand-in for MuJoCo Playground; what its `load` was given."""
    given = []
    config = {
        "ctrl_dt": 0.02,
        "action_repeat": 2,
        "episode_length": 9,
        "impl": "warp",
        "noise_config": {"level": 1.0},
    }

    def load(name, config_overrides=None):
        given.append((name, config_overrides))
        return Counting()

    registry = types.SimpleNamespace(
        ALL_ENVS=("CartpoleBalance", "Go1"),
        get_default_config=lambda name: types.SimpleNamespace(to_dict=lambda: dict(config)),
        load=load,
    )
    module = types.ModuleType("mujoco_playground")
    module.registry = registry
    monkeypatch.setitem(sys.modules, "mujoco_playground", module)
    return given


def test_playground(loaded):
    assert names("playground") == ("CartpoleBalance", "Go1")
    env = make("playground:CartpoleBalance?ctrl_dt=0.01", **{"noise_config.level": 0.5})
    given = {"ctrl_dt": 0.01, "noise_config.level": 0.5, "impl": "jax"}
    assert loaded == [("CartpoleBalance", given)]
    assert repr(env) == "Brax('playground:CartpoleBalance')"
    found = rollout(env, nothing, 6)
    # Nine steps of the simulation are five of two.
    np.testing.assert_array_equal(found.truncated, [0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(found.reward, [3, 7, 11, 15, 19, 3])
    check_interface(env)


def test_playground_arguments(loaded):
    env = make("playground:Go1?action_repeat=1&max_steps_in_episode=2&fresh_resets=True&impl=warp")
    assert loaded == [("Go1", {"impl": "warp"})]
    found = rollout(env, nothing, 4)
    np.testing.assert_array_equal(found.truncated, [0, 1, 0, 1])
    assert found.before[0, 1] != found.before[2, 1]
    with pytest.raises(ValueError, match=r"did you mean noise_config\.level"):
        make("playground:Go1", **{"noise_config.levl": 0.5})
    with pytest.raises(ValueError, match="unknown environment of playground 'Go2'; did you mean"):
        make("playground:Go2")


@pytest.mark.slow
def test_agents_train_on_the_real_playground(capfd):
    pytest.importorskip("mujoco_playground", reason="MuJoCo Playground is not installed")
    config = ppo.Config(
        env="playground:CartpoleBalance?max_steps_in_episode=50", total_steps=1024, num_envs=8,
        num_steps=64, hidden=(8,),
    )  # fmt: skip
    _, history = jax.jit(ppo.PPO(config).train)(jax.random.key(0))
    np.testing.assert_array_equal(history["episode/length"], [50, 50])
    assert (history["episode/return"] > 0).all()
    assert (history["episode/return"] <= 50).all()
    assert capfd.readouterr().out == ""
