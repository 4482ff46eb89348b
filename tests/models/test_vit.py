from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

from trustjax.models import ViT
from trustjax.models.vit import patches

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).random((3, 4, 6, 2), np.float32))


def test_patches_are_squares_row_by_row() -> None:
    cut = patches(IMAGES, 2)
    assert cut.shape == (3, 6, 8)
    np.testing.assert_array_equal(cut[1, 0], IMAGES[1, :2, :2].ravel())
    np.testing.assert_array_equal(cut[1, 2], IMAGES[1, :2, 4:].ravel())
    np.testing.assert_array_equal(cut[1, 3], IMAGES[1, 2:, :2].ravel())


def test_patch_embedding_is_the_strided_convolution() -> None:
    """So a convolution kernel of a checkpoint, reshaped, is the Dense kernel."""
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 2, 5)).astype(np.float32))
    convolved = jax.lax.conv_general_dilated(
        IMAGES, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    embedded = patches(IMAGES, 2) @ kernel.reshape(8, 5)
    np.testing.assert_allclose(embedded, convolved.reshape(3, 6, 5), atol=1e-5)


def reference(parameters: Any, images: np.ndarray, heads: int, pool: str) -> np.ndarray:
    """The paper's equations 1 to 4 in float64, one head at a time."""
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)

    def dense(name: str, x: np.ndarray, of: Any = parameters) -> np.ndarray:
        return x @ of[name]["kernel"] + of[name]["bias"]

    def norm(name: str, x: np.ndarray, of: Any = parameters) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * of[name]["scale"] + of[name]["bias"]

    x = dense("patch_embedding", np.asarray(patches(images, 2), np.float64))
    if pool == "cls":
        token = np.broadcast_to(parameters["class_token"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([token, x], axis=1)
    x = x + parameters["position_embedding"]
    for index in range(2):
        block = parameters[f"block_{index}"]
        y = norm("attention_norm", x, block)
        attended = []
        query, key, value = (
            np.split(dense(name, y, block), heads, axis=-1) for name in ("query", "key", "value")
        )
        for q, k, v in zip(query, key, value, strict=True):
            weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            attended.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + dense("attention_out", np.concatenate(attended, axis=-1), block)
        y = dense("mlp_in", norm("mlp_norm", x, block), block)
        y = y * (1 + np.asarray(erf(y / np.sqrt(2)))) / 2
        x = x + dense("mlp_out", y, block)
    x = norm("final_norm", x)
    return dense("head", x[:, 0] if pool == "cls" else x.mean(axis=1))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_matches_the_paper(pool: str, variables_of: Callable[..., Any]) -> None:
    model = ViT(5, patch_size=2, width=12, depth=2, num_heads=3, pool=pool)
    variables = variables_of(model, IMAGES)
    expected = reference(variables["params"], IMAGES, 3, pool)
    logits = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 7), ("mean", 6)])
def test_parameter_count(pool: str, tokens: int) -> None:
    width, depth, mlp, classes = 12, 3, 30, 5
    model = ViT(classes, 2, width, depth, num_heads=3, mlp_ratio=2.5, pool=pool)
    variables = jax.eval_shape(model.init, KEY, IMAGES)
    embedding = (2 * 2 * 2 + 1) * width + tokens * width + (width if pool == "cls" else 0)
    block = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 4 * width
    head = 2 * width + (width + 1) * classes
    expected = embedding + depth * block + head
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


def test_layer_norm_epsilon(variables_of: Callable[..., Any]) -> None:
    """One so large that every norm gives its bias."""
    model = ViT(5, 2, 12, 1, 3, layer_norm_epsilon=1e12)
    variables = variables_of(model, IMAGES)
    apply = jax.jit(model.apply, static_argnames="return_features")
    _, features = apply(variables, IMAGES, return_features=True)
    bias = variables["params"]["final_norm"]["bias"]
    np.testing.assert_allclose(features, np.broadcast_to(bias, features.shape), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "max"}, "pool must be one of 'cls', 'mean', got 'max'"),
        ({"num_heads": 5}, "width must be a multiple of num_heads, got 12 and 5"),
        ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
        ({"patch_size": 0}, "patch_size must be >= 1, got 0"),
        ({"frozen_blocks": 2}, "frozen_blocks must be <= 1, got 2"),
        ({"frozen_blocks": -1}, "frozen_blocks must be >= 0, got -1"),
    ],
)
def test_wrong_fields(arguments: dict[str, Any], message: str) -> None:
    fields = {"num_classes": 5, "patch_size": 2, "width": 12, "depth": 1, "num_heads": 3}
    with pytest.raises(ValueError, match=message):
        ViT(**(fields | arguments))


def test_patch_size_must_divide_the_image() -> None:
    with pytest.raises(ValueError, match="got patch_size 4 and images of 4 x 6"):
        jax.eval_shape(ViT(5, 4, 12, 1, 3).init, KEY, IMAGES)


def test_without_query_key_and_value_biases() -> None:
    shapes = jax.eval_shape(ViT(5, 2, 12, 1, 3, qkv_bias=False).init, KEY, IMAGES)["params"]
    block = shapes["block_0"]
    biased = {name for name, leaves in block.items() if "bias" in leaves}
    assert biased == block.keys() - {"query", "key", "value"}


def test_without_a_head_the_logits_are_the_features(variables_of: Callable[..., Any]) -> None:
    """The dense layer with tanh of the pre-training included."""
    model = ViT(0, 2, 12, 1, 3, representation_width=7)
    variables = variables_of(model, IMAGES)
    assert "head" not in variables["params"]
    apply = jax.jit(model.apply, static_argnames="return_features")
    logits, features = apply(variables, IMAGES, return_features=True)
    np.testing.assert_array_equal(logits, features)
    layer = variables["params"].pop("representation")
    plain = jax.jit(ViT(0, 2, 12, 1, 3).apply)(variables, IMAGES)
    np.testing.assert_allclose(
        features, np.tanh(plain @ layer["kernel"] + layer["bias"]), atol=1e-5
    )


EMBEDDINGS = {"patch_embedding", "class_token", "position_embedding"}


@pytest.mark.parametrize(
    ("frozen_blocks", "frozen"),
    [
        (None, set()),
        (0, EMBEDDINGS),
        (1, EMBEDDINGS | {"block_0"}),
        (2, EMBEDDINGS | {"block_0", "block_1"}),
    ],
)
def test_trainable(frozen_blocks: int | None, frozen: set[str]) -> None:
    model = ViT(5, 2, 12, 2, 3, frozen_blocks=frozen_blocks)
    params = jax.eval_shape(model.init, KEY, IMAGES)["params"]
    labels = model.trainable(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    expected = {name: jax.tree.map(lambda _: True, leaves) for name, leaves in params.items()}
    expected |= {name: jax.tree.map(lambda _: False, params[name]) for name in frozen}
    assert labels == expected


@pytest.mark.parametrize(("frozen_blocks", "frozen"), [(0, EMBEDDINGS),
                                                       (1, EMBEDDINGS | {"block_0"})])  # fmt: skip
def test_frozen_parts_have_no_gradient(
    frozen_blocks: int, frozen: set[str], variables_of: Callable[..., Any]
) -> None:
    model = ViT(5, 2, 12, 1, 3, frozen_blocks=frozen_blocks)
    params = variables_of(model, IMAGES)["params"]

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, IMAGES) ** 2)

    gradients = gradient(params)
    still = {name for name in params if not any(map(np.any, jax.tree.leaves(gradients[name])))}
    assert still == frozen


def test_preprocess_comes_first(variables_of: Callable[..., Any]) -> None:
    model = ViT(5, 2, 12, 1, 3)
    variables = variables_of(model, IMAGES)
    negating = model.clone(preprocess=jnp.negative)
    np.testing.assert_array_equal(
        jax.jit(negating.apply)(variables, IMAGES), jax.jit(model.apply)(variables, -IMAGES)
    )
