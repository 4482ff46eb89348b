"""Environments behind one interface: gymnax 1.x's."""

from trustjax.envs.environment import Environment as Environment
from trustjax.envs.registry import make as make
from trustjax.envs.registry import make_once as make_once
from trustjax.envs.registry import names as names
