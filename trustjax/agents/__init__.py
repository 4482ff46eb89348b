"""Reinforcement learning algorithms as pure functions: init, update, train, act, evaluate."""

from trustjax.agents import mdpo as mdpo
from trustjax.agents import ppo as ppo
from trustjax.agents import sac as sac
from trustjax.agents import trpo as trpo
from trustjax.agents.algorithm import AgentConfig as AgentConfig
from trustjax.agents.algorithm import Algorithm as Algorithm
from trustjax.agents.algorithm import select_seed as select_seed
from trustjax.agents.config import OffPolicyConfig as OffPolicyConfig
from trustjax.agents.config import OnPolicyConfig as OnPolicyConfig
from trustjax.agents.mdpo import MDPO as MDPO
from trustjax.agents.mdpo import OffPolicyMDPO as OffPolicyMDPO
from trustjax.agents.off_policy import OffPolicy as OffPolicy
from trustjax.agents.on_policy import OnPolicy as OnPolicy
from trustjax.agents.on_policy import State as State
from trustjax.agents.policy import Evaluation as Evaluation
from trustjax.agents.policy import Policy as Policy
from trustjax.agents.policy import load_policy as load_policy
from trustjax.agents.ppo import PPO as PPO
from trustjax.agents.sac import SAC as SAC
from trustjax.agents.training import Best as Best
from trustjax.agents.training import data_parallel as data_parallel
from trustjax.agents.training import evaluate_and_keep_best as evaluate_and_keep_best
from trustjax.agents.training import initial_best as initial_best
from trustjax.agents.training import train_in_chunks as train_in_chunks
from trustjax.agents.training import train_with_evaluations as train_with_evaluations
from trustjax.agents.trpo import TRPO as TRPO
