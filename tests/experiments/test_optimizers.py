"""Every yaml of conf/optimizer makes a factory that trains, of conf/penalty a penalty; methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.optimizers import Method, Optimizer
from experiments.penalties import FromReference, UnderNoise
from experiments.runtime.building import build
from experiments.runtime.config import CONF
from trustjax.losses import mesa_penalty, r3f_penalty, trpo_penalty


def names(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def built(group, name):
    """What the yaml makes; its first line says what it is."""
    assert (CONF / group / f"{name}.yaml").read_text().startswith("# ")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+{group}={name}"])
    return build(OmegaConf.to_container(config, resolve=True)[group], group)


@pytest.mark.table
@pytest.mark.parametrize("name", names("optimizer"))
def test_optimizer(name):
    """A step at rate 0.1 moves the weights; its radius is a traced number."""
    method = Method(built("optimizer", name), 0.1)
    w = jnp.array([[1.0, -2.0]])  # a matrix, for those that give vectors to another optimizer
    losses_fn = lambda w: jnp.array([1.0, 2.0]) * jnp.sum(w**4)
    grad = jax.grad(lambda w, where=None: jnp.mean(losses_fn(w), where=where))

    @jax.jit
    def step(numbers):
        tx = optax.with_extra_args_support(method.at(**numbers).optimizer(0.1))
        outputs = {"outputs": w, "output_fn": lambda p: p, "noisy_outputs": w + 1.0}
        extra = {"grad_fn": grad, "losses_fn": losses_fn, "fisher_grads": grad(w), **outputs}
        return tx.update(grad(w), tx.init(w), w, **extra)[0]

    assert jnp.all(jnp.abs(step(method.hyperparameters)) > 0.005)


@pytest.mark.parametrize("name", names("penalty"))
def test_penalty(name):
    """Zero where the other function is the same, else above it; the weight is TRAM's."""
    penalty = built("penalty", name)
    assert penalty.weight == 0.1
    logits, other = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    same = penalty(logits, lambda: logits, lambda: logits)
    np.testing.assert_array_equal(same, np.zeros(3))
    assert np.all(penalty(logits, lambda: other, lambda: other) > 0)


def test_what_the_penalties_compare_with():
    logits, at_reference, under_noise = np.random.default_rng(0).normal(size=(3, 2, 4))
    others = (lambda: at_reference, lambda: under_noise)
    for name, loss, other in (
        ("trpo", trpo_penalty, at_reference),
        ("mesa", mesa_penalty, at_reference),
        ("r3f", r3f_penalty, under_noise),
    ):
        np.testing.assert_allclose(built("penalty", name)(logits, *others), loss(logits, other))


def test_references():
    """The previous weights, and the average into which they go before their update."""
    weights = [{"w": jnp.array([x])} for x in (1.0, 3.0, 4.0)]
    for decay, expected in ((0.0, [1.0, 1.0, 3.0, 4.0]), (0.75, [1.0, 1.0, 1.5, 2.125])):
        penalty = FromReference(trpo_penalty, decay=decay)
        reference = penalty.start(weights[0])
        seen = [reference["w"][0]]
        for params in weights:
            reference = penalty.refreshed(reference, params)
            seen.append(reference["w"][0])
        np.testing.assert_allclose(seen, expected)
    assert UnderNoise(r3f_penalty).start(weights[0]) is None


def test_numbers_of_a_method():
    """Those of the attack and the weight; other values make another method."""
    seen = []

    def attack(rho):
        seen.append(rho)
        return optax.identity()

    optimizer, penalty = Optimizer(optax.sgd, attack, {"rho": 0.1}), UnderNoise(r3f_penalty, 0.2)
    assert Method(Optimizer(optax.sgd), 0.1).hyperparameters == {}
    assert Method(optimizer, 0.1).hyperparameters == {"rho": 0.1}
    method = Method(optimizer, 0.1, penalty)
    assert method.hyperparameters == {"rho": 0.1, "weight": 0.2}
    changed = method.at(rho=0.7, weight=2.0)
    assert changed.hyperparameters == {"rho": 0.7, "weight": 2.0}
    for each in (method, changed):
        each.optimizer(0.1)
    assert seen == [0.1, 0.7]
    weights = jax.vmap(lambda weight: method.at(rho=0.1, weight=weight).penalty.weight * 1.0)
    np.testing.assert_array_equal(weights(jnp.arange(3.0)), [0, 1, 2])


@pytest.mark.table
@pytest.mark.parametrize("name", names("optimizer"))
def test_frozen_parameters(name):
    """Neither attacked, nor decayed, nor given state; the others move."""
    factory = built("optimizer", name)
    params = {"free": jnp.array([[1.0, -2.0]]), "frozen": jnp.array([[3.0, 4.0, 5.0]])}
    seen = []

    def losses(params):
        return jnp.array([1.0, 2.0]) * (
            jnp.sum(params["free"] ** 4) + jnp.sum(params["frozen"] ** 4)
        )

    def grad(params, where=None):
        seen.append(params["frozen"])
        return jax.grad(lambda p: jnp.mean(losses(p), where=where))(params)

    tx = factory(0.1, trainable=lambda p: {"free": True, "frozen": False})
    state = jax.eval_shape(tx.init, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    holds_reference = optax.tree.get(state, "reference") is not None
    assert ((1, 3) in shapes) == holds_reference

    @jax.jit
    def update(params):
        state, gradient = tx.init(params), grad(params)
        out = {"outputs": params["free"], "output_fn": lambda p: p["free"],
               "noisy_outputs": params["free"] + 1.0}  # fmt: skip
        extra = {"grad_fn": grad, "losses_fn": losses, "fisher_grads": gradient, **out}
        return optax.with_extra_args_support(tx).update(gradient, state, params, **extra)[0], seen

    updates, seen = update(params)
    assert not np.any(updates["frozen"])
    assert np.all(np.abs(updates["free"]) > 0.005)
    assert seen
    assert all(np.array_equal(value, params["frozen"]) for value in seen)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method(Optimizer(optax.sgd), 0.0), "learning_rate must be > 0, got 0"),
        (lambda: UnderNoise(r3f_penalty, -1.0), "weight must be >= 0, got -1"),
        (lambda: FromReference(trpo_penalty, -1.0), "weight must be >= 0, got -1"),
        (lambda: FromReference(trpo_penalty, decay=1.5), "decay must be <= 1, got 1.5"),
        (lambda: FromReference(trpo_penalty, decay=-0.5), "decay must be >= 0, got -0.5"),
    ],
)
def test_bad_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@functools.cache
def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name="config", overrides=list(overrides))
    OmegaConf.resolve(config.task)
    return OmegaConf.to_container(config.task)


def test_all_rows_of_the_paper():
    """Seventeen methods, each with a rate; the search has sixteen trials for every one."""
    task = build(composed("+exp=tram_vision_search", "methods=paper"), "task")
    task.validate()
    assert len(task.methods) == 17
    assert {len(task.search.trials(name)) for name in task.methods} == {16}
    trials = task.search.trials("asam_trpo")
    assert {trial["rho"] for trial in trials} == {0.1}
    assert {trial["weight"] for trial in trials} == {1e-4, 1e-3, 1e-2, 1e-1}


def test_a_radius_needs_an_attack() -> None:
    with pytest.raises(ValueError, match=r"^radius must be empty without an attack, got \{'rho'"):
        Optimizer(optax.sgd, radius={"rho": 0.1})
