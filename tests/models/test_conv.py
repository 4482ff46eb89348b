import functools
from collections.abc import Callable
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.models import ResNet
from trustjax.models.conv import lax_convolution, matmul_convolution

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize(
    ("size", "stride"), [((5, 8), 1), ((5, 8), 2), ((6, 6), 2), ((1, 2), 3)], ids=str
)
def test_both_forms_agree(size: tuple[int, int], stride: int) -> None:
    """In value and in both gradients, to float32 accuracy."""
    images, kernel = normal(2, *size, 3), normal(3, 3, 3, 4, seed=1)
    cotangent = normal(2, -(-size[0] // stride), -(-size[1] // stride), 4, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(convolve: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        value, pull_back = jax.vjp(lambda *a: convolve(*a, stride), images, kernel)
        return value, *pull_back(cotangent)

    results = (value_and_gradients(form) for form in (matmul_convolution, lax_convolution))
    for matmul, lax in zip(*results, strict=True):
        np.testing.assert_allclose(matmul, lax, rtol=1e-5, atol=3e-5)


def test_forms_are_what_they_are_called() -> None:
    images, kernel = normal(1, 4, 4, 1), normal(3, 3, 1, 1)
    for convolve, there in ((matmul_convolution, False), (lax_convolution, True)):
        program = str(jax.make_jaxpr(lambda *a, f=convolve: f(*a, 1))(images, kernel))
        assert ("conv_general_dilated" in program) is there


def test_networks_of_both_forms_share_parameters(variables_of: Callable[..., Any]) -> None:
    images = normal(4, 8, 8, 2)
    matmul, lax = (ResNet(3, widths=(4, 6), convolution=form) for form in ("matmul", "lax"))
    assert ResNet(3).convolution == "matmul"
    variables = variables_of(matmul, images)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, jax.eval_shape(lax.init, KEY, images)
    )
    kernel = variables["params"]["stage_1_block_0"]["conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 4, 6)

    logits = [
        jax.jit(model.apply, static_argnames=("train", "mutable"))(
            variables, images, train=True, mutable=("batch_stats",)
        )[0]
        for model in (matmul, lax)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("widths", "blocks"), [((16, 32, 64), 1), ((4, 4), 2)])
def test_parameter_count(widths: tuple[int, ...], blocks: int) -> None:
    model = ResNet(10, widths=widths, blocks_per_stage=blocks)
    params = jax.eval_shape(model.init, KEY, jnp.zeros([1, 8, 8, 3]))["params"]
    expected = 9 * 3 * widths[0]
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            expected += 2 * before + 9 * before * width + 2 * width + 9 * width * width
            expected += before * width if block == 0 and (stage > 0 or before != width) else 0
            before = width
    expected += 2 * before + (before + 1) * 10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_batch_statistics(variables_of: Callable[..., Any]) -> None:
    model = ResNet(3, widths=(4,))
    images = 3 + normal(16, 8, 8, 2)
    variables = variables_of(model, images)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    statistics = ("batch_stats",)

    # The first norm sees the stem's output: its statistics are known.
    stem = lax_convolution(images, variables["params"]["stem"]["kernel"], 1)
    logits, updated = apply(variables, images, train=True, mutable=statistics)
    before, after = (v["batch_stats"]["stage_0_block_0"]["norm_0"] for v in (variables, updated))
    batch_mean = stem.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * batch_mean, rtol=1e-4)

    # Evaluation leaves them alone and uses them.
    evaluated, same = apply(variables, images, mutable=statistics)
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"])
    assert not np.allclose(evaluated, logits)
    after_update, _ = apply({**variables, **updated}, images, mutable=statistics)
    assert not np.allclose(evaluated, after_update)

    # Training with frozen statistics is a mistake that Flax reports.
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        jax.eval_shape(lambda: model.apply(variables, images, train=True))


def test_stages_halve_the_image() -> None:
    """Seen in the number of positions that reach the last mean: 8 x 8, 4 x 4, 2 x 2."""
    model = ResNet(3, widths=(2, 2, 2))
    images = normal(1, 8, 8, 1)

    def capture(key: jax.Array) -> Any:
        variables = model.init(key, images)
        return model.apply(
            variables, images, capture_intermediates=True, mutable=["intermediates"]
        )[1]

    captured = jax.eval_shape(capture, KEY)
    shapes = [
        captured["intermediates"][f"stage_{stage}_block_0"]["__call__"][0].shape
        for stage in range(3)
    ]
    assert shapes == [(1, 8, 8, 2), (1, 4, 4, 2), (1, 2, 2, 2)]


def test_unknown_convolution() -> None:
    with pytest.raises(ValueError, match="convolution must be one of 'matmul', 'lax', got 'fft'"):
        ResNet(3, convolution="fft")
