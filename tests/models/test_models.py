"""What every model promises, and the yaml that builds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from trustjax.models import MLP, ResNet, ViT

CONF = Path(__file__).parents[2] / "conf"
MODELS: dict[str, nn.Module] = {
    "mlp": MLP(3, hidden=(7, 5)),
    "vit": ViT(3, patch_size=2, width=8, depth=1, num_heads=2),
    "resnet": ResNet(3, widths=(4, 6)),
}
FEATURES = {"mlp": 5, "vit": 8, "resnet": 6}
each_model = pytest.mark.parametrize("name", MODELS)
KEY = jax.random.key(0)


IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 4, 2), np.float32))


def jitted(model: nn.Module) -> Callable[..., Any]:
    return jax.jit(model.apply, static_argnames="return_features")


@each_model
def test_logits_are_the_head_of_the_features(name: str, variables_of: Callable[..., Any]) -> None:
    model = MODELS[name]
    variables = variables_of(model, IMAGES)
    logits, features = jitted(model)(variables, IMAGES, return_features=True)
    assert logits.shape == (4, 3)
    assert logits.dtype == features.dtype == jnp.float32
    assert features.shape == (4, FEATURES[name])
    head = variables["params"]["head"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)


@each_model
def test_bfloat16_computes_short_and_keeps_float32(
    name: str, variables_of: Callable[..., Any]
) -> None:
    model = MODELS[name]
    short = model.clone(dtype="bfloat16")
    variables = variables_of(short, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits, features = jitted(short)(variables, IMAGES, return_features=True)
    assert logits.dtype == jnp.float32
    assert features.dtype == jnp.bfloat16
    exact = jitted(model)(variables, IMAGES)
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())
    assert not np.array_equal(logits, exact)


@each_model
def test_seeds_under_vmap_and_examples_alone(name: str, variables_of: Callable[..., Any]) -> None:
    """Neither the runs of a vmap mix nor, in evaluation, the examples of a batch."""
    model = MODELS[name]
    runs = [variables_of(model, IMAGES, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    logits = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(stacked, IMAGES)
    assert logits.shape == (2, 4, 3)
    alone = jitted(model)(runs[1], IMAGES[2:3])
    np.testing.assert_allclose(alone[0], logits[1, 2], rtol=1e-4, atol=1e-4)


@each_model
def test_init_under_vmap(name: str) -> None:
    keys = jax.random.split(KEY, 2)
    one = jax.eval_shape(MODELS[name].init, KEY, IMAGES)
    two = jax.eval_shape(jax.vmap(MODELS[name].init, in_axes=(0, None)), keys, IMAGES)
    assert jax.tree.map(lambda leaf: (2, *leaf.shape), one) == jax.tree.map(jnp.shape, two)


def test_seeds_of_init_differ() -> None:
    keys = jax.random.split(KEY, 2)
    linear = MLP(3, hidden=())
    variables = jax.jit(jax.vmap(linear.init, in_axes=(0, None)))(keys, IMAGES)
    kernel = variables["params"]["head"]["kernel"]
    assert not np.any(kernel[0] == kernel[1])


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_dropout_follows_its_key(name: str, variables_of: Callable[..., Any]) -> None:
    model = MODELS[name].clone(dropout=0.5)
    variables = variables_of(model, IMAGES)

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        return model.apply(variables, IMAGES, train=True, rngs={"dropout": key})

    one, two = (jax.random.key(seed, impl="rbg") for seed in (1, 2))  # quick to compile
    np.testing.assert_array_equal(train(one), train(one))
    assert not np.array_equal(train(one), train(two))
    evaluated = jitted(model)(variables, IMAGES)
    np.testing.assert_array_equal(evaluated, jitted(MODELS[name])(variables, IMAGES))
    assert not np.array_equal(train(one), evaluated)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_of_the_wrong_rank(name: str) -> None:
    with pytest.raises(ValueError, match=r"images must be \[batch, height, width, channels\]"):
        jax.eval_shape(MODELS[name].init, KEY, IMAGES[0])


@pytest.mark.parametrize("name", ["mlp", "vit_tiny", "resnet_small"])
def test_config_builds_a_model(name: str) -> None:
    file = CONF / "model" / f"{name}.yaml"
    assert file.read_text().startswith("# ")
    model = instantiate(OmegaConf.load(file))(num_classes=10)
    logits = jax.eval_shape(jax.jit(model.init_with_output), KEY, jnp.zeros([2, 8, 8, 1]))[0]
    assert logits.shape == (2, 10)


def test_widths_may_be_lists() -> None:
    """As configs give them; jit needs a hash of the module."""
    assert hash(MLP(3, hidden=[7, 5])) == hash(MLP(3, hidden=(7, 5)))
    assert hash(ResNet(3, widths=[4, 6])) == hash(ResNet(3, widths=(4, 6)))
