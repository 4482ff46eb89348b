"""Several agents: MAPPO, HAPPO, HATRPO, GA-MATR, MATRPO, with the interface of single agents."""

from trustjax.agents.multi import ga_matr as ga_matr
from trustjax.agents.multi import happo as happo
from trustjax.agents.multi import hatrpo as hatrpo
from trustjax.agents.multi import mappo as mappo
from trustjax.agents.multi import matrpo as matrpo
from trustjax.agents.multi.base import Graph as Graph
from trustjax.agents.multi.base import MultiAgent as MultiAgent
from trustjax.agents.multi.base import MultiAgentConfig as MultiAgentConfig
from trustjax.agents.multi.ga_matr import GAMATR as GAMATR
from trustjax.agents.multi.happo import HAPPO as HAPPO
from trustjax.agents.multi.hatrpo import HATRPO as HATRPO
from trustjax.agents.multi.mappo import MAPPO as MAPPO
from trustjax.agents.multi.matrpo import MATRPO as MATRPO
