"""JaxMARL's wrappers on our environment, and JaxMARL's particles behind our interface.

JaxMARL is not part of the development extra: pip install jaxmarl==0.2.0.
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.envs import MultiUAV, make, names
from trustjax.envs.checking import check_multi_agent_environment
from trustjax.envs.third_party import import_extra

if importlib.util.find_spec("jaxmarl") is None:
    pytest.skip("jaxmarl is not installed", allow_module_level=True)

wrappers = import_extra("jaxmarl.wrappers.baselines", install="jaxmarl")
jaxmarl = import_extra("jaxmarl", install="jaxmarl")
SPREAD = "MPE_simple_spread_v3"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mpe.json").read_text())


@pytest.mark.parametrize("replace_info", [False, True])
def test_log_wrapper(replace_info):
    """As JaxMARL's MAPPO script steps and stacks; it reshapes all infos to one number per agent."""
    env = MultiUAV(num_uavs=2, num_users=3, max_steps_in_episode=3)
    wrapped = wrappers.LogWrapper(env, replace_info=replace_info)
    keys = jax.random.split(jax.random.key(0), 4)
    seen, state = jax.vmap(wrapped.reset)(keys)
    step = jax.jit(jax.vmap(wrapped.step))
    total = 0.0
    for _ in range(3):
        actions = {agent: jnp.arange(4, dtype=jnp.int32) for agent in env.agents}
        seen, state, rewards, dones, infos = step(keys, state, actions)
        total += rewards["agent_0"]
    batch = jnp.stack([seen[agent] for agent in env.agents]).reshape(8, -1)
    assert batch.shape == (8, *env.observation_space("agent_0").shape)
    if replace_info:
        infos = jax.tree.map(lambda x: x.reshape(8), infos)
    else:
        assert infos["final_observation"]["agent_0"].shape == seen["agent_0"].shape
    assert infos["returned_episode"].all()
    assert dones["__all__"].all()
    np.testing.assert_allclose(
        np.reshape(infos["returned_episode_returns"], (4, 2))[:, 0], total, rtol=1e-5
    )


def test_central_wrapper():
    """The wrapper of JaxMARL's value-based scripts: agents' names, a state and a reward for all."""
    env = MultiUAV(num_uavs=2, num_users=3)
    wrapped = wrappers.CTRolloutManager(env, batch_size=3)
    seen, state = wrapped.batch_reset(jax.random.key(0))
    size = env.observation_space("agent_0").shape[0]
    assert seen["agent_1"].shape == (3, size + 2)
    np.testing.assert_array_equal(seen["agent_1"][:, -2:], [[0, 1]] * 3)
    assert seen["__all__"].shape == (3, 2 * size)
    actions = {agent: wrapped.batch_sample(jax.random.key(1), agent) for agent in env.agents}
    _, state, rewards, dones, _ = wrapped.batch_step(jax.random.key(2), state, actions)
    np.testing.assert_allclose(rewards["__all__"], 2 * rewards["agent_0"], rtol=1e-6)
    assert wrapped.get_valid_actions(state)["agent_0"].shape == (3, 27)
    assert not dones["__all__"].any()


@pytest.mark.parametrize("kwargs", [{}, {"action_type": "Continuous", "num_agents": 2}])
def test_particles_step_as_in_jaxmarl(kwargs):
    env, theirs = make(f"jaxmarl:{SPREAD}", **kwargs), jaxmarl.make(SPREAD, **kwargs)
    check_multi_agent_environment(env)
    assert env.agents == theirs.agents

    @functools.partial(jax.jit, static_argnums=0)
    def play(env, key):
        def step(carry, key):
            seen, state = carry
            actions = {agent: env.action_space(agent).sample(key) for agent in env.agents}
            seen, state, rewards, dones, infos = env.step(key, state, actions)
            return (seen, state), ({a: seen[a] for a in env.agents}, rewards, dones, infos)

        return jax.lax.scan(step, env.reset(key), jax.random.split(key, 30))[1]

    ours, expected = play(env, jax.random.key(0)), play(theirs, jax.random.key(0))
    # Compiled with other things around them, the same operations may differ in the last bit.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours[:3], expected[:3]
    )
    # Its limit is tested before the step is counted: 26 steps, and every end is a truncation.
    dones, infos = ours[2], ours[3]
    np.testing.assert_array_equal(np.flatnonzero(dones["__all__"]), [25])
    np.testing.assert_array_equal(infos["truncated"].all(1), dones["__all__"])
    assert not infos["terminated"].any()
    world = infos["final_observation"]["world_state"]
    assert world.shape == (30, sum(env.observation_space(agent).shape[0] for agent in env.agents))


@pytest.mark.parametrize("episode", GOLDEN["episodes"], ids=["apart", "colliding", "two"])
def test_particles_move_as_the_original_ones(episode):
    """The steps of mpe2, which has no JAX: positions, velocities, collisions and rewards."""
    start = {name: np.array(values) for name, values in episode["start"].items()}
    env = make(f"jaxmarl:{SPREAD}", num_agents=len(start["agents"]),
               num_landmarks=len(start["landmarks"]))  # fmt: skip
    _, state = env.reset(jax.random.key(0))
    state = state.replace(
        p_pos=jnp.concatenate([start["agents"], start["landmarks"]]).astype(jnp.float32),
        p_vel=jnp.zeros_like(state.p_vel).at[: len(env.agents)].set(start["velocities"]),
    )

    def step(state, actions):
        given = {agent: actions[index] for index, agent in enumerate(env.agents)}
        seen, state, rewards, _, _ = env.step_env(jax.random.key(0), state, given)
        return state, [jnp.stack([each[a] for a in env.agents]) for each in (seen, rewards)]

    actions = jnp.array(episode["actions"])
    _, (seen, rewards) = jax.jit(lambda: jax.lax.scan(step, state, actions))()
    np.testing.assert_allclose(seen, episode["observations"], atol=1e-4)
    np.testing.assert_allclose(rewards, episode["rewards"], atol=1e-4)


def test_names_and_errors():
    assert SPREAD in names("jaxmarl")
    assert "hanabi" not in names("jaxmarl")
    assert make(f"jaxmarl:{SPREAD}", max_steps=5).unwrapped.max_steps == 5
    with pytest.raises(ValueError, match="unknown argument of jaxmarl:MPE_simple_spread_v3 'agen"):
        make(f"jaxmarl:{SPREAD}", agents=3)
    with pytest.raises(ValueError, match="max_steps must be >= 1"):
        make(f"jaxmarl:{SPREAD}", max_steps=0)
    with pytest.raises(ValueError, match="unknown environment of jaxmarl 'hanabi'"):
        make("jaxmarl:hanabi")
