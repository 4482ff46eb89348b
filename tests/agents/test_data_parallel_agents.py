"""Eight devices that share the environments compute what one computes."""

import jax
import numpy as np
import pytest
from agent_table import small_config

from trustjax._sharding import averaged
from trustjax.agents import algorithm, data_parallel
from trustjax.parallel import make_mesh

SHARED = {
    "env": "gymnax:CartPole-v1", "num_envs": 16, "num_steps": 8, "total_steps": 10 * 128,
    "hidden": (8,), "num_minibatches": 2, "num_epochs": 2, "normalize_observations": True,
    "normalize_rewards": True, "learning_rate": 0.001,
}  # fmt: skip
OWN = {
    "mdpo": {"policy_steps": 3, "entropy_coefficient": 0.01},
    "trpo": {"entropy_coefficient": 0.01},
}
BY_KL = {"target_kl": 2e-5, "desired_kl": 1e-5, "anneal_learning_rate": False}


def trained(algorithm, num_devices, num_updates=10, num_seeds=None, **options):
    mesh = make_mesh(num_devices)
    config = small_config(algorithm, **SHARED | OWN.get(algorithm, {}) | options)
    init, advance = data_parallel(type(config).agent, config, mesh, num_seeds=num_seeds)
    key = jax.random.key(0)
    state, history = advance(
        init(key if num_seeds is None else jax.random.split(key, num_seeds)), num_updates
    )
    keyless = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.asarray, (keyless, history))


def check_equal(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-8, atol=1e-9), found, expected
    )


@pytest.mark.parametrize(
    ("algorithm", "seeds"),
    [
        pytest.param("ppo", 2, marks=pytest.mark.slow),
        pytest.param("trpo", None, marks=pytest.mark.slow),
        ("mdpo", None),
    ],
)
def test_eight_devices_equal_one(algorithm, seeds, x64):
    """Parameters, statistics, environments and every metric, over ten iterations.

    `trust/used` is a ratio of two numbers near zero, which have to agree themselves.
    """
    found, expected = (trained(algorithm, number, num_seeds=seeds) for number in (8, 1))
    used = [history.pop("trust/used") for _, history in (found, expected)]
    np.testing.assert_allclose(*used, rtol=1e-6)
    check_equal(found, expected)
    assert found[1]["entropy"].shape == ((10,) if seeds is None else (seeds, 10))


@pytest.mark.slow
def test_rates_and_ends_by_the_kl_on_eight_devices(x64):
    """Every device sees the KL of all, and so takes the same steps."""
    found, expected = (trained("ppo", number, num_updates=4, **BY_KL) for number in (8, 1))
    check_equal(found, expected)
    assert len(set(found[1]["learning_rate"])) > 1
    assert np.any(found[1]["gradient_steps"] < 4)


@pytest.mark.slow
def test_gradients_of_one_device_alone_differ(x64, monkeypatch):
    """Without the mean of gradients over devices the numbers are others."""
    expected = trained("ppo", 1, num_updates=2)

    def but_gradients(tree, axis_name):
        return tree if isinstance(tree, dict) and "actor" in tree else averaged(tree, axis_name)

    monkeypatch.setattr(algorithm, "averaged", but_gradients)
    with pytest.raises(AssertionError):
        check_equal(trained("ppo", 8, num_updates=2), expected)


def test_bad_sizes():
    mesh = make_mesh(8)
    for options, message in [
        ({"num_envs": 8, "num_minibatches": 2}, "multiple of 8 devices times num_minibatches, 2"),
        ({"num_envs": 12, "num_minibatches": 1}, "got 12"),
        ({"shuffle": "transitions"}, "shuffle must be 'environments' on several devices"),
    ]:
        config = small_config("ppo", **SHARED | options)
        with pytest.raises(ValueError, match=message):
            data_parallel(type(config).agent, config, mesh)


@pytest.mark.parametrize(
    ("num_seeds", "numbers", "message"),
    [
        (None, {"learning_rate": [1e-3, 1e-2]}, "numbers.learning_rate must have one value for"),
        (3, {"learning_rate": [1e-3, 1e-2]}, r"num_seeds, 3, got shape \(2,\)"),
        (2, {"nonsense": [1, 2]}, "numbers.nonsense must be a number of the Config"),
        (2, {"num_envs": [8, 16]}, "numbers.num_envs must be a number of the Config"),
        (0, None, "num_seeds must be >= 1, got 0"),
    ],
)
def test_bad_numbers_of_seeds(num_seeds, numbers, message):
    config = small_config("ppo", **SHARED)
    with pytest.raises(ValueError, match=message):
        data_parallel(
            type(config).agent, config, make_mesh(1), num_seeds=num_seeds, numbers=numbers
        )


def test_as_many_keys_as_seeds():
    config = small_config("ppo", **SHARED)
    init, _ = data_parallel(type(config).agent, config, make_mesh(1), num_seeds=2)
    with pytest.raises(ValueError, match="key must be keys of num_seeds, 2 seeds, got 3"):
        init(jax.random.split(jax.random.key(0), 3))
