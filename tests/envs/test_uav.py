"""Steps of vehicles against numbers from plain NumPy, and what must hold of every network."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.envs import MultiUAV, make
from trustjax.envs.checking import check_multi_agent_environment
from trustjax.envs.joint import joint
from trustjax.envs.uav import UAVState
from trustjax.envs.uav_energy import propulsion_power

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/uav.json").read_text())["steps"]
SMALL = {"num_uavs": 2, "num_users": 3}


def golden_env(case):
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in case["fields"].items()
    }
    return MultiUAV(
        num_uavs=len(case["vehicles"]), num_users=len(case["users"]), actions="continuous", **fields
    )


def at(env, vehicles, users=None):
    """The state at the start of an episode, with vehicles and users at these places."""
    dtype = jnp.result_type(float)
    number = np.zeros(env.num_uavs, np.int32)
    users = np.zeros((env.num_users, 2), dtype) if users is None else np.array(users, dtype)
    rates = np.zeros(env.num_users, dtype)
    return UAVState(
        done=np.array(False), step=np.array(0, np.int32), vehicles=np.array(vehicles, dtype),
        power=number.astype(dtype), channel=number, users=users, waypoints=users,
        serving=rates.astype(np.int32), rates=rates, average_rates=rates,
    )  # fmt: skip


def placed(env, case):
    """The state and the actions of a golden case."""
    actions = np.array(case["actions"], jnp.result_type(float))
    return at(env, case["vehicles"], case["users"]), dict(zip(env.agents, actions, strict=True))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_steps(name, x64):
    case = GOLDEN[name]
    env = golden_env(case)
    state, actions = placed(env, case)
    assert env.action_space("agent_0").shape == actions["agent_0"].shape
    observations, after, rewards, dones, infos = jax.jit(env.step_env)(
        jax.random.key(1), state, actions
    )
    expected = case["after"]
    check = lambda found, key: np.testing.assert_allclose(found, expected[key], rtol=1e-9)
    check(after.vehicles, "vehicles")
    check(after.serving, "serving")
    check(after.rates, "rates")
    check(after.average_rates, "rates")
    check(env.peak_rate, "peak_rate")
    check(jnp.stack(list(rewards.values())), "rewards")
    for key in ("collision", "outside", "energy", "rate"):
        check(infos[key], key)
    check(infos["jain"][0], "jain")
    np.testing.assert_allclose(infos["sum_rate"], sum(expected["rates"]), rtol=1e-9)
    assert after.step == 1
    assert not any(dones.values())
    # The observation of the first vehicle, part by part.
    own = [*np.array(expected["vehicles"][0]) / [env.area, env.area, env.heights[1]]]
    own += [case["power"][0] / env.max_power]
    own += list(np.eye(env.num_channels)[case["channel"][0]]) if env.num_channels > 1 else []
    places = np.array(expected["vehicles"])
    for other in places[1:]:
        seen = np.linalg.norm(other - places[0]) <= env.communication_radius
        own += [seen, *(seen * (other - places[0])[:2] / env.area)]
    crowd = list(zip(case["users"], expected["rates"], strict=True))
    if env.bandwidth_split != "per_user":
        crowd = sorted(crowd, key=lambda each: math.dist(each[0], places[0, :2]))
    for user, rate in crowd:
        gap = (np.array(user) - places[0, :2]) / env.sensing_radius
        row = [1, *gap, *2 * [rate / expected["peak_rate"]]]
        own += row if np.linalg.norm(gap) <= 1 else [0] * 5
    np.testing.assert_allclose(observations["agent_0"], own, rtol=1e-9)
    world = np.asarray(observations["world_state"])
    np.testing.assert_allclose(world[-4:-2] * env.area, case["users"][-1], rtol=1e-9)
    np.testing.assert_allclose(world[-2] * expected["peak_rate"], expected["rates"][-1], rtol=1e-9)


def test_golden_step_in_single_precision():
    case = GOLDEN["sheet"]
    env = golden_env(case)
    state, actions = placed(env, case)
    batch = jax.tree.map(lambda x: np.stack([x, x]), (state, actions))
    step = jax.jit(jax.vmap(env.step_env, (None, 0, 0)))
    _, after, rewards, *_ = step(jax.random.key(0), *batch)
    np.testing.assert_allclose(after.rates, [case["after"]["rates"]] * 2, rtol=1e-5)
    for agent, reward in zip(env.agents, case["after"]["rewards"], strict=True):
        np.testing.assert_allclose(rewards[agent], [reward] * 2, rtol=1e-4)


def test_team_reward_is_the_mean(x64):
    case = GOLDEN["rich"]
    env = dataclasses.replace(golden_env(case), reward="team")
    rewards = jax.jit(env.step_env)(jax.random.key(1), *placed(env, case))[2]
    mean = np.mean(case["after"]["rewards"])
    np.testing.assert_allclose(list(rewards.values()), [mean] * env.num_uavs, rtol=1e-9)


def test_a_tilted_split_makes_rates_equal():
    """With tilt 1 all users of a vehicle have one rate, with -1 the strong ones gain."""
    env = MultiUAV(actions="continuous", bandwidth_split="tilted", power_control=False)

    @jax.jit
    def rates(tilt):
        action = jnp.array([0.0, 0.0, tilt])
        _, state = env.reset(jax.random.key(3))
        after = env.step_env(jax.random.key(0), state, dict.fromkeys(env.agents, action))[1]
        return after.serving, after.rates

    serving, equal = map(np.asarray, rates(1.0))
    assert len(set(serving)) == 3
    for vehicle in range(3):
        np.testing.assert_allclose(np.ptp(equal[serving == vehicle]), 0, atol=1e-4 * equal.max())
    assert rates(-1.0)[1].sum() > rates(0.0)[1].sum() > equal.sum()


UAVS = MultiUAV(
    num_uavs=3, num_users=4, actions="continuous", reward="individual", num_channels=2,
    heights=(50.0, 150.0), bandwidth_split="per_user", energy_weight=0.1, fairness="served",
)  # fmt: skip
SIZE = 2 + 1 + 1 + 2 + 4  # velocity, climb, power, channels, users
PEAK_RATE = 180e3 * np.log2(1 + 1e-2 * 10 ** (-(75.625 + 1.6) / 10) / 1.8e-15)


@jax.jit
def step_under_other_names(seed, vehicles, users):
    """A step of a random network, and one in which places and actions have other numbers."""

    def step(state, actions):
        named = dict(zip(UAVS.agents, actions, strict=True))
        _, after, rewards, _, infos = UAVS.step_env(jax.random.key(0), state, named)
        return after, jnp.stack([rewards[agent] for agent in UAVS.agents]), infos

    key_reset, key_act = jax.random.split(jax.random.key(seed))
    _, state = UAVS.reset(key_reset)
    actions = jax.random.uniform(key_act, (3, SIZE), minval=-1, maxval=1)
    renamed = state.replace(
        vehicles=state.vehicles[vehicles], users=state.users[users], rates=state.rates[users],
        waypoints=state.waypoints[users], average_rates=state.average_rates[users],
    )  # fmt: skip
    theirs = jnp.concatenate([actions[vehicles, :-4], actions[vehicles, -4:][:, users]], 1)
    return step(state, actions), step(renamed, theirs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.permutations(range(3)), st.permutations(range(4)))
def test_names_do_not_matter(seed, vehicles, users):
    """Vehicles and users under other names have the same rates and rewards under these names."""
    vehicles, users = np.array(vehicles), np.array(users)
    found = jax.tree.map(np.asarray, step_under_other_names(seed, vehicles, users))
    (after, rewards, infos), (then, their_rewards, their_infos) = found
    np.testing.assert_allclose(then.rates, after.rates[users], rtol=1e-5)
    np.testing.assert_allclose(their_rewards, rewards[vehicles], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(vehicles[then.serving], after.serving[users])
    for name, info in infos.items():
        np.testing.assert_allclose(their_infos[name], info[vehicles], rtol=1e-5)
    # What is seen and earned stays within the declared bounds.
    assert (after.rates <= PEAK_RATE).all()
    np.testing.assert_allclose(infos["rate"].sum(), after.rates.sum(), rtol=1e-5)


VARIANTS = {
    "discrete": {},
    "eight, moving": {
        "num_uavs": 8,
        "num_users": 1,
        "num_channels": 3,
        "bandwidth_split": "tilted",
        "user_speed": 3.0,
        "hotspots": 2,
        "heights": (50.0, 120.0),
        "energy_weight": 1.0,
    },
    "continuous": {"actions": "continuous", "bandwidth_split": "per_user", "num_channels": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_play(variant):
    """Interface, spaces, ends and means over 30 steps in one scan, of several environments."""
    limit, length = 7, 30
    env = MultiUAV(**SMALL | {"max_steps_in_episode": limit} | VARIANTS[variant])
    check_multi_agent_environment(env)

    def play(key):
        def step(state, key):
            keys = jax.random.split(key, env.num_agents + 1)
            drawn = jax.vmap(env.action_space("agent_0").sample)(keys[1:])
            actions = dict(zip(env.agents, drawn, strict=True))
            seen, after, rewards, dones, infos = env.step(keys[0], state, actions)
            return after, (seen, after, rewards, dones, infos, env.adjacency(after))

        return jax.lax.scan(step, env.reset(key)[1], jax.random.split(key, length))[1]

    found = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(0)))
    seen, states, rewards, dones, infos, adjacency = jax.tree.map(np.asarray, found)
    ends = np.arange(1, length + 1) % limit == 0
    for agent in [*env.agents, "__all__"]:
        np.testing.assert_array_equal(dones[agent], np.broadcast_to(ends, (2, length)))
    np.testing.assert_array_equal(infos["truncated"].all(-1), dones["__all__"])
    assert not infos["terminated"].any()
    np.testing.assert_array_equal(states.step[0], np.arange(1, length + 1) % limit)
    for agent in env.agents:
        space = env.observation_space(agent)
        assert seen[agent].shape == (2, length, *space.shape)
        assert space.contains(seen[agent])
        assert np.isfinite(rewards[agent]).all()
        # The last observation of an episode is not that of the next one, other steps' are.
        same = (infos["final_observation"][agent] == seen[agent]).all(-1)
        np.testing.assert_array_equal(same, ~dones[agent])
    assert adjacency[..., 0, 0].all()
    np.testing.assert_array_equal(adjacency, adjacency.swapaxes(-1, -2))
    assert np.isfinite(seen["world_state"]).all()
    # Average rates are means over the steps of the episode.
    np.testing.assert_allclose(states.average_rates[0, 4], states.rates[0, :5].mean(0), rtol=1e-5)
    moved = np.abs(np.diff(states.users[:, :6], axis=1)).max()
    assert (moved > 0) == (env.user_speed > 0)
    assert moved <= env.user_speed * env.time_step + 1e-3
    low, high = env.heights
    assert ((states.vehicles[..., 2] >= low) & (states.vehicles[..., 2] <= high)).all()


def test_ends_of_two_kinds():
    """A collision in the last step terminates and does not truncate; both end the episode."""
    env = MultiUAV(
        **SMALL, actions="continuous", power_control=False, end_on_collision=True,
        max_steps_in_episode=2, reward="individual", rate_weight=0.0, fairness_weight=0.0,
    )  # fmt: skip
    step = jax.jit(env.step_env)
    apart = at(env, [[400, 100, 100], [600, 100, 100]])
    towards = {"agent_0": np.array([1.0, 0], "f"), "agent_1": np.array([-1.0, 0], "f")}
    away = {"agent_0": towards["agent_1"], "agent_1": towards["agent_0"]}
    for first, second, crash in (
        (away, away, False),
        (away, towards, False),
        (towards, away, True),
    ):
        state = step(jax.random.key(0), apart, first)[1]
        _, state, rewards, dones, infos = step(jax.random.key(0), state, second)
        assert bool(dones["__all__"])
        np.testing.assert_array_equal(infos["terminated"], [crash] * 2)
        np.testing.assert_array_equal(infos["truncated"], [not crash] * 2)
        np.testing.assert_array_equal(list(rewards.values()), [-crash] * 2)


def test_no_rewards_but_energy():
    """Who flies at the speed of least energy pays least; climbing costs the weight's lift."""
    env = MultiUAV(
        **SMALL, actions="continuous", power_control=False, energy_weight=1.0, rate_weight=0.0,
        fairness_weight=0.0, reward="individual", heights=(50.0, 150.0), max_speed=20.0,
        max_climb=1.0,
    )  # fmt: skip
    state = at(env, [[500, 500, 100], [100, 100, 100]])
    actions = {"agent_0": np.array([0.5, 0, 0]), "agent_1": np.array([0.0, 0, 0.5])}
    _, after, rewards, _, infos = jax.jit(env.step_env)(jax.random.key(0), state, actions)
    np.testing.assert_allclose(after.vehicles[1], [100, 100, 105], rtol=1e-6)
    watts = [float(propulsion_power(10.0)), float(propulsion_power(0.0)) + 10]
    np.testing.assert_allclose(infos["energy"], np.array(watts) * 10, rtol=1e-6)
    expected = -np.array(watts) / 168.48421774
    np.testing.assert_allclose(list(rewards.values()), expected, rtol=1e-6)


def test_starts():
    env = MultiUAV(num_users=400, hotspots=2, num_channels=2, heights=(50.0, 150.0))
    other = MultiUAV(num_users=400)
    keys = jax.random.split(jax.random.key(0), 20)
    state, even = jax.jit(jax.vmap(lambda key: (env.reset(key)[1], other.reset(key)[1])))(keys)
    assert ((state.vehicles[..., 2] > 50) & (state.vehicles[..., 2] < 150)).all()
    np.testing.assert_array_equal(state.channel, [[0, 1, 0]] * 20)
    assert ((state.users >= 0) & (state.users <= 1000)).all()
    spread = np.asarray(state.users).std(1).mean()
    assert spread < 230 < np.asarray(even.users).std(1).mean() < 300  # 1000 / sqrt(12) = 289


def test_a_layout_is_the_same_in_every_episode():
    """The users stay, the vehicles do not; another seed is another layout."""
    keys = jax.random.split(jax.random.key(0), 3)
    reset = jax.jit(lambda key: [MultiUAV(layout=seed).reset(key)[1] for seed in (0, 1)])
    first, second = jax.vmap(reset)(keys)
    np.testing.assert_array_equal(first.users, first.users[:1].repeat(3, 0))
    assert np.abs(first.users - second.users).max() > 100
    assert np.abs(first.vehicles[0] - first.vehicles[1]).max() > 100


def test_equal_environments_share_programs():
    assert MultiUAV(**SMALL) == make("trustjax:MultiUAV?num_uavs=2", num_users=3)
    assert hash(MultiUAV()) == hash(MultiUAV())
    assert MultiUAV() != MultiUAV(area=900.0)
    assert repr(MultiUAV()) == "MultiUAV('trustjax:MultiUAV')"
    assert make("trustjax:MultiUAV?heights=(50.0, 90.0)").heights == (50.0, 90.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_uavs": 1}, "num_uavs must be >= 2, got 1"),
        ({"num_uavs": 9}, "num_uavs must be <= 8, got 9"),
        ({"num_users": 0}, "num_users must be >= 1, got 0"),
        ({"num_users": 2.5}, "num_users must be a whole number, got 2.5"),
        ({"area": 0.0}, "area must be > 0"),
        ({"area": float("nan")}, "area must be > 0"),
        ({"area": jnp.ones([])}, "area must be a number of Python"),
        ({"heights": [50.0, 60.0]}, "heights must be a tuple of two numbers"),
        ({"heights": (50.0,)}, "heights must be a tuple of two numbers"),
        ({"heights": (0.0, 60.0)}, "heights must be > 0"),
        ({"heights": (70.0, 60.0)}, "heights must be >= 70"),
        ({"time_step": 0.0}, "time_step must be > 0"),
        ({"max_steps_in_episode": 0}, "max_steps_in_episode must be >= 1"),
        ({"max_speed": "fast"}, "max_speed must be a number, got 'fast'"),
        ({"user_speed": -1.0}, "user_speed must be >= 0"),
        ({"hotspots": -1}, "hotspots must be >= 0"),
        ({"layout": -1}, "layout must be >= 0"),
        ({"layout": 2**32}, "layout must be <= 4"),
        ({"layout": 0.5}, "layout must be an int"),
        ({"scene": "forest"}, "scene must be one of 'suburban', 'urban'"),
        ({"bandwidth_split": "fair"}, "bandwidth_split must be one of 'equal', 'tilted'"),
        ({"bandwidth_split": "per_user"}, "bandwidth_split must be 'equal' or 'tilted' with disc"),
        ({"actions": "box"}, "actions must be one of 'discrete', 'continuous'"),
        ({"actions": "continuous", "num_speeds": 3}, "num_speeds must be None with continuous"),
        ({"num_headings": 0}, "num_headings must be >= 1"),
        ({"power_control": 1}, "power_control must be True or False, got 1"),
        ({"power_control": False, "num_levels": 2}, "num_levels must be None without power_contr"),
        ({"reward": "mine"}, "reward must be one of 'team', 'individual'"),
        ({"fairness": "none"}, "fairness must be one of 'all', 'served'"),
        ({"energy_weight": -0.1}, "energy_weight must be >= 0"),
        ({"speed": 3.0}, "unknown argument of trustjax:MultiUAV 'speed'; .*user_speed"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        make("trustjax:MultiUAV", **fields)


@pytest.mark.parametrize("radius", [1.0, 1e6])
def test_agents_hear_each_other_within_the_communication_radius(radius):
    """The graph of a joint observation is the one of the state that it was made in."""
    env = joint(MultiUAV(**SMALL, communication_radius=radius))
    observation, state = jax.jit(env.reset)(jax.random.key(0))
    action = jnp.zeros((2, *np.shape(env.action_low)[1:]), int if env.action_low is None else None)
    *_, info = jax.jit(env.step)(jax.random.key(1), state, action)
    expected = np.eye(2, dtype=bool) | (radius > 1)
    np.testing.assert_array_equal(observation["graph"], expected)
    np.testing.assert_array_equal(info["final_observation"]["graph"], expected)
