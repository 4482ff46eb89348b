"""Every yaml of conf/optimizer makes a factory that trains; Method checks its rate."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config import CONF
from experiments.optimizers import Method, Optimizer
from experiments.targets import build

NAMES = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


def compose_optimizer(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+optimizer={name}"])


@pytest.mark.parametrize("name", NAMES)
def test_yaml(name):
    """A step at rate 0.1 moves the weights; its radius is a traced number."""
    assert (Path(CONF) / "optimizer" / f"{name}.yaml").read_text().startswith("# ")
    node = OmegaConf.to_container(compose_optimizer(name), resolve=True)["optimizer"]
    factory = build(node, "optimizer")
    assert isinstance(factory, Optimizer)
    w = jnp.array([1.0, -2.0])
    grad = jax.grad(lambda w: jnp.sum(w**4))

    @jax.jit
    def step(radius):
        tx = optax.with_extra_args_support(factory(0.1, **radius))
        outputs = {"outputs": w, "output_fn": lambda p: p, "noisy_outputs": w + 1.0}
        extra = {"grad_fn": grad, "fisher_grads": grad(w), **outputs}
        return tx.update(grad(w), tx.init(w), w, **extra)[0]

    assert jnp.all(jnp.abs(step(dict(factory.radius))) > 0.01)


def test_radius_argument_replaces_the_configured_one():
    seen = []

    def attack(rho):
        seen.append(rho)
        return optax.identity()

    factory = Optimizer(optax.sgd, attack, {"rho": 0.1})
    factory(0.1)
    factory(0.1, rho=0.7)
    assert seen == [0.1, 0.7]


def test_learning_rate_must_be_positive():
    with pytest.raises(ValueError, match="learning_rate must be > 0, got 0"):
        Method(Optimizer(optax.sgd), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters(name):
    """Neither attacked, nor decayed, nor given state; the others move."""
    node = OmegaConf.to_container(compose_optimizer(name), resolve=True)["optimizer"]
    factory = build(node, "optimizer")
    params = {"free": jnp.array([1.0, -2.0]), "frozen": jnp.array([3.0, 4.0, 5.0])}
    seen = []

    def grad(params):
        seen.append(params["frozen"])
        return jax.grad(lambda p: jnp.sum(p["free"] ** 4) + jnp.sum(p["frozen"] ** 4))(params)

    tx = factory(0.1, trainable=lambda p: {"free": True, "frozen": False}, **factory.radius)
    state, gradient = tx.init(params), grad(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    holds_reference = optax.tree.get(state, "reference") is not None
    assert ((3,) in shapes) == holds_reference
    out = {"outputs": params["free"], "output_fn": lambda p: p["free"],
           "noisy_outputs": params["free"] + 1.0}  # fmt: skip
    extra = {"grad_fn": grad, "fisher_grads": gradient, **out}
    updates, _ = optax.with_extra_args_support(tx).update(gradient, state, params, **extra)
    assert jnp.all(updates["frozen"] == 0)
    assert jnp.all(jnp.abs(updates["free"]) > 0.01)
    assert all(jnp.array_equal(value, params["frozen"]) for value in seen)
