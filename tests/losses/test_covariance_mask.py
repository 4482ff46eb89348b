"""Clip-Cov and KL-Cov against verl's losses and worked numbers, over devices, and extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_trust_mask import GIVEN, GOLDEN, MASK, NEW, OLD

from trustjax.losses import clip_cov_mask, dapo_loss, grpo_loss, kl_cov_mask

COVARIANCE = GOLDEN["covariance"]
ADVANTAGES = np.array(COVARIANCE["advantages"])
CLIPS = {"clip": 0.2, "clip_high": 0.28}
KEY = jax.random.key(0)
NAN = np.nan
clip_cov = jax.jit(clip_cov_mask, static_argnames="share")
kl_cov = jax.jit(kl_cov_mask, static_argnames="share")

# c = (A - mean A)(log pi - mean log pi), with means 0 and -2 of the four tokens that count.
LOG_PROBS = np.array([[-1.0, -3.0, -5.0], [-3.0, -1.0, 7.0]])
TOKEN_ADVANTAGES = np.array([[2.0, -1.0, 9.0], [3.0, -4.0, 9.0]])
SMALL_MASK = np.array([[1, 1, 0], [1, 1, 0]])  # c: 2, 1, -, -3, -4, -


def test_clip_cov_agrees_with_verl(x64):
    """With a share of 1, all tokens between the bounds are left out, but those clipped anyway."""
    given = (OLD, ADVANTAGES, MASK)

    def loss(new):
        kept = clip_cov_mask(KEY, new, *given, share=1.0, lowest=0.1, highest=1.0, **CLIPS)
        return dapo_loss(new, *given, **CLIPS, weights=kept)

    value, slope = jax.jit(jax.value_and_grad(loss))(NEW)
    np.testing.assert_allclose(value, COVARIANCE["clip_cov"]["value"], rtol=1e-12)
    np.testing.assert_allclose(slope, COVARIANCE["clip_cov"]["gradient"], rtol=1e-10, atol=1e-15)
    assert abs(value - dapo_loss(NEW, *given, **CLIPS)) > 0.01


def test_kl_cov_agrees_with_verl(x64):
    def loss(new):
        chosen = kl_cov_mask(new, ADVANTAGES, MASK, share=0.2)
        return grpo_loss(
            new, OLD, ADVANTAGES, MASK, clip=jnp.inf, reference_log_probs=OLD, kl="abs",
            beta=0.5 * chosen, reduction="token_mean",
        )  # fmt: skip

    value, slope = jax.jit(jax.value_and_grad(loss))(NEW)
    np.testing.assert_allclose(value, COVARIANCE["kl_cov"]["value"], rtol=1e-12)
    np.testing.assert_allclose(slope, COVARIANCE["kl_cov"]["gradient"], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (2e-4, [[1, 0, 0], [0, 0, 0]]),  # one token at least
        (0.5, [[1, 1, 0], [0, 0, 0]]),
        (0.74, [[1, 1, 0], [0, 0, 0]]),  # rounded down
        (0.75, [[1, 1, 0], [1, 0, 0]]),
        (1.0, SMALL_MASK),
    ],
)
def test_kl_cov_of_worked_numbers(share, expected):
    found = kl_cov(LOG_PROBS, TOKEN_ADVANTAGES, SMALL_MASK, share=share)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("numbers", "left_out"),
    [
        ({"lowest": 0.5, "highest": 5.0}, [[1, 1, 0], [0, 0, 0]]),
        ({"lowest": 1.0, "highest": 5.0}, [[1, 0, 0], [0, 0, 0]]),  # the bounds do not belong to it
        ({"lowest": 0.5, "highest": 2.0}, [[0, 1, 0], [0, 0, 0]]),
        ({"lowest": -3.5, "highest": 0.0}, [[0, 0, 0], [1, 0, 0]]),
        ({"lowest": 2.0, "highest": 5.0}, np.zeros((2, 3))),
    ],
)
def test_clip_cov_of_worked_numbers(numbers, left_out):
    found = clip_cov(KEY, LOG_PROBS, LOG_PROBS, TOKEN_ADVANTAGES, SMALL_MASK, share=1.0, **numbers)
    np.testing.assert_array_equal(found, SMALL_MASK - np.array(left_out))


def test_clip_cov_draws_a_share_of_the_candidates():
    """Of 40 candidates among 60 tokens, a share of 0.1 leaves out 6, and every one sometimes."""
    random = np.random.default_rng(0)
    new = random.normal(-2, 1, (10, 8))
    advantages = np.sign(new - new.mean())  # so that all covariances are positive, or nearly
    mask = (np.arange(8) < 6) * np.ones((10, 1))

    @jax.jit
    @jax.vmap
    def drawn(key):
        return clip_cov_mask(key, new, new, advantages, mask, share=0.1, lowest=0.4, highest=9.0)

    left_out = mask - drawn(jax.random.split(KEY, 200))
    np.testing.assert_array_equal(left_out.sum((1, 2)), 6)
    every = clip_cov(KEY, new, new, advantages, mask, share=1.0, lowest=0.4, highest=9.0)
    candidates = mask - every
    np.testing.assert_array_equal(left_out.max(0), candidates)
    assert 20 < candidates.sum() < 60
    rates = left_out.mean(0)[candidates == 1]
    np.testing.assert_allclose(rates, 6 / candidates.sum(), atol=0.1)


def test_clipped_tokens_are_no_candidates():
    """With A > 0, r = e is clipped and no candidate; with `clip=inf` it is one."""
    old = LOG_PROBS - np.array([[1.0, 0, 0], [0, 0, 0]])
    given = (KEY, LOG_PROBS, old, TOKEN_ADVANTAGES, SMALL_MASK)
    numbers = {"share": 1.0, "lowest": 0.5, "highest": 5.0}
    np.testing.assert_array_equal(clip_cov(*given, **numbers), SMALL_MASK - [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
        clip_cov(*given, **numbers, clip=1.0, clip_high=jnp.inf),
        SMALL_MASK - [[1, 1, 0], [0, 0, 0]],
    )
    # For A < 0 a small ratio is clipped: that of the second token.
    old = LOG_PROBS + np.array([[0, 1.0, 0], [0, 0, 0]])
    found = clip_cov(KEY, LOG_PROBS, old, TOKEN_ADVANTAGES, SMALL_MASK, **numbers)
    np.testing.assert_array_equal(found, SMALL_MASK - [[1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("name", ["clip", "kl"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes(name, dtype):
    """Far log-ratios, an answer without a token, NaN in masked places, no gradient, no token."""
    far = np.array([[1e4, -1e4, NAN], [-1e4, 1e4, 1e4], [NAN] * 3])
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    old = jnp.asarray(np.where(mask == 1, 0, NAN), dtype)
    advantages = jnp.array([1.0, -1.0, NAN])

    def of(new, advantages, mask):
        if name == "kl":
            return kl_cov_mask(new, advantages, mask, share=0.3)
        bounds = {"lowest": -jnp.inf, "highest": jnp.inf, "clip": 1.0, "clip_high": jnp.inf}
        return clip_cov_mask(KEY, new, old, advantages, mask, share=0.3, **bounds)

    @jax.jit
    def found(new, advantages, mask):
        total = lambda *x: jnp.sum(of(*x, mask).astype(jnp.float32))
        return of(new, advantages, mask), jax.grad(total, (0, 1))(new, advantages)

    new = jnp.asarray(far, dtype)
    kept, slopes = found(new, advantages, mask)
    assert kept.dtype == bool
    assert not np.any(np.where(mask == 1, False, kept))
    assert np.sum(kept) == (1 if name == "kl" else 4)  # one of five is chosen, or left out
    assert not any(np.any(slope) for slope in slopes)
    clean, _ = found(jnp.nan_to_num(new), advantages, mask)
    np.testing.assert_array_equal(kept, clean)
    nothing, _ = found(new, advantages, np.zeros_like(mask))
    assert not np.any(nothing)


def test_over_eight_devices(x64):
    """Means, shares and draws are those of the whole batch."""
    random = np.random.default_rng(0)
    new, advantages = random.normal(-2, 1, (2, 16, 5))
    old, mask = new + random.normal(0, 0.2, new.shape), random.random(new.shape) < 0.7
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))

    def both(new, old, advantages, mask, **options):
        clip = clip_cov_mask(KEY, new, old, advantages, mask, share=0.1, lowest=0.1, **options)
        return clip, kl_cov_mask(new, advantages, mask, share=0.1, **options)

    many = jax.shard_map(
        functools.partial(both, axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    given = (new, old, advantages, mask)
    for found, expected in zip(jax.jit(many)(*given), jax.jit(both)(*given), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert np.sum(mask & ~expected) > 0


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_errors(share):
    with pytest.raises(ValueError, match=r"^share must be"):
        kl_cov_mask(LOG_PROBS, TOKEN_ADVANTAGES, SMALL_MASK, share=share)
    with pytest.raises(ValueError, match=r"^share must be"):
        clip_cov_mask(KEY, LOG_PROBS, LOG_PROBS, TOKEN_ADVANTAGES, SMALL_MASK, share=share)
    with pytest.raises(ValueError, match=r"^advantages must have"):
        kl_cov_mask(LOG_PROBS, GIVEN["advantages"], SMALL_MASK)
