"""Losses of TRL, verl and the authors of TRPA and ADPO, timed on request.

python torch_sequence_losses.py INPUTS.npz [--trpa CHECKOUT] [--verlm CHECKOUT] [--threads N]

It runs in the environment that `build.sh torch` makes. After a line of JSON with the versions, the
programs, their values and gradients' norms, and why the others are missing, it reads the name of a
program per line, runs it once, and writes the seconds. The functions are called as the scripts of
tests/golden call them: most also compute metrics, which their trainers log. "plain" is the formula
alone, by hand.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "golden"))

Tensor = torch.Tensor
Loss = Callable[..., Tensor]
Programs = dict[str, tuple[Loss, tuple[str, ...]]]

TOKENS, PAIR = ("log_probs",), ("chosen", "rejected")


def plain_losses(given: dict[str, Tensor]) -> Programs:
    """The formulas alone, without metrics and without a library."""
    old, reference = given["old_log_probs"], given["reference_log_probs"]
    advantages, mask = given["advantages"][:, None], given["mask"]

    def grpo(new: Tensor) -> Tensor:
        ratio = torch.exp(new - old)
        losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        distance = reference - new
        losses = losses + 0.04 * (torch.exp(distance) - distance - 1)
        return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    margin = given["reference_chosen"] - given["reference_rejected"]

    def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - margin)).mean()

    return {"grpo": (grpo, TOKENS), "dpo_sigmoid": (dpo, PAIR)}


def trl_losses(given: dict[str, Tensor]) -> Programs:
    from make_group import trl_loss
    from make_group_masks import rloo_loss
    from make_preference import DPO_CASES, dpo_loss, kto_loss
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    of_tokens = functools.partial(trl_loss, given)
    near = {"low": 3e-4, "high": 4e-4}
    found: Programs = {
        "grpo": (of_tokens("grpo", "token", beta=0.04), TOKENS),
        "dr_grpo": (of_tokens("dr_grpo", "token"), TOKENS),
        "dapo": (of_tokens("dapo", "token"), TOKENS),
        "gspo": (of_tokens("grpo", "sequence", **near), TOKENS),
        "rloo": (rloo_loss(given), TOKENS),
        "cispo": (of_tokens("cispo", "token", high=5.0), TOKENS),
        "sapo": (of_tokens("sapo", "token"), TOKENS),
        "vespo": (of_tokens("vespo", "token"), TOKENS),
        "luspo": (of_tokens("luspo", "sequence", low=2e-3, high=2.5e-3), TOKENS),
    }
    lengths = torch.cat([given["chosen_lengths"], given["rejected_lengths"]]).to(torch.long)
    reference = torch.cat([given["reference_chosen"], given["reference_rejected"]])
    for variant, options in DPO_CASES.items():
        if variant == "sft":
            continue
        # An answer counts as one token, whose log-probability is the sum or the mean.
        scale = lengths if variant in ("ipo", "sigmoid_norm") else torch.ones_like(lengths)
        one = torch.ones_like(lengths)
        loss = dpo_loss(one, reference / scale, 1, [variant], beta=0.1, **options)

        def of_sums(
            chosen: Tensor, rejected: Tensor, loss: Loss = loss, scale: Tensor = scale
        ) -> Tensor:
            return loss((torch.cat([chosen, rejected]) / scale)[:, None])

        found[f"dpo_{variant}"] = (of_sums, PAIR)

    kto = kto_loss(
        given["desirable"] > 0, given["reference_chosen"], given["mismatched"],
        given["mismatched_reference"], "kto", beta=0.1, desirable_weight=1.0,
        undesirable_weight=1.0,
    )  # fmt: skip
    found["kto"] = (kto, PAIR[:1])
    sizes = given["chosen_lengths"], given["rejected_lengths"]
    accelerator = SimpleNamespace(device=torch.device("cpu"))

    def of_cpo(loss_type: str, nll: float, means: bool, **numbers: float) -> Loss:
        trainer = SimpleNamespace(
            accelerator=accelerator, loss_type=loss_type, label_smoothing=0.0,
            **{"alpha": 0.0, "simpo_gamma": 0.0} | numbers,
        )  # fmt: skip

        def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
            scores = (chosen / sizes[0], rejected / sizes[1]) if means else (chosen, rejected)
            value = CPOTrainer.cpo_loss(trainer, *scores)[0].mean()
            return value - nll * chosen.sum() / sizes[0].sum() if nll else value

        return loss

    found["cpo"] = (of_cpo("sigmoid", 1.0, False, beta=0.1), PAIR)
    found["simpo"] = (of_cpo("simpo", 0.0, True, beta=2.0, simpo_gamma=0.5), PAIR)
    found["alphapo"] = (of_cpo("simpo", 0.0, True, beta=2.5, simpo_gamma=0.1, alpha=0.25), PAIR)
    odds = SimpleNamespace(accelerator=accelerator, beta=0.1)

    def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
        losses = ORPOTrainer.odds_ratio_loss(odds, chosen / sizes[0], rejected / sizes[1])[0]
        return -chosen.sum() / sizes[0].sum() - losses.mean()

    return found | {"orpo": (orpo, PAIR)}


def verl_losses(given: dict[str, Tensor]) -> Programs:
    from make_group import verl_loss
    from make_group_masks import reinforce_loss
    from verl.trainer.ppo import core_algos, rollout_corr_helper
    from verl.workers.config import PolicyLossConfig

    of_tokens = functools.partial(verl_loss, given)
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    near = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    sequence, mask = "seq-mean-token-mean", given["mask"]

    def of_covariance(mode: str, **numbers: float) -> Loss:
        policy = PolicyLossConfig(loss_mode=mode, **numbers)
        return of_tokens(mode, "token-mean", policy_loss=policy, **clips)

    found: Programs = {
        "dapo_dual_clip": (of_tokens("vanilla", "token-mean", clip_ratio_c=3.0, **clips), TOKENS),
        "gspo": (of_tokens("gspo", sequence, **near), TOKENS),
        "reinforce": (reinforce_loss(given), TOKENS),
        "cispo": (
            of_tokens("cispo", "token-mean", clip_ratio_low=1.0, clip_ratio_high=4.0), TOKENS
        ),
        "sapo": (of_tokens("sapo", sequence), TOKENS),
        "gmpo": (of_tokens("geo_mean", "token-mean", **clips), TOKENS),
        "dppo_tv": (
            of_tokens("dppo_tv", "token-mean", clip_ratio_low=0.15, clip_ratio_high=0.15), TOKENS
        ),
        "dppo_kl": (
            of_tokens("dppo_kl", "token-mean", clip_ratio_low=0.05, clip_ratio_high=0.05), TOKENS
        ),
        "clip_cov": (of_covariance("clip_cov"), TOKENS),
        "kl_cov": (of_covariance("kl_cov", ppo_kl_coef=1.0), TOKENS),
    }  # fmt: skip
    last = torch.zeros_like(mask)
    last[torch.arange(len(mask)), mask.sum(-1).long() - 1] = 1
    placed, index = given["rewards"][:, None] * last, np.arange(len(mask)) // 8
    rejection = rollout_corr_helper.compute_rollout_rejection_mask
    correction = rollout_corr_helper.compute_rollout_correction_weights
    old, new = given["old_log_probs"], given["log_probs"]
    constants: dict[str, Callable[[], Tensor]] = {
        "advantages_grpo": lambda: core_algos.compute_grpo_outcome_advantage(placed, mask, index)[
            0
        ],
        "advantages_rloo": lambda: core_algos.compute_rloo_outcome_advantage(placed, mask, index)[
            0
        ],
        "advantages_reinforce_plus_plus": lambda: (
            core_algos.compute_reinforce_plus_plus_outcome_advantage(
                placed, mask, SimpleNamespace(gamma=1.0)
            )[0]
        ),
        "advantages_reinforce_plus_plus_baseline": lambda: (
            core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(placed, mask, index)[
                0
            ]
        ),
        "sequence_trust_mask": lambda: rejection(
            new - old, mask, rollout_rs="seq_mean_k3", rollout_rs_threshold=0.005
        )[0],
        "rollout_weights": lambda: correction(new - old, mask)[0],
    }
    return found | {
        name: (lambda _, constant=constant: constant(), ()) for name, constant in constants.items()
    }


def trpa_losses(given: dict[str, Tensor], checkout: Path) -> Programs:
    from make_preference import core_algos

    if not checkout.is_dir():
        raise ImportError(f"{checkout} is no checkout")
    module, mask = core_algos(checkout), given["mask"]

    def loss(new: Tensor) -> Tensor:
        preference, *_ = module.compute_pairwise_policy_loss(
            log_prob=new, ref_log_prob=given["reference_log_probs"], advantages=None,
            eos_mask=mask, beta=0.1, preference_levels=given["levels"].long(), anisotropy=2.5,
            id_tensor=given["group_ids"].long(),
        )  # fmt: skip
        distance = module.kl_penalty(new, given["old_log_probs"], "low_var_kl")
        return preference + 0.001 * module.verl_F.masked_mean(distance, mask)

    return {"trpa": (loss, TOKENS)}


def adpo_losses(given: dict[str, Tensor], checkout: Path) -> Programs:
    from make_anchored import SECOND, Config, functions, source

    if not checkout.is_dir():
        raise ImportError(f"{checkout} is no checkout")
    text = source(str(checkout), SECOND, "verl/trainer/adpo/core_algos.py")
    function = functions(text, "adpo_policy_loss")["adpo_policy_loss"]
    options = Config(tau=0.8, num_generations=8, beta_reward=0.5, use_adaptive_tau=False)
    options["algorithm"] = options
    rewards = given["rewards"]
    return {
        "adpo": (
            lambda new: function(
                given["old_log_probs"], new, rewards, given["mask"], config=options,
                rewards=rewards,
            )[0],
            TOKENS,
        )
    }  # fmt: skip


class Timed:
    """A program that returns the seconds of a value and a gradient, or of constants alone."""

    def __init__(self, given: dict[str, Tensor], loss: Loss, names: tuple[str, ...]) -> None:
        self.leaves = [given[name].clone().requires_grad_() for name in names]
        self.loss = loss if names else lambda: loss(None)
        self.value: Tensor | None = None

    def __call__(self) -> float:
        for leaf in self.leaves:
            leaf.grad = None
        with contextlib.redirect_stdout(io.StringIO()):  # TRPA's code prints
            started = time.perf_counter()
            self.value = self.loss(*self.leaves)
            if self.leaves:
                self.value.backward()
            return time.perf_counter() - started

    def result(self) -> dict[str, float]:
        """The sum of the values, and the norm of the gradient, or of what has none."""
        assert self.value is not None
        value = self.value.detach().double()
        measured = [leaf.grad for leaf in self.leaves if leaf.grad is not None] or [value]
        norm = sum(float((each.double() ** 2).sum()) for each in measured) ** 0.5
        return {"value": float(value.sum()), "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--trpa", type=Path, default=Path("trpa"))
    parser.add_argument("--verlm", type=Path, default=Path("verlm"))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {name: torch.from_numpy(array) for name, array in np.load(options.inputs).items()}
    libraries = {
        "plain": plain_losses,
        "trl": trl_losses,
        "verl": verl_losses,
        "trpa": functools.partial(trpa_losses, checkout=options.trpa),
        "verlm": functools.partial(adpo_losses, checkout=options.verlm),
    }
    programs: dict[str, Timed] = {}
    missing = {}
    for library, losses in libraries.items():
        try:
            found: dict[str, Any] = losses(given)
        except ImportError as error:
            missing[library] = str(error)
            continue
        programs |= {f"{library}/{name}": Timed(given, *each) for name, each in found.items()}
    for program in programs.values():
        program()
    packages = {each.name: each.version for each in importlib.metadata.distributions()}
    about = {
        "versions": {name: packages[name] for name in ("torch", "trl", "verl") if name in packages},
        "threads": torch.get_num_threads(),
        "missing": missing,
        "results": {name: program.result() for name, program in programs.items()},
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(programs[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
