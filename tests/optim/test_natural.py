"""The natural gradient step: worked numbers, the line search, invariance, devices, bad input."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from trustjax.geometry import kl_divergence
from trustjax.optim import natural_gradient

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "natural.json").read_text(encoding="utf-8")
)
FISHER, ASCENT = (np.array(GOLDEN[name]) for name in ("fisher", "ascent"))
RADIUS = GOLDEN["radius"]
START = np.array([0.3, -0.7])


def quadratic(params):
    away = params - START
    return 0.5 * away @ FISHER @ away


def loss(params):
    """The surrogate that TRPO climbs, with the opposite sign."""
    return -ASCENT @ (params - START)


def stepped(tx, params=START, loss_fn=loss, divergence_fn=quadratic):
    params = jnp.asarray(params)

    @jax.jit
    def step(params):
        gradient = jax.grad(loss_fn)(params)
        return tx.update(
            gradient, tx.init(params), params, loss_fn=loss_fn, divergence_fn=divergence_fn
        )

    return step(params)


@pytest.mark.parametrize("name", ["undamped", "damped"])
def test_golden_step(name, x64):
    golden = GOLDEN[name]
    tx = natural_gradient(RADIUS, damping=golden.get("damping", 0.0))
    step, state = stepped(tx)
    np.testing.assert_allclose(step, golden["full_step"], rtol=1e-8)
    np.testing.assert_allclose(ASCENT @ step, golden["gain"], rtol=1e-8)
    np.testing.assert_allclose(state.distance, golden["divergence"], rtol=1e-8)
    assert state.accepted
    assert (state.step_fraction, state.radius, state.num_products) == (1.0, RADIUS, 2)
    if name == "undamped":
        multiplier = golden["solution"] / np.asarray(step)
        np.testing.assert_allclose(multiplier, golden["multiplier"], rtol=1e-8)


def bent_loss(params):
    away = params - START
    return loss(params) + 8 * jnp.sum(away**2)


def bent_divergence(params):
    return quadratic(params) + 3 * jnp.sum(jnp.abs(params - START) ** 3)


def test_golden_line_search(x64):
    """The full step fails both conditions: the surrogate fell, and the divergence is 1.7 delta."""
    golden = GOLDEN["line_search"]
    tx = natural_gradient(RADIUS, damping=0.0, backtrack=0.5)
    step, state = stepped(tx, loss_fn=bent_loss, divergence_fn=bent_divergence)
    np.testing.assert_allclose(step, 0.5 * np.array(GOLDEN["undamped"]["full_step"]), rtol=1e-8)
    assert state.step_fraction == 0.5
    np.testing.assert_allclose(state.distance, golden["half"]["divergence"], rtol=1e-7)
    half, full = (START + f * np.array(GOLDEN["undamped"]["full_step"]) for f in (0.5, 1.0))
    np.testing.assert_allclose(-bent_loss(half), golden["half"]["surrogate"], rtol=1e-7)
    np.testing.assert_allclose(-bent_loss(full), golden["full"]["surrogate"], rtol=1e-5)
    np.testing.assert_allclose(bent_divergence(full), golden["full"]["divergence"], rtol=1e-5)


def test_each_condition_of_the_line_search(x64):
    """The divergence or the loss alone rejects a step; slack and accept_ratio move the border."""
    make = functools.partial(natural_gradient, RADIUS, damping=0.0, backtrack=0.5)
    fraction = lambda tx, *functions: float(stepped(tx, START, *functions)[1].step_fraction)
    assert fraction(make(), loss, bent_divergence) == 0.5
    assert fraction(make(slack=1.7), loss, bent_divergence) == 1.0
    assert fraction(make(), bent_loss, quadratic) == 0.5
    # At half of the step 0.0320 of the promised 0.0756 came, at a quarter 0.0306 of 0.0378.
    assert fraction(make(accept_ratio=0.5), bent_loss, quadratic) == 0.25
    assert fraction(make(accept_ratio=0.4), bent_loss, quadratic) == 0.5
    infinite = lambda params: jnp.where(params[0] > START[0] + 0.05, jnp.nan, loss(params))
    assert fraction(make(), infinite, quadratic) == 0.5
    assert fraction(make(), loss, lambda p: jnp.where(p[0] > START[0] + 0.05, jnp.nan, quadratic(p))
                    ) == 0.5  # fmt: skip


def test_no_step_is_accepted(x64):
    """If no step is accepted, the weights stay."""
    rising = lambda params: loss(params) + 100 * jnp.sum(jnp.abs(params - START))
    tx = natural_gradient(RADIUS, max_backtracks=3)
    gradient = jax.grad(loss)(jnp.asarray(START))
    step, state = tx.update(
        gradient, tx.init(START), jnp.asarray(START), loss_fn=rising, divergence_fn=quadratic
    )
    np.testing.assert_array_equal(step, 0)
    assert (state.accepted, state.step_fraction, state.distance) == (False, 0, 0)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_gradients_without_a_direction(value):
    gradient, at = jnp.full(2, value, jnp.float32), jnp.asarray(START, jnp.float32)
    tx = natural_gradient(RADIUS)
    step, state = jax.jit(functools.partial(tx.update, loss_fn=loss, divergence_fn=quadratic))(
        gradient, tx.init(at), at
    )
    np.testing.assert_array_equal(step, 0)
    assert not state.accepted
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in state)


# ---- a policy: softmax of a linear map

RANDOM = np.random.default_rng(0)
STATES = RANDOM.normal(size=(16, 3))
ADVANTAGES = RANDOM.normal(size=(16, 4))


def policy_losses(old, states=STATES, advantages=ADVANTAGES):
    """The surrogate of all actions and the mean divergence, as functions of {"w", "b"}."""
    logits = lambda params: states @ params["w"] + params["b"]
    before = jax.lax.stop_gradient(logits(old))
    return (
        lambda params: -jnp.mean(jnp.sum(jax.nn.softmax(logits(params)) * advantages, -1)),
        lambda params: jnp.mean(kl_divergence(before, logits(params))),
    )


def policy(dtype=np.float64):
    random = np.random.default_rng(1)
    return {
        "b": jnp.asarray(random.normal(size=4), dtype),
        "w": jnp.asarray(random.normal(size=(3, 4)), dtype),
    }


def policy_step(tx, params):
    loss_fn, divergence_fn = policy_losses(params)
    gradient = jax.grad(loss_fn)(params)
    return tx.update(
        gradient, tx.init(params), params, loss_fn=loss_fn, divergence_fn=divergence_fn
    )


@pytest.mark.slow
def test_agrees_with_the_exact_inverse(x64):
    params = policy()
    loss_fn, divergence_fn = policy_losses(params)
    step, state = policy_step(natural_gradient(1e-6, damping=1e-3, cg_steps=50), params)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    fisher = jax.jit(jax.hessian(lambda flat: divergence_fn(unravel(flat))))(flat) + 1e-3 * np.eye(
        len(flat)
    )
    gradient = jax.jit(jax.grad(lambda flat: loss_fn(unravel(flat))))(flat)
    x = -jnp.linalg.solve(fisher, gradient)
    expected = x * jnp.sqrt(2e-6 / (x @ fisher @ x))
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(step)[0], expected, rtol=1e-3)
    assert state.accepted


def test_does_not_depend_on_the_coordinates(x64):
    """The step moves the policy in the same way when its weights are written in other units."""
    params, tx = policy(), natural_gradient(1e-4, damping=0.0, cg_steps=100)
    loss_fn, divergence_fn = policy_losses(params)
    turn = np.random.default_rng(2).normal(size=(3, 3)) + 2 * np.eye(3)
    old = {"b": params["b"] / 10, "w": np.linalg.solve(turn, params["w"])}
    back = lambda own: {"b": 10 * own["b"], "w": turn @ own["w"]}
    losses = [lambda own, f=f: f(back(own)) for f in (loss_fn, divergence_fn)]

    @jax.jit
    def policies(old, params):
        step, _ = policy_step(tx, params)
        other, _ = tx.update(
            jax.grad(losses[0])(old), tx.init(old), old, loss_fn=losses[0], divergence_fn=losses[1]
        )
        moved = optax.apply_updates(params, step), back(optax.apply_updates(old, other))
        return [jax.nn.softmax(STATES @ p["w"] + p["b"]) for p in moved]

    np.testing.assert_allclose(*policies(old, params), atol=1e-6)


def test_it_climbs_within_the_radius():
    """With the opposite sign of the step nothing would be accepted."""
    params, tx = policy(np.float32), natural_gradient(0.01, damping=1e-3)
    losses, next_step = [policy_losses(params)[0](params)], jax.jit(lambda p: policy_step(tx, p))
    for _ in range(20):
        step, state = next_step(params)
        assert state.accepted
        assert 0.002 < state.distance <= 0.0101
        params = optax.apply_updates(params, step)
        losses.append(policy_losses(params)[0](params))
    assert np.all(np.diff(losses) < 0)
    assert losses[0] - losses[-1] > 0.3


@pytest.mark.slow
def test_dtypes_integers_and_traced_radius():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy(np.float32)) | {
        "n": jnp.array([3])
    }
    loss_fn, divergence_fn = policy_losses(params)
    floats = {name: params[name] for name in ("b", "w")}
    gradient = jax.grad(loss_fn)(floats) | {"n": jnp.array([0])}

    @jax.vmap
    def step(radius):
        tx = natural_gradient(radius)
        return tx.update(
            gradient, tx.init(params), params, loss_fn=loss_fn, divergence_fn=divergence_fn
        )

    updates, state = step(jnp.array([0.1, 0.4]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16", "int32"}
    assert state.distance.dtype == jnp.float32
    np.testing.assert_allclose(state.radius, [0.1, 0.4])
    assert np.all(state.accepted)
    assert state.distance[1] > 2 * state.distance[0] > 0.04


@pytest.mark.slow
def test_radius_may_be_a_schedule():
    params, tx = policy(np.float32), natural_gradient(lambda count: 0.01 / (1 + count))
    loss_fn, divergence_fn = policy_losses(params)
    state = tx.init(params)
    for expected in (0.01, 0.005):
        _, state = tx.update(
            jax.grad(loss_fn)(params), state, params, loss_fn=loss_fn, divergence_fn=divergence_fn
        )
        assert state.radius == pytest.approx(expected)


# ---- tolerance, small steps, calls outside of jit


def regression(start=(0.0, 0.0, 0.0)):
    """A loss of three weights, and the divergence of the outputs from those at given weights."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(32, 3)), jnp.float32)
    y = x @ jnp.array([1.0, -2.0, 0.5])
    divergence = lambda old: lambda w: 0.5 * jnp.mean(jnp.square(x @ w - x @ old))
    return jnp.array(start), lambda w: jnp.mean(jnp.square(x @ w - y)), divergence


def test_it_converges_with_the_defaults():
    """With ten tries it stalls at 6e-5, because the full step is no shorter near the minimum."""
    w, loss_fn, divergence = regression()
    tx = natural_gradient(0.01)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(
            jax.grad(loss_fn)(w), state, w, loss_fn=loss_fn, divergence_fn=divergence(w)
        )
        return w + updates, state

    state = tx.init(w)
    for _ in range(40):
        w, state = step(w, state)
        assert state.accepted
    assert loss_fn(w) < 1e-8


@pytest.mark.parametrize("height", [0.0, 1e8])
def test_an_unchanged_loss_did_not_fall(height):
    """This holds even if the fall is less than a rounding error of the loss."""
    at = jnp.asarray(START, jnp.float32)
    flat = lambda params: height + 0 * params[0] if height == 0 else height + loss(params)
    step, state = stepped(natural_gradient(RADIUS), at, loss_fn=loss, divergence_fn=quadratic)
    assert state.accepted
    tx = natural_gradient(RADIUS, accept_ratio=0.0)
    step, state = jax.jit(functools.partial(tx.update, loss_fn=flat, divergence_fn=quadratic))(
        jax.grad(loss)(at), tx.init(at), at
    )
    np.testing.assert_array_equal(step, 0)
    assert not state.accepted


def test_solver_tolerance(x64):
    """It is passed on to the solver; the default is 1e-10."""

    @functools.partial(jax.jit, static_argnames="cg_tolerance")
    def products(**options):
        tx = natural_gradient(1e-4, damping=1e-3, cg_steps=50, **options)
        return policy_step(tx, policy())[1].num_products

    default = products()
    assert 1 == products(cg_tolerance=0.99) < products(cg_tolerance=1e-2) < default
    assert default == products(cg_tolerance=1e-10)


@pytest.mark.slow
def test_calls_outside_of_jit_do_not_compile_again(compiled):
    """Neither the same functions nor new ones of the same shapes, as each batch makes them."""
    w, loss_fn, divergence = regression()
    tx = natural_gradient(0.01)
    gradient, state = jax.grad(loss_fn)(w), tx.init(w)
    same = divergence(w)

    def call(divergence_fn):
        tx.update(gradient, state, w, loss_fn=loss_fn, divergence_fn=divergence_fn)

    call(same)
    assert compiled
    compiled.clear()
    call(same)
    call(divergence(w))
    assert not compiled


def test_leaves_without_a_gradient_stay():
    w, loss_fn, divergence = regression()
    others = {"n": jnp.array(7), "flag": jnp.array(True), "empty": jnp.ones((0, 5)), "none": None}
    params = {"w": w, "key": jax.random.key(0)} | others
    tx = natural_gradient(0.01)
    arguments = {
        "loss_fn": lambda p: loss_fn(p["w"]),
        "divergence_fn": lambda p: divergence(w)(p["w"]),
    }
    expected, _ = tx.update(
        jax.grad(loss_fn)(w), tx.init(w), w, loss_fn=loss_fn, divergence_fn=divergence(w)
    )
    for of_n in (np.zeros([], jax.dtypes.float0), jnp.array(5), None):
        gradient = {"w": jax.grad(loss_fn)(w), "n": of_n, "flag": None, "key": None} | {
            name: others[name] for name in ("empty", "none")
        }
        updates, state = tx.update(gradient, tx.init(params), params, **arguments)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
        assert not updates["n"]  # zero, whatever stood there, or None
        assert updates["flag"] is updates["key"] is updates["none"] is None
        assert updates["empty"].shape == (0, 5)
        assert state.accepted


def test_complex_leaves_are_refused():
    with pytest.raises(ValueError, match=r"params\['z'\] is complex64.*two leaves"):
        natural_gradient(0.01).init({"w": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)})


def test_gradient_of_another_shape():
    w, loss_fn, divergence = regression()
    tx = natural_gradient(0.01)
    for wrong in (jnp.ones(()), np.zeros(3, jax.dtypes.float0), None):
        with pytest.raises(ValueError, match=r"the gradient of params\['w'\].*shape \(3,\)"):
            tx.update(
                {"w": wrong}, tx.init({"w": w}), {"w": w},
                loss_fn=lambda p: loss_fn(p["w"]), divergence_fn=lambda p: divergence(w)(p["w"]),
            )  # fmt: skip


# ---- devices that share a batch


def on_eight_devices(tx, check_vma=True):
    """A compiled step on the whole batch, of which each of 8 devices has a part."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, parts = PartitionSpec(), PartitionSpec("data")

    def step(params, states, advantages):
        loss_fn, divergence_fn = policy_losses(params, states, advantages)
        local = jax.lax.pcast(params, "data", to="varying") if check_vma else params
        gradient = jax.lax.pmean(jax.grad(loss_fn)(local), "data")
        return tx.update(
            gradient, tx.init(params), params, loss_fn=loss_fn, divergence_fn=divergence_fn
        )

    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, parts, parts),
            out_specs=(whole, whole),
            check_vma=check_vma,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_eight_devices_are_one(check_vma, x64):
    """Fails when products, losses or divergences are not averaged over the devices."""
    params = policy()
    expected, state = policy_step(natural_gradient(1.0, accept_ratio=0.8), params)
    tx = natural_gradient(1.0, accept_ratio=0.8, axis_name="data")
    found, shared = on_eight_devices(tx, check_vma)(params, STATES, ADVANTAGES)
    assert state.step_fraction < 1
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found, expected)
    jax.tree.map(close, shared, state)


@pytest.mark.slow
def test_vmap_over_an_axis_is_one(x64):
    params = policy()
    expected, _ = policy_step(natural_gradient(1.0, accept_ratio=0.8), params)
    tx = natural_gradient(1.0, accept_ratio=0.8, axis_name="data")

    @functools.partial(jax.vmap, axis_name="data", in_axes=(None, 0, 0))
    def step(params, states, advantages):
        loss_fn, divergence_fn = policy_losses(params, states, advantages)
        gradient = jax.lax.pmean(jax.grad(loss_fn)(params), "data")
        return tx.update(
            gradient, tx.init(params), params, loss_fn=loss_fn, divergence_fn=divergence_fn
        )[0]

    found = step(params, STATES.reshape(4, 4, 3), ADVANTAGES.reshape(4, 4, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, np.stack([b] * 4), rtol=1e-8), found, expected
    )


def test_one_reduction_a_product():
    """The compiled loop of the solver has one reduction, and none for its dot products."""
    step = on_eight_devices(natural_gradient(1.0, accept_ratio=0.8, axis_name="data"))
    text = step.lower(policy(np.float32), STATES, ADVANTAGES).compile().as_text()
    computations = re.split(r"\n\n", text)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    reductions = {
        name: len(re.findall(r"= \S+ all-reduce(?:-start)?\(|= \(.*\) all-reduce(?:-start)?\(", c))
        for name in bodies
        for c in computations
        if re.match(rf"%?{re.escape(name)} ", c)
    }
    assert len(reductions) == 2  # the solver, and the search with its loss and divergence
    assert sorted(reductions.values()) in ([1, 1], [1, 2])


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"radius": -1.0}, "radius must be >= 0, got -1"),
        ({"damping": -0.1}, "damping must be >= 0"),
        ({"cg_steps": 0}, "cg_steps must be >= 1, got 0"),
        ({"cg_tolerance": -1.0}, "cg_tolerance must be >= 0, got -1"),
        ({"max_backtracks": 0}, "max_backtracks must be >= 1, got 0"),
        ({"backtrack": 0.0}, "backtrack must be > 0, got 0"),
        ({"backtrack": 1.5}, "backtrack must be <= 1, got 1.5"),
        ({"accept_ratio": -0.1}, "accept_ratio must be >= 0"),
        ({"slack": 0.5}, "slack must be >= 1, got 0.5"),
    ],
)
def test_bad_numbers(arguments, words):
    with pytest.raises(ValueError, match=words):
        natural_gradient(**{"radius": 0.01} | arguments)


def test_missing_arguments():
    tx, at = natural_gradient(0.01), jnp.asarray(START)
    with pytest.raises(ValueError, match="needs params and loss_fn and divergence_fn: call"):
        tx.update(at, tx.init(at))
    with pytest.raises(ValueError, match="needs divergence_fn: call"):
        tx.update(at, tx.init(at), at, loss_fn=loss)


def test_hidden_leaves():
    tx = optax.masked(natural_gradient(0.01), {"a": True, "b": False})
    with pytest.raises(ValueError, match="natural_gradient evaluates the whole model"):
        tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
