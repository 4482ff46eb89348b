"""Configurations that cannot work say so, naming the field, before anything is compiled."""

import pytest
from agent_table import AGENTS, ON_POLICY

SHARED = [
    ({"env": "gymnax:CartPole-v2"}, "CartPole-v1"),
    ({"env": "probe:delay"}, "delayed"),
    ({"env": "gym:CartPole-v1"}, "gymnax:NAME"),
    ({"num_envs": 0}, "num_envs must be >= 1, got 0"),
    ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
    ({"num_envs": 64, "num_steps": 128, "total_steps": 8191}, "total_steps must .* 8192, got 8191"),
    ({"learning_rate": -1e-3}, "learning_rate must be > 0, got -0.001"),
    ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
    ({"learning_rate": float("inf")}, "learning_rate must be < inf, got inf"),
    ({"learning_rate": True}, "learning_rate must be a number, got True"),
    ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
    ({"normalize_observations": "False"}, "normalize_observations must be True or False"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
    ({"max_grad_norm": False}, "max_grad_norm must be a number, got False"),
    ({"discount": 1.1}, "discount must be <= 1"),
    ({"clip_observations": 0.0}, "clip_observations must be > 0"),
    ({"activation": "swish"}, "activation must be one of .*'tanh'.* got 'swish'"),
    ({"hidden": (64, 0)}, r"hidden must be widths >= 1, got \(64, 0\)"),
    ({"hidden": 64}, "hidden must be widths >= 1, got 64"),
]
OF_ON_POLICY = [
    ({"num_envs": 6, "num_minibatches": 4}, "num_minibatches must divide the 6 environments"),
    (
        {"num_envs": 1, "num_steps": 128, "num_minibatches": 4},
        "num_minibatches must divide the 1 environments of an iteration, got 4; "
        "shuffle='transitions' divides its 128 transitions instead",
    ),
    (
        {"num_envs": 1, "num_minibatches": 4, "gru_size": 8},
        "num_minibatches must divide the 1 environments of an iteration, got 4$",
    ),
    ({"num_epochs": 0}, "num_epochs must be >= 1"),
    ({"value_clip": -0.1}, "value_clip must be >= 0"),
    ({"entropy_coefficient": -1.0}, "entropy_coefficient must be >= 0, got -1"),
    ({"lambda_": -0.1}, "lambda_ must be >= 0"),
    ({"clip_rewards": 0.0}, "clip_rewards must be > 0"),
    ({"normalize_advantages": "yes"}, "normalize_advantages must be one of"),
    ({"shuffle": "all"}, "shuffle must be one of"),
    ({"shuffle": "transitions", "gru_size": 8}, "shuffle must be 'environments' with a GRU"),
    ({"gru_size": 0}, "gru_size must be >= 1 or None, got 0"),
]
OWN = [
    ("ppo", {"clip": -0.2}, "clip must be >= 0, got -0.2"),
    ("ppo", {"surrogate": "trust"}, "surrogate must be one of"),
    ("ppo", {"kl_target": 0.0}, "kl_target must be > 0"),
    ("ppo", {"kl_coefficient": -1.0}, "kl_coefficient must be >= 0"),
    ("ppo", {"target_kl": False}, "target_kl must be a number, got False"),
    ("ppo", {"target_kl": 0.0}, "target_kl must be > 0, got 0"),
    ("ppo", {"desired_kl": -0.01}, "desired_kl must be > 0, got -0.01"),
    ("ppo", {"desired_kl": 0.01}, "anneal_learning_rate must be False with desired_kl"),
    ("mdpo", {"value_learning_rate": 0.0}, "value_learning_rate must be > 0, got 0"),
    ("sac", {"critic_learning_rate": 0.0}, "critic_learning_rate must be > 0, got 0"),
    ("sac", {"temperature_learning_rate": -1.0}, "temperature_learning_rate must be > 0, got -1"),
    ("sac", {"reward_scale": 0.0}, "reward_scale must be > 0, got 0"),
    (
        "off_policy_mdpo",
        {"temperature_learning_rate": 0.001},
        "temperature_learning_rate must be None where the temperature is fixed, got 0.001",
    ),
    (
        "off_policy_mdpo",
        {"target_entropy": -3.0},
        "target_entropy must be None where the temperature is fixed, got -3.0",
    ),
    (
        "ppo",
        {"shuffle": "transitions", "num_steps": 3, "num_envs": 3},
        "num_minibatches must divide the 9 transitions",
    ),
    ("trpo", {"radius": -0.01}, "radius must be >= 0, got -0.01"),
    ("trpo", {"damping": -0.1}, "damping must be >= 0"),
    ("trpo", {"backtrack": 1.5}, "backtrack"),
    ("trpo", {"slack": 0.5}, "slack"),
    ("trpo", {"accept_ratio": -1.0}, "accept_ratio"),
    ("trpo", {"cg_steps": 0}, "cg_steps"),
    ("trpo", {"normalize_advantages": "minibatch"}, "normalize_advantages must be 'batch'"),
    ("mdpo", {"normalize_advantages": "minibatch"}, "normalize_advantages must be 'batch'"),
    ("mdpo", {"step_size": 0.0}, "step_size must be > 0, got 0"),
    ("mdpo", {"policy_steps": 0}, "policy_steps must be >= 1"),
    ("mdpo", {"kl": "both"}, "kl must be one of 'new_old', 'old_new', got 'both'"),
]


@pytest.mark.parametrize("algorithm", AGENTS)
@pytest.mark.parametrize(("options", "message"), SHARED, ids=str)
def test_shared_fields(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        AGENTS[algorithm](**options).agent()


@pytest.mark.parametrize("algorithm", ON_POLICY)
@pytest.mark.parametrize(("options", "message"), OF_ON_POLICY, ids=str)
def test_fields_of_on_policy_agents(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        AGENTS[algorithm](**options).agent()


@pytest.mark.parametrize(("algorithm", "options", "message"), OWN, ids=str)
def test_own_fields(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        AGENTS[algorithm](**options).agent()


@pytest.mark.parametrize("algorithm", AGENTS)
def test_defaults_work(algorithm):
    steps_per_update = {"ppo": 1024, "trpo": 8192, "mdpo": 1024}.get(algorithm, 64)
    assert AGENTS[algorithm]().agent().config.num_updates == 1_000_000 // steps_per_update
