"""Values and gradients of TRL's and verl's losses, for group.json.

python tests/golden/make_group.py, where torch, trl 1.16.0 and verl 0.9.1 are installed

The functions of both libraries run as they are, in float64. TRL's loss is a method of its trainer;
it is called with an object that holds what the method reads.
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
import verl
from trl.trainer.grpo_trainer import GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

RANDOM = np.random.default_rng(0)
BATCH, TIME = 6, 5


def tensors() -> dict[str, torch.Tensor]:
    old = RANDOM.normal(-1.5, 0.7, (BATCH, TIME)).clip(max=-0.05)
    arrays = {
        "log_probs": (old + RANDOM.normal(0, 0.4, old.shape)).clip(max=-0.02),
        "old_log_probs": old,
        "reference_log_probs": (old + RANDOM.normal(0, 0.4, old.shape)).clip(max=-0.02),
        "advantages": RANDOM.normal(size=BATCH),
        "mask": (np.arange(TIME) < RANDOM.integers(1, TIME + 1, (BATCH, 1))).astype(float),
    }
    return {name: torch.tensor(array) for name, array in arrays.items()}


def value_and_gradient(loss: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    new = given["log_probs"].clone().requires_grad_(True)
    value = loss(new)
    value.backward()
    return {"value": value.item(), "gradient": new.grad.tolist()}


def verl_loss(
    given: dict[str, torch.Tensor], mode: str, reduction: str, **numbers: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """verl's loss as a function of the log-probabilities."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **numbers)
    old, advantages, mask = (given[name] for name in ("old_log_probs", "advantages", "mask"))
    wide = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(old).contiguous()
    function = core_algos.get_policy_loss_fn(mode)
    return lambda new: function(old, new, wide, mask, loss_agg_mode=reduction, config=config)[0]


def trl_loss(
    given: dict[str, torch.Tensor], loss_type: str, level: str, **numbers: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """TRL's loss as a function of the log-probabilities."""
    settings = {
        "delta": None,
        "use_bias_correction_kl": False,
        "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    beta = numbers.pop("beta", 0.0)
    low, high = numbers.pop("low", 0.2), numbers.pop("high", 0.28)
    batch, time = given["mask"].shape
    trainer = SimpleNamespace(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(**{**settings, **numbers}),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=time,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(batch, 1, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 1, dtype=torch.long),
        "completion_ids": torch.zeros(batch, time, dtype=torch.long),
        "completion_mask": given["mask"],
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_log_probs"],
        "ref_per_token_logps": given["reference_log_probs"],
        "num_items_in_batch": given["mask"].sum(),
    }
    entropies = torch.zeros_like(given["mask"])

    def loss(new: torch.Tensor) -> torch.Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new, entropies, None)
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


def main() -> None:
    given = tensors()
    of_trl = lambda *rest, **numbers: value_and_gradient(trl_loss(given, *rest, **numbers), given)
    of_verl = lambda *rest, **numbers: value_and_gradient(verl_loss(given, *rest, **numbers), given)
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    cases = {
        "trl/grpo": of_trl("grpo", "token", beta=0.04),
        "trl/grpo_delta": of_trl("grpo", "token", delta=1.5),
        "trl/dapo": of_trl("dapo", "token"),
        "trl/dr_grpo": of_trl("dr_grpo", "token"),
        "trl/gspo": of_trl("grpo", "sequence", low=0.03, high=0.04),
        "trl/luspo": of_trl("luspo", "sequence", low=0.03, high=0.04),
        "trl/cispo": of_trl("cispo", "token", high=1.2),
        "trl/sapo": of_trl("sapo", "token"),
        "trl/vespo": of_trl("vespo", "token"),
        "verl/vanilla": of_verl("vanilla", "token-mean", clip_ratio_c=1.5, **clips),
        "verl/grpo": of_verl("vanilla", "seq-mean-token-mean", clip_ratio_c=9.0, **clips),
        "verl/gspo": of_verl("gspo", "seq-mean-token-mean", **clips),
        "verl/cispo": of_verl("cispo", "token-mean", **clips),
        "verl/sapo": of_verl("sapo", "seq-mean-token-mean"),
        "verl/gmpo": of_verl("geo_mean", "token-mean", **clips),
        "verl/dppo_tv": of_verl("dppo_tv", "token-mean", clip_ratio_low=0.05, clip_ratio_high=0.08),
        "verl/dppo_kl": of_verl("dppo_kl", "token-mean", clip_ratio_low=0.01, clip_ratio_high=0.02),
    }
    golden = {
        "origin": "tests/golden/make_group.py: the libraries' own functions, torch in float64.",
        "versions": {
            "trl": trl.__version__,
            "verl": getattr(verl, "__version__", "0.9.1"),
            "torch": torch.__version__,
        },
        "arguments": {name: tensor.tolist() for name, tensor in given.items()},
        "cases": cases,
    }
    path = Path(__file__).with_name("group.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
