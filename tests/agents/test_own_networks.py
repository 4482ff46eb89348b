"""Networks of one's own, observations in parts, several actions at once, and masks of actions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agent_table import AGENTS, ON_POLICY, small_config

from trustjax.agents import load_policy
from trustjax.envs import EpisodicEnvironment

KEY = jax.random.key(0)


class Cells(EpisodicEnvironment):
    """A place in 0 ... 3, seen as pixels and as a number; an illegal action costs 100."""

    default_params = {"max_steps_in_episode": 6}  # noqa: RUF012
    num_actions = 3

    def see(self, place):
        return {
            "pixels": jnp.full((4, 4, 1), place, jnp.uint8),
            "place": place.astype(jnp.float32)[None],
            "more": {"hidden": place.astype(jnp.float32)},
            "action_mask": jnp.arange(3) <= place,
        }

    def reset_env(self, key, params):
        place = jax.random.randint(key, (), 0, 3)
        return self.see(place), place

    def is_legal(self, place, action):
        return action <= place

    def step_env(self, key, place, action, params):
        reward = jnp.where(self.is_legal(place, action), 0.0, -100.0)
        place = jnp.clip(place + jnp.sum(action) - 1, 0, 3)
        return self.see(place), place, reward, False


class Pairs(Cells):
    """Two actions at once, of two and of three choices."""

    num_actions = (2, 3)

    def see(self, place):
        return super().see(place) | {"action_mask": jnp.arange(5) != 3 - (place > 1)}

    def is_legal(self, place, action):
        mask = self.see(place)["action_mask"]
        return mask[action[0]] & mask[2 + action[1]]


class Pixels(Cells):
    """The pixels alone, without a mask."""

    def see(self, place):
        return super().see(place)["pixels"]


class CNN(nn.Module):
    """A convolution as slices and a product, which is quick inside a scan on CPU."""

    features: tuple[int, ...] = (3,)

    @nn.compact
    def __call__(self, pixels):
        assert pixels.dtype == jnp.uint8
        assert pixels.shape[1:] == (4, 4, 1)
        x = pixels.astype(jnp.float32) / 255
        patches = [x[:, i : 4 + i - 1, j : 4 + j - 1] for i in (0, 1) for j in (0, 1)]
        x = nn.relu(nn.Dense(self.features[0])(jnp.concatenate(patches, -1)))
        return x.reshape(len(x), -1)


def config_of(name, env, **options):
    small = {"env": env, "num_envs": 4, "num_steps": 6, "total_steps": 72, "hidden": (4,)}
    if name not in ON_POLICY:
        small |= {"learning_starts": 24, "buffer_size": 72}
    return small_config(name, **small | options)


def shapes_of(params):
    return jax.tree.map(lambda x: x.shape, params)["params"]


@pytest.mark.table
@pytest.mark.parametrize("name", AGENTS)
def test_a_network_on_pixels(name, tmp_path):
    """Its features go into the hidden layers, behind them an action; every network has its own."""
    agent = config_of(name, Pixels(), network=CNN([3]), normalize_observations=True).agent()
    state = jax.eval_shape(agent.init, KEY)
    critics = state.params["critics"] if name not in ON_POLICY else (state.params["critic"],)
    for params in (state.params["actor"], *critics):
        shapes = shapes_of(params)
        assert shapes["network"]["Dense_0"]["kernel"] == (4, 3)
        assert shapes["dense_0"]["kernel"] == (27, 4)
    assert state.runner.observation.dtype == jnp.uint8
    assert state.runner.observation.shape == (4, 4, 4, 1)
    after, _ = jax.eval_shape(agent.update, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_nothing_behind_a_network():
    for options in ({"hidden": ()}, {"hidden": (4,), "critic_hidden": ()}):
        config = config_of("ppo", Pixels(), network=CNN(), **options)
        params = jax.eval_shape(config.agent().init, KEY).params
        assert shapes_of(params["critic"])["head"]["kernel"] == (27, 1)
    assert shapes_of(params["actor"])["head"]["kernel"] == (4, 3)


def test_another_network_of_the_critic():
    config = config_of("sac", Pixels(), critic_network=CNN((5,)))
    params = jax.eval_shape(config.agent().init, KEY).params
    assert shapes_of(params["actor"])["dense_0"]["kernel"] == (16, 4)
    assert shapes_of(params["critics"][1])["dense_0"]["kernel"] == (45, 4)


class Pictures(nn.Module):
    def __call__(self, x):
        return x.reshape(len(x), -1).astype(jnp.float32)


class Matrix(nn.Module):
    def __call__(self, x):
        return x.astype(jnp.float32)


class Averaging(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1).astype(jnp.float32)
        return nn.BatchNorm(use_running_average=False)(x)


class Training(nn.Module):
    def __call__(self, x, training):
        return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": Training()}, r"network must map .* got TypeError: .*missing.*'training'; it"),
        (
            {"critic_network": nn.Sequential([Pictures(), nn.Dropout(0.5, deterministic=False)])},
            r"critic_network must map .* got InvalidRngError: .*; it is called with .* alone",
        ),
        ({"network": CNN}, r"network must be a flax\.linen module, such as CNN\(\), got .*CNN"),
        ({"network": Matrix()}, r"network must return features, float \[batch, width\], got float"),
        ({"critic_network": Matrix()}, r"critic_network must return features"),
        ({"network": Averaging()}, r"network must have parameters alone, got .*batch_stats"),
        ({"network": CNN(np.ones(1))}, r"network must have fields that can be hashed"),
        ({"policy_obs_key": "place"}, r"policy_obs_key must be None for an environment whose obs"),
    ],
)
def test_wrong_networks(options, message):
    with pytest.raises(ValueError, match=message):
        config_of("ppo", Pixels(), **options).agent()


@pytest.mark.parametrize("key", ["state", ("place", "state"), "action_mask", ""])
def test_wrong_parts(key):
    with pytest.raises(ValueError, match=r"value_obs_key must name parts of the observation, more"):
        config_of("ppo", Cells(), value_obs_key=key).agent()


def test_the_critic_may_see_more():
    config = config_of("ppo", Cells(), policy_obs_key=["place"], value_obs_key=("place", "more"))
    params = jax.eval_shape(config.agent().init, KEY).params
    assert shapes_of(params["actor"])["dense_0"]["kernel"] == (1, 4)
    assert shapes_of(params["critic"])["dense_0"]["kernel"] == (2, 4)
    params = jax.eval_shape(config_of("sac", Cells()).agent().init, KEY).params
    assert shapes_of(params["actor"])["dense_0"]["kernel"] == (18, 4)  # all but the mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("ppo", Cells()), ("trpo", Pairs()), ("off_policy_mdpo", Cells()),
        pytest.param("mdpo", Pairs(), marks=pytest.mark.slow),
        pytest.param("sac", Cells(), marks=pytest.mark.slow),
        pytest.param("ppo", Pairs(), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_masked_actions_are_never_taken(name, env, tmp_path):
    """Nor in the first random steps; without the mask in `Actor` the return falls below 0."""
    options = {"projection": "forward", "temperature": 1.0} if "off" in name else {}
    config = config_of(name, env, normalize_observations=True, **options)
    agent = config.agent()
    state, history = jax.jit(agent.train)(KEY)
    np.testing.assert_array_equal(history["episode/return"], 0)
    for metric, values in history.items():
        assert metric == "value/explained" or np.isfinite(values).all(), metric
    statistics = state.observations
    assert statistics["pixels"] is None
    assert statistics["more"]["hidden"].mean.shape == ()
    assert 0 < statistics["place"].mean < 3
    policy = agent.policy(state)
    policy.save(tmp_path / "policy.npz")
    loaded = load_policy(tmp_path / "policy.npz", env=env)
    observation = jax.vmap(jax.vmap(env.see))(jnp.arange(6).reshape(2, 3) % 4)
    for deterministic in (True, False):
        expected, found = (
            one.act(observation, KEY, deterministic=deterministic)[0] for one in (policy, loaded)
        )
        assert found.shape == (2, 3, *np.shape(env.num_actions))
        np.testing.assert_array_equal(found, expected)


def test_several_actions_are_refused_off_policy():
    with pytest.raises(ValueError, match=r"env must have one discrete action or .* \(2, 3\); PPO"):
        config_of("sac", Pairs()).agent()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.ones(2, bool), r"\['action_mask'\] must be bool \[3\], got bool \[2\]"),
        (jnp.ones(3), r"\['action_mask'\] must be bool \[3\], got float32 \[3\]"),
    ],
    ids=str,
)
def test_wrong_masks(mask, message):
    env = Cells()
    env.see = lambda place: {"place": place.astype(jnp.float32)[None], "action_mask": mask}
    with pytest.raises(ValueError, match=message):
        config_of("ppo", env).agent()


def test_observations_of_another_shape():
    agent = config_of("ppo", Cells(), policy_obs_key="place").agent()
    policy = agent.policy(agent.init(KEY))
    seen = Cells().see(jnp.int32(1))
    with pytest.raises(ValueError, match=r"observation\['place'\] must be \[\.\.\., \*\(1,\)\]"):
        policy.act(seen | {"place": jnp.zeros(2)}, KEY)
    with pytest.raises(ValueError, match="observation must have the parts of"):
        policy.act(seen["place"], KEY)


# Files.


def test_a_network_is_given_to_its_file(tmp_path):
    agent = config_of("ppo", Pixels(), network=CNN((3,))).agent()
    policy = agent.policy(agent.init(KEY))
    path = tmp_path / "policy.npz"
    policy.save(path)
    with np.load(path) as file:
        assert "CNN" in str(file["about"])
    with pytest.raises(ValueError, match=r"^env must be given.*'Pixels', .*; write load_policy"):
        load_policy(path)
    with pytest.raises(ValueError, match=r"^network must be given.*'CNN', .*network=\.\.\.\)$"):
        load_policy(path, env=Pixels())
    with pytest.raises(ValueError, match=r"kernel must have shape \(18, 4\), got \(27, 4\)"):
        load_policy(path, env=Pixels(), network=CNN((2,)))
    with pytest.raises(ValueError, match="env must have observations of shape"):
        load_policy(path, env=Cells(), network=CNN())
    seen = jnp.zeros((5, 4, 4, 1), jnp.uint8)
    loaded = load_policy(path, env=Pixels(), network=CNN([3]))
    np.testing.assert_array_equal(loaded.act(seen, KEY)[0], policy.act(seen, KEY)[0])


class Side(EpisodicEnvironment):
    """One step: a picture with a bright left or right side, and the action that names it."""

    num_actions = 2

    def reset_env(self, key, params):
        side = jax.random.randint(key, (), 0, 2)
        bright = (jnp.arange(6) >= 3) == (side == 1)
        return jnp.broadcast_to(bright[None, :, None], (6, 6, 1)) * jnp.uint8(255), side

    def step_env(self, key, side, action, params):
        return jnp.zeros((6, 6, 1), jnp.uint8), side, 2.0 * (action == side) - 1.0, True


class Convolutions(nn.Module):
    """Features of pixels by a convolution of Flax."""

    @nn.compact
    def __call__(self, pixels):
        x = nn.relu(nn.Conv(2, (3, 3), strides=2)(pixels.astype(jnp.float32) / 255))
        return x.reshape(len(x), -1)


@pytest.mark.slow
def test_convolutions_learn_from_pixels(tmp_path):
    """With the pixels multiplied by 0 the return stays near 0; it is 1 before and after saving."""
    config = small_config(
        "ppo", env=Side(), network=Convolutions(), hidden=(), num_envs=16, num_steps=4,
        total_steps=960, learning_rate=0.02, num_minibatches=1, normalize_observations=True,
    )  # fmt: skip
    agent = config.agent()
    state, _ = jax.jit(agent.train)(KEY)
    policy = agent.policy(state)
    policy.save(tmp_path / "policy.npz")
    loaded = load_policy(tmp_path / "policy.npz", env=Side(), network=Convolutions())
    np.testing.assert_array_equal(loaded.evaluate(KEY, 20).returns, 1)


def test_what_a_file_does_not_need(tmp_path):
    agent = small_config("ppo").agent()
    path = tmp_path / "policy.npz"
    agent.policy(agent.init(KEY)).save(path)
    for name, own in {"network": CNN(), "actor": agent.actor}.items():
        with pytest.raises(ValueError, match=f"^{name} must not be given for a policy without"):
            load_policy(path, **{name: own})


class Uniform(nn.Module):
    """An actor in place of `Actor`."""

    gru_size = None
    squashed = False

    @nn.compact
    def __call__(self, x, carry=()):
        from trustjax.distributions import Categorical

        return Categorical(nn.Dense(2)(x)), carry


def test_an_actor_of_ones_own(tmp_path):
    agent = small_config("ppo").agent()
    agent.actor = Uniform()
    policy = agent.policy(agent.init(KEY))
    path = tmp_path / "policy.npz"
    policy.save(path)
    with pytest.raises(ValueError, match=r"^actor must be given.*'Uniform', .*actor=\.\.\.\)$"):
        load_policy(path)
    loaded = load_policy(path, actor=Uniform())
    seen = jnp.ones((5, 1))
    np.testing.assert_array_equal(loaded.act(seen, KEY)[0], policy.act(seen, KEY)[0])
    assert "Policy(env='probe:both', " in repr(loaded)
