"""Writes tests/golden/anchored.json: values and gradients of the author's code of ADPO.

Needs torch (made with 2.13.0) and clones of wk222/verlm and wk222/TRL-ADPO, whose functions are run
from their source as they are, without the packages around them:
    python tests/golden/make_anchored.py VERLM TRL_ADPO
"""

import ast
import json
import logging
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIRST, SECOND = "88f702e7", "8f11e858"  # 23 and 29 November 2025
LATEST = "b79d8f45"
TRL_LATEST = "7705479"
GROUPS, SIZE, TIME = 4, 5, 6


def source(repository: str, commit: str, path: str) -> str:
    command = ["git", "-C", repository, "show", f"{commit}:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(text: str, *names: str) -> dict[str, Any]:
    """The named functions or methods of a source, without decorators, compiled as they are."""
    around = vars(torch.nn.functional) | {
        "torch": torch, "F": torch.nn.functional, "np": np, "Any": Any, "DictConfig": dict,
        "logger": logging.getLogger("adpo"), "dist": torch.distributed,
    }  # fmt: skip
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            code = textwrap.dedent(ast.unparse(node))
            exec("from __future__ import annotations\n" + code, around)
    return {name: around[name] for name in names}


class Config(dict):
    """A configuration as the code reads it, by attribute and by `get`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def inputs() -> dict[str, torch.Tensor]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, TIME + 1, GROUPS * SIZE)
    arrays = {
        "log_probs": -random.exponential(1.0, (GROUPS * SIZE, TIME)),
        "old_log_probs": -random.exponential(1.0, (GROUPS * SIZE, TIME)),
        "mask": (np.arange(TIME) < lengths[:, None]).astype(float),
        "rewards": random.normal(size=GROUPS * SIZE),
        "entropies": random.exponential(1.0, (GROUPS * SIZE, TIME)),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def value_and_gradient(loss: Any, log_probs: torch.Tensor) -> dict[str, Any]:
    leaf = log_probs.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return {"value": value.item(), "gradient": leaf.grad.tolist()}


def verlm_losses(repository: str, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Three generations of the trainer's loss, with a fixed and with an adaptive temperature."""
    path = "verl/trainer/adpo/core_algos.py"
    found = {}
    for commit in (FIRST, SECOND):
        loss_fn = functions(source(repository, commit, path), "adpo_policy_loss")
        for adaptive in (False, True):
            options = Config(
                tau=0.8, num_generations=SIZE, beta_reward=0.5, use_adaptive_tau=adaptive,
                adaptive_tau_alpha=0.5, adaptive_tau_beta=0.5, adaptive_tau_min=0.05,
                adaptive_tau_max=5.0, vocab_size=50,
            )  # fmt: skip
            options["algorithm"] = options

            def loss(log_probs: torch.Tensor, loss_fn=loss_fn, options=options) -> torch.Tensor:
                return loss_fn["adpo_policy_loss"](
                    given["old_log_probs"], log_probs, given["rewards"], given["mask"],
                    config=options, rewards=given["rewards"],
                )[0]  # fmt: skip

            name = f"{commit}{'_adaptive' if adaptive else ''}"
            found[name] = value_and_gradient(loss, given["log_probs"])

    # The softmax variant raises unless it is given the target. The Plackett-Luce variant, the
    # default of this commit, always raises; `rankings` therefore runs its inner function.
    loss_fn = functions(source(repository, LATEST, path), "adpo_policy_loss")
    target = torch.softmax(given["rewards"].reshape(GROUPS, SIZE) / 0.3, -1).flatten()
    options = Config(
        loss_variant="softmax", num_generations=SIZE, clip_log_ratio=0.0, clip_anchored_score=0.0
    )
    found[LATEST] = value_and_gradient(
        lambda log_probs: loss_fn["adpo_policy_loss"](
            given["old_log_probs"], log_probs, given["rewards"], given["mask"],
            config=options, q_target=target,
        )[0],
        given["log_probs"],
    )  # fmt: skip
    return found


def trl_losses(repository: str, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    text = source(repository, TRL_LATEST, "trl/trainer/adpo_trainer.py")
    loss_fn = functions(text, "_compute_loss")["_compute_loss"]
    found = {}
    for adaptive in (False, True):
        arguments = Config(
            tau=1.0, beta_reward=0.5, use_adaptive_tau=adaptive, adaptive_tau_alpha=0.5,
            adaptive_tau_beta=1.0, adaptive_tau_min=0.1, adaptive_tau_max=5.0, beta_anchor_kl=0.0,
            drop_all_failed_prompts=False, use_q_centering=True,
        )  # fmt: skip

        def loss(log_probs: torch.Tensor, arguments=arguments) -> torch.Tensor:
            trainer = types.SimpleNamespace(
                args=arguments, num_generations=SIZE, current_gradient_accumulation_steps=1,
                model=Config(config=Config(vocab_size=50), training=True),
                accelerator=types.SimpleNamespace(gather=lambda x: x), _metrics=Metrics(),
                _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, given["entropies"]),
            )  # fmt: skip
            ids = torch.zeros_like(given["mask"])
            batch = {
                "advantages": given["rewards"], "rewards": given["rewards"], "prompt_ids": ids,
                "prompt_mask": ids, "completion_ids": ids, "completion_mask": given["mask"],
                "old_per_token_logps": given["old_log_probs"],
            }  # fmt: skip
            return loss_fn(trainer, None, batch)

        name = "adaptive" if adaptive else "fixed"
        found[name] = value_and_gradient(loss, given["log_probs"])
    return found


class Metrics(dict):
    """Takes whatever is logged."""

    def __missing__(self, name: str) -> Any:
        self[name] = Metrics()
        return self[name]

    def append(self, value: Any) -> None:
        pass


def rankings(repository: str) -> list[dict[str, Any]]:
    """The Plackett-Luce loss under several of its options."""
    text = source(repository, LATEST, "verl/trainer/adpo/core_algos.py")
    loss_fn = functions(text, "_compute_plackett_luce_loss")["_compute_plackett_luce_loss"]
    random = np.random.default_rng(1)
    found = []
    for options in (
        {},
        {"top_k": 2},
        {"temperature": 1.7},
        {"label_smoothing": 0.1},
        {"use_poly_loss": True, "epsilon": 0.7},
        {"top_k": 3, "label_smoothing": 0.2, "use_poly_loss": True, "temperature": 0.4},
    ):
        scores, rewards = random.normal(size=(2, GROUPS, SIZE))
        numbers = value_and_gradient(
            lambda u, rewards=rewards, options=options: loss_fn(
                u, torch.from_numpy(rewards), **options
            ),
            torch.from_numpy(3 * scores),
        )
        found.append(
            {"options": options, "scores": (3 * scores).tolist(), "rewards": rewards.tolist()}
            | numbers
        )
    return found


def helpers(repository: str) -> dict[str, Any]:
    """The adaptive temperature, the moving average and the trigger of the first generation."""
    names = (
        "compute_adaptive_tau",
        "update_anchor_policy_ema",
        "should_update_anchor_kl_triggered",
    )
    found = functions(source(repository, FIRST, "verl/trainer/adpo/utils.py"), *names)
    random = np.random.default_rng(2)
    target = torch.softmax(torch.from_numpy(random.normal(0, 2, (GROUPS, SIZE))), -1)
    weights = torch.from_numpy(random.normal(size=(4, 3)))
    anchor, policy = (
        torch.nn.ParameterList([torch.nn.Parameter(weights[0].clone())]) for _ in range(2)
    )
    for step in weights[1:]:
        policy[0].data = step
        found["update_anchor_policy_ema"](anchor, policy, alpha=0.9)
    distances = random.uniform(0.0, 0.2, 40).tolist()
    triggered, window = [], []
    for distance in distances:
        window.append(distance)
        due = found["should_update_anchor_kl_triggered"](window[-5:], 0.1, 5)
        triggered.append(bool(due))
        window = [] if due else window  # The caller's part, which the trainer never had.
    return {
        "target": target.tolist(),
        "temperature": found["compute_adaptive_tau"](target, 0.8, num_generations=SIZE).tolist(),
        "weights": weights.tolist(),
        "average": anchor[0].tolist(),
        "distances": distances,
        "triggered": triggered,
    }


def main(verlm: str, trl_adpo: str) -> None:
    given = inputs()
    golden = {
        "origin": f"torch {torch.__version__}; wk222/verlm {FIRST}, {SECOND}, {LATEST}; "
        f"wk222/TRL-ADPO {TRL_LATEST}; functions run from their source, float64",
        "inputs": {name: tensor.tolist() for name, tensor in given.items()},
        "groups": [GROUPS, SIZE],
        "verlm": verlm_losses(verlm, given),
        "trl_adpo": trl_losses(trl_adpo, given),
        "rankings": rankings(verlm),
        "helpers": helpers(verlm),
    }
    path = Path(__file__).parent / "anchored.json"
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
