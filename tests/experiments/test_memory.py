"""The memory estimate, against counts by hand and the compiler's own plan."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.optimizers import Method, Optimizer
from experiments.penalties import FromReference
from experiments.runtime.memory import GIB, describe, memory_estimate
from trustjax.losses import trpo_penalty
from trustjax.models import MLP, ResNet, ViT
from trustjax.optim import sam, tram

ADAM = Method(Optimizer(optax.adam), 1.0)
ADAM_SAM = Method(Optimizer(optax.adam, sam), 1.0)
IMAGES = jax.ShapeDtypeStruct((6, 2, 4, 1), jnp.float32)
LINEAR = MLP(3, hidden=())  # of 8 pixels: 27 parameters
VIT = ViT(3, patch_size=2, width=8, depth=4, num_heads=2)


def in_bytes(estimate):
    return {name: gib * GIB for name, gib in estimate.items()}


def test_counts():
    found = in_bytes(memory_estimate(LINEAR, [ADAM], IMAGES, 1))
    assert found == {
        "parameters": 27 * 4,
        "gradients": 27 * 4,
        "optimizer state": 2 * 27 * 4 + 4,
        "attack copies": 0,
        "activations": 6 * 8 * 4,  # the input of the one matrix
        "total": (4 * 27 + 1 + 48) * 4,
    }


def test_parameters_are_not_counted_as_activations():
    """Though the backward pass reads them."""
    model = MLP(3, hidden=(300, 300))
    estimate = memory_estimate(model, [ADAM], jax.ShapeDtypeStruct((1, 2, 4, 1), jnp.float32), 1)
    assert estimate["activations"] < 0.05 * estimate["parameters"]


def test_several_networks_and_the_largest_method():
    """SAM copies the parameters in its second pass, TRAM holds a reference too."""
    methods = [ADAM, Method(Optimizer(optax.sgd, tram), 1.0), ADAM_SAM]
    one, five = (in_bytes(memory_estimate(LINEAR, methods, IMAGES, n)) for n in (1, 5))
    assert one["attack copies"] == 27 * 4
    assert 2 * 27 * 4 < one["optimizer state"] < 3 * 27 * 4
    assert five == pytest.approx({name: 5 * size for name, size in one.items()})
    adam_tram = Method(Optimizer(optax.adam, tram), 1.0)
    adam_trpo = Method(Optimizer(optax.adam), 1.0, FromReference(trpo_penalty))
    for method in (adam_tram, adam_trpo):
        with_reference = in_bytes(memory_estimate(LINEAR, [method], IMAGES, 1))
        assert with_reference["optimizer state"] >= 3 * 27 * 4


def test_half_of_the_blocks_frozen():
    whole = memory_estimate(VIT, [ADAM_SAM], IMAGES, 1)
    half = memory_estimate(VIT.clone(frozen_blocks=2), [ADAM_SAM], IMAGES, 1)
    assert half["parameters"] == whole["parameters"]
    for name in ("gradients", "optimizer state", "attack copies", "activations"):
        assert 0.35 * whole[name] < half[name] < 0.6 * whole[name], name


def test_activations_are_about_what_the_compiler_plans():
    images = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32)
    model = VIT.clone(depth=1)
    estimate = in_bytes(memory_estimate(model, [ADAM], images, 1))["activations"]
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda params, images: model.apply(params, images).sum()))
    planned = gradient.lower(params, images).compile().memory_analysis().temp_size_in_bytes
    assert 0.6 * planned < estimate < 1.4 * planned


def test_description():
    line = describe({"parameters": 0.32, "activations": 29.891, "total": 30.211})
    assert line == "memory estimate: 30.21 GiB (parameters 0.32, activations 29.89)"


def test_dropout_and_batch_statistics():
    """Models that need a key or other collections in training."""
    model = functools.partial(memory_estimate, methods=[ADAM], images=IMAGES, num_networks=1)
    assert model(MLP(3, dropout=0.5))["activations"] > model(MLP(3))["activations"]
    assert model(ResNet(3, widths=(4,)))["activations"] > 0
