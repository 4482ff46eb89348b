"""One table of transforms with tests for all of its rows. A new transform adds a row."""

import dataclasses
import functools
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from trustjax.geometry import p_norm, separable_p
from trustjax.optim import (
    alternating,
    asam,
    auon,
    esam,
    fisher_sam,
    gsam,
    hybrid_auon,
    mirror_descent,
    sam,
    tram,
    tram_fisher,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A transform of the table.

    Attributes:
      factory: The factory of the transform, which takes the swept number by name.
      number: The name of the radius, rate or factor that is swept.
      values: Two values of this number.
      needs: The extra arguments that `update` cannot do without.
      with_base: A function that makes an optimizer of the transform and a base optimizer.
      calls: Calls of `update` per step.
      static: Arguments of the factory that must be known before compilation.
      attacks_at_zero_gradient: The reason why the transform moves the weights even where their
        gradient is zero, such as an attack of random direction. Empty for a transform that attacks
        nothing there, as all do that follow the gradient.
    """

    factory: Callable[..., Any]
    number: str
    values: tuple[float, float] = (0.05, 0.2)
    needs: tuple[str, ...] = ("grad_fn",)
    with_base: Callable[..., Any] = optax.chain
    calls: int = 1
    static: tuple[str, ...] = ()
    attacks_at_zero_gradient: str = ""

    def make(self, value: Any = None) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{self.number: self.values[0] if value is None else value})


def mirror_gradient(rate, mirror_map):
    return optax.chain(mirror_descent(rate, mirror_map), optax.scale(-1.0))


REFERENCE = ("grad_fn", "outputs", "output_fn")
NOISE = ("grad_fn", "outputs", "noisy_outputs")
LOSSES = ("grad_fn", "losses_fn")
# At its first draw esam keeps both leaves of one layer, whatever order a tree has them in.
SEED = 7
RELEASED = {"ascent": "released", "divergence": "released_kl"}
TRANSFORMS = {
    "sam": Row(sam, "rho"),
    "sam_linf": Row(functools.partial(sam, norm="linf"), "rho"),
    "asam": Row(asam, "rho"),
    "tram_previous": Row(functools.partial(tram, "previous"), "scale", (1.0, 4.0), REFERENCE),
    "tram_initial": Row(functools.partial(tram, "initial"), "scale", (1.0, 4.0), REFERENCE),
    "tram_ema": Row(functools.partial(tram, "ema", decay=0.5), "scale", (1.0, 4.0), REFERENCE),
    "tram_noise": Row(functools.partial(tram, "noise"), "scale", (1.0, 4.0), NOISE),
    "tram_released": Row(
        functools.partial(tram, "initial", **RELEASED), "scale", (1.0, 4.0), REFERENCE
    ),
    "tram_fisher": Row(tram_fisher, "gamma", needs=("grad_fn", "fisher_grads")),
    "fisher_sam": Row(fisher_sam, "gamma"),
    "gsam": Row(gsam, "rho"),
    "esam": Row(functools.partial(esam, seed=SEED), "rho", needs=LOSSES),
    # With the sign of a gradient, as the base follows; the vectors stay gradients. A number below 0
    # is refused, and a schedule is not looked at.
    "auon": Row(
        functools.partial(auon, lambda count: -1.0, other=optax.identity()),
        "gamma",
        (0.5, 2.0),
        (),
        static=("ns_steps",),
    ),
    "hybrid_auon": Row(
        functools.partial(hybrid_auon, lambda count: -1.0, other=optax.identity()),
        "gamma",
        (0.5, 2.0),
        (),
        static=("ns_steps",),
    ),
    # At rate 1 with the sign of a gradient; the rate stands for its number.
    "mirror_descent": Row(
        functools.partial(mirror_gradient, mirror_map=separable_p(1.5)), "rate", (0.5, 2.0), ()
    ),
    "mirror_descent_p_norm": Row(
        functools.partial(mirror_gradient, mirror_map=p_norm(1.5)), "rate", (0.5, 2.0), ()
    ),
    "alternating": Row(sam, "rho", needs=(), with_base=alternating, calls=2),
}
# Those that return a gradient taken at attacked weights.
ATTACKS = [name for name, row in TRANSFORMS.items() if "grad_fn" in row.needs]
rows = pytest.mark.parametrize("row", TRANSFORMS.values(), ids=TRANSFORMS)
attacks = pytest.mark.parametrize("row", [TRANSFORMS[n] for n in ATTACKS], ids=ATTACKS)

# ---- the problem: a small MLP as a plain dict

RANDOM = np.random.default_rng(0)
X, Z = RANDOM.normal(size=(2, 6, 2)).astype(np.float32) * np.array([[[1.0]], [[0.2]]], np.float32)
ONES = np.ones(6, np.float32)
LABELS = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
SHAPES = {
    "hidden": {"kernel": (2, 4), "bias": (4,)},
    "out": {"kernel": (4, 3), "bias": (3,)},
}


def random_params():
    return {
        layer: {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in leaf.items()}
        for layer, leaf in SHAPES.items()
    }


PARAMS = random_params()
START = jax.tree.map(lambda p, r: p + np.float32(0.2) * r, PARAMS, random_params())


def compiled(function, **arguments):
    """`function` compiled, even inside of disable_jit."""
    return jax.disable_jit(False)(jax.jit(function, **arguments))


@compiled
def mlp(params, x):
    # Computes in the dtype of x, and spells out every promotion.
    dense = lambda layer, x: (
        x @ layer["kernel"].astype(x.dtype) + jnp.expand_dims(layer["bias"].astype(x.dtype), 0)
    )
    return dense(params["out"], jnp.tanh(dense(params["hidden"], x)))


def losses_of(params, x=X, apply=mlp):
    return -jnp.sum(LABELS * jax.nn.log_softmax(apply(params, x)), -1)


def loss_of(params, x=X, apply=mlp, weights=ONES):
    losses = losses_of(params, x, apply)
    return jnp.sum(weights * losses) / jnp.sum(weights).astype(losses.dtype)


# Compiled once for all rows; what is under test runs operation by operation around it.
gradient_of = compiled(jax.grad(loss_of), static_argnames="apply")


def extra_args(params, apply=mlp):
    """Everything a transform may ask for."""

    def grad_fn(params, where=None):
        chosen = {} if where is None else {"weights": where.astype(jnp.float32)}
        return gradient_of(params, X, apply=apply, **chosen)

    return {
        "grad_fn": grad_fn,
        "outputs": apply(params, X),
        "output_fn": lambda p: apply(p, X),
        "losses_fn": lambda p: losses_of(p, X, apply),
        "noisy_outputs": apply(params, X + Z),
        "fisher_grads": gradient_of(params, X + Z, apply=apply),
    }


def itself(params, where=None):
    """A `grad_fn` that returns the weights at which the second gradient is taken."""
    return params


def call(tx, params, state, apply=mlp, **changes):
    """One call of `update`, applied to the parameters."""
    arguments = extra_args(params, apply) | changes
    updates, state = tx.update(gradient_of(params, X, apply=apply), state, params, **arguments)
    return optax.apply_updates(params, updates), state


def advance(tx, calls, params=PARAMS, start=START, **changes):
    """`calls` calls after `init` at another point, so that the weights differ from it."""
    params, state = as_arrays(params), tx.init(as_arrays(start))
    return repeat(tx, calls, params, state, **changes)


def repeat(tx, calls, params, state, **changes):
    # Outside of jit a lax.cond compiles its branches anew at every call, unless jit is disabled.
    with jax.disable_jit():
        for _ in range(calls):
            params, state = call(tx, params, state, **changes)
    return params, state


def as_arrays(tree):
    """The tree as new arrays, which may be donated."""
    return jax.tree.map(jnp.array, tree)


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def largest_difference(actual, expected):
    gap = lambda a, e: np.abs(np.asarray(a) - np.asarray(e)).max()
    return max(jax.tree.leaves(jax.tree.map(gap, actual, expected)))


# ---- how it is run


# Rows that differ from another one by a number or a word alone; golden numbers hold for them too.
NIGHTLY = {
    "sam_linf", "tram_initial", "tram_ema", "tram_noise", "tram_released", "hybrid_auon",
    "mirror_descent_p_norm",
}  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=[pytest.mark.slow] * (name in NIGHTLY))
        for name, row in TRANSFORMS.items()
    ],
)
def test_compiled_scan_under_vmap_equals_eager_loops(row):
    """The two values of the number differ in their results; unknown arguments are ignored."""
    make = lambda value: row.with_base(row.make(value), optax.sgd(0.1))

    def run(value):
        tx = make(value)
        body = lambda carry, _: (call(tx, *carry), None)
        return jax.lax.scan(body, (as_arrays(PARAMS), tx.init(as_arrays(START))), length=4)[0]

    together = jax.jit(jax.vmap(run))(jnp.array(row.values))
    results = [jax.tree.map(lambda x, i=i: x[i], together) for i in (0, 1)]
    for value, result in zip(row.values, results, strict=True):
        assert_trees_close(result, advance(make(value), 4, unknown_argument=3.0))
    assert largest_difference(results[0][0], PARAMS) > 0.01
    assert largest_difference(results[0][0], results[1][0]) > 1e-5


@rows
def test_parameters_and_state_can_be_donated(row):
    """They share no buffer, and the state uses none twice."""
    params = as_arrays(PARAMS)
    state = row.with_base(row.make(), optax.sgd(0.1)).init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.table
@rows
def test_mixed_dtypes(row):
    """Each leaf keeps its dtype, where some are bfloat16 and some float32."""
    params = as_arrays(PARAMS)
    params["hidden"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["hidden"])
    tx = row.with_base(row.make(row.values[1]), optax.sgd(0.1))
    new, _ = advance(tx, 2, params, params)
    assert dtypes(new) == dtypes(params)
    expected, _ = advance(tx, 2, start=PARAMS)
    assert_trees_close(jax.tree.map(np.float32, new), expected, atol=0.03)


@pytest.mark.table
@rows
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes_of_updates_and_state(row, dtype, x64):
    """Updates have the dtypes of the parameters; a call does not change the dtypes of the state."""
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    tx = row.with_base(row.make(), optax.identity())
    state = jax.eval_shape(tx.init, params)

    def grad_fn(attacked, where=None):
        assert set(dtypes(attacked)) == {jnp.dtype(dtype)}
        return jax.tree.map(lambda p: p.astype(jnp.float32), attacked)

    # With a traced number.
    run = lambda value, state: row.with_base(row.make(value), optax.identity()).update(
        gradient_of(params, X), state, params, **(extra_args(params) | {"grad_fn": grad_fn})
    )
    updates, new_state = jax.eval_shape(run, jnp.float32(0.1), state)
    assert set(dtypes(updates)) == {jnp.dtype(dtype)}
    assert jax.tree.leaves(new_state) == jax.tree.leaves(state)
    for radius in optax.tree.get_all_with_path(state, "radius"):
        assert radius[1].dtype == ("float64" if dtype == jnp.float64 else "float32")


@rows
def test_strict_promotion(row, strict):
    tx = row.make() if row.with_base is optax.chain else row.with_base(row.make(), optax.sgd(0.1))
    state = tx.init(PARAMS)
    jax.eval_shape(lambda p: tx.update(gradient_of(p, X), state, p, **extra_args(p)), PARAMS)


@pytest.mark.table
@attacks
def test_integer_leaf_is_left_alone(row):
    """An example is a step counter, whose gradient under allow_int is a float0."""
    with_count = lambda tree, count: {**as_arrays(tree), "count": count}
    without_count = lambda tree: {name: tree[name] for name in PARAMS}
    gradient_with_float0 = lambda tree: with_count(tree, np.zeros([], jax.dtypes.float0))
    tx, seen = row.make(), []

    arguments = extra_args(PARAMS)
    plain = dict(arguments)

    def grad_fn(params, **where):
        seen.append(params["count"])
        return gradient_with_float0(plain["grad_fn"](without_count(params), **where))

    with jax.disable_jit():
        expected, _ = tx.update(gradient_of(PARAMS, X), tx.init(START), PARAMS, **arguments)
    params, start = with_count(PARAMS, jnp.array(7)), with_count(START, jnp.array(7))
    arguments |= {
        "grad_fn": grad_fn,
        "output_fn": lambda params: plain["output_fn"](without_count(params)),
        "losses_fn": lambda params: plain["losses_fn"](without_count(params)),
        "fisher_grads": gradient_with_float0(arguments["fisher_grads"]),
    }
    gradient = gradient_with_float0(gradient_of(PARAMS, X))
    with jax.disable_jit():
        actual, state = tx.update(gradient, tx.init(start), params, **arguments)
    assert (seen[0].dtype, seen[0]) == (jnp.int32, 7)
    assert actual["count"].dtype == jax.dtypes.float0
    assert_trees_close(without_count(actual), expected)
    if getattr(state, "reference", None) is not None:
        assert state.reference["count"] == 7


OTHER_LEAVES = {
    "count": np.array(7),
    "unsigned": np.array([3], np.uint32),
    "flag": np.array([True, False]),
    "empty": np.ones((0, 5), np.float32),
    "none": None,
}
GRADIENTS_OF_OTHERS = {
    "float0": lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0 if leaf.size else leaf.dtype),
    "zeros": np.zeros_like,
    "none": lambda leaf: np.zeros_like(leaf) if leaf.dtype == np.float32 else None,
}


@pytest.mark.table
@rows
@pytest.mark.parametrize("kind", GRADIENTS_OF_OTHERS)
def test_leaves_without_a_gradient_stay(row, kind):
    """Integers, bools, keys, empty arrays and None change nothing for the other leaves."""
    others = OTHER_LEAVES | {"key": jax.random.key(3)}
    of_other = GRADIENTS_OF_OTHERS[kind]
    rest = jax.tree.map(of_other, OTHER_LEAVES) | {"key": None}
    whole = lambda tree: {"model": as_arrays(tree), "others": others}
    gradients = lambda tree: {"model": tree, "others": rest}
    tx = row.with_base(row.make(), optax.identity())
    arguments, state = extra_args(PARAMS), tx.init(whole(START))
    arguments |= {
        "grad_fn": lambda p, **where: gradients(extra_args(PARAMS)["grad_fn"](p["model"], **where)),
        "output_fn": lambda p: mlp(p["model"], X),
        "losses_fn": lambda p: losses_of(p["model"]),
        "fisher_grads": gradients(arguments["fisher_grads"]),
    }
    with jax.disable_jit():
        for _ in range(row.calls):
            first = gradients(gradient_of(PARAMS, X))
            updates, state = tx.update(first, state, whole(PARAMS), **arguments)
        plain, plain_state = PARAMS, tx.init(START)
        for _ in range(row.calls):
            expected, plain_state = tx.update(
                gradient_of(PARAMS, X), plain_state, plain, **extra_args(PARAMS)
            )
    if "losses_fn" not in row.needs:  # esam draws a number for every leaf
        assert_trees_close(updates["model"], expected)
    for name, leaf in OTHER_LEAVES.items():
        moved = updates["others"][name]
        if leaf is None or (kind == "none" and name != "empty"):
            assert moved is None
        elif moved.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(leaf + moved, leaf)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates["model"]))


@rows
def test_complex_leaves_are_refused(row):
    """They are only accepted outside of the mask of an attack, as the next test shows."""
    tx = row.with_base(row.make(), optax.sgd(0.1))
    params = {"model": PARAMS, "z": np.ones((2, 2), np.complex64)}
    with pytest.raises(ValueError, match=r"params\['z'\] is complex64.*two leaves"):
        tx.init(params)


@attacks
def test_complex_leaf_outside_of_the_mask(row):
    factory = functools.partial(row.factory, mask={"model": True, "z": False})
    tx = factory(**{row.number: row.values[0]})
    with_z = lambda tree: {"model": tree, "z": np.full(2, 1 + 2j, np.complex64)}
    arguments = {
        "grad_fn": lambda p, **where: p,
        "outputs": mlp(PARAMS, X),
        "output_fn": lambda p: mlp(p["model"], X),
        "losses_fn": lambda p: losses_of(p["model"]),
        "noisy_outputs": mlp(PARAMS, X + Z),
        "fisher_grads": with_z(PARAMS),
    }
    with jax.disable_jit():
        gradient, _ = tx.update(with_z(PARAMS), tx.init(with_z(START)), with_z(PARAMS), **arguments)
    np.testing.assert_array_equal(gradient["z"], with_z(PARAMS)["z"])


@pytest.mark.table
@rows
def test_python_numbers_are_parameters(row):
    """They move as arrays with the same numbers do."""
    tx = row.with_base(row.make(), optax.identity())
    arguments = {
        "grad_fn": lambda p, **where: p,
        "outputs": np.array([[0.1, 0.2]], np.float32),
        "output_fn": lambda p: jnp.stack([p["w"] * ONES[:1], ONES[:1]], -1),
        "losses_fn": lambda p: p["w"] * ONES,
        "noisy_outputs": np.array([[0.3, 0.2]], np.float32),
    }
    found = []
    for number in (2.0, jnp.array(2.0)):
        params, state = {"w": number}, tx.init({"w": number})
        gradient = {"w": jnp.array(0.5)}
        with jax.disable_jit():
            for _ in range(row.calls):
                updates, state = tx.update(
                    gradient, state, params, fisher_grads=gradient, **arguments
                )
        found.append(updates["w"])
    assert found[0] == found[1] != 0


# ---- masks


def eager(tx, params, **arguments):
    """The attacked weights, from `init` and one `update` of an attack."""
    return tx.update(params, tx.init(params), params, grad_fn=itself, **arguments)[0]


@pytest.mark.parametrize("name", ["mask", "adaptive"])
def test_mask_is_a_module_that_can_be_called(name):
    """An Equinox model of bools is a tree; only a tree with callable leaves is a function."""
    model = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_array)
    is_matrix = lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
    trees = [eager(sam(**{name: mask}), model) for mask in (is_matrix(model), is_matrix)]
    assert_trees_close(*trees)
    assert largest_difference(trees[0].layers[0].weight, model.layers[0].weight) > 0
    if name == "mask":
        assert largest_difference(trees[0].layers[0].bias, model.layers[0].bias) == 0


@attacks
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (False, "mask must be a tree of bools.*got the single False"),
        (True, "mask must be a tree of bools.*got the single True"),
        (lambda params: jax.tree.map(lambda x: False, params), "mask selects none of the 4"),
        (lambda params: jax.tree.map(lambda x: 1.0, params), "got 1.0 in it"),
        ({"hidden": "yes", "out": True}, "got 'yes' in it"),
        ({"hidden": True}, "mask must be a tree like the parameters"),
        ({"hidden": np.array([True, False]), "out": True}, "a tree of bools"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_masks_that_are_none_are_refused(row, mask, words, traced):
    init = row.factory(**{row.number: row.values[0]}, mask=mask).init
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(init, PARAMS) if traced else init(PARAMS)


@attacks
def test_mask_under_inject_hyperparams(row):
    """A function is called as a schedule unless static_args names it."""
    by_path = lambda tree: jax.tree.map_with_path(lambda path, _: "bias" not in str(path), tree)
    make = lambda static: optax.inject_hyperparams(row.factory, static_args=static)(
        **{row.number: row.values[0]}, mask=by_path
    )
    with pytest.raises(ValueError, match=r"mask must be .*static_args='mask'"):
        make(()).init(PARAMS)
    make("mask").init(PARAMS)


def test_example_of_static_args_in_the_docs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "methods" / "sam.md"
    (example,) = (
        block
        for block in page.read_text(encoding="utf-8").split("```")
        if "static_args" in block and block.startswith("python")
    )
    names = {}
    exec(textwrap.dedent(example.removeprefix("python\n")), names)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    attacked, _ = names["tx"].update(params, names["state"], params, grad_fn=itself)
    np.testing.assert_allclose(attacked["kernel"], 1.05)  # 0.1 over four entries
    np.testing.assert_array_equal(attacked["bias"], 1.0)


# ---- what it is combined with


@pytest.mark.table
@rows
def test_chain_with_clipping_and_adamw(row):
    """The clipping acts on the gradient of the second pass, and the loss falls."""
    base = optax.chain(optax.clip_by_global_norm(1e-3), optax.adamw(0.05))
    tx = row.with_base(row.make(), base)
    params, state = advance(tx, row.calls)
    length = optax.tree.norm(optax.tree.get(state, "mu"))
    np.testing.assert_allclose(length, (1 - 0.9) * 1e-3, rtol=1e-4)
    params, _ = repeat(tx, 3 * row.calls, params, state)
    assert loss_of(params) < 0.9 * loss_of(PARAMS)


@pytest.mark.table
@rows
def test_injected_number_is_state(row):
    """It is read from the state at every call, and may be a tracer when the factory is called."""
    make = lambda value: row.with_base(
        optax.inject_hyperparams(row.factory, static_args=row.static)(**{row.number: value}),
        optax.sgd(0.1),
    )
    tx = make(row.values[0])
    state = tx.init(as_arrays(START))
    assert float(optax.tree.get(state, row.number)) == pytest.approx(row.values[0])
    state = optax.tree.set(state, **{row.number: jnp.array(row.values[1])})
    actual, _ = repeat(tx, row.calls, as_arrays(PARAMS), state)
    expected, _ = advance(row.with_base(row.make(row.values[1]), optax.sgd(0.1)), row.calls)
    assert_trees_close(actual, expected)
    jax.eval_shape(lambda value: advance(make(value), row.calls), row.values[0])


@pytest.mark.table
@rows
def test_apply_if_finite(row):
    plain = row.with_base(row.make(), optax.sgd(0.1))
    tx = optax.apply_if_finite(plain, 3)
    jax.eval_shape(lambda: advance(tx, 1))  # both branches, traced
    params, state = advance(tx, row.calls)
    assert_trees_close((params, state.inner_state), advance(plain, row.calls))
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    with jax.disable_jit():
        updates, after = tx.update(bad, state, params, **extra_args(params))
    assert largest_difference(updates, jax.tree.map(np.zeros_like, PARAMS)) == 0
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


@pytest.mark.table
@rows
def test_accumulation_around_the_base(row):
    """Each micro-batch attacks on its own, and the base steps with the mean of their gradients."""
    # A base that returns the gradient as its update shows the gradient.
    tx = row.with_base(row.make(), optax.identity())
    state, gradients = tx.init(as_arrays(START)), []
    for _ in range(2):
        params, state = repeat(tx, row.calls, as_arrays(PARAMS), state)
        gradients.append(jax.tree.map(jnp.subtract, params, PARAMS))
    expected = jax.tree.map(lambda p, g, h: p - 0.05 * (g + h), PARAMS, *gradients)

    base = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = row.with_base(row.make(), base)
    jax.eval_shape(lambda: advance(tx, 1))
    params, state = advance(tx, row.calls)
    assert_trees_close(params, PARAMS)
    params, _ = repeat(tx, row.calls, params, state)
    assert_trees_close(params, expected)


def test_states_survive_a_checkpoint(tmp_path):
    """Orbax writes them and reads them into the state of a new `init`, without pickle."""
    optimizers = {n: r.with_base(r.make(), optax.adamw(0.1)) for n, r in TRANSFORMS.items()}
    states = {name: advance(tx, 3)[1] for name, tx in optimizers.items()}
    fresh = {name: tx.init(PARAMS) for name, tx in optimizers.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", fresh)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    jax.tree.map(np.testing.assert_array_equal, restored, states)


# ---- trees of other libraries


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(jnp.tanh(nn.Dense(4, name="hidden")(x)))


class NNXMLP(nnx.Module):
    def __init__(self):
        self.hidden, self.out = (nnx.Linear(i, o, rngs=nnx.Rngs(0)) for i, o in ((2, 4), (4, 3)))

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


class EquinoxMLP(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(lambda row: self.out(jnp.tanh(self.hidden(row))))(x)


def linen_tree(params):
    apply = lambda variables, x: LinenMLP().apply(variables, x)
    return {"params": params}, apply, lambda variables: variables["params"]


def nnx_tree(params):
    graph, state = nnx.split(NNXMLP(), nnx.Param)
    if hasattr(nnx, "as_pure"):  # since Flax 0.12.7
        state = nnx.as_pure(state)
    nnx.replace_by_pure_dict(state, params)
    return state, lambda s, x: nnx.merge(graph, s)(x), nnx.to_pure_dict


def equinox_tree(params):
    linear = lambda layer: eqx.tree_at(
        lambda m: (m.weight, m.bias),
        eqx.nn.Linear(*layer["kernel"].shape, key=jax.random.key(0)),
        (jnp.asarray(layer["kernel"]).T, jnp.asarray(layer["bias"])),
    )
    arrays, static = eqx.partition(
        EquinoxMLP(linear(params["hidden"]), linear(params["out"])), eqx.is_inexact_array
    )
    layer = lambda linear: {"kernel": linear.weight.T, "bias": linear.bias}
    to_dict = lambda model: {"hidden": layer(model.hidden), "out": layer(model.out)}
    return arrays, lambda m, x: eqx.combine(m, static)(x), to_dict


@functools.cache
def step_on_a_dict(name):
    row = TRANSFORMS[name]
    return advance(row.with_base(row.make(), optax.adam(0.1)), row.calls)[0]


@pytest.mark.slow
@pytest.mark.parametrize("make_tree", [linen_tree, nnx_tree, equinox_tree])
def test_trees_of_other_libraries(make_tree):
    """All rows make the same step on them as on a dict."""
    params, apply, to_dict = make_tree(PARAMS)
    start, _, _ = make_tree(START)
    apply = compiled(apply)
    for name, row in TRANSFORMS.items():
        tx = row.with_base(row.make(), optax.adam(0.1))
        actual, _ = advance(tx, row.calls, params, start, apply=apply)
        assert jax.tree.structure(actual) == jax.tree.structure(params)
        assert_trees_close(to_dict(actual), step_on_a_dict(name))


class NNXNoisyMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(jnp.tanh(self.hidden(x)))))


@nnx.jit
def nnx_step(model, optimizer, x):
    loss_fn = lambda model: loss_of(None, x, lambda _, x: model(x))
    # A copy from before the first pass has its random keys; its new batch statistics are dropped.
    attacked = nnx.clone(model)

    def grad_fn(params):
        nnx.update(attacked, params)
        return nnx.grad(loss_fn)(attacked)

    optimizer.update(model, nnx.grad(loss_fn)(model), grad_fn=grad_fn)


def test_nnx_optimizer():
    """Both passes share a random key, and the batch statistics come from the first pass alone."""
    models = {}
    for name, transform in {"plain": optax.identity(), "at_0": sam(0.0), "at_1": sam(1.0)}.items():
        models[name] = model = NNXNoisyMLP(nnx.Rngs(0))
        tx = optax.chain(transform, optax.sgd(0.1))
        nnx_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), X)
    params, statistics = (
        {n: nnx.to_pure_dict(nnx.state(m, kind)) for n, m in models.items()}
        for kind in (nnx.Param, nnx.BatchStat)
    )
    assert_trees_close(params["at_0"], params["plain"])
    assert largest_difference(params["at_1"], params["plain"]) > 1e-3
    fresh = nnx.to_pure_dict(nnx.state(NNXNoisyMLP(nnx.Rngs(0)), nnx.BatchStat))
    assert largest_difference(statistics["plain"], fresh) > 1e-3
    assert_trees_close(statistics["at_1"], statistics["plain"])


# ---- degenerate input


def check_zero_gradient(row):
    """The base optimizer sees the gradient at the weights themselves, unless `row` says why not."""
    tx, zeros = row.make(), jax.tree.map(jnp.zeros_like, PARAMS)
    arguments = extra_args(PARAMS) | {"grad_fn": itself, "fisher_grads": zeros}
    attacked, state = tx.update(zeros, tx.init(START), PARAMS, **arguments)
    if row.attacks_at_zero_gradient:
        assert largest_difference(attacked, PARAMS) > 0, "the row gives a reason for no attack"
        assert float(state.distance) > 0.0
    else:
        jax.tree.map(np.testing.assert_array_equal, attacked, PARAMS)
        assert float(state.distance) == 0.0


@pytest.mark.table
@attacks
def test_zero_gradient_attacks_nothing(row):
    check_zero_gradient(row)


class ShiftState(NamedTuple):
    distance: jax.Array


def shifted_gradient(shift):
    """The gradient at weights that are moved by `shift`, whatever their gradient is."""

    def update(updates, state, params, *, grad_fn, **extra_args):
        return grad_fn(jax.tree.map(lambda p: p + shift, params)), ShiftState(jnp.asarray(shift))

    return optax.GradientTransformationExtraArgs(lambda params: ShiftState(jnp.zeros([])), update)


def test_attacks_at_zero_gradient_need_a_reason():
    """A row that gives a reason may attack at zero gradient, and then it has to."""
    attacking = Row(shifted_gradient, "shift")
    with pytest.raises(AssertionError, match="not equal"):
        check_zero_gradient(attacking)
    reason = "the attack is a constant"
    check_zero_gradient(dataclasses.replace(attacking, attacks_at_zero_gradient=reason))
    with pytest.raises(AssertionError, match="a reason for no attack"):
        check_zero_gradient(dataclasses.replace(TRANSFORMS["sam"], attacks_at_zero_gradient=reason))


@attacks
def test_zero_weights_are_finite(row):
    """An adaptive ball has no extent at zero weights."""
    tx, zeros = row.make(), jax.tree.map(jnp.zeros_like, PARAMS)
    direction = jax.tree.map(jnp.ones_like, PARAMS)
    arguments = extra_args(zeros) | {"grad_fn": itself}
    result = tx.update(direction, tx.init(START), zeros, **arguments)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result))


@attacks
def test_one_class(row):
    """With a single class no function differs from another."""
    one_class = lambda params, x: mlp(params, x)[:, :1]
    tx = row.make()
    arguments = extra_args(PARAMS)
    arguments |= {
        "grad_fn": itself,
        "outputs": one_class(PARAMS, X),
        "output_fn": lambda p: one_class(p, X),
        "noisy_outputs": one_class(PARAMS, X + Z),
    }
    gradient, state = tx.update(PARAMS, tx.init(START), PARAMS, **arguments)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, state)))
    if "outputs" in row.needs:
        jax.tree.map(np.testing.assert_array_equal, gradient, PARAMS)
        assert float(state.radius) == float(state.distance) == 0.0


@pytest.mark.parametrize("name", [n for n in ATTACKS if "outputs" in TRANSFORMS[n].needs])
def test_no_divergence_is_a_step_of_the_base_optimizer(name):
    base = optax.adamw(0.1)
    tx = optax.chain(TRANSFORMS[name].make(), base)
    actual, state = advance(tx, 1, start=PARAMS, noisy_outputs=mlp(PARAMS, X))
    assert_trees_close(actual, advance(base, 1)[0])
    assert optax.tree.get(state, "radius") == 0.0


# ---- a second pass that is not finite


def broken(tree, value=np.nan):
    """`tree` with one of its numbers replaced."""
    return {**tree, "out": {**tree["out"], "bias": jnp.array([0.5, value, 1.0], jnp.float32)}}


def with_second_gradient(row, gradient, updates=None, **options):
    """The update and the state if the gradient at the attacked weights is `gradient`."""
    tx = row.factory(**{row.number: row.values[0]}, **options)
    arguments = extra_args(PARAMS) | {"grad_fn": lambda params, where=None: gradient}
    updates = gradient_of(PARAMS, X) if updates is None else updates
    return tx.update(updates, tx.init(as_arrays(START)), PARAMS, **arguments)


@attacks
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_second_pass_falls_back_to_the_first_gradient(row, value):
    """The first gradient returns bit for bit, or the broken one is passed on; both are counted."""
    first, second = gradient_of(PARAMS, X), broken(gradient_of(START, X), value)
    gradient, state = with_second_gradient(row, second)
    jax.tree.map(np.testing.assert_array_equal, gradient, first)
    assert state.nonfinite_count == 1
    gradient, state = with_second_gradient(row, second, on_nonfinite="propagate")
    assert not np.isfinite(gradient["out"]["bias"][1])
    assert state.nonfinite_count == 1
    _, state = with_second_gradient(row, gradient_of(START, X))
    assert state.nonfinite_count == 0


@attacks
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_first_gradient_stays_broken(row, value):
    first = broken(gradient_of(PARAMS, X), value)
    for second in (first, jax.tree.map(lambda p: jnp.full_like(p, np.nan), PARAMS)):
        gradient, state = with_second_gradient(row, second, first)
        assert not np.isfinite(gradient["out"]["bias"][1])
        assert state.nonfinite_count == 0


@pytest.mark.table
@attacks
def test_a_radius_that_is_not_a_number_stays_so(row):
    """It makes an attack that is not a number, even at a zero gradient."""
    tx = row.factory(**{row.number: lambda count: jnp.float32(np.nan)})

    def update(first):
        arguments = extra_args(PARAMS) | {"grad_fn": itself, "fisher_grads": first}
        return tx.update(first, tx.init(as_arrays(START)), PARAMS, **arguments)

    for first in (gradient_of(PARAMS, X), jax.tree.map(jnp.zeros_like, PARAMS)):
        for gradient, state in (update(first), jax.jit(update)(first)):
            assert np.isnan(state.radius)
            assert np.isnan(state.distance)
            assert any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))
            assert state.nonfinite_count == 0


@attacks
def test_an_unknown_choice_is_refused(row):
    with pytest.raises(ValueError, match="on_nonfinite must be one of 'clean', 'propagate', got"):
        row.factory(on_nonfinite="skip")


# ---- errors


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_per_shard_cannot_alternate(name):
    """In `alternating` the trainer holds the attacked weights, one set for all shards."""
    tx = alternating(TRANSFORMS[name].factory(axis_name="data"), optax.sgd(0.1))
    arguments = extra_args(PARAMS)
    del arguments["grad_fn"]
    words = "cannot stand in alternating" if name == "gsam" else "axis_name='data'.*alternating"
    with pytest.raises(ValueError, match=words):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **arguments)


@pytest.mark.parametrize("name", [*ATTACKS, "alternating"])
def test_hidden_leaves_raise(name):
    """optax.masked and optax.partition would hide a part of the model from the transform."""
    row = TRANSFORMS[name]
    tx = row.with_base(row.make(), optax.sgd(0.1))
    labels = {"hidden": "a", "out": "b"}
    for wrapper in (
        optax.masked(tx, {"hidden": True, "out": False}),
        optax.partition({"a": tx, "b": optax.set_to_zero()}, labels),
    ):
        with pytest.raises(ValueError, match=r"mask=.*optax\.partition"):
            wrapper.init(PARAMS)


@pytest.mark.parametrize("name", [*ATTACKS, "alternating"])
def test_missing_params_raise(name):
    row = TRANSFORMS[name]
    tx = row.with_base(row.make(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"needs params: call tx\.update\(grads, state, params"):
        tx.update(PARAMS, tx.init(PARAMS), None, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", ATTACKS)
def test_missing_grad_fn_raises(name):
    """The error names `alternating` for the transforms that can stand in it."""
    tx = optax.chain(TRANSFORMS[name].make(), optax.sgd(0.1))
    arguments = extra_args(PARAMS)
    del arguments["grad_fn"]
    with pytest.raises(ValueError, match=r"needs grad_fn: call .*grad_fn=lambda") as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **arguments)
    assert ("alternating(" in str(error.value)) == (not name.startswith("gsam"))


@rows
def test_what_it_needs_is_enough_and_necessary(row):
    tx = row.with_base(row.make(), optax.sgd(0.1))
    arguments = {name: extra_args(PARAMS)[name] for name in row.needs}
    state = tx.init(START)
    jax.eval_shape(lambda p: tx.update(p, state, p, **arguments), PARAMS)
    for missing in set(row.needs) - {"outputs"}:  # tram computes these by output_fn
        fewer = {name: value for name, value in arguments.items() if name != missing}
        with pytest.raises(ValueError, match=f"needs {missing}"):
            tx.update(PARAMS, state, PARAMS, **fewer)


def test_gradients_of_other_shapes_are_refused():
    tx = sam()
    with pytest.raises(ValueError, match="in the structure of the first gradient"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: (1.0, p))
