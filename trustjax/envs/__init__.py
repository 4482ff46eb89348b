"""Environments of several packages behind gymnax's interface, or JaxMARL's for several agents."""

from trustjax.envs.environment import Environment as Environment
from trustjax.envs.episodic import EpisodicEnvironment as EpisodicEnvironment
from trustjax.envs.multi_agent import MultiAgentEnvironment as MultiAgentEnvironment
from trustjax.envs.registry import as_environment as as_environment
from trustjax.envs.registry import make as make
from trustjax.envs.registry import make_once as make_once
from trustjax.envs.registry import names as names
from trustjax.envs.uav import MultiUAV as MultiUAV
