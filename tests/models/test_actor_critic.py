"""Policy and value networks: what they compute, how they start, and their memory."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.distributions import Categorical, DiagonalGaussian, TanhGaussian
from trustjax.models.actor_critic import (
    ActionValue,
    Actor,
    Critic,
    Torso,
    check_network,
    initial_carry,
    reset_carry,
    unroll,
)

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 2, 4)).astype(np.float32)


def kernels(variables: Any) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(layer["kernel"])
        for name, layer in variables["params"].items()
        if name != "log_std"
    }


# ---- what they compute


@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 2, 4)])
def test_matches_numpy(variables_of: Callable[..., Any], shape: tuple[int, ...]) -> None:
    x = X.reshape(-1)[: np.prod(shape)].reshape(shape)
    for model in (Actor(hidden=(6, 3), num_actions=2), Critic(hidden=(6, 3))):
        variables = variables_of(model, x)
        layers, expected = variables["params"], x
        for name in ("dense_0", "dense_1", "head"):
            expected = expected @ layers[name]["kernel"] + layers[name]["bias"]
            expected = expected if name == "head" else np.tanh(expected)
        output, carry = jax.jit(model.apply)(variables, x)
        assert carry == ()
        if isinstance(model, Actor):
            assert isinstance(output, Categorical)
            np.testing.assert_allclose(output.logits, expected, atol=1e-6)
        else:
            np.testing.assert_allclose(output, expected[..., 0], atol=1e-6)


@pytest.mark.parametrize(
    "num_actions", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_gradients_of_the_head(variables_of: Callable[..., Any], num_actions: int) -> None:
    """Few outputs are computed one by one: to first and second order no different."""
    model = Actor(hidden=(6,), num_actions=num_actions)
    variables = variables_of(model, X)["params"]
    weights = RANDOM.normal(size=(5, 2, num_actions))

    def of_model(params: Any) -> jax.Array:
        return jnp.sum(weights * jnp.sin(model.apply({"params": params}, X)[0].logits))

    def by_hand(params: Any) -> jax.Array:
        x = jnp.tanh(X @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
        return jnp.sum(weights * jnp.sin(x @ params["head"]["kernel"] + params["head"]["bias"]))

    for order in (jax.grad, jax.hessian):
        found, expected = (jax.jit(order(f))(variables) for f in (of_model, by_hand))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_squashed_actor(variables_of: Callable[..., Any]) -> None:
    """Both halves of the head, the logarithm of the deviation cut to its range."""
    model = Actor(
        hidden=(6,), action_size=3, squashed=True, initial_log_std=-1.0, log_std_range=(-9.0, 1.0)
    )
    variables = variables_of(model, X)
    layers = variables["params"]
    assert set(layers) == {"dense_0", "head"}  # no deviation beside the network's
    hidden = np.tanh(X @ layers["dense_0"]["kernel"] + layers["dense_0"]["bias"])
    expected = hidden @ layers["head"]["kernel"] + layers["head"]["bias"]
    output, _ = model.apply(variables, X)
    assert isinstance(output, TanhGaussian)
    np.testing.assert_allclose(output.mean, expected[..., :3], atol=1e-6)
    np.testing.assert_allclose(output.log_std, expected[..., 3:] - 1, atol=1e-6)
    far = jax.tree.map(lambda x: 1e4 * x, variables)
    log_std = model.apply(far, X)[0].log_std
    assert (log_std.min(), log_std.max()) == (-9, 1)


def test_values_of_actions(variables_of: Callable[..., Any]) -> None:
    """Of a continuous action from observation and action side by side; of a choice all at once."""
    action = RANDOM.normal(size=(5, 2, 3)).astype(np.float32)
    model = ActionValue(hidden=(6,))
    variables = jax.jit(model.init)(KEY, X, action)
    both = np.concatenate([X, action], -1)
    expected, _ = jax.jit(Critic(hidden=(6,)).apply)(variables, both)
    np.testing.assert_allclose(model.apply(variables, X, action), expected, atol=1e-6)
    choice = ActionValue(hidden=(6,), num_actions=4)
    assert jax.eval_shape(choice.init_with_output, KEY, X)[0].shape == (5, 2, 4)


def test_activation(variables_of: Callable[..., Any]) -> None:
    variables = variables_of(Critic(hidden=(6,)), X)
    layer, head = variables["params"]["dense_0"], variables["params"]["head"]
    hidden = np.maximum(X @ layer["kernel"] + layer["bias"], 0)
    found, _ = Critic(hidden=(6,), activation="relu").apply(variables, X)
    np.testing.assert_allclose(found, (hidden @ head["kernel"] + head["bias"])[..., 0], atol=1e-6)


def test_standard_deviation_does_not_depend_on_the_state(variables_of: Callable[..., Any]) -> None:
    model = Actor(hidden=(6,), action_size=3)
    variables = variables_of(model, X)
    policy, _ = model.apply(variables, X)
    assert isinstance(policy, DiagonalGaussian)
    assert policy.mean.shape == (5, 2, 3)
    expected = np.broadcast_to(variables["params"]["log_std"], (5, 2, 3))
    np.testing.assert_array_equal(policy.log_std, expected)


def test_narrow_computation(variables_of: Callable[..., Any]) -> None:
    """bfloat16 inside, float32 for parameters and what comes out."""
    for wide, narrow in (
        (Actor(hidden=(6,), action_size=3), Actor(hidden=(6,), action_size=3, dtype=jnp.bfloat16)),
        (Critic(hidden=(6,)), Critic(hidden=(6,), dtype=jnp.bfloat16)),
    ):
        variables = variables_of(narrow, X)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
        found, expected = (
            jax.tree.leaves(model.apply(variables, X)[0]) for model in (narrow, wide)
        )
        assert {leaf.dtype for leaf in found} == {np.dtype("float32")}
        np.testing.assert_allclose(found[0], expected[0], atol=0.03)
        assert np.max(np.abs(found[0] - expected[0])) > 1e-5


# ---- how they start


def check_scale(kernel: np.ndarray, scale: float) -> None:
    np.testing.assert_allclose(np.linalg.svd(kernel)[1], scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (Actor(hidden=(6, 3), num_actions=2), 0.01),
        (Actor(hidden=(6, 3), action_size=2), 0.01),
        (Critic(hidden=(6, 3)), 1.0),
    ],
    ids=["choice", "continuous", "value"],
)
def test_orthogonal_start(model: Torso, head: float) -> None:
    variables = jax.jit(model.init)(KEY, X[0])
    found = kernels(variables)
    assert found.keys() == {"dense_0", "dense_1", "head"}
    check_scale(found["dense_0"], np.sqrt(2))
    check_scale(found["dense_1"], np.sqrt(2))
    check_scale(found["head"], head)
    assert not any(np.any(variables["params"][name]["bias"]) for name in found)


@pytest.mark.parametrize("gru_size", [None, 8])
def test_seeds_side_by_side_start_one_after_the_other(gru_size: int | None) -> None:
    """LAPACK's factorisation of several matrices at once can stop a program for ever."""
    model = Actor(hidden=(8, 8), num_actions=2, gru_size=gru_size)
    carry = initial_carry(model, (1,))

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 4)), carry)

    keys = jax.random.split(KEY, 12)
    program = jax.jit(jax.vmap(init)).lower(keys)
    batched = re.findall(r'lapack_sgeqrf_ffi\(.*?num_batch_dims = "(\d)"', program.as_text())
    assert set(batched) == {"0"}
    together, alone = program.compile()(keys), jax.jit(init)(keys[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, atol=1e-6), together, alone)


def test_lecun_start() -> None:
    """Normal with variance 1 / inputs, in the head too."""
    model = Actor(hidden=(64, 64), num_actions=64, orthogonal=False)
    variables = jax.jit(model.init)(KEY, np.ones((1, 64), np.float32))
    for kernel in kernels(variables).values():
        np.testing.assert_allclose(np.std(kernel), 1 / 8, rtol=0.05)
        assert np.ptp(np.linalg.svd(kernel)[1]) > 1


def test_first_standard_deviation() -> None:
    model = Actor(hidden=(3,), action_size=2, initial_log_std=-0.5)
    (policy, _), _ = jax.jit(model.init_with_output)(KEY, X[0])
    np.testing.assert_array_equal(policy.log_std, np.full((2, 2), -0.5))
    # The head is small: the first policy hardly depends on the state.
    assert np.max(np.abs(policy.mean)) < 0.05


def test_double_precision(x64: None) -> None:
    model = Critic(hidden=(3,), gru_size=2)
    variables = jax.eval_shape(model.init, KEY, X[0], initial_carry(model, (2,)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float64")}


# ---- memory


def remembering(dtype: Any = None) -> Critic:
    return Critic(hidden=(6,), gru_size=3, dtype=dtype)


def test_first_carry() -> None:
    assert initial_carry(Critic(), (2,)) == ()
    for model, dtype in ((remembering(), jnp.float32), (remembering(jnp.bfloat16), jnp.bfloat16)):
        carry = initial_carry(model, (5, 2))
        assert carry.shape == (5, 2, 3)
        assert carry.dtype == dtype
        assert not np.any(carry)


def test_restarted() -> None:
    carry = np.arange(1.0, 7).reshape(3, 2)
    found = reset_carry(carry, jnp.array([False, True, False]))
    np.testing.assert_array_equal(found, [[1, 2], [0, 0], [5, 6]])
    assert reset_carry((), jnp.array([True])) == ()


@pytest.fixture(scope="module")
def gru() -> Any:
    model = remembering()
    shapes = jax.eval_shape(model.init, KEY, X[0], initial_carry(model, (2,)))
    return jax.tree.map(lambda x: RANDOM.normal(size=x.shape).astype(x.dtype), shapes)


def test_carry_is_used_and_passed_on(gru: Any) -> None:
    model, carry = remembering(), initial_carry(remembering(), (2,))
    first, after = model.apply(gru, X[0], carry)
    assert after.shape == carry.shape
    assert np.max(np.abs(after)) > 0.1
    second, _ = model.apply(gru, X[0], after)
    assert np.max(np.abs(second - first)) > 0.01


def test_unroll_equals_steps_by_hand(gru: Any) -> None:
    """The carry is zero where an episode starts, in that environment alone."""
    model, starts = remembering(), np.zeros((5, 2), bool)
    starts[0, 1] = starts[2, 0] = starts[3, 1] = True
    start = RANDOM.normal(size=(2, 3)).astype(np.float32)
    outputs, carries = jax.jit(lambda: unroll(model, gru, X, starts, start))()
    step = jax.jit(model.apply)
    assert outputs.shape == (5, 2)
    assert carries.shape == (5, 2, 3)
    for place in range(2):
        carry = start[place]
        for time in range(5):
            carry = np.zeros(3, np.float32) if starts[time, place] else carry
            output, carry = step(gru, X[time, place], carry)
            np.testing.assert_allclose(outputs[time, place], output, atol=1e-5)
            np.testing.assert_allclose(carries[time, place], carry, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sequence_is_the_cell_stepped(gru: Any, dtype: Any) -> None:
    """Values, memories and all gradients of a scan of the network over single steps."""
    model = remembering(dtype and jnp.dtype(dtype))
    starts = jnp.array([[0, 1], [0, 0], [1, 0], [0, 1], [0, 0]], bool)
    start = jnp.asarray(RANDOM.normal(size=(2, 3)), model.dtype)

    def stepped(variables: Any, x: jax.Array, carry: jax.Array) -> Any:
        def step(carry: jax.Array, each: tuple[jax.Array, jax.Array]) -> Any:
            output, carry = model.apply(variables, each[0], reset_carry(carry, each[1]))
            return carry, (output, carry)

        return jax.lax.scan(step, carry, (x, starts))[1]

    def whole(variables: Any, x: jax.Array, carry: jax.Array) -> Any:
        return unroll(model, variables, x, starts, carry)

    def both(found: Any) -> tuple[jax.Array, Any]:
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in found), found

    arguments = (gru, jnp.asarray(X), start)
    (_, expected), expected_grads = jax.jit(
        jax.value_and_grad(lambda *a: both(stepped(*a)), argnums=(0, 1, 2), has_aux=True)
    )(*arguments)
    (_, found), grads = jax.jit(
        jax.value_and_grad(lambda *a: both(whole(*a)), argnums=(0, 1, 2), has_aux=True)
    )(*arguments)
    tolerance = 1e-5 if dtype is None else 0.1
    for one, other in zip(
        jax.tree.leaves((found, grads)), jax.tree.leaves((expected, expected_grads)), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), atol=tolerance
        )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_unroll_without_memory(variables_of: Callable[..., Any]) -> None:
    model = Actor(hidden=(6,), action_size=3)
    variables = variables_of(model, X)
    starts = np.zeros((5, 2), bool)
    found, carry = unroll(model, variables, X, starts, ())
    assert carry == ()
    expected, _ = model.apply(variables, X)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-6), found, expected)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8,), "swish", None), "activation must be one of .*'silu'.* got 'swish'"),
        (((8, 0), "tanh", None), r"hidden must be widths >= 1, got \(8, 0\)"),
        (((8,), "tanh", 0), "gru_size must be >= 1 or None, got 0"),
    ],
)
def test_bad_networks(arguments: tuple[Any, ...], message: str) -> None:
    check_network((8,), "tanh", None)
    with pytest.raises(ValueError, match=message):
        check_network(*arguments)
