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
from trustjax.losses.covariance_mask import clip_cov_mask as clip_cov_mask
from trustjax.losses.covariance_mask import kl_cov_mask as kl_cov_mask
from trustjax.losses.dpo import dpo_loss as dpo_loss
from trustjax.losses.group import dapo_loss as dapo_loss
from trustjax.losses.group import dr_grpo_loss as dr_grpo_loss
from trustjax.losses.group import grpo_loss as grpo_loss
from trustjax.losses.group import gspo_loss as gspo_loss
from trustjax.losses.group import reinforce_plus_plus_loss as reinforce_plus_plus_loss
from trustjax.losses.group import rloo_loss as rloo_loss
from trustjax.losses.group_advantage import informative_groups as informative_groups
from trustjax.losses.group_advantage import (
    reinforce_plus_plus_advantages as reinforce_plus_plus_advantages,
)
from trustjax.losses.group_advantage import (
    reinforce_plus_plus_baseline_advantages as reinforce_plus_plus_baseline_advantages,
)
from trustjax.losses.group_advantage import soft_overlong_penalty as soft_overlong_penalty
from trustjax.losses.group_advantage import token_rewards as token_rewards
from trustjax.losses.group_advantage import trust_grpo_advantages as trust_grpo_advantages
from trustjax.losses.group_advantage import trust_weight as trust_weight
from trustjax.losses.group_variants import cispo_loss as cispo_loss
from trustjax.losses.group_variants import gmpo_loss as gmpo_loss
from trustjax.losses.group_variants import luspo_loss as luspo_loss
from trustjax.losses.group_variants import sapo_loss as sapo_loss
from trustjax.losses.group_variants import vespo_loss as vespo_loss
from trustjax.losses.kl_estimator import kl_estimate as kl_estimate
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
from trustjax.losses.preference import cr_dpo_loss as cr_dpo_loss
from trustjax.losses.preference import kto_loss as kto_loss
from trustjax.losses.preference import preference_metrics as preference_metrics
from trustjax.losses.ranking import pl_dpo_loss as pl_dpo_loss
from trustjax.losses.ranking import plackett_luce_loss as plackett_luce_loss
from trustjax.losses.ranking import ranking_of as ranking_of
from trustjax.losses.reduction import masked_mean as masked_mean
from trustjax.losses.reduction import reduce_tokens as reduce_tokens
from trustjax.losses.reference_free import alphapo_loss as alphapo_loss
from trustjax.losses.reference_free import cpo_loss as cpo_loss
from trustjax.losses.reference_free import nll_loss as nll_loss
from trustjax.losses.reference_free import orpo_loss as orpo_loss
from trustjax.losses.reference_free import simpo_loss as simpo_loss
from trustjax.losses.regularizer import bregman_penalty as bregman_penalty
from trustjax.losses.regularizer import mesa_penalty as mesa_penalty
from trustjax.losses.regularizer import r3f_penalty as r3f_penalty
from trustjax.losses.regularizer import smart_penalty as smart_penalty
from trustjax.losses.regularizer import smart_perturbation as smart_perturbation
from trustjax.losses.regularizer import trpo_penalty as trpo_penalty
from trustjax.losses.tokens import TokenStatistics as TokenStatistics
from trustjax.losses.tokens import fused_cross_entropy as fused_cross_entropy
from trustjax.losses.tokens import token_log_probs as token_log_probs
from trustjax.losses.tokens import token_statistics as token_statistics
from trustjax.losses.trpa import pairs_from_levels as pairs_from_levels
from trustjax.losses.trpa import preference_levels as preference_levels
from trustjax.losses.trpa import trpa_loss as trpa_loss
from trustjax.losses.trpa import trpa_metrics as trpa_metrics
from trustjax.losses.trpa import trpa_trust_region as trpa_trust_region
from trustjax.losses.trust_mask import divergence_mask as divergence_mask
from trustjax.losses.trust_mask import off_policy_mask as off_policy_mask
from trustjax.losses.trust_mask import rollout_weights as rollout_weights
from trustjax.losses.trust_mask import sequence_trust_mask as sequence_trust_mask
from trustjax.losses.trust_mask import token_divergence as token_divergence
from trustjax.losses.trust_mask import trust_metrics as trust_metrics
