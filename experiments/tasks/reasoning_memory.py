"""An estimate of the memory that learning from rewards takes, before anything is loaded."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime.memory import GIB, array_bytes, describe, residual_bytes
from trustjax._checks import FieldError
from trustjax.agents.language import Config, answer_statistics
from trustjax.models.lora import lora_factors

PyTree = Any


def check_memory(
    configs: dict[str, Config], seeds: int, evaluated: int, limit_gib: float | None
) -> str:
    """The estimate of the method that takes most, in one line.

    Args:
      configs: The methods; `base_params` and `initial_params` may be shapes.
      seeds: Number of trainings side by side.
      evaluated: Answers of the final evaluation, which are drawn together.
      limit_gib: GiB that a device has; None for what it says, or the memory of the host.

    Raises FieldError, which names the overrides that help, if there is not enough.
    """
    estimates = {name: estimate(config, seeds, evaluated) for name, config in configs.items()}
    name = max(estimates, key=lambda name: estimates[name]["total"])
    parts, config = estimates[name], configs[name]
    available = limit_gib if limit_gib is not None else device_gib(config)
    if parts["total"] > available:
        largest = max((part for part in parts if part != "total"), key=lambda part: parts[part])
        got = f"{available:.2f} ({name}: {describe(parts)})"
        raise FieldError(
            "memory_gib", f"be >= {parts['total']:.2f}", got, advice=_advice(name, config, largest)
        )
    return f"{name}: {describe(parts)}"


def estimate(config: Config, seeds: int, evaluated: int) -> dict[str, float]:
    """GiB on each device, by purpose, and their sum, "total".

    Arrays are counted by their shapes, so that the compiler may need somewhat more (scratch space)
    or less (it fuses operations). "copies" are the weights that LoRA changes, and those that are
    gathered or rounded for sampling; "cache" holds the keys and values of all answers that are
    drawn together; "activations" is what the forward pass of a step keeps for the backward pass.
    """
    devices = 1 if config.mesh is None else config.mesh.size
    split = devices if config.shard_params else 1
    whole = jax.eval_shape(
        lambda: config.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    )
    base = {} if config.base_params is None else whole
    trained = jax.eval_shape(config.agent().init, jax.random.key(0)).params
    optimizer = jax.eval_shape(config.optimizer(1e-3).init, trained)
    width = np.dtype(config.model.dtype).itemsize
    weights = array_bytes(jax.tree.leaves(whole)) * width / 4  # at the dtype of the computation
    own = array_bytes(jax.tree.leaves(trained))
    copies = 0.0
    if base:
        factors = lora_factors(trained).values()
        copies += width * sum(len(factor["a"]) * factor["b"].shape[1] for factor in factors)
    if split > 1 or (not base and width < 4):
        copies += weights
    rows = -(-config.num_prompts * config.num_samples // devices)
    length = config.prompts.tokens.shape[1] + config.max_new_tokens
    cache = jax.eval_shape(lambda: config.model.init_cache(max(rows, evaluated), length))
    seeded = {
        "trained weights": own / split,
        "gradients": own / split,
        "optimizer state": array_bytes(jax.tree.leaves(optimizer)) / split,
        "reference": own / split if config.needs_reference else 0,
        "copies": copies,
        "cache": array_bytes(jax.tree.leaves(cache)),
        "activations": _activations(config, base, trained, rows // config.num_minibatches),
    }
    gib = {"frozen weights": weights / split / GIB if base else 0.0}
    gib |= {name: seeds * size / GIB for name, size in seeded.items()}
    return {**gib, "total": sum(gib.values())}


def _activations(config: Config, base: PyTree, trained: PyTree, rows: int) -> int:
    """Bytes that a forward pass over the rows of one step keeps."""

    def statistics(trained: PyTree, base: PyTree, *texts: jax.Array) -> Any:
        own = dataclasses.replace(config, base_params=base or None, mesh=None, shard_params=False)
        return answer_statistics(
            config.model, own.whole_params(trained), *texts, chunk=config.chunk
        ).log_probs

    prompt, answer = (
        tuple(jax.ShapeDtypeStruct((max(rows, 1), time), kind) for kind in (jnp.int32, jnp.bool_))
        for time in (config.prompts.tokens.shape[1], config.max_new_tokens)
    )
    return residual_bytes(statistics, trained, base, *prompt, *answer)


def device_gib(config: Config) -> float:
    """GiB that a device of the config has; simulated devices share the memory of the host."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        devices = 1 if config.mesh is None else config.mesh.size
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return float(limit) / GIB


def _advice(name: str, config: Config, largest: str) -> str:
    """Which overrides make the largest part smaller."""
    if largest == "activations":
        fewer = f"task.methods.{name}.num_minibatches={2 * config.num_minibatches}"
        return f"{fewer} helps" if config.model.remat else f"model.remat=true or {fewer} helps"
    if largest == "cache":
        return "a smaller task.max_new_tokens, task.test_questions or task.most_prompt helps"
    if config.base_params is None:
        return "model.lora_rank=8, or mesh=data task.shard_params=true on several devices, helps"
    return "precision=bfloat16, or mesh=data task.shard_params=true on several devices, helps"
