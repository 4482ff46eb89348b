"""Losses as pure functions over leading batch axes: one value per example, which callers reduce."""

from trustjax.losses.advantage import VTrace as VTrace
from trustjax.losses.advantage import gae as gae
from trustjax.losses.advantage import group_relative as group_relative
from trustjax.losses.advantage import lambda_returns as lambda_returns
from trustjax.losses.advantage import leave_one_out as leave_one_out
from trustjax.losses.advantage import vtrace as vtrace
from trustjax.losses.off_policy import mdpo_actor_loss as mdpo_actor_loss
from trustjax.losses.off_policy import mdpo_forward_loss as mdpo_forward_loss
from trustjax.losses.off_policy import policy_mean as policy_mean
from trustjax.losses.off_policy import sac_actor_loss as sac_actor_loss
from trustjax.losses.off_policy import sac_critic_loss as sac_critic_loss
from trustjax.losses.off_policy import temperature_loss as temperature_loss
from trustjax.losses.off_policy import tsallis_log as tsallis_log
from trustjax.losses.policy import adapt_kl_coefficient as adapt_kl_coefficient
from trustjax.losses.policy import adapt_learning_rate as adapt_learning_rate
from trustjax.losses.policy import mdpo_loss as mdpo_loss
from trustjax.losses.policy import ppo_clip_loss as ppo_clip_loss
from trustjax.losses.policy import ppo_kl_loss as ppo_kl_loss
from trustjax.losses.policy import trpo_surrogate as trpo_surrogate
from trustjax.losses.policy import value_loss as value_loss
from trustjax.losses.regularizer import bregman_penalty as bregman_penalty
from trustjax.losses.regularizer import mesa_penalty as mesa_penalty
from trustjax.losses.regularizer import r3f_penalty as r3f_penalty
from trustjax.losses.regularizer import smart_penalty as smart_penalty
from trustjax.losses.regularizer import smart_perturbation as smart_perturbation
from trustjax.losses.regularizer import trpo_penalty as trpo_penalty
