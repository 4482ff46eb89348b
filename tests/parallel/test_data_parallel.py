"""One attack for the whole batch and one per device, on eight simulated devices."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.optim import sam, tram, two_pass_step
from trustjax.parallel import (
    batch_sharding,
    data_parallel_step,
    make_mesh,
    replicated,
    shard_batch,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "tram_sam.json").read_text(encoding="utf-8")
)
RANDOM = np.random.default_rng(0)
PARAMS = {"hidden": RANDOM.normal(size=(5, 16)), "out": RANDOM.normal(size=(16, 3))}
BATCH = {"x": RANDOM.normal(size=(24, 5)), "y": RANDOM.integers(3, size=24)}


def output_fn(params, batch, key):
    return jnp.tanh(batch["x"] @ params["hidden"]) @ params["out"]


def loss_fn(params, batch, key):
    kept = jax.random.bernoulli(key, 0.9, batch["x"].shape)
    logits = output_fn(params, {"x": batch["x"] * kept}, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"outputs": logits, "kept": kept}


def collectives(program):
    """The name and type of every operation of the program that communicates between devices."""
    pattern = r"= (\S+(?: \S+)*) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    return [(name, kind) for kind, name in re.findall(pattern, program.as_text())]


def test_a_jitted_step_needs_no_change(x64):
    """With placed arrays it gives the same numbers, and devices exchange only sums."""
    tx = optax.chain(tram(), optax.adamw(0.1))
    step = jax.jit(two_pass_step(loss_fn, tx, output_fn=output_fn))
    mesh, key = make_mesh(), jax.random.key(0)

    def train(params, batch):
        state = tx.init(params)
        program = step.lower(params, state, batch, key).compile()
        for _ in range(3):
            params, state, loss, aux = program(params, state, batch, key)
        return (params, state, loss, aux), program

    expected, _ = train(jax.tree.map(jnp.asarray, PARAMS), jax.tree.map(jnp.asarray, BATCH))
    actual, program = train(jax.device_put(PARAMS, replicated(mesh)), shard_batch(BATCH, mesh))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, actual, expected)
    assert actual[3]["outputs"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert {name for name, _ in collectives(program)} == {"all-reduce"}


# ---- an attack a device


def softmax_loss(params, batch, key):
    del key
    losses = optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ params, batch["y"])
    return losses.mean()


@pytest.mark.parametrize(("m", "num_devices"), [("4", 1), ("2", 2), ("1", 4)])
def test_m_sharpness(m, num_devices, x64):
    """The gradient is that of SAM in which each device attacks with its m examples."""
    golden = GOLDEN["m_sharpness"]
    tx = optax.chain(sam(golden["rho"], axis_name="data"), optax.sgd(1.0))
    step = data_parallel_step(two_pass_step(softmax_loss, tx), make_mesh(num_devices))
    start = np.array(GOLDEN["softmax"]["w"])
    batch = {"x": np.array(golden["x"]), "y": np.array(golden["y"])}
    params, state, loss, _ = step(jnp.array(start), tx.init(start), batch, jax.random.key(0))
    column = np.array(golden["first_column_of_gradient"][m])
    np.testing.assert_allclose(start - params, np.stack([column, -column], 1), atol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "distance"), golden["rho"], rtol=1e-12)
    np.testing.assert_allclose(loss, softmax_loss(start, batch, None), rtol=1e-12)


def test_what_each_device_does(x64):
    """It has its own random numbers and attacked weights, and its outputs stay on it."""
    mesh, key = make_mesh(), jax.random.key(0)
    tx = optax.chain(tram("initial", axis_name="data"), optax.adamw(0.1))
    step = data_parallel_step(two_pass_step(loss_fn, tx, output_fn=output_fn), mesh)
    params = jax.tree.map(jnp.asarray, PARAMS)
    arguments = params, tx.init(params), shard_batch(BATCH, mesh), key
    program = jax.jit(step).lower(*arguments).compile()
    assert {name for name, _ in collectives(program)} == {"all-reduce"}
    assert not re.search(r"f64\[8,(5,16|16,3)\]", program.as_text())  # not the weights of others
    params, state, _, aux = program(*arguments)
    assert aux["kept"].shape == (8, 3, 5)
    assert aux["kept"].sharding.is_equivalent_to(batch_sharding(mesh), 3)
    assert len({np.asarray(kept).tobytes() for kept in aux["kept"]}) > 1
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves((params, state)))


def test_an_optimizer_that_does_not_average_is_refused():
    """Its parameters would drift apart between devices."""
    tx = optax.chain(sam(0.05), optax.sgd(0.1))
    step = data_parallel_step(two_pass_step(softmax_loss, tx), make_mesh())
    params, batch = jnp.ones((5, 3)), BATCH
    with pytest.raises(ValueError, match="out_axes"):
        step(params, tx.init(params), batch, jax.random.key(0))


# ---- errors


def test_batches_that_cannot_be_shared_equally():
    mesh = make_mesh()
    message = "batch_size must be a multiple of the number of devices, 8, got 20"
    batch = jax.tree.map(lambda x: x[:20], BATCH)
    with pytest.raises(ValueError, match=message):
        shard_batch(batch, mesh)
    tx = optax.sgd(0.1)
    step = data_parallel_step(two_pass_step(softmax_loss, tx), mesh)
    with pytest.raises(ValueError, match=message):
        step(jnp.ones((5, 3)), tx.init(jnp.ones((5, 3))), batch, jax.random.key(0))


@pytest.mark.parametrize("num_devices", [0, 9])
def test_devices_that_there_are_not(num_devices):
    message = f"num_devices must be from 1 to 8, .* got {num_devices}"
    with pytest.raises(ValueError, match=message):
        make_mesh(num_devices)


def test_mesh():
    assert make_mesh().shape == {"data": 8}
    assert make_mesh(3, axis_name="examples").shape == {"examples": 3}
    assert list(make_mesh(2).devices) == jax.devices()[:2]


def test_the_documented_loops_run():
    page = pathlib.Path(__file__).parents[2] / "docs" / "parallel.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    found = {}
    exec("\n".join(blocks), found)
    assert found["loss"] < 1.0
    assert found["params"].is_fully_replicated
