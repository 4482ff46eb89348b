"""The text models: what checkpoints of Hugging Face compute, padding, documents and the cache.

tests/golden/make_text.py made the checkpoints and the numbers with transformers.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.models import (
    Decoder,
    Encoder,
    RopeScaling,
    mean_pool,
    pretrained_transformer,
    segment_positions,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
OUTPUTS = json.loads((GOLDEN / "outputs.json").read_text(encoding="utf-8"))
TOKENS, MASK, TYPES = (np.array(OUTPUTS[name], np.int32) for name in ("tokens", "mask", "types"))
DECODERS = ["gpt2", "llama", "smollm2", "qwen2", "qwen3"]
ENCODERS = sorted(OUTPUTS.keys() - {"origin", "tokens", "mask", "types", *DECODERS})


def load(name: str, **arguments: Any) -> tuple[Any, Any]:
    model = pretrained_transformer(GOLDEN / name, **arguments)
    return model, {"params": model.load_pretrained()}


@pytest.mark.table
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_compute_what_transformers_computes(name: str) -> None:
    model, variables = load(name)

    @jax.jit
    def apply(variables: Any, tokens: jax.Array, segments: jax.Array) -> Any:
        hidden = model.apply(variables, tokens, segments=segments, method="hidden")
        return hidden, model.apply(variables, hidden, method="logits")  # as `__call__` does

    hidden, logits = apply(variables, TOKENS, MASK)
    assert logits.dtype == jnp.float32
    for row, number in enumerate(MASK.sum(1)):
        expected = OUTPUTS[name]
        np.testing.assert_allclose(hidden[row, :number], expected["hidden"][row], atol=1e-4)
        np.testing.assert_allclose(logits[row, :number], expected["logits"][row], atol=1e-4)
    np.testing.assert_allclose(
        hidden @ model.head_matrix(variables["params"]), logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.table
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_what_transformers_computes(name: str) -> None:
    model, variables = load(name)
    types = TYPES if name.startswith("bert") else None

    @jax.jit
    def apply(variables: Any, tokens: jax.Array, segments: jax.Array) -> Any:
        arguments = {"segments": segments, "types": types}
        name = "hidden" if model.head is None else "logits"
        found = {name: model.apply(variables, tokens, **arguments)}
        if model.pooler:
            found["pooled"] = model.apply(variables, tokens, **arguments, method="pooled")
        return found

    found = apply(variables, TOKENS, MASK)
    for key, ours_of_all in found.items():
        expected = OUTPUTS[name][key]
        for row, number in enumerate(MASK.sum(1)):
            ours = ours_of_all[row]
            ours = ours[:number] if ours.ndim > 1 else ours
            np.testing.assert_allclose(ours, expected[row], atol=1e-4, err_msg=key)


@pytest.mark.parametrize(("name", "side"), [("gpt2", "left"), ("qwen3", "right")])
def test_cache_gives_the_logits_of_a_whole_pass(name: str, side: str) -> None:
    """Prefill of rows of 5 and 3 tokens, padded on one side, then three single tokens each."""
    model, variables = load(name)
    whole = jax.jit(model.apply)(variables, TOKENS[:1, :8])[0]
    rows = [TOKENS[0, :5], TOKENS[0, :3]]
    pads = [(5 - len(row), 0) if side == "left" else (0, 5 - len(row)) for row in rows]
    prompt = np.stack([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = np.stack([np.pad(np.ones_like(r), pad) for r, pad in zip(rows, pads, strict=True)])
    step = jax.jit(
        lambda cache, tokens, mask: model.apply(variables, tokens, segments=mask, cache=cache)
    )
    logits, cache = step(model.init_cache(2, 8), prompt, mask)
    for row, pad in enumerate(pads):
        ours = logits[row, pad[0] : 5 - pad[1]]
        np.testing.assert_allclose(ours, whole[: len(rows[row])], atol=2e-5)
    for number in range(3):
        tokens = np.stack([TOKENS[0, [5 + number]], TOKENS[0, [3 + number]]])
        logits, cache = step(cache, tokens, np.ones((2, 1), np.int32))
        np.testing.assert_allclose(logits[0, 0], whole[5 + number], atol=2e-5)
        np.testing.assert_allclose(logits[1, 0], whole[3 + number], atol=2e-5)
    np.testing.assert_array_equal(cache.lengths, [8, 6])
    assert int(cache.filled) == 8
    np.testing.assert_array_equal(cache.repeat(2).lengths, [8, 8, 6, 6])


def test_a_cache_grows_by_empty_columns() -> None:
    model = Decoder(vocab_size=9, width=8, depth=2, num_heads=2, num_kv_heads=1, mlp_width=8)
    full = jax.tree.map(lambda x: x + 1, model.init_cache(3, 5))
    grown, empty = full.grown(2), model.init_cache(3, 7)
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, empty)
    for leaf, axis in ((grown.keys[1], 3), (grown.values[1], 2), (grown.segments, 1)):
        old, new = np.split(np.asarray(leaf), [5], axis)
        assert np.all(old == 1)
        assert np.all(new == 0)
    assert int(grown.filled) == 1
    assert grown.lengths.tolist() == [1, 1, 1]


def test_rows_that_have_stopped_leave_the_cache_as_it_is() -> None:
    """A token of segment 0 takes a column, but nothing attends to it, and no length grows."""
    model, variables = load("smollm2")
    step = jax.jit(lambda cache, *a: model.apply(variables, a[0], segments=a[1], cache=cache))
    one = np.ones((1, 1), np.int32)
    _, cache = step(model.init_cache(1, 4), TOKENS[:1, :1], one)
    expected, _ = step(cache, TOKENS[:1, 1:2], one)
    _, cache = step(cache, TOKENS[:1, 7:8], 0 * one)
    logits, cache = step(cache, TOKENS[:1, 1:2], one)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    np.testing.assert_array_equal(cache.lengths, [2])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    """Two documents in a row, with padding on both sides, compute what each computes alone."""
    model, variables = load(name)
    apply = jax.jit(lambda tokens, segments: model.apply(variables, tokens, segments=segments))
    first, second = TOKENS[0, :4], TOKENS[1, :5]
    packed = np.concatenate([[9, 9], first, second, [9]])[None]
    together = apply(packed, np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]))[0]
    for part, document in ((slice(2, 6), first), (slice(6, 11), second)):
        alone = apply(document[None], np.ones((1, len(document)), np.int32))[0]
        np.testing.assert_allclose(together[part], alone, atol=2e-5)


def test_positions_are_an_argument() -> None:
    """Rotary positions are relative: a shift changes nothing, a stretch does."""
    model, variables = load("qwen3")
    apply = jax.jit(lambda positions: model.apply(variables, TOKENS[:1], positions=positions))
    plain = apply(np.arange(9)[None])
    np.testing.assert_allclose(apply(7 + np.arange(9)[None]), plain, atol=2e-5)
    assert np.abs(apply(2 * np.arange(9)[None]) - plain).max() > 1e-2


@pytest.mark.slow
def test_remat_and_bfloat16() -> None:
    """Gradient checkpointing changes nothing; half precision rounds, in float32 logits."""
    plain, variables = load("qwen3")

    def gradients(model: Any) -> Any:
        loss = lambda v: jnp.mean(model.apply(v, TOKENS, train=True) ** 2)
        return jax.jit(jax.grad(loss))(variables)

    remat = plain.clone(remat=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradients(plain), gradients(remat),
    )  # fmt: skip
    half = jax.jit(plain.clone(dtype=jnp.bfloat16).apply)(variables, TOKENS)
    assert half.dtype == jnp.float32
    full = jax.jit(plain.apply)(variables, TOKENS)
    assert 0 < float(jnp.abs(half - full).max()) < 0.15 * float(jnp.abs(full).max())


def test_remat_stores_less() -> None:
    model = Decoder(50, 32, 6, 4, 128)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def residuals(model: Decoder) -> int:
        saved = jax.eval_shape(
            lambda v, t: jax.vjp(lambda v: model.apply(v, t).sum(), v)[1], variables, tokens
        )
        return sum(leaf.size for leaf in jax.tree.leaves(saved))

    assert residuals(model.clone(remat=True)) < residuals(model) / 3


def test_segment_positions() -> None:
    found = segment_positions(jnp.array([[0, 0, 1, 1, 2], [3, 3, 3, 0, 0]]))
    np.testing.assert_array_equal(found, [[0, 1, 0, 1, 0], [0, 1, 2, 0, 1]])


def test_mean_pool() -> None:
    hidden = jnp.array([[[3.0, 0], [0, 4], [9, 9]], [[1, 1], [1, 1], [1, 1]]])
    pooled = mean_pool(hidden, jnp.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(pooled, [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_heads": 3, "num_kv_heads": 3}, "width must be a multiple of num_heads without"),
        ({"head_dim": 3}, "head_dim must be even for rotary positions, got 3"),
        ({"positions": "alibi"}, "positions must be one of 'rotary', 'learned', got 'alibi'"),
        ({"activation": "tanh"}, "activation must be one of 'gelu', 'gelu_tanh'"),
        ({"norm": "batch"}, "norm must be one of 'rms', 'layer'"),
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
        ({"width": 2.0}, "width must be an int, got 2.0"),
        ({"depth": -1}, "depth must be >= 0, got -1"),
        ({"dropout": 1.5}, "dropout must be <= 1, got 1.5"),
        ({"norm_epsilon": -1e-6}, "norm_epsilon must be >= 0"),
        ({"rope_theta": 0.0}, "rope_theta must be > 0"),
    ],
)
def test_wrong_attributes_of_a_decoder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(
            **{"vocab_size": 8, "width": 8, "depth": 1, "num_heads": 4, "mlp_width": 8, **changes}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "tagger"}, "head must be one of 'tokens', 'sequence', 'masked_lm', got 'tagger'"),
        ({"head": "tokens"}, "num_classes must be above 0 with a head .* got 0 and 'tokens'"),
        ({"num_classes": 3}, "num_classes must be above 0 with a head .* got 3 and None"),
        ({"head": "masked_lm", "pooler": True}, "pooler must be False beside a head, got True"),
        ({"num_heads": 3}, "width must be a multiple of num_heads, got 8 and 3"),
    ],
)
def test_wrong_attributes_of_an_encoder(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(
            **{"vocab_size": 8, "width": 8, "depth": 1, "num_heads": 4, "mlp_width": 8, **changes}
        )


def test_wrong_scaling() -> None:
    with pytest.raises(ValueError, match="high_frequency_factor must be > 1, got 1"):
        RopeScaling("llama3", 8.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="kind must be one of 'linear', 'llama3', got 'yarn'"):
        RopeScaling("yarn", 8.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tokens": np.zeros(3, int)},
            r"tokens must be integers \[batch, time\], got shape \(3,\)",
        ),
        ({"tokens": np.zeros((1, 3))}, r"tokens must be integers .* of float"),
        ({"segments": np.ones((1, 4), int)}, r"segments must have the shape of tokens, \(1, 3\)"),
        ({"positions": np.ones((3,), int)}, r"positions must be integers \[batch, time\]"),
        (
            {"tokens": np.zeros((1, 21), int)},
            "tokens must be at most max_length = 20 a row, got 21",
        ),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_wrong_tokens(name: str, arguments: dict[str, Any], message: str) -> None:
    model = pretrained_transformer(GOLDEN / name)
    arguments = {"tokens": np.zeros((1, 3), int), **arguments}
    with pytest.raises(ValueError, match=message):
        model.apply({}, arguments.pop("tokens"), **arguments)


def test_wrong_caches() -> None:
    model = pretrained_transformer(GOLDEN / "gpt2")
    with pytest.raises(ValueError, match="cache must have the 1 rows of tokens, got 2"):
        model.apply({}, np.zeros((1, 3), int), cache=model.init_cache(2, 4))
    with pytest.raises(ValueError, match="cache must have a capacity of 3 tokens or more, got 2"):
        model.apply({}, np.zeros((1, 3), int), cache=model.init_cache(1, 2))
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        model.init_cache(1, 0)
