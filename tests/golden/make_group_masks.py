"""Masks, weights, advantages and KL estimates by TRL's and verl's functions, for group_masks.json.

python tests/golden/make_group_masks.py, where torch, trl 1.16.0 and verl 0.9.1 are installed

The functions run as they are, in float64. Radii lie between the second and the third largest of
what they are compared with. Clip-Cov leaves out all candidates, as the share is 1: which of them a
smaller share leaves out is random.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from make_group import value_and_gradient, verl_loss
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig, PolicyLossConfig

BATCH, TIME, GROUP = 8, 6, 4
RANDOM = np.random.default_rng(1)


def tensors() -> dict[str, torch.Tensor]:
    old = RANDOM.normal(-1.5, 0.7, (BATCH, TIME)).clip(max=-0.05)
    mask = RANDOM.random((BATCH, TIME)) < 0.7  # with gaps, as tools leave them
    mask[5] = False
    mask[[0, 1]] = True
    arrays = {
        "log_probs": (old + RANDOM.normal(0, 0.4, old.shape)).clip(max=-0.02),
        "old_log_probs": old,
        "reference_log_probs": (old + RANDOM.normal(0, 0.4, old.shape)).clip(max=-0.02),
        "advantages": RANDOM.normal(size=BATCH),
        "mask": mask.astype(float),
    }
    return {name: torch.tensor(array) for name, array in arrays.items()}


def between(values: torch.Tensor) -> float:
    """A number between the second and the third largest value."""
    largest = torch.sort(values.flatten().abs()).values
    return float((largest[-2] + largest[-3]) / 2)


def trust_masks(given: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """verl's rejection by the estimates of the KL, of tokens and of answers."""
    log_ratio, mask = given["log_probs"] - given["old_log_probs"], given["mask"]
    estimates = {
        "k1": -log_ratio * mask,
        "k2": log_ratio**2 / 2 * mask,
        "k3": (log_ratio.exp() - 1 - log_ratio) * mask,
    }
    levels = {
        "token": lambda x: x,
        "sum": lambda x: x.sum(-1),
        "mean": lambda x: x.sum(-1) / mask.sum(-1).clamp(min=1),
        "max": lambda x: x.max(-1).values,
    }
    found = []
    for level, reduced in levels.items():
        for kind, values in estimates.items():
            if (level, kind) == ("max", "k1"):
                continue  # not in verl
            radius = between(reduced(values))
            name = f"token_{kind}" if level == "token" else f"seq_{level}_{kind}"
            # verl bounds the ratio exp(k1) by a number and its inverse.
            bound = float(np.exp(radius)) if kind == "k1" else radius
            kept, _ = rollout_corr_helper.compute_rollout_rejection_mask(
                log_ratio, mask, rollout_rs=name, rollout_rs_threshold=bound
            )
            found.append(
                {"criterion": level, "divergence": kind, "radius": radius, "mask": kept.tolist()}
            )
    return found


def weights(given: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    log_ratio, mask = given["log_probs"] - given["old_log_probs"], given["mask"]
    found = []
    for level in ("token", "sequence"):
        for lowest, highest in ((None, 1.3), (0.7, 1.3)):
            bound = highest if lowest is None else f"{lowest}_{highest}"
            values, _ = rollout_corr_helper.compute_rollout_correction_weights(
                log_ratio, mask, rollout_is=level, rollout_is_threshold=bound
            )
            numbers = {"level": level, "lowest": lowest, "highest": highest}
            numbers["mode"] = "truncate" if lowest is None else "mask"
            found.append({"numbers": numbers, "weights": values.tolist()})
    return found


def off_policy(given: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """TRL's mask, at a radius that leaves out some answers and at one that leaves out none."""
    return [
        {
            "radius": radius,
            "mask": GRPOTrainer.get_off_policy_mask(
                given["advantages"][:, None],
                given["log_probs"],
                given["old_log_probs"],
                given["mask"],
                radius,
            )[:, 0].tolist(),
        }
        for radius in (0.0, 0.05, 5.0)
    ]


def covariance(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """verl's losses with Clip-Cov and KL-Cov, on token advantages."""
    advantages = torch.tensor(RANDOM.normal(size=(BATCH, TIME)))
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}

    given = {**given, "advantages": advantages}

    def loss(mode: str, **numbers: Any) -> dict[str, Any]:
        policy = PolicyLossConfig(loss_mode=mode, **numbers)
        function = verl_loss(given, mode, "token-mean", policy_loss=policy, **clips)
        return value_and_gradient(function, given)

    bounds = {"clip_cov_lb": 0.1, "clip_cov_ub": 1.0}
    return {
        "advantages": advantages.tolist(),
        "clip_cov": loss("clip_cov", clip_cov_ratio=1.0, **bounds),
        "kl_cov": loss("kl_cov", kl_cov_ratio=0.2, ppo_kl_coef=0.5),
    }


def advantages_of_verl(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    mask = given["mask"]
    scores = torch.tensor(RANDOM.normal(size=BATCH))
    placed = torch.zeros(BATCH, TIME, dtype=torch.float64)
    last = (mask * torch.arange(1, TIME + 1)).argmax(-1)
    placed[torch.arange(BATCH), last] = scores
    rewarded = core_algos.compute_rewards(
        placed, given["old_log_probs"], given["reference_log_probs"], 0.1
    )
    index = np.arange(BATCH) // GROUP
    returns = core_algos.compute_reinforce_plus_plus_outcome_advantage
    by_group = {
        "grpo": core_algos.compute_grpo_outcome_advantage(placed, mask, index)[0],
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(
            placed, mask, index, norm_adv_by_std_in_grpo=False
        )[0],
        "rloo": core_algos.compute_rloo_outcome_advantage(placed, mask, index)[0],
        "rloo_vectorized": core_algos.compute_rloo_vectorized_outcome_advantage(
            placed, mask, index
        )[0],
        "reinforce_plus_plus_baseline":
            core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
                placed, mask, index
            )[0],
    }  # fmt: skip
    return {
        "rewards": scores.tolist(),
        "group_size": GROUP,
        "token_rewards": (rewarded * mask).tolist(),
        "beta": 0.1,
        **{name: values.tolist() for name, values in by_group.items()},
        "reinforce_plus_plus": [
            {
                "discount": discount,
                "advantages": returns(rewarded * mask, mask, SimpleNamespace(gamma=discount))[
                    0
                ].tolist(),
            }
            for discount in (1.0, 0.9)
        ],
    }


def rloo_loss(given: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """TRL's clipped loss on the ratios of answers."""
    mask = given["mask"]
    trainer = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.28, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    ids, entropies = torch.zeros(mask.shape, dtype=torch.long), torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
        "advantages": given["advantages"], "old_logps": (given["old_log_probs"] * mask).sum(1),
    }  # fmt: skip

    def loss(new: torch.Tensor) -> torch.Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new, entropies, None)
        return RLOOTrainer._compute_loss(trainer, None, inputs)

    return loss


def reinforce_loss(given: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """verl's REINFORCE, with the sum over the tokens of an answer."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    old, mask = given["old_log_probs"], given["mask"]
    wide = given["advantages"][:, None].expand_as(mask)
    function = core_algos.compute_policy_loss_reinforce
    return lambda new: function(old, new, wide, mask, config=config)[0]


def rloo(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The losses of RLOO, of answers with a token: TRL counts the others."""
    rows = given["mask"].sum(-1) > 0
    kept = {name: tensor[rows] for name, tensor in given.items()}
    return {
        "trl": value_and_gradient(rloo_loss(kept), kept),
        "verl": value_and_gradient(reinforce_loss(kept), kept),
    }


def reductions(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    modes = {
        "token_mean": "token-mean",
        "sequence_mean": "seq-mean-token-mean",
        "sequence_sum": "seq-mean-token-sum",
    }
    return {
        name: core_algos.agg_loss(given["log_probs"], given["mask"], mode).item()
        for name, mode in modes.items()
    }


def kl_estimates(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {}
    for kind in ("k1", "k2", "k3", "abs", "k1+", "k3+"):
        new = given["log_probs"].clone().requires_grad_(True)
        values = core_algos.kl_penalty(new, given["reference_log_probs"], kind)
        values.sum().backward()
        found[kind] = {"values": values.tolist(), "gradient": new.grad.tolist()}
    return found


def main() -> None:
    given = tensors()
    golden = {
        "origin": "tests/golden/make_group_masks.py: the libraries' functions, torch in float64.",
        "versions": {"trl": trl.__version__, "verl": "0.9.1", "torch": torch.__version__},
        "arguments": {name: tensor.tolist() for name, tensor in given.items()},
        "trust_masks": trust_masks(given),
        "weights": weights(given),
        "off_policy": off_policy(given),
        "covariance": covariance(given),
        "advantages": advantages_of_verl(given),
        "rloo": rloo(given),
        "reductions": reductions(given),
        "kl": kl_estimates(given),
    }
    path = Path(__file__).with_name("group_masks.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
