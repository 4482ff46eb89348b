"""Log-probabilities and losses of tokens against the head written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from trustjax.losses import fused_cross_entropy, token_log_probs, token_statistics

VOCAB = 53
RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.normal(size=(8, 3, 16))
HEAD = RANDOM.normal(size=(16, VOCAB))
TARGETS = RANDOM.integers(0, VOCAB, (8, 3))
WHERE = RANDOM.random((8, 3)) < 0.7
SLOPES = RANDOM.normal(size=(8, 3))


def written_out(hidden, head):
    return jax.nn.log_softmax(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), -1)


def picked(log_probs, targets=TARGETS):
    return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


def entropy(log_probs):
    return -jnp.sum(jnp.exp(log_probs) * log_probs, -1)


def graded(function, hidden=HIDDEN, head=HEAD, dtype=jnp.float32):
    arrays = (jnp.asarray(hidden, dtype), jnp.asarray(head, dtype))
    return jax.jit(jax.value_and_grad(function, (0, 1)))(*arrays)


def assert_close(found, expected, **tolerance):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(
            np.asarray(f, np.float64), np.asarray(e, np.float64), **tolerance
        ),
        found,
        expected,
    )


@pytest.mark.parametrize("chunk", [1, 16, VOCAB, 4096])
@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_blocks_equal_the_whole(name, chunk):
    of_whole = {"log_probs": picked, "entropy": entropy}[name]

    def found(hidden, head):
        if name == "log_probs":
            return jnp.sum(SLOPES * token_log_probs(hidden, head, TARGETS, chunk=chunk))
        return jnp.sum(SLOPES * token_statistics(hidden, head, TARGETS, chunk=chunk).entropy)

    expected = graded(lambda *given: jnp.sum(SLOPES * of_whole(written_out(*given))))
    assert_close(graded(found), expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("chunk", [1, 5, 24, 256])
def test_fused_equals_the_mean(chunk):
    def found(hidden, head):
        return 3 * fused_cross_entropy(hidden, head, TARGETS, chunk=chunk, where=WHERE)

    def expected(hidden, head):
        return -3 * jnp.mean(picked(written_out(hidden, head)), where=WHERE)

    assert_close(graded(found), graded(expected), rtol=1e-6, atol=5e-7)
    whole = expected(HIDDEN, HEAD)
    assert_close(jax.jit(found)(HIDDEN, HEAD), whole, rtol=1e-6)  # without its gradient


@pytest.mark.parametrize("chunk", [1, 10, VOCAB])
def test_likeliest_tokens(chunk):
    found = jax.jit(lambda h, w: token_statistics(h, w, TARGETS, chunk=chunk, top=7))(HIDDEN, HEAD)
    log_probs, tokens = jax.lax.top_k(written_out(HIDDEN, HEAD), 7)
    np.testing.assert_array_equal(found.top_tokens, tokens)
    np.testing.assert_allclose(found.top_log_probs, log_probs, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(found.log_probs, picked(written_out(HIDDEN, HEAD)), rtol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk"), [(1, 1, 1), (7, 9, 4), (5, 3, 2), (12, 8, 15), (3, 9, 8)]
)
def test_any_sizes(tokens, vocab, chunk):
    """What does not divide tokens or vocabulary, more than all of it, and one of one."""
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(tokens, 2)), jnp.float32)
    head = jnp.asarray(random.normal(size=(2, vocab)), jnp.float32)
    targets = random.integers(0, vocab, tokens)

    @jax.jit
    def numbers(hidden, head, targets):
        found = token_log_probs(hidden, head, targets, chunk=chunk)
        loss = fused_cross_entropy(hidden, head, targets, chunk=chunk)
        return picked(written_out(hidden, head), targets), found, loss

    expected, found, loss = numbers(hidden, head, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, -np.mean(expected), rtol=1e-5, atol=1e-6)


LOSSES = {
    "log_probs": lambda h, w, y, **o: -jnp.sum(token_log_probs(h, w, y, chunk=16, **o)),
    "entropy": lambda h, w, y, **o: jnp.sum(token_statistics(h, w, y, chunk=16, **o).entropy),
    "fused": lambda h, w, y, **o: fused_cross_entropy(h, w, y, chunk=5, **o),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
def test_what_is_left_out_is_not_read(loss):
    hidden, targets = HIDDEN.copy(), TARGETS.copy()
    hidden[~WHERE], targets[~WHERE] = np.nan, -100
    expected = graded(lambda *given: loss(*given, TARGETS, where=WHERE))
    found = graded(lambda *given: loss(*given, targets, where=WHERE), hidden)
    assert_close(found, expected, rtol=0)
    assert np.all(np.asarray(found[1][0])[~WHERE] == 0)
    nothing = graded(lambda *given: loss(*given, targets, where=np.zeros_like(WHERE)), hidden)
    assert_close(nothing, jax.tree.map(jnp.zeros_like, nothing), rtol=0)


log_probs_and_loss = jax.jit(
    lambda *given: (token_log_probs(*given, chunk=16), fused_cross_entropy(*given))
)


@pytest.mark.parametrize("target", [-1, VOCAB, 10**6])
def test_targets_outside_the_vocabulary_give_nan(target):
    targets = TARGETS.copy()
    targets[0, 1] = target
    found, loss = log_probs_and_loss(HIDDEN, HEAD, targets)
    assert np.isnan(found).sum() == 1
    assert np.isnan(found[0, 1])
    assert np.isnan(loss)


@losses
def test_nan_stays_nan(loss):
    hidden = HIDDEN.copy()
    hidden[0, 0, 0] = np.nan
    value, _ = graded(lambda *given: loss(*given, TARGETS), hidden)
    assert np.isnan(value)


@pytest.mark.table
@losses
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_far_logits(loss, dtype):
    """Logits of +-1e4 and more: finite values and gradients, and digits near log p = 0."""
    value, slopes = graded(lambda *given: loss(*given, TARGETS), HIDDEN * 3e3, HEAD, dtype)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    sure = jnp.array([[30.0]], dtype)
    found = token_log_probs(sure, jnp.array([[0.5, 0.0, 0.0]], dtype), jnp.array([0]), chunk=2)
    np.testing.assert_allclose(found, -np.log1p(2 * np.exp(-15.0)), rtol=1e-6 / 6e-7)
    assert found < 0


@losses
def test_bfloat16_to_rounding(loss):
    arrays = [jnp.asarray(each, jnp.bfloat16).astype(jnp.float32) for each in (HIDDEN, HEAD)]
    expected = graded(lambda *given: loss(*given, TARGETS), *arrays)
    value, slopes = graded(lambda *given: loss(*given, TARGETS), *arrays, dtype=jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert slopes[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for found, wanted in zip(slopes, expected[1], strict=True):
        scale = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=0.01, atol=0.01 * scale)


@losses
def test_transforms(loss):
    """Under vmap over the tokens and under strict promotion."""
    each = jax.vmap(lambda h, y: loss(h, HEAD.astype(np.float32), y))
    found = jax.jit(each)(HIDDEN.astype(np.float32), TARGETS)
    alone, head = jax.jit(loss), HEAD.astype(np.float32)
    expected = [alone(h.astype(np.float32), head, y) for h, y in zip(HIDDEN, TARGETS, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with jax.numpy_dtype_promotion("strict"):
        value, _ = graded(lambda *given: loss(*given, TARGETS, where=WHERE))
    np.testing.assert_allclose(value, graded(lambda *g: loss(*g, TARGETS, where=WHERE))[0])


@losses
def test_a_vocabulary_over_devices(loss):
    """Tokens over two rows of devices, columns over four: 52 columns equal one device to 1e-9."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "vocab"))
    targets = jnp.asarray(TARGETS % 52)
    fused = loss is LOSSES["fused"]

    def on_devices(hidden, head, targets, where):
        options = {"axis_name": "data"} if fused else {}
        found = loss(hidden, head, targets, where=where, vocab_axis_name="vocab", **options)
        return found if fused else jax.lax.psum(found, "data")

    shapes = (P("data"), P(None, "vocab"))
    options = {"mesh": mesh, "in_specs": (*shapes, P("data"), P("data"))}
    outside = jax.value_and_grad(jax.shard_map(on_devices, out_specs=P(), **options), (0, 1))
    inside = jax.shard_map(
        jax.value_and_grad(on_devices, (0, 1)), out_specs=(P(), shapes), **options
    )
    with jax.enable_x64():
        arrays = jnp.asarray(HIDDEN), jnp.asarray(HEAD[:, :52])
        whole = jax.value_and_grad(lambda *g: loss(*g, targets, where=WHERE), (0, 1))
        one = jax.jit(whole)(*arrays)
        for graded_on_devices in (outside, inside):
            found = jax.jit(graded_on_devices)(*arrays, targets, WHERE)
            assert_close(found, one, rtol=1e-9, atol=1e-12)


def test_likeliest_tokens_over_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    found = jax.jit(
        jax.shard_map(
            lambda h, w: token_statistics(
                h, w, TARGETS % 52, chunk=5, top=6, vocab_axis_name="vocab"
            ),
            mesh=mesh,
            in_specs=(P(), P(None, "vocab")),
            out_specs=P(),
        )
    )(HIDDEN, HEAD[:, :52])
    expected = jax.jit(lambda h, w: token_statistics(h, w, TARGETS % 52, top=6))(
        HIDDEN, HEAD[:, :52]
    )
    np.testing.assert_array_equal(found.top_tokens, expected.top_tokens)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "share"), [("log_probs", 8), ("fused", 8)])
def test_memory(name, share):
    """Temporary arrays of value and gradient, against those of the head written out."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2048, 64), (64, 50_000))]
    targets = jax.ShapeDtypeStruct((2048,), jnp.int32)
    forms = {
        "log_probs": lambda h, w, y: jnp.sum(token_log_probs(h, w, y)),
        "fused": lambda h, w, y: fused_cross_entropy(h, w, y),
        "plain": lambda h, w, y: -jnp.mean(picked(written_out(h, w), y)),
    }

    def temporary(form):
        compiled = jax.jit(jax.value_and_grad(form, (0, 1))).lower(*shapes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert share * temporary(forms[name]) < temporary(forms["plain"])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"head": HEAD[0]}, r"head must be an array \[features, vocab\], got shape \(53,\)"),
        ({"hidden": HIDDEN[..., :9]}, r"hidden must .*\(8, 3, 16\), got shape \(8, 3, 9\)"),
        ({"targets": SLOPES}, "targets must be integers, got float"),
        ({"where": WHERE[0]}, "where must have the shape"),
        ({"chunk": 0}, "chunk must be >= 1, got 0"),
        ({"chunk": 2.0}, "chunk must be an int"),
        ({"top": -1}, "top must be >= 0"),
        ({"top": 54}, "top must be <= 53"),
    ],
)
def test_errors(changed, text):
    given = {"hidden": HIDDEN, "head": HEAD, "targets": TARGETS, **changed}
    with pytest.raises(ValueError, match=text):
        token_statistics(**given)
