"""Writes tests/golden/preference.json: losses of preferences by TRL's and TRPA's own code.

Needs trl 1.16.0 with torch, and a checkout of XueruiSu/Trust-Region-Preference-Approximation:
    python tests/golden/make_preference.py CHECKOUT

The loss methods of TRL's trainers run as they are, on an object that has the attributes they read
and a model that returns given log-probabilities. Numbers are float64, but for the alpha divergence,
the label of EXO and the odds of ORPO, where TRL itself computes in float32.
"""

import importlib.util
import json
import os
import sys
import tempfile
import types
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PAIRS, TIME = 6, 5
IDENTITY = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)
DPO_CASES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.07},
    "sft": {},
}
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def random_tokens(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, 0 behind the end, and lengths."""
    lengths = generator.integers(1, TIME + 1, rows)
    inside = np.arange(TIME) < lengths[:, None]
    return np.where(inside, -generator.exponential(1.0, (rows, TIME)), 0.0), lengths


def dpo_loss(lengths, reference, time, loss_types, weights=None, **options):
    """The mean loss of TRL's DPOTrainer as a function of the log-probabilities of tokens."""
    rows = len(lengths)
    mask = torch.zeros(rows, time + 1, dtype=torch.long)
    mask[:, 1:] = torch.arange(time) < torch.as_tensor(lengths)[:, None]
    outputs = SimpleNamespace(
        entropy=torch.zeros(rows, time),
        mean_logits=torch.zeros(rows, time),
        is_top1=torch.zeros(rows, time, dtype=torch.bool),
    )
    numbers = {"label_smoothing": 0.0, "discopop_tau": 0.05, "f_alpha_divergence_coef": 0.5}
    numbers |= {"f_divergence_type": "reverse_kl", "beta": 0.3} | options
    trainer = SimpleNamespace(
        **numbers, model=SimpleNamespace(training=True), accelerator=IDENTITY,
        args=SimpleNamespace(discopop_tau=numbers["discopop_tau"]), aux_loss_enabled=False,
        precompute_ref_logps=True, ld_alpha=None, use_weighting=False, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        loss_types=loss_types, loss_weights=weights or [1.0],
    )  # fmt: skip
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros(rows, time + 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, time + 1, dtype=torch.long),
        "completion_mask": mask, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip

    def loss(log_probs):
        outputs.log_probs = log_probs
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    return loss


def dpo(tokens, lengths, reference, loss_types, weights=None, dtype=torch.float64, **options):
    """The mean loss of TRL's DPOTrainer and its gradient with respect to the token sums."""
    log_probs = torch.tensor(tokens, dtype=dtype, requires_grad=True)
    reference = torch.tensor(reference, dtype=dtype)
    function = dpo_loss(lengths, reference, tokens.shape[1], loss_types, weights, **options)
    loss = function(log_probs)
    loss.backward()
    return loss.item(), log_probs.grad[:, 0].tolist()


def dpo_cases(generator):
    tokens, lengths = random_tokens(generator, 2 * PAIRS)
    reference = tokens.sum(1) + generator.normal(0, 1.5, 2 * PAIRS)
    given = (tokens, lengths, reference)
    cases = []

    def add(variant, dtype=torch.float64, **options):
        mean, gradient = dpo(*given, [variant], dtype=dtype, **options)
        each = None  # AOT and the likelihood mix the pairs
        if variant not in ("aot", "aot_unpaired", "sft"):
            rows = ([i, i + PAIRS] for i in range(PAIRS))
            each = [dpo(*(x[r] for x in given), [variant], dtype=dtype, **options)[0] for r in rows]
        single = dtype == torch.float32 or variant == "exo_pair"
        cases.append(
            {"variant": variant, "options": options, "mean": mean, "each": each,
             "gradient": gradient, "float32": single}
        )  # fmt: skip

    for variant, options in DPO_CASES.items():
        add(variant, **options)
    for variant in OF_DIVERGENCES:
        for divergence in DIVERGENCES:
            dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64
            options = {"f_divergence_type": divergence} | DPO_CASES[variant]
            if divergence == "alpha_divergence":
                options["f_alpha_divergence_coef"] = 0.7
            add(variant, dtype=dtype, **options)
    mean, gradient = dpo(*given, ["sigmoid", "sft"], weights=[1.0, 0.5])
    return {
        "beta": 0.3, "sums": tokens.sum(1).tolist(), "lengths": lengths.tolist(),
        "reference": reference.tolist(), "cases": cases,
        "rpo": {"rpo_alpha": 0.5, "mean": mean, "gradient": gradient},
    }  # fmt: skip


def kto_loss(labels, reference, policy_kl, reference_kl, variant, **numbers):
    """The mean loss of TRL's KTOTrainer as a function of the log-probabilities of answers."""
    rows = len(reference)
    outputs = SimpleNamespace(entropy=torch.zeros(rows, 1), mean_logits=torch.zeros(rows, 1))
    trainer = SimpleNamespace(
        **numbers, model=SimpleNamespace(training=True), accelerator=IDENTITY, loss_type=variant,
        _tp_size=1, calculate_KL=variant == "kto", precompute_ref_logps=True,
        aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _compute_kl_logps=lambda *_: policy_kl,
    )  # fmt: skip
    mask = torch.tensor([[0, 1]] * rows)
    inputs = {
        "input_ids": torch.zeros(rows, 2, dtype=torch.long), "attention_mask": mask,
        "completion_mask": mask, "label": labels, "ref_logps": reference,
        "ref_KL_logps": reference_kl,
    }  # fmt: skip

    def loss(log_probs):
        outputs.log_probs = log_probs[:, None]
        return KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    return loss


def kto_cases(generator):
    policy, reference, policy_kl, reference_kl = generator.normal(-20, 2, (4, PAIRS))
    labels = [True, False, True, True, False, True]
    numbers = {"beta": 0.2, "desirable_weight": 0.8, "undesirable_weight": 1.3}
    cases = []
    for variant in ("kto", "apo_zero_unpaired"):
        for shift in (3.0, -6.0):  # the second one makes the mean negative, which is clamped
            log_probs = torch.tensor(policy, requires_grad=True)
            shifted = policy_kl + shift
            constants = map(torch.tensor, (labels, reference, shifted, reference_kl))
            loss = kto_loss(*constants, variant, **numbers)(log_probs)
            loss.backward()
            cases.append(
                {"variant": variant, "policy_kl": shifted.tolist(), "mean": loss.item(),
                 "gradient": log_probs.grad.tolist()}
            )  # fmt: skip
    arrays = {"policy": policy, "reference": reference, "reference_kl": reference_kl}
    return {k: v.tolist() for k, v in arrays.items()} | {
        "numbers": numbers, "labels": labels, "cases": cases
    }  # fmt: skip


def reference_free_cases(generator):
    """CPO, SimPO, AlphaPO and ORPO, whose methods take sums or means per answer."""
    tokens, lengths = random_tokens(generator, 2 * PAIRS)
    cases = []

    def add(name, trainer_class, method, **options):
        sums = torch.tensor(tokens.sum(1), requires_grad=True)
        means = name == "orpo" or options["loss_type"] in ("ipo", "simpo")
        scale = torch.tensor(lengths) if means else 1
        chosen, rejected = (sums / scale).chunk(2)
        nll = -sums[:PAIRS].sum() / lengths[:PAIRS].sum()
        trainer = SimpleNamespace(accelerator=IDENTITY, aux_loss_enabled=False, **options)
        loss_of = getattr(trainer_class, method)
        setattr(trainer, method, lambda *x: loss_of(trainer, *x))
        trainer.concatenated_forward = lambda *_: (chosen, rejected, chosen, rejected, nll)
        loss, _ = trainer_class.get_batch_loss_metrics(trainer, None, {})
        loss.backward()
        cases.append(
            {"name": name, "options": options, "mean": loss.item(), "gradient": sums.grad.tolist()}
        )

    cpo = {"alpha": 0.0, "beta": 0.4, "cpo_alpha": 0.7, "label_smoothing": 0.0}
    for variant in ("sigmoid", "hinge", "ipo"):
        add("cpo", CPOTrainer, "cpo_loss", **cpo, loss_type=variant)
    add("cpo", CPOTrainer, "cpo_loss", **cpo | {"label_smoothing": 0.1}, loss_type="sigmoid")
    simpo = {"loss_type": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0, "beta": 2.0}
    for alpha in (0.0, 0.25, -0.5):
        for smoothing in (0.0, 0.1):
            options = simpo | {"alpha": alpha, "label_smoothing": smoothing}
            add("simpo", CPOTrainer, "cpo_loss", **options)
    add("orpo", ORPOTrainer, "odds_ratio_loss", beta=0.2)
    return {"sums": tokens.sum(1).tolist(), "lengths": lengths.tolist(), "cases": cases}


def core_algos(checkout: Path):
    """The authors' module, without the packages around it that need a cluster's libraries."""
    os.environ["SAVE_DIR"], os.environ["EXP_NAME"] = tempfile.mkdtemp(), "golden"
    for name in ("verl", "verl.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules.setdefault("tensordict", SimpleNamespace(TensorDict=None))

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, checkout / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    functional = load("verl.utils.torch_functional", "verl/utils/torch_functional.py")
    sys.modules["verl.utils"].torch_functional = functional
    sys.modules["verl"].utils = sys.modules["verl.utils"]
    return load("core_algos", "verl/trainer/ppo/core_algos.py")


def trpa_cases(generator, checkout: Path):
    module, rows = core_algos(checkout), 12
    tokens, lengths = random_tokens(generator, rows)
    mask = torch.tensor((np.arange(TIME) < lengths[:, None]).astype(float))
    noise = generator.normal(0, 0.8, (2, rows, TIME))
    reference, old = tokens + noise[0], tokens + noise[1]
    groups = generator.permutation(np.repeat([3, 5, 9], 4))
    cases = []
    for levels in (generator.integers(1, 5, rows), groups // 3):
        for root in (False, True):
            log_probs = torch.tensor(tokens, requires_grad=True)
            loss, *_ = module.compute_pairwise_policy_loss(
                log_prob=log_probs, ref_log_prob=torch.tensor(reference), advantages=None,
                eos_mask=mask, beta=0.2, preference_levels=torch.tensor(levels), anisotropy=2.5,
                id_tensor=torch.tensor(groups),
            )  # fmt: skip
            # The total as in verl/workers/actor/dp_actor.py.
            kl = module.kl_penalty(log_probs, torch.tensor(old), "low_var_kl")
            kl = module.verl_F.masked_mean(kl, mask)
            total = loss + 0.3 * (torch.sqrt(kl + 0.25) if root else kl)
            total.backward()
            cases.append(
                {"levels": levels.tolist(), "root": root, "preference": loss.item(),
                 "kl": kl.item(), "total": total.item(), "gradient": log_probs.grad.tolist()}
            )  # fmt: skip
    arrays = {"log_probs": tokens, "reference": reference, "old": old, "lengths": lengths}
    numbers = {"beta": 0.2, "kappa": 2.5, "trust_coefficient": 0.3}
    return {k: v.tolist() for k, v in arrays.items()} | {
        "group_ids": groups.tolist(), "numbers": numbers, "cases": cases
    }  # fmt: skip


def main() -> None:
    generator = np.random.default_rng(0)
    golden = {
        "origin": {
            "trl": f"huggingface/trl {trl.__version__}, PyPI",
            "trpa": "XueruiSu/Trust-Region-Preference-Approximation, commit f372585",
            "torch": torch.__version__,
            "script": "tests/golden/make_preference.py",
        },
        "dpo": dpo_cases(generator),
        "kto": kto_cases(generator),
        "reference_free": reference_free_cases(generator),
        "trpa": trpa_cases(generator, Path(sys.argv[1])),
    }
    path = Path(__file__).with_name("preference.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
