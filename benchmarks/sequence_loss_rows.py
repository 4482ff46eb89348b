"""What `benchmarks.sequence_losses` measures: the arrays, and every loss with its peers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import Numbers
from trustjax import losses

BATCH, TIME, GROUP, PAIRS = 64, 1024, 8, 256
Arrays = dict[str, jax.Array]
CLIPS = {"clip": 0.2, "clip_high": 0.28}
NEAR = {"clip": 3e-4, "clip_high": 4e-4}
TOKENS, PAIR = ("log_probs",), ("chosen", "rejected")
# Numbers that TRL has as defaults of its options, for the variants that read them.
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2}


class Row(NamedTuple):
    """A loss and who else has it.

    Attributes:
      loss: The loss of the moving arrays and of all arrays by name, or constants.
      moving: Names of the arrays that it is differentiated by; none for constants.
      peers: Names of the libraries that have it.
      agrees: Whether values and gradients have to agree; False where the peer draws randomly.
    """

    loss: Callable[..., jax.Array]
    moving: tuple[str, ...]
    peers: tuple[str, ...]
    agrees: bool = True


def arrays(batch: int = BATCH, time: int = TIME, pairs: int = PAIRS) -> dict[str, np.ndarray]:
    """Log-probabilities near those of the old policy, and all else that a loss takes."""
    random = np.random.default_rng(0)
    old = -random.exponential(0.5, (batch, time)) - 0.02
    lengths = random.integers(max(time // 4, 1), time + 1, batch)
    sizes = random.integers(20, 400, (2, pairs))
    reference = -sizes * random.uniform(0.5, 1.5, (2, pairs))
    moved = reference + random.normal(0, 5, (2, pairs))
    found = {
        "old_log_probs": old,
        "log_probs": np.minimum(old + random.normal(0, 0.1, old.shape), -0.01),
        "reference_log_probs": old + random.normal(0, 0.2, old.shape),
        "mask": np.arange(time) < lengths[:, None],
        "advantages": random.normal(size=batch),
        "rewards": random.normal(size=batch),
        "levels": random.integers(1, 5, batch),
        "group_ids": np.arange(batch) // GROUP,
        "chosen": moved[0],
        "rejected": moved[1],
        "reference_chosen": reference[0],
        "reference_rejected": reference[1],
        "chosen_lengths": sizes[0],
        "rejected_lengths": sizes[1],
        "mismatched": reference[1] + random.normal(2, 1, pairs),
        "mismatched_reference": reference[1],
        "desirable": random.random(pairs) < 0.5,
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


def of_tokens(loss: Callable[..., jax.Array], **numbers: Any) -> Callable[..., jax.Array]:
    """The loss of log-probabilities of tokens."""

    def value(new: jax.Array, given: Arrays) -> jax.Array:
        return loss(new, given["old_log_probs"], given["advantages"], given["mask"], **numbers)

    return value


def masked(new: jax.Array, given: Arrays, mask: Callable[..., jax.Array]) -> jax.Array:
    """DPPO, with the weights of a mask."""
    old, advantages, keep = given["old_log_probs"], given["advantages"], given["mask"]
    weights = mask(new, old, advantages, keep)
    return losses.cispo_loss(new, old, advantages, keep, clip=1.0, clip_high=19.0, weights=weights)


def grpo(new: jax.Array, given: Arrays) -> jax.Array:
    """GRPO with a reference."""
    reference = given["reference_log_probs"]
    loss = of_tokens(losses.grpo_loss, reference_log_probs=reference, beta=0.04, **CLIPS)
    return loss(new, given)


def grpo_with_metrics(new: jax.Array, given: Arrays) -> tuple[jax.Array, Any]:
    """The same, and what the peers' functions compute for their logs."""
    metrics = of_tokens(losses.trust_metrics, **CLIPS)(jax.lax.stop_gradient(new), given)
    distance = losses.kl_estimate(new, given["reference_log_probs"])
    return grpo(new, given), (metrics, losses.masked_mean(distance, given["mask"]))


def clip_cov(new: jax.Array, given: Arrays) -> jax.Array:
    """The token mean with Clip-Cov."""
    old, advantages, mask = given["old_log_probs"], given["advantages"], given["mask"]
    kept = losses.clip_cov_mask(jax.random.key(0), new, old, advantages, mask, **CLIPS)
    return losses.dapo_loss(new, old, advantages, mask, weights=kept, **CLIPS)


def kl_cov(new: jax.Array, given: Arrays) -> jax.Array:
    """The token mean with KL-Cov."""
    old, advantages, mask = given["old_log_probs"], given["advantages"], given["mask"]
    chosen = losses.kl_cov_mask(new, advantages, mask)
    return losses.grpo_loss(
        new, old, advantages, mask, clip=jnp.inf, reference_log_probs=old, kl="abs",
        beta=1.0 * chosen, reduction="token_mean",
    )  # fmt: skip


def trpa(new: jax.Array, given: Arrays) -> jax.Array:
    """TRPA as its authors have it."""
    return losses.trpa_loss(
        new, given["old_log_probs"], given["reference_log_probs"], given["levels"],
        given["group_ids"], given["mask"],
    )  # fmt: skip


def adpo(new: jax.Array, given: Arrays) -> jax.Array:
    """ADPO with sums of tokens and a fixed temperature, as its author's first trainers have it."""
    ratios = losses.sequence_log_ratios(
        new, given["old_log_probs"], given["mask"], reduction="sum"
    ).reshape(-1, GROUP)
    target = losses.reward_targets(given["rewards"].reshape(-1, GROUP))
    return jnp.mean(losses.adpo_loss(ratios, jnp.zeros_like(ratios), target, temperature=0.8))


def dpo(variant: str) -> Callable[..., jax.Array]:
    """The mean of a variant of DPO."""

    def mean(chosen: jax.Array, rejected: jax.Array, given: Arrays) -> jax.Array:
        options: Numbers = {"label_smoothing": SMOOTHING.get(variant, 0.0)}
        if variant in ("ipo", "sigmoid_norm"):
            options |= {name: given[name] for name in ("chosen_lengths", "rejected_lengths")}
        if variant == "discopop":
            options["discopop_tau"] = 0.07
        reference = given["reference_chosen"], given["reference_rejected"]
        return jnp.mean(
            losses.dpo_loss(chosen, rejected, *reference, beta=0.1, variant=variant, **options)
        )

    return mean


def dpo_with_metrics(
    chosen: jax.Array, rejected: jax.Array, given: Arrays
) -> tuple[jax.Array, Any]:
    """DPO, and the implicit rewards that TRL logs."""
    reference = given["reference_chosen"], given["reference_rejected"]
    constants = jax.lax.stop_gradient((chosen, rejected))
    metrics = losses.preference_metrics(*constants, *reference, beta=0.1)
    return dpo("sigmoid")(chosen, rejected, given), metrics


def kto(chosen: jax.Array, given: Arrays) -> jax.Array:
    """KTO of the chosen answers alone."""
    each = losses.kto_loss(
        chosen, given["reference_chosen"], given["desirable"], given["mismatched"],
        given["mismatched_reference"],
    )  # fmt: skip
    return jnp.mean(each)


def without_reference(
    loss: Callable[..., jax.Array], *lengths: str, **numbers: Any
) -> Callable[..., jax.Array]:
    """The mean of a loss of pairs without a reference."""

    def mean(chosen: jax.Array, rejected: jax.Array, given: Arrays) -> jax.Array:
        return jnp.mean(loss(chosen, rejected, **{n: given[n] for n in lengths}, **numbers))

    return mean


def placed(given: Arrays) -> jax.Array:
    """The rewards on the last tokens."""
    return losses.token_rewards(given["rewards"], given["mask"])


LENGTHS = ("chosen_lengths", "rejected_lengths")
VARIANTS = (
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
BOTH = ("trl", "verl")
ROWS = {
    "grpo": Row(grpo, TOKENS, ("trl", "plain")),
    "dr_grpo": Row(of_tokens(losses.dr_grpo_loss, **CLIPS), TOKENS, ("trl",)),
    "dapo": Row(of_tokens(losses.dapo_loss), TOKENS, ("trl",)),
    "dapo_dual_clip": Row(of_tokens(losses.dapo_loss, dual_clip=3.0), TOKENS, ("verl",)),
    "gspo": Row(of_tokens(losses.gspo_loss, **NEAR), TOKENS, BOTH),
    "rloo": Row(of_tokens(losses.rloo_loss, **CLIPS), TOKENS, ("trl",)),
    "reinforce": Row(
        lambda new, given: losses.rloo_loss(new, None, given["advantages"], given["mask"]),
        TOKENS, ("verl",),
    ),
    "cispo": Row(of_tokens(losses.cispo_loss), TOKENS, BOTH),
    "sapo": Row(of_tokens(losses.sapo_loss), TOKENS, BOTH),
    "gmpo": Row(of_tokens(losses.gmpo_loss, **CLIPS), TOKENS, ("verl",)),
    "vespo": Row(of_tokens(losses.vespo_loss), TOKENS, ("trl",)),
    "luspo": Row(of_tokens(losses.luspo_loss), TOKENS, ("trl",)),
    "dppo_tv": Row(
        functools.partial(masked, mask=functools.partial(losses.divergence_mask, radius=0.15)),
        TOKENS, ("verl",),
    ),
    "dppo_kl": Row(
        functools.partial(
            masked, mask=functools.partial(losses.divergence_mask, radius=0.05, divergence="kl")
        ),
        TOKENS, ("verl",),
    ),
    "clip_cov": Row(clip_cov, TOKENS, ("verl",), agrees=False),
    "kl_cov": Row(kl_cov, TOKENS, ("verl",)),
    "trpa": Row(trpa, TOKENS, ("trpa",)),
    "adpo": Row(adpo, TOKENS, ("verlm",)),
    "advantages_grpo": Row(
        lambda given: losses.group_relative(given["rewards"], group_size=GROUP)[:, None]
        * given["mask"],
        (), ("verl",),
    ),
    "advantages_rloo": Row(
        lambda given: losses.leave_one_out(given["rewards"], group_size=GROUP)[:, None]
        * given["mask"],
        (), ("verl",),
    ),
    "advantages_reinforce_plus_plus": Row(
        lambda given: losses.reinforce_plus_plus_advantages(placed(given), given["mask"]),
        (), ("verl",),
    ),
    "advantages_reinforce_plus_plus_baseline": Row(
        lambda given: losses.reinforce_plus_plus_baseline_advantages(
            given["rewards"], given["mask"], group_size=GROUP
        ),
        (), ("verl",),
    ),
    "sequence_trust_mask": Row(
        lambda given: losses.sequence_trust_mask(
            given["log_probs"], given["old_log_probs"], given["mask"], radius=0.005,
            criterion="mean", divergence="k3",
        ).astype(jnp.float32),
        (), ("verl",),
    ),
    "rollout_weights": Row(
        lambda given: losses.rollout_weights(
            given["log_probs"], given["old_log_probs"], given["mask"]
        ),
        (), ("verl",),
    ),
    **{
        f"dpo_{variant}": Row(
            dpo(variant), PAIR, ("trl", "plain") if variant == "sigmoid" else ("trl",)
        )
        for variant in VARIANTS
    },
    "kto": Row(kto, PAIR[:1], ("trl",)),
    "cpo": Row(without_reference(losses.cpo_loss, "chosen_lengths"), PAIR, ("trl",)),
    "simpo": Row(without_reference(losses.simpo_loss, *LENGTHS), PAIR, ("trl",)),
    "alphapo": Row(without_reference(losses.alphapo_loss, *LENGTHS), PAIR, ("trl",)),
    "orpo": Row(without_reference(losses.orpo_loss, *LENGTHS), PAIR, ("trl",)),
}  # fmt: skip
# What the peers' functions compute with the loss, for their logs.
WITH_METRICS = {"grpo": grpo_with_metrics, "dpo_sigmoid": dpo_with_metrics}
