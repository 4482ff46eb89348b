"""LoRA's factors: they change nothing at first, train alone, and merge into a plain model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.models import (
    lora_init,
    lora_merge,
    pretrained_transformer,
    save_transformer,
)

KEY = jax.random.key(0)
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
GOLDEN = Path(__file__).parents[1] / "golden" / "text" / "qwen2"


def test_nothing_changes_at_first() -> None:
    params = pretrained_transformer(GOLDEN).load_pretrained()
    factors = lora_init(KEY, params, rank=2)
    assert len(factors) == 4  # query and value of two blocks
    merged = lora_merge(params, factors)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_training_moves_the_factors_alone_and_merges_exactly(tmp_path: Path) -> None:
    """The folder that is written computes the same bits as the model in training."""
    model = pretrained_transformer(GOLDEN)
    params = model.load_pretrained()
    factors = lora_init(KEY, params, rank=2)
    tx = optax.adam(3e-2)

    def loss(factors: Any) -> jax.Array:
        logits = model.apply({"params": lora_merge(params, factors, alpha=4.0)}, TOKENS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
        return losses.mean()

    @jax.jit
    def step(factors: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(factors)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(factors, updates), state, value

    state, values = tx.init(factors), []
    for _ in range(30):
        factors, state, value = step(factors, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    merged = lora_merge(params, factors, alpha=4.0)
    save_transformer(tmp_path, model, merged)
    again = pretrained_transformer(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.load_pretrained(), merged)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), merged, params)
    assert sum(jax.tree.leaves(changed)) == 4


def test_formula_dtype_and_targets() -> None:
    path = ("block_0", "mlp", "gate", "kernel")
    kernel = np.linspace(-1, 1, 24).reshape(4, 6)
    params = {"block_0": {"mlp": {"gate": {"kernel": jnp.asarray(kernel, jnp.bfloat16)}}}}
    factors = lora_init(KEY, params, rank=3, target=lambda path: path[-2] == "gate")
    assert factors.keys() == {path}
    factors[path]["b"] = jnp.ones((3, 6))
    merged = lora_merge(params, factors, alpha=6.0)["block_0"]["mlp"]["gate"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    expected = kernel + 2 * np.asarray(factors[path]["a"]) @ np.ones((3, 6))
    np.testing.assert_allclose(merged.astype(jnp.float32), expected, atol=0.03)


def test_wrong_arguments() -> None:
    params = {"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        lora_init(KEY, params, rank=0)
    with pytest.raises(ValueError, match="target must choose at least one parameter, got none"):
        lora_init(KEY, params, rank=1, target=lambda _: False)
    with pytest.raises(ValueError, match=r"target must choose matrices, got query/bias of shape"):
        lora_init(KEY, params, rank=1, target=lambda _: True)
    factors = lora_init(KEY, params, rank=1)
    with pytest.raises(ValueError, match="factors must belong to the parameters, got query/kernel"):
        lora_merge({"query": {"kernel": jnp.ones((3, 3))}}, factors)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        lora_merge(params, factors, alpha=0)
