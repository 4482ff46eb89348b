"""MATRPO: exchanges, steps and consensus against plain loops, and whose actions are executed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_multi_agent import DIFFER, KEY, SMALL, UNEQUAL, recorded

from trustjax.agents import select_seed
from trustjax.agents.multi import matrpo
from trustjax.agents.multi.matrpo import exchange
from trustjax.agents.multi.networks import components

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/matrpo.json").read_text())["exchanges"]


def config(**options):
    fields = SMALL | {"env": DIFFER, "total_steps": 256, "radius": 0.02, "hidden": (2,)}
    return matrpo.Config(**fields | options)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"rho_{case['penalty']}")
def test_an_exchange_is_that_of_the_authors_code(case):
    """Fails with the other sign of l_j."""
    found = exchange(*case["log_ratios"], *case["multipliers"], case["penalty"])
    np.testing.assert_allclose(found, [*case["estimates"], case["multiplier"]], rtol=1e-6)


def vector(tree):
    """All numbers of a tree in one array."""
    return jax.flatten_util.ravel_pytree(tree)[0]


def by_loops(agent, members, batch, edges):
    """One iteration by plain loops: dense Fisher matrices, and the gradient as the code has it."""
    given, count = agent.config, agent.env.num_agents
    flat = [jax.flatten_util.ravel_pytree(jax.tree.map(lambda x, i=i: x[i], members))
            for i in range(count)]  # fmt: skip
    start, tree = [each[0] for each in flat], flat[0][1]

    def policy(i, w):
        return agent.policy_of(tree(w), batch, jnp.asarray(i))

    def ratios(i, w):
        return policy(i, w).log_prob(batch.action) - policy(i, start[i]).log_prob(batch.action)

    def kl(i, w):
        return policy(i, start[i]).kl_divergence(policy(i, w)).sum(-1).mean()

    sign = dict.fromkeys(edges, 1.0) | {(j, i): -1.0 for i, j in edges}
    z = {edge: jnp.zeros_like(batch.log_prob) for edge in sign}
    y = {edge: jnp.full_like(batch.log_prob, given.initial_multiplier) for edge in sign}
    now = list(start)

    def lagrangian(i, w):
        moved = ratios(i, w)
        total = -jnp.exp(moved.sum(-1)) * batch.advantage[..., i]
        for (a, b), c in sign.items():
            if a == i:
                apart = c * moved - z[a, b]
                total += (y[a, b] * apart + given.penalty / 2 * apart**2).sum(-1)
        return total.mean()

    for turn in range(given.num_exchanges):
        edge = edges[turn % len(edges)]
        for i in edge:
            weight = batch.advantage[..., i, None]
            for (a, b), c in sign.items():
                if a == i:
                    weight = weight - c * y[a, b] + given.penalty * c * z[a, b]
            g = jax.grad(lambda w, i=i, v=weight: (v * ratios(i, w)).sum(-1).mean())(start[i])
            fisher = jax.hessian(lambda w, i=i: kl(i, w))(start[i])
            fisher += given.damping * jnp.eye(len(g))
            x = jnp.linalg.solve(fisher, g)
            full, before = x * jnp.sqrt(2 * given.radius / (g @ x)), lagrangian(i, start[i])
            now[i] = start[i]
            for halvings in range(given.max_backtracks):
                tried = start[i] + 0.5**halvings * full
                if kl(i, tried) <= 1.5 * given.radius and lagrangian(i, tried) < before:
                    now[i] = tried
                    break
        i, j = edge
        z[i, j], z[j, i], y[i, j] = exchange(
            ratios(i, now[i]), ratios(j, now[j]), y[i, j], y[j, i], given.penalty
        )
        y[j, i] = y[i, j]
    return now


@pytest.mark.parametrize(("edges", "multiplier"), [(None, 0.0), (((1, 2), (0, 1)), 1.0)])
def test_an_iteration_is_that_of_plain_loops(x64, edges, multiplier):
    """Three agents; fails without the reset to the old policy, or with one sign for all edges."""
    agent = config(
        env=UNEQUAL, num_exchanges=4, cg_steps=40, edges=edges, initial_multiplier=multiplier
    ).agent()
    state, kept = jax.jit(lambda key: recorded(agent, key, 2))(KEY)
    first = jax.tree.map(lambda x: x[1], kept)
    pairs = agent.config.neighbours(3)
    expected = by_loops(agent, agent.members(first.params), first.batch, pairs)
    found = agent.members(state.params)
    before = agent.members(first.params)
    for i, own in enumerate(expected):
        got, old = (vector(jax.tree.map(lambda x, i=i: x[i], tree)) for tree in (found, before))
        np.testing.assert_allclose(got, own, rtol=1e-3, atol=2e-6)
        assert np.abs(got - old).max() > 1e-3
    assert first.metrics["trust/distance"] <= 1.5 * 0.02 * (1 + 1e-6)


def test_exchanges_bring_neighbours_together():
    """Fails with multipliers that stay at 1, which is no method of multipliers."""
    errors = {}
    for number in (1, 30):
        agent = config(env=UNEQUAL, num_exchanges=number, penalty=3.0).agent()
        state = agent.init(KEY)
        _, metrics = jax.jit(agent.update)(state)
        errors[number] = float(metrics["consensus/error"])
    assert errors[30] < 0.3 * errors[1]


@pytest.mark.parametrize(
    "env", [UNEQUAL, "trustjax:MultiUAV?actions=continuous"], ids=["discrete", "continuous"]
)
def test_an_agent_executes_its_own_component(env):
    """Fails if agents execute the first component, or that of another agent's policy."""
    agent = config(env=env, num_envs=2, num_steps=2, normalize_observations=True).agent()
    state = jax.jit(agent.init)(KEY)
    noise = jax.random.normal(KEY, (1000,))
    moved = jax.tree.map(
        lambda x: x + noise[: x.size].reshape(x.shape) if x.size <= 1000 else x + 0.1,
        state.params["actor"],
    )
    obs = agent.env.observe(*agent.env.unwrapped.reset(KEY))
    obs = jax.tree.map(lambda x: jnp.stack([x, x])[None], obs)
    found = agent.actor.apply(moved, obs)[0]
    count = agent.env.num_agents
    members = agent.members({"actor": moved})
    for i in range(count):
        own = jax.tree.map(lambda x, i=i: x[i], members)
        every, _ = agent.actor.member.apply({"params": own}, obs["agents"][..., i, :])
        every = components(every, count)
        for got, whole in zip(jax.tree.leaves(found), jax.tree.leaves(every), strict=True):
            np.testing.assert_allclose(got[..., i, :], whole[..., i, :], rtol=1e-5, atol=1e-6)
            assert np.std(np.asarray(whole)) > 0


@pytest.mark.parametrize("env", [DIFFER, "trustjax:MultiUAV?actions=continuous"])
def test_what_is_executed_is_a_policy_of_its_own(env):
    """For best responses, which begin at it; fails if the components are interleaved."""
    agent = config(env=env, num_envs=2, num_steps=2).agent()
    state = jax.jit(agent.init)(KEY)
    count = agent.env.num_agents
    member = jax.tree.map(lambda x: x[1], agent.members(state.params))
    member = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) / x.size, member)
    obs = jnp.linspace(-1, 1, state.runner.observation["agents"].shape[-1])
    own = agent.actor.member.clone(
        num_actions=agent.num_actions and agent.num_actions[0],
        action_size=agent.actor.member.action_size and agent.actor.member.action_size // count,
    )
    found, _ = own.apply({"params": agent.executed(member, jnp.asarray(1))}, obs)
    every, _ = agent.actor.member.apply({"params": member}, obs)
    every = components(every, count)
    for got, whole in zip(jax.tree.leaves(found), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(got, whole[1], rtol=1e-5, atol=1e-6)
        assert np.abs(got - whole[0]).max() > 0.01


@pytest.mark.slow
def test_agents_with_actions_of_their_own_numbers_learn(tmp_path):
    """The best of three agents' rewards, which differ by a factor; fails with the sign of A."""
    agent = config(env=UNEQUAL, hidden=(8,), total_steps=80 * 128, num_exchanges=9).agent()
    states, history = jax.jit(jax.vmap(agent.train))(jax.random.split(KEY, 2))
    assert np.all(np.asarray(history["episode/return"])[:, -5:].mean(1) > 0.9 * 1.5)
    assert np.all(np.asarray(history["trust/used"]) <= 1.5 * (1 + 1e-4))
    agent.policy(select_seed(states, 0)).save(tmp_path / "policy.npz")
