"""Sharded parameters and attacks per shard (m-sharpness), on eight simulated devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import GOLDEN, array

from trustjax.geometry import hypentropy, p_norm
from trustjax.optim import (
    asam,
    esam,
    fisher_sam,
    gsam,
    mirror_descent,
    sam,
    scale_by_auon,
    tram,
    tram_fisher,
)

M_SHARPNESS = GOLDEN["m_sharpness"]


def loss(params, x, y, where=None):
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params, y)
    return jnp.mean(losses, where=where)


def m_sharpness_problem():
    w = array(GOLDEN["softmax"]["w"])
    return w, array(M_SHARPNESS["x"]), jnp.array(M_SHARPNESS["y"])


# ---- sharded parameters

TRANSFORMS = {
    "sam": lambda: sam(0.5),
    "sam_linf": lambda: sam(0.5, norm="linf"),
    "asam": lambda: asam(0.5),
    "tram": lambda: tram("previous"),
    "tram_ema": lambda: tram("ema", decay=0.5),
    "tram_fisher": lambda: tram_fisher(0.5),
    "fisher_sam": lambda: fisher_sam(0.5),
    "gsam": lambda: gsam(0.5),
    "esam": lambda: esam(0.5, gamma=1.0),
    "auon": scale_by_auon,
    "auon_rms": lambda: scale_by_auon(brake="rms"),
    "mirror_descent": lambda: mirror_descent(0.1, hypentropy(1.0)),
    "mirror_descent_p_norm": lambda: mirror_descent(0.1, p_norm(1.5)),
}


@pytest.mark.table
@pytest.mark.parametrize("name", TRANSFORMS)
def test_sharded_parameters_stay_where_they_are(name):
    """The rows of a table of logits lie on eight devices, between which only scalars pass."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    random = np.random.default_rng(0)
    start, table = random.normal(size=(2, 16, 3)).astype(np.float32)
    tx = TRANSFORMS[name]()

    # Outputs are the table itself; the loss is any that works row by row.
    grad_fn = jax.grad(lambda table: jnp.sum(jnp.sin(table) * jnp.square(table)))

    def update(table, state):
        return tx.update(
            grad_fn(table),
            state,
            table,
            grad_fn=grad_fn,
            outputs=table,
            output_fn=lambda table: table,
            fisher_grads=jnp.cos(table),
        )

    expected, expected_state = jax.jit(update)(table, tx.init(start))

    table = jax.device_put(table, rows)
    state = tx.init(jax.device_put(start, rows))
    compiled = jax.jit(update).lower(table, state).compile()
    actual, actual_state = compiled(table, state)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual_state.radius, expected_state.radius, rtol=1e-5)
    assert actual.sharding.is_equivalent_to(rows, 2)
    if getattr(actual_state, "reference", None) is not None:
        assert actual_state.reference.sharding.is_equivalent_to(rows, 2)
    collectives = re.findall(
        r"= (\S+(?: \S+)*) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()
    )
    assert collectives  # the norm of the gradient needs one
    for shape, operation in collectives:
        assert operation == "all-reduce"
        assert not re.search(r"\[\d", shape), f"{operation} of {shape}"


# ---- m-sharpness: every shard of the batch attacks on its own, the gradients are averaged


def shard_map_update(tx, loss, mesh, extra_args=lambda params, x, y: {}, *, check_vma=True):
    """An update with the batch split over the mesh axis "data" and all else replicated."""

    def local_update(params, state, x, y):
        grad_fn = lambda params, **where: jax.grad(loss)(params, x, y, **where)
        # The gradient of replicated parameters would be summed over the devices; make it local.
        local = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return tx.update(grad_fn(local), state, params, grad_fn=grad_fn, **extra_args(params, x, y))

    replicated, split = PartitionSpec(), PartitionSpec("data")
    return jax.jit(
        jax.shard_map(
            local_update,
            mesh=mesh,
            in_specs=(replicated, replicated, split, split),
            out_specs=(replicated, replicated),
            check_vma=check_vma,
        )
    )


def vmap_update(tx, loss, shards, extra_args=lambda params, x, y: {}):
    """The same update on one device, with the batch as [shards, examples, ...]."""

    def local_update(params, state, x, y):
        grad_fn = lambda params, **where: jax.grad(loss)(params, x, y, **where)
        return tx.update(
            grad_fn(params), state, params, grad_fn=grad_fn, **extra_args(params, x, y)
        )

    over_shards = jax.vmap(local_update, (None, None, 0, 0), out_axes=None, axis_name="data")
    split = lambda leaf: leaf.reshape(shards, -1, *leaf.shape[1:])
    return jax.jit(lambda params, state, x, y: over_shards(params, state, split(x), split(y)))


def data_mesh(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


WAYS = {
    "shard_map": lambda tx, loss, n, *extra: shard_map_update(tx, loss, data_mesh(n), *extra),
    "shard_map_unchecked": lambda tx, loss, n, *extra: shard_map_update(
        tx, loss, data_mesh(n), *extra, check_vma=False
    ),
    "vmap": vmap_update,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# Without the check of shard_map other sums are inserted; SAM shows it in every run.
checked_first = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=[pytest.mark.slow] * (name == "shard_map_unchecked"))
        for name, way in WAYS.items()
    ],
)


@pytest.mark.table
@ways
@pytest.mark.parametrize("m", ["4", "2", "1", "plain"])
def test_sam_per_shard(way, m, x64):
    """Every shard attacks on its own; at radius 0 nothing is counted twice."""
    w, x, y = m_sharpness_problem()
    rho, shards = (0.0, 4) if m == "plain" else (M_SHARPNESS["rho"], 4 // int(m))
    tx = sam(rho, axis_name="data")
    gradient, state = way(tx, loss, shards)(w, tx.init(w), x, y)
    column = np.array(M_SHARPNESS["first_column_of_gradient"][m])
    np.testing.assert_allclose(gradient, np.stack([column, -column], 1), atol=1e-12)
    np.testing.assert_allclose([state.radius, state.distance], rho, rtol=1e-12)


def by_hand(make, loss, params, start, x, y, shards, extra_args=lambda params, x, y: {}):
    """Computes each shard by itself, without an axis, and the means of gradients and lengths."""
    tx = make()

    @jax.jit
    def update(x, y):
        grad_fn = lambda params, **where: jax.grad(loss)(params, x, y, **where)
        gradient, state = tx.update(
            grad_fn(params), tx.init(start), params, grad_fn=grad_fn, **extra_args(params, x, y)
        )
        return gradient, state.radius, state.distance

    split = lambda leaf: leaf.reshape(shards, -1, *leaf.shape[1:])
    results = [update(*shard) for shard in zip(split(x), split(y), strict=True)]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *results)


def assert_trees_close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-11), actual, expected)


@pytest.mark.table
@checked_first
@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_tram_per_shard(way, reference, x64):
    """Each shard has its own divergence; the state holds the mean and stays replicated."""
    w, x, y = m_sharpness_problem()
    start = array(GOLDEN["softmax"]["reference"])
    extra_args = lambda params, x, y: {"outputs": x @ params, "output_fn": lambda p: x @ p}
    make = lambda **axis: tram(reference, scale=10.0, **axis)
    expected = by_hand(make, loss, w, start, x, y, 2, extra_args)

    tx = make(axis_name="data")
    gradient, state = way(tx, loss, 2, extra_args)(w, tx.init(start), x, y)
    assert_trees_close((gradient, state.radius, state.distance), expected)
    np.testing.assert_array_equal(state.reference, start if reference == "initial" else w)
    # One divergence for all would be another attack.
    whole = by_hand(make, loss, w, start, x, y, 1, extra_args)
    assert np.abs(whole[0] - expected[0]).max() > 1e-3


ATTACKS_PER_SHARD = {
    "sam": functools.partial(sam, 0.5),
    "asam": functools.partial(asam, 0.5),
    "gsam": functools.partial(gsam, 0.5),
    "fisher_sam": functools.partial(fisher_sam, 0.5),
}


@pytest.mark.table
@pytest.mark.parametrize("name", ATTACKS_PER_SHARD)
@pytest.mark.parametrize("way", ["shard_map", "vmap"])
def test_all_shards_fall_back_when_one_breaks(way, name, x64):
    """If one of four second passes is not finite, all take the mean of the first gradients."""
    w, x, y = m_sharpness_problem()
    x = x.at[0].add(100.0)

    def fragile(params, x, y):
        # Breaks far from w, and only where the first example is.
        steep = jnp.where(jnp.any(params != w) & (jnp.max(x) > 50), jnp.inf, 1.0)
        return loss(params, x, y) * steep

    make = ATTACKS_PER_SHARD[name]
    tx = make(axis_name="data")
    update = WAYS[way](tx, fragile, 4)
    gradient, state = update(w, tx.init(w), x, y)
    np.testing.assert_allclose(gradient, jax.grad(loss)(w, x, y), rtol=1e-11)
    assert state.nonfinite_count == 1
    # A shard whose own first gradient is broken breaks all, as without an attack.
    broken, broken_state = update(w, tx.init(w), x.at[0].set(jnp.nan), y)
    assert np.all(np.isnan(broken))
    assert broken_state.nonfinite_count == 0
    tx = make(axis_name="data", on_nonfinite="propagate")
    gradient, state = WAYS[way](tx, fragile, 4)(w, tx.init(w), x, y)
    assert np.all(~np.isfinite(gradient))
    assert state.nonfinite_count == 1


NEIGHBOURS = {
    "gsam": functools.partial(gsam, 0.5),
    "fisher_sam": functools.partial(fisher_sam, 0.5),
    "esam": functools.partial(esam, 0.5, beta=1.0, gamma=0.5),
}


def losses_of_shard(params, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return {"losses_fn": lambda p: losses(x @ p, y)}


@functools.cache
def neighbour_by_hand(name, shards):
    w, x, y = m_sharpness_problem()
    return by_hand(NEIGHBOURS[name], loss, w, w, x, y, shards, losses_of_shard)


@pytest.mark.table
@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("way", ["shard_map", "vmap"])
def test_neighbours_per_shard(way, name, x64):
    """GSAM's decomposition, Fisher SAM's ellipse and ESAM's selection are per shard."""
    w, x, y = m_sharpness_problem()
    expected, whole = (neighbour_by_hand(name, shards) for shards in (2, 1))
    tx = NEIGHBOURS[name](axis_name="data")
    gradient, state = WAYS[way](tx, loss, 2, losses_of_shard)(w, tx.init(w), x, y)
    assert_trees_close((gradient, state.radius, state.distance), expected)
    assert np.abs(whole[0] - expected[0]).max() > 1e-3


@pytest.mark.table
@pytest.mark.parametrize("make", [sam, asam])
@checked_first
def test_a_leaf_that_is_not_attacked(way, make, x64):
    """Its gradient is local too, and averaged once instead of summed by shard_map."""
    w, x, y = m_sharpness_problem()
    params = {"w": w, "bias": array([0.1, -0.2])}
    losses = optax.softmax_cross_entropy_with_integer_labels
    loss = lambda p, x, y: losses(x @ p["w"] + p["bias"], y).mean()
    transform = lambda **axis: make(0.5, mask={"w": True, "bias": False}, **axis)
    expected = by_hand(transform, loss, params, params, x, y, 4)
    tx = transform(axis_name="data")
    gradient, state = way(tx, loss, 4)(params, tx.init(params), x, y)
    assert_trees_close((gradient, state.radius, state.distance), expected)
