"""Odd values, names and targets for the fuzz tests."""

import random
from typing import Any

TARGETS = [
    "os.system", "builtins.eval", "builtins.open", "builtins.__import__", "subprocess.run",
    "shutil.rmtree", "pathlib.Path.write_text", "numpy.save", "jax.numpy.save", "optax.jnp.save",
    "trustjax.models.save_pretrained", "trustjax.models.checkpoint.save_pretrained",
    "trustjax.models.checkpoint.os.system", "trustjax.agents.policy.Policy.save",
    "trustjax.agents.Policy", "trustjax.agents.load_policy", "experiments.run.main",
    "experiments.sweep.main", "experiments.report.main", "experiments.play.main",
    "experiments.runtime.session.train_in_folder", "experiments.runtime.files.write_text",
    "experiments.runtime.config.save_config",
    "experiments.trackers.Csv", "experiments.trackers.TensorBoard",
    "experiments.trackers.read_rows",
    "experiments.trackers.mlflow.Mlflow", "experiments.runtime.checkpoint.Checkpoints",
    "experiments.runtime.loop.train", "experiments.analysis.plots.save", "hydra.utils.instantiate",
    "hydra.utils.get_method", "flax.serialization.from_bytes", "flax.linen.Dense",
    "flax.training.checkpoints.save_checkpoint", "flax.linen.tabulate", "flax.nnx.display",
    "optax.sgd", "optax.adamw", "optax.chain", "optax.contrib.muon", "optax.contrib.sam",
    "optax.inject_hyperparams", "optax.MultiSteps", "optax._src.alias.sgd", "optax.masked",
    "optax.constant_schedule", "optax.losses.l2_loss", "optax.GradientTransformation",
    "trustjax.optim.sam", "trustjax.optim.tram", "trustjax.optim.auon",
    "trustjax.optim.alternating",
    "trustjax.optim.natural_gradient", "trustjax.geometry.p_norm", "trustjax.geometry.mmd",
    "trustjax.losses.gae", "trustjax.models.MLP", "trustjax.models.build_vit",
    "trustjax.models.pretrained_vit", "trustjax.data.hugging_face", "trustjax.data.digits",
    "trustjax.parallel.make_mesh", "trustjax.agents.ppo.Config", "trustjax.agents.algorithm.adam",
    "experiments.optimizers.Optimizer", "experiments.optimizers.Method",
    "experiments.penalties.Penalty", "experiments.penalties.UnderNoise",
    "experiments.matrices.matrices_and_others", "experiments.tasks.two_minima.TwoMinima",
    "experiments.tasks.mirror.Mirror", "experiments.tasks.reinforcement.Reinforcement",
    "experiments.tasks.nothing.Nothing", "", ".", "optax", "optax.", "sgd",
]  # fmt: skip
TEXTS = [
    "", " ", "abc", "a=b", "#", "(", "[", "\u00fc", "\u65e5\u672c", "~", "~/x", "/etc/passwd",
    "../x",
    "null", "true", "1e400", "-1", "0x10", "1_000", "${seed}", "${oc.env:HOME}", "${hydra:job.num}",
    "${oc.create:{_target_: os.system}}", "???", "%s", "{}", "[]", "\\", "'", '"', "\n", "\t",
    "a:b",
    "a,b", "1,2", "*", "&a", "!!x", "$(touch x)", "`touch x`", "x" * 300, "nan", "inf", "_target_",
]  # fmt: skip
NAMES = ["_target_", "_partial_", "_args_", "_recursive_", "_convert_", "_mode_", "_", "a", "seed"]


def value(draw: random.Random, depth: int = 0) -> Any:
    """Plain data."""
    kind = draw.randrange(14 if depth < 3 else 10)
    if kind < 3:
        return draw.choice(TEXTS)
    if kind < 6:
        numbers = [0, 1, -1, 2, 64, 10**6, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400]
        return draw.choice(numbers)
    if kind < 8:
        return draw.choice([0.0, -0.5, 1e-300, 1e300, float("inf"), float("nan"), 0.1])
    if kind < 10:
        return draw.choice([None, True, False])
    if kind < 11:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind < 12:
        nested: Any = 1
        for _ in range(draw.choice([2, 10, 30, 300]) if depth == 0 else 2):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        return nested
    node = {"_target_": draw.choice(TARGETS)} if draw.random() < 0.7 else {}
    for _ in range(draw.randrange(3)):
        name = draw.choice([*NAMES, "path", "folder", "learning_rate", "value", "name"])
        node[name] = value(draw, depth + 1)
    return node
