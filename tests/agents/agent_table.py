"""The table of all agents: a new one is a row here, and every test that holds for all finds it."""

from typing import Any

from trustjax.agents import AgentConfig, mdpo, ppo, sac, trpo

ON_POLICY: dict[str, type[AgentConfig]] = {
    "ppo": ppo.Config,
    "trpo": trpo.Config,
    "mdpo": mdpo.Config,
}
OFF_POLICY: dict[str, type[AgentConfig]] = {
    "sac": sac.Config,
    "off_policy_mdpo": mdpo.OffPolicyConfig,
}
AGENTS = ON_POLICY | OFF_POLICY

# Trainings that take a moment: five iterations of 32 steps, and ten of 40 of which two are random.
SMALL_ON_POLICY = {
    "env": "probe:both", "num_envs": 8, "num_steps": 4, "total_steps": 5 * 32, "hidden": (8,),
    "num_minibatches": 2, "num_epochs": 2, "learning_rate": 0.01,
    "normalize_observations": False, "normalize_rewards": False,
}  # fmt: skip
SMALL_OFF_POLICY = {
    "env": "gymnax:Pendulum-v1", "num_envs": 4, "num_steps": 10, "total_steps": 400,
    "learning_starts": 80, "gradient_steps": 2, "batch_size": 16, "buffer_size": 240,
    "hidden": (8,), "learning_rate": 0.003,
}  # fmt: skip


def small_config(name: str, **options: Any) -> AgentConfig:
    """The configuration of a small training of an agent, with some fields changed."""
    small = SMALL_ON_POLICY if name in ON_POLICY else SMALL_OFF_POLICY
    return AGENTS[name](**small | options)
