"""Language policies that learn from rewards of their own answers: TRPA, the GRPO family, DPO."""

from trustjax.agents.language.agent import LanguageAgent as LanguageAgent
from trustjax.agents.language.agent import State as State
from trustjax.agents.language.answers import Answers as Answers
from trustjax.agents.language.config import Config as Config
from trustjax.agents.language.evaluation import Evaluation as Evaluation
from trustjax.agents.language.evaluation import pass_at_k as pass_at_k
from trustjax.agents.language.objectives import TRPA as TRPA
from trustjax.agents.language.objectives import Objective as Objective
from trustjax.agents.language.objectives import OnlineDPO as OnlineDPO
from trustjax.agents.language.objectives import PolicyGradient as PolicyGradient
from trustjax.agents.language.objectives import TrustGRPO as TrustGRPO
from trustjax.agents.language.scoring import answer_statistics as answer_statistics
from trustjax.agents.language.scoring import fine_tuning_loss as fine_tuning_loss
