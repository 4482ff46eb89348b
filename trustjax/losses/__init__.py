"""Losses as pure functions over leading batch axes: one value per example, which callers reduce."""

from trustjax.losses.advantage import VTrace as VTrace
from trustjax.losses.advantage import gae as gae
from trustjax.losses.advantage import group_relative as group_relative
from trustjax.losses.advantage import lambda_returns as lambda_returns
from trustjax.losses.advantage import leave_one_out as leave_one_out
from trustjax.losses.advantage import vtrace as vtrace
from trustjax.losses.anchor import Anchor as Anchor
from trustjax.losses.anchor import AnchorState as AnchorState
from trustjax.losses.anchor import ema_anchor as ema_anchor
from trustjax.losses.anchor import fixed_anchor as fixed_anchor
from trustjax.losses.anchor import kl_anchor as kl_anchor
from trustjax.losses.anchor import on_policy_anchor as on_policy_anchor
from trustjax.losses.anchor import periodic_anchor as periodic_anchor
from trustjax.losses.anchored import adpo_loss as adpo_loss
from trustjax.losses.anchored import adpo_metrics as adpo_metrics
from trustjax.losses.anchored import adpo_optimum as adpo_optimum
from trustjax.losses.anchored import adpo_pairwise_loss as adpo_pairwise_loss
from trustjax.losses.anchored import sequence_log_ratios as sequence_log_ratios
from trustjax.losses.anchored_targets import bradley_terry_targets as bradley_terry_targets
from trustjax.losses.anchored_targets import hard_targets as hard_targets
from trustjax.losses.anchored_targets import kde_targets as kde_targets
from trustjax.losses.anchored_targets import reward_targets as reward_targets
from trustjax.losses.anchored_targets import smooth_hybrid_temperature as smooth_hybrid_temperature
from trustjax.losses.anchored_targets import (
    target_entropy_temperature as target_entropy_temperature,
)
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
from trustjax.losses.ranking import pl_dpo_loss as pl_dpo_loss
from trustjax.losses.ranking import plackett_luce_loss as plackett_luce_loss
from trustjax.losses.ranking import ranking_of as ranking_of
from trustjax.losses.regularizer import bregman_penalty as bregman_penalty
from trustjax.losses.regularizer import mesa_penalty as mesa_penalty
from trustjax.losses.regularizer import r3f_penalty as r3f_penalty
from trustjax.losses.regularizer import smart_penalty as smart_penalty
from trustjax.losses.regularizer import smart_perturbation as smart_perturbation
from trustjax.losses.regularizer import trpo_penalty as trpo_penalty
