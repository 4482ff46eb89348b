"""Several agents on small games: their order, ratios, trust regions, and what they learn."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.agents import load_policy, select_seed
from trustjax.agents import rollout as rollouts
from trustjax.agents.multi import Graph, ga_matr, happo, hatrpo, mappo, matrpo
from trustjax.agents.multi.hatrpo import unweighted_divergence
from trustjax.distributions import Categorical
from trustjax.envs.matrix_game import MatrixGame
from trustjax.envs.uav import MultiUAV
from trustjax.losses import ppo_clip_loss
from trustjax.losses._ratio import exp_times
from trustjax.optim import natural_gradient

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/multi_agent.json").read_text())
KEY = jax.random.key(0)
# The game of the paper's Proposition 1 for two agents: one of them has to differ.
DIFFER = MatrixGame([[0.0, 1.0], [1.0, 0.0]], common=True)
# Three agents with two, three and two actions: the first and the last have to differ, and the one
# between them has to take its last action. The agents are paid 1, 1.5 and 2 times the same.
PAYOFF = np.zeros((2, 3, 2))
PAYOFF[0, 2, 1] = PAYOFF[1, 2, 0] = 1
UNEQUAL = MatrixGame(np.stack([PAYOFF, 1.5 * PAYOFF, 2 * PAYOFF]))
SMALL = {
    "hidden": (8,), "num_envs": 32, "num_steps": 4, "num_minibatches": 1, "num_epochs": 1,
    "normalize_observations": False,
}  # fmt: skip
UPDATES = 60


def config(method, env=DIFFER, updates=UPDATES, **options):
    return method.Config(**SMALL | {"env": env, "total_steps": updates * 128} | options)


def trained(method, seeds=2, **options):
    """The agent, its last states and its history, of seeds side by side."""
    agent = config(method, **options).agent()
    return agent, *jax.jit(jax.vmap(agent.train))(jax.random.split(KEY, seeds))


class Kept(NamedTuple):
    """What goes into an iteration and comes out of it."""

    params: Any
    batch: Any
    key: Any
    metrics: Any


def recorded(agent, key, updates):
    """The last state of a training, and `Kept` of every iteration."""
    inputs = {}
    learn = agent.learn

    def keeping(state, batch, key):
        inputs["of"] = batch, key
        return learn(state, batch, key)

    agent.learn = keeping

    def step(state, _):
        after, metrics = agent.update(state)
        batch, key = inputs["of"]
        return after, Kept(state.params, batch, key, metrics)

    return jax.lax.scan(step, agent.init(key), length=updates)


class Trained(NamedTuple):
    agent: Any
    state: Any
    kept: Any


def record(method, updates=UPDATES, lanes=((0, 0.5), (1, 0.5), (0, 1000.0)), **options):
    """Lanes with a seed and an `accept_ratio` each, in one program."""
    fields = {"env": UNEQUAL, "reward": "individual", "updates": updates} | options

    def lane(seed, ratio):
        own = {"accept_ratio": ratio} if method is hatrpo else {}
        agent = config(method, **fields, **own).agent()
        return recorded(agent, jax.random.split(KEY, 2)[seed], updates)

    seeds, ratios = map(jnp.asarray, zip(*lanes, strict=True))
    return Trained(config(method, **fields).agent(), *jax.jit(jax.vmap(lane))(seeds, ratios))


@pytest.fixture(scope="module")
def run():
    """HATRPO: two seeds that learn, and a lane whose line search always fails."""
    return record(hatrpo, radius=0.02)


@pytest.fixture(scope="module", params=["hatrpo", pytest.param("happo", marks=pytest.mark.slow)])
def sequential(request):
    if request.param == "hatrpo":
        return request.getfixturevalue("run")
    return record(happo, updates=5, learning_rate=0.01)


def at(kept, lane, update):
    return jax.tree.map(lambda x: x[lane, update], kept)


# ---- formulas


def test_ratios_compound_in_the_order_of_the_agents(x64):
    golden = GOLDEN["ratios"]
    advantage, log_r = jnp.asarray(golden["advantage"]), jnp.asarray(golden["log_ratio"])
    log_factor = jnp.zeros(4)
    for each in golden["agents"]:
        weighted = exp_times(log_factor, advantage)
        np.testing.assert_allclose(weighted, each["weighted"], rtol=1e-12)
        own = log_r[:, each["agent"]]
        losses = ppo_clip_loss(own, jnp.zeros(4), weighted, clip=golden["clip"])
        np.testing.assert_allclose(jnp.mean(losses), each["loss"], rtol=1e-12)
        np.testing.assert_allclose(
            jnp.mean(exp_times(own, weighted)), each["surrogate"], rtol=1e-12
        )
        log_factor = log_factor + own
    np.testing.assert_allclose(jnp.exp(log_factor), golden["factor"], rtol=1e-12)


@pytest.mark.parametrize("name", ["kl", "unweighted"])
def test_a_step_with_either_divergence(name, x64):
    golden = GOLDEN["step"]
    old = jnp.log(jnp.asarray(golden["policy"]))
    advantage = jnp.asarray(golden["advantage"])

    def divergence(logits):
        if name == "kl":
            return Categorical(old).kl_divergence(Categorical(logits))
        return unweighted_divergence(old, jax.nn.log_softmax(logits))

    def loss(logits):
        return -jax.nn.softmax(logits) @ advantage

    tx = natural_gradient(golden["radius"], damping=golden["damping"], accept_ratio=0.5)
    step, state = jax.jit(
        lambda old: tx.update(
            jax.grad(loss)(old), tx.init(old), old, loss_fn=loss, divergence_fn=divergence
        )
    )(old)
    np.testing.assert_allclose(step, golden[name]["step"], rtol=1e-7)
    np.testing.assert_allclose(jax.nn.softmax(old + step), golden[name]["policy"], rtol=1e-8)
    np.testing.assert_allclose(state.distance, golden[name][name], rtol=1e-7)
    assert state.step_fraction == 1


def test_both_divergences():
    p, q = jnp.log(jnp.array(GOLDEN["divergence"]["p"])), jnp.log(jnp.array([0.4, 0.4, 0.2]))
    found = Categorical(p).kl_divergence(Categorical(q))
    np.testing.assert_allclose(found, GOLDEN["divergence"]["kl"], rtol=1e-5)
    found = unweighted_divergence(p, q)
    np.testing.assert_allclose(found, GOLDEN["divergence"]["unweighted"], rtol=1e-5)
    # The constraint of the algorithm is the one from the old policy to the new one: the other
    # direction is 0.02581.
    for name in ("kl", "unweighted"):
        agent = config(hatrpo, divergence=name).agent()
        found = agent._divergence(Categorical(p), Categorical(q))
        np.testing.assert_allclose(found, GOLDEN["divergence"][name], rtol=1e-5)
    # Excluded actions, and logits that are far apart, stay finite with their gradients.
    far = jnp.array([[-1e9, 80.0, 0.0], [-jnp.inf, 0.0, -50.0]])
    old = jnp.array([[-1e9, 0.0, 80.0], [-jnp.inf, 0.0, 0.0]])
    value, slope = jax.value_and_grad(lambda x: jnp.sum(unweighted_divergence(old, x)))(far)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


# ---- the order


def test_the_order_is_drawn_anew_and_results_are_those_of_the_agents():
    agent = config(hatrpo, env=UNEQUAL).agent()

    def order(key):
        def step(carry, index, key):
            place, seen = carry
            return (place + 1, seen.at[place].set(index)), {"index": index}

        start = (jnp.zeros([], jnp.int32), jnp.zeros(3, jnp.int32))
        (_, seen), found = agent.in_drawn_order(key, step, start)
        return seen, found["index"]

    orders, indices = jax.jit(jax.vmap(order))(jax.random.split(KEY, 600))
    np.testing.assert_array_equal(indices, np.tile(np.arange(3), (600, 1)))
    counts = [np.all(orders == np.array(p), 1).sum() for p in itertools.permutations(range(3))]
    assert sum(counts) == 600
    assert min(counts) > 60  # of 100 expected; below with probability 1e-5


# ---- one update, against NumPy


def test_the_surrogate_of_every_agent_has_the_ratios_of_those_before(sequential):
    """Gains are recomputed from the parameters before and after; they tell the order.

    Fails without the factor, with that of all agents, or with the order turned around.
    """
    agent = sequential.agent
    now, after = at(sequential.kept, 0, 2), at(sequential.kept, 0, 3)
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.split(now.key)[0])[0], 3))
    old, new = (
        agent.distributions(params["actor"], now.batch).log_prob(now.batch.action)
        for params in (now.params, after.params)
    )
    log_r = np.asarray(new - old, np.float64)
    advantage = np.asarray(now.batch.advantage, np.float64)
    assert np.std(advantage[..., 0] - advantage[..., 1]) > 0.1
    factor = np.ones(log_r.shape[:-1])
    for index in order:
        weighted = factor * advantage[..., index]
        gain = np.mean((np.exp(log_r[..., index]) - 1) * weighted)
        np.testing.assert_allclose(now.metrics[f"gain/agent_{index}"], gain, rtol=2e-3, atol=1e-6)
        factor = factor * np.exp(log_r[..., index])
    np.testing.assert_allclose(now.metrics["factor/mean"], factor.mean(), rtol=1e-5)
    share = factor.mean() ** 2 / np.mean(factor**2)
    np.testing.assert_allclose(now.metrics["factor/effective"], share, rtol=1e-5)
    assert np.max(np.abs(log_r)) > 0.01


def test_agents_never_take_actions_that_they_do_not_have(sequential):
    agent, kept = sequential.agent, sequential.kept
    assert agent.num_actions == (2, 3, 2)
    np.testing.assert_array_equal(np.max(kept.batch.action, (0, 1, 2, 3)), [1, 2, 1])
    assert all(np.all(np.isfinite(value)) for value in kept.metrics.values())
    now, after = at(kept, 0, 2), at(kept, 0, 3)
    old, new = (agent.distributions(each.params["actor"], now.batch) for each in (now, after))
    for index, value in enumerate(np.mean(old.kl_divergence(new), (0, 1))):
        found = now.metrics[f"kl/agent_{index}"]
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=1e-7)


def test_one_agent_alone_is_its_part_of_the_joint_policy(run):
    agent, now = run.agent, at(run.kept, 0, 10)
    together = agent.distributions(now.params["actor"], now.batch)
    for index in range(3):
        own = agent.batch_of(now.batch, jnp.asarray(index))
        member = jax.tree.map(lambda x, i=index: x[i], agent.members(now.params))
        alone = agent.member_distributions(member, own, jnp.asarray(index))
        np.testing.assert_allclose(alone.logits, together.logits[:, :, index], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(own.action, now.batch.action[..., index])
        np.testing.assert_array_equal(own.advantage, now.batch.advantage[..., index])


# ---- the trust region


def test_no_agent_leaves_its_trust_region_and_no_surrogate_falls(run):
    """At every iteration of the whole training."""
    metrics, radius = run.kept.metrics, run.agent.config.radius
    names = [f"agent_{index}" for index in range(3)]
    for name in names:
        kl = np.asarray(metrics[f"kl/{name}"])
        assert np.all(kl <= radius * (1 + 1e-3))
        assert np.all(np.max(kl[:2], 1) > 0.3 * radius)
        assert np.all(metrics[f"gain/{name}"] > -1e-6)  # of rounding
        assert np.all(np.max(metrics[f"gain/{name}"][:2], 1) > 0.01)
    largest = np.max([metrics[f"kl/{name}"] for name in names], 0)
    np.testing.assert_array_equal(metrics["trust/distance"], largest)


def test_a_failed_line_search_leaves_everything_to_the_bit(run):
    """No step improves the surrogate a thousand times as much as its gradient promises."""
    state, kept = jax.tree.map(lambda x: x[2], (run.state, run.kept))
    jax.tree.map(
        lambda first, last: np.testing.assert_array_equal(first[0], last),
        kept.params["actor"], state.params["actor"],
    )  # fmt: skip
    metrics = kept.metrics
    for name in ("factor/mean", "factor/effective"):
        np.testing.assert_array_equal(metrics[name], 1)
    for name in ("trust/distance", "gain/agent_0", "kl/agent_1", "step_fraction/agent_2"):
        np.testing.assert_array_equal(metrics[name], 0)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a[0] - b)), kept.params, state.params)
    assert max(jax.tree.leaves(moved["critic"])) > 1e-4


# ---- learning


def test_three_unequal_agents_find_the_best_joint_action(run):
    """It pays 1.5 on average, and 0.25 by chance; fails with the sign of the surrogate turned."""
    returns = np.asarray(run.kept.metrics["episode/return"])
    assert np.all(returns[:2, -5:].mean(1) > 1.4)
    assert np.all(returns[:, :2].mean(1) < 0.45)
    assert np.all(returns[2, -5:].mean() < 0.45)


@pytest.mark.slow
def test_shared_parameters_cannot_differ_and_names_help():
    """Proposition 1: 2 / 2^n of the optimum, 0.5, unless policies see which agent they are."""
    options = {"num_epochs": 4, "learning_rate": 0.02, "updates": 40, "entropy_coefficient": 0.0}
    _, _, history = trained(mappo, **options)
    assert np.all(np.asarray(history["episode/return"])[:, -5:].mean(1) < 0.6)
    for more in ({"identify_agents": True}, {"share_parameters": False}):
        _, _, history = trained(mappo, **more, **options)
        assert np.all(np.asarray(history["episode/return"])[:, -5:].mean(1) > 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (hatrpo, {}),
        (happo, {"learning_rate": 0.01}),
        (mappo, {"share_parameters": False, "learning_rate": 0.02, "critic": "local"}),
        (mappo, {"share_parameters": False, "learning_rate": 0.02, "critic": Graph()}),
        (ga_matr, {}),
        (ga_matr, {"critic": Graph("gatv2", gru_size=None), "divergence": "unweighted"}),
        (hatrpo, {"gru_size": 4}),
        (matrpo, {"num_exchanges": 6, "radius": 0.02}),
        (hatrpo, {"actor_graph": Graph(heads=1, width=2, gru_size=None)}),
    ],
)
def test_everyone_with_parameters_of_their_own_differs(method, options):
    epochs = 4 if method is mappo else 1
    _, _, history = trained(method, num_epochs=epochs, **options)
    assert np.all(np.asarray(history["episode/return"])[:, -5:].mean(1) > 0.9)


# ---- the interface


@pytest.mark.slow
def test_a_seed_is_the_same_alone_and_beside_others(run):
    agent = dataclasses.replace(run.agent.config, total_steps=3 * 128).agent()
    _, alone = jax.jit(agent.train)(jax.random.split(KEY, 2)[1])
    for name in ("episode/return", "kl/agent_0", "loss/value"):
        found = run.kept.metrics[name][1, :3]
        np.testing.assert_allclose(alone[name], found, rtol=1e-3, atol=1e-6)


def test_policies_act_are_evaluated_and_saved(run, tmp_path):
    agent, state = run.agent, select_seed(run.state, 0)
    observations = agent.env.observe(*UNEQUAL.reset(KEY))
    action, carry = agent.act(state, observations, KEY, deterministic=True)
    assert carry == ()
    assert PAYOFF[tuple(action)] == 1
    assert agent.env.actions(action)["agent_1"] == 2
    returns, lengths = jax.jit(lambda key: tuple(agent.evaluate(state, key, 16)))(KEY)
    np.testing.assert_array_equal(returns, 1.5)
    np.testing.assert_array_equal(lengths, 1)
    agent.policy(state).save(tmp_path / "policy.npz")
    loaded = load_policy(tmp_path / "policy.npz", env=agent.env, actor=agent.actor)
    same, _ = loaded.act(observations, KEY, deterministic=True)
    np.testing.assert_array_equal(same, action)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (happo, {}),
        (mappo, {"critic": "local", "share_parameters": False}),
        (ga_matr, {"critic": Graph(heads=2, width=2, gru_size=3), "reward": "team"}),
        (matrpo, {"num_exchanges": 2, "gru_size": 3}),
        (matrpo, {"env": "trustjax:MultiUAV", "num_exchanges": 2, "normalize_observations": True}),
    ],
)
def test_an_update_keeps_shapes_and_dtypes(method, options):
    agent = config(method, **{"env": UNEQUAL, **options}).agent()
    state = jax.eval_shape(agent.init, KEY)
    after, metrics = jax.eval_shape(agent.update, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.slow
def test_a_team_has_one_value_and_one_advantage():
    """The mean reward, whichever agent gets it; the weights of attention sum to 1."""
    options = {"critic": Graph(heads=2, width=2, gru_size=3), "env": UNEQUAL}
    agent = config(ga_matr, **options).agent()
    _, kept = jax.jit(lambda key: recorded(agent, key, 2))(KEY)
    for name in ("value", "advantage", "returns"):
        found = np.asarray(getattr(kept.batch, name))
        np.testing.assert_array_equal(found[..., 1:], found[..., :1].repeat(2, -1))
    assert np.std(kept.batch.advantage) > 0.5
    for i in range(3):
        total = sum(kept.metrics[f"attention/{i}_{j}"] for j in range(3))
        np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert np.all(kept.metrics["attention/entropy"] <= np.log(3) + 1e-4)


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        (hatrpo, {"env": "gymnax:CartPole-v1"}, "env must be a multi-agent environment"),
        (hatrpo, {"reward": "both"}, "reward must be one of 'team', 'individual'"),
        (hatrpo, {"critic": "mlp"}, "critic must be one of 'central', 'local'"),
        (hatrpo, {"divergence": "tsallis"}, "divergence must be one of 'kl', 'unweighted'"),
        (hatrpo, {"value_obs_key": "state"}, "value_obs_key must be None for several agents"),
        (hatrpo, {"critic": Graph(), "gru_size": 4}, "gru_size must be None with a graph"),
        (hatrpo, {"actor_graph": Graph()}, "actor_graph must have gru_size=None"),
        (ga_matr, {"shuffle": "transitions"}, "shuffle must be 'environments' with a GRU"),
        (hatrpo, {"radius": -1.0}, "radius must be >= 0"),
        (happo, {"policy_epochs": 0}, "policy_epochs must be >= 1"),
        (ga_matr, {"critic": "central"}, "critic must be a Graph"),
        (matrpo, {"penalty": 0.0}, "penalty must be > 0"),
        (matrpo, {"num_exchanges": 0}, "num_exchanges must be >= 1"),
        (matrpo, {"edges": ()}, "edges must name one pair or more"),
        (matrpo, {"edges": [0, 1]}, "edges must be pairs of two different agents"),
        (matrpo, {"edges": [[0, 2]]}, "edges must be pairs of two different agents of 0 to 1"),
        (matrpo, {"edges": ((0, 1), (1, 0))}, "edges must name every pair once"),
        (
            mappo,
            {"identify_agents": True, "actor_graph": Graph(gru_size=None)},
            "identify_agents must be False with an actor_graph",
        ),
    ],
)
def test_bad_input_names_the_field(method, fields, text):
    with pytest.raises(ValueError, match=text):
        config(method, **fields).agent()


def test_a_graph_is_checked():
    with pytest.raises(ValueError, match="gru_size must be >= 1"):
        Graph(gru_size=0)


def test_sequential_steps_of_a_product():
    """Two agents with the reward a_1 a_2: one after the other they gain, together they lose.

    The exact game of the paper's Fig. 1: means -0.25 and 0.25, and steps of length 1.
    """

    @jax.jit
    def move(mean, other):
        tx = natural_gradient(0.5, damping=0.0)
        loss = lambda m: -m * other
        step, _ = tx.update(
            jax.grad(loss)(mean), tx.init(mean), mean,
            loss_fn=loss, divergence_fn=lambda m: jnp.square(m - mean) / 2,
        )  # fmt: skip
        return optax.apply_updates(mean, step)

    first, second = jnp.asarray(-0.25), jnp.asarray(0.25)
    together = move(first, second) * move(second, first)
    np.testing.assert_allclose(together, -0.5625, rtol=1e-3)
    moved = move(first, second)
    np.testing.assert_allclose(moved * move(second, moved), 0.9375, rtol=1e-3)


@pytest.mark.parametrize("gru_size", [None, 8])
@pytest.mark.parametrize("method", [ga_matr, happo])
def test_minibatches_of_a_recurrent_critic_are_whole_sequences(method, gru_size):
    """Stitched together from several environments, they would not have the rollout's values."""
    env = MultiUAV(num_uavs=2, num_users=3, max_steps_in_episode=7)
    critic = Graph(heads=1, width=4, gru_size=gru_size)
    agent = config(
        method, env=env, updates=4, num_envs=4, num_steps=10, num_minibatches=4, critic=critic
    ).agent()
    state = agent.init(KEY)
    _, rollout = rollouts.collect(
        agent.env, None, agent.actor, state.params["actor"],
        functools.partial(agent.normalize, state.observations), state.runner, KEY, 10,
    )  # fmt: skip
    batch, *_ = agent._batch(state, rollout, state.returns)

    def differences(carry, minibatch):
        values = agent.values(state.params["critic"], minibatch)
        return carry, jnp.max(jnp.abs(values - minibatch.value))

    _, found = agent.epochs(batch, KEY, 1, 4, differences, 0)
    np.testing.assert_allclose(found, 0, atol=1e-5)
