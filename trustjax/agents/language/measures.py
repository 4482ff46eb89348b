"""The metrics of an iteration, numbers [] by name."""

import jax
import jax.numpy as jnp

from trustjax.agents.algorithm import Metrics
from trustjax.agents.language.answers import Answers, rows
from trustjax.agents.language.config import Config
from trustjax.losses import TokenStatistics, kl_estimate, masked_mean, trust_metrics

LEVELS = (1, 2, 3, 4)


def answer_metrics(answers: Answers) -> Metrics:
    """What the answers of an iteration are like.

    accuracy is the share of level 1, pass@k the share of prompts with such an answer among the k of
    the group. `time/reward` is the time of host rewards in seconds.
    """
    right = answers.levels == 1
    lengths = jnp.sum(answers.mask, -1, dtype=jnp.float32)
    size = answers.rewards.shape[1]
    return {
        "accuracy": jnp.mean(right, dtype=jnp.float32),
        f"pass@{size}": jnp.mean(jnp.any(right, 1), dtype=jnp.float32),
        "reward/mean": jnp.mean(answers.rewards),
        "reward/deviation": jnp.std(answers.rewards),
        "thinking/mean": jnp.mean(answers.thinking),
        "length/mean": jnp.mean(lengths),
        "length/largest": jnp.max(lengths),
        "length/stopped": jnp.mean(answers.stopped, dtype=jnp.float32),
        "time/reward": jnp.sum(answers.seconds),
        **{
            f"level/{level}": jnp.mean(answers.levels == level, dtype=jnp.float32)
            for level in LEVELS
        },
    }


def policy_metrics(config: Config, answers: Answers, new: TokenStatistics) -> Metrics:
    """How far the policy went in an iteration, and which share of tokens is beyond the clip.

    `trust/distance` is the mean over tokens of the k3 estimate of KL(pi_old || pi);
    `rollout/difference` the mean of abs(log pi_old - log pi_sampler), `rollout/largest` the largest
    one: what rounding makes of the same weights.
    """
    mask, bounds = rows(answers.mask), config.objective.clip_bounds()
    log_probs, old = rows(new.log_probs), rows(answers.old_log_probs)
    low, high = (0.0, None) if bounds is None else bounds
    radius = config.objective.radius
    for target in (config.max_kl, config.kl_target if config.kl_to == "old" else None):
        radius = radius if target is None else target  # type: ignore[assignment]
    metrics = trust_metrics(
        log_probs, old, rows(answers.advantages), mask, clip=low, clip_high=high, radius=radius
    )
    del metrics["masked"]  # the weights are the loss's own
    if bounds is None:
        metrics = {name: x for name, x in metrics.items() if not name.startswith("clip")}
    apart = jnp.abs(rows(answers.sampler_log_probs) - old)
    metrics["rollout/difference"] = masked_mean(apart, mask)
    metrics["rollout/largest"] = jnp.max(jnp.where(mask, apart, 0))
    if config.needs_reference:
        reference = rows(answers.reference_log_probs)
        metrics["kl/reference"] = masked_mean(kl_estimate(old, reference), mask)
    return {name: jax.lax.stop_gradient(x) for name, x in metrics.items()}
