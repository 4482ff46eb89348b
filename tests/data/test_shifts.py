import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.data import SHIFTS, digits, parse_shift

each_shift = pytest.mark.parametrize("name", SHIFTS)
KEY = jax.random.key(0)
# Compiled once a shape, with severity traced: eager calls compile every operation by itself.
COMPILED = {name: jax.jit(shift) for name, shift in SHIFTS.items()}


def digit_images(n: int = 6) -> jax.Array:
    return jnp.asarray(digits().images[:n], jnp.float32) / 255


def random_images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).random(shape, np.float32))


@pytest.mark.table
@each_shift
@pytest.mark.parametrize("shape", [(6, 8, 8, 1), (1, 5, 9, 2)])
def test_range_shape_and_identity_at_zero(name: str, shape: tuple[int, ...]) -> None:
    for images in (random_images(*shape), jnp.ones(shape), jnp.zeros(shape)):
        for severity in (0.5, 1.0, 5.0):
            shifted = COMPILED[name](images, severity, KEY)
            assert shifted.shape == shape
            assert shifted.dtype == jnp.float32
            assert jnp.all((shifted >= 0) & (shifted <= 1))
        np.testing.assert_array_equal(COMPILED[name](images, 0.0, KEY), images)


@pytest.mark.table
@each_shift
def test_severity_zero_is_the_identity(name: str) -> None:
    """Exactly, of any numbers, as no shift at all would be."""
    images = jnp.array([-0.5, 1.5, np.nan, np.inf, 0.3, -0.0]).reshape(1, 2, 3, 1)
    for given in (images, images.astype(jnp.bfloat16)):
        shifted = COMPILED[name](given, 0.0, KEY)
        assert shifted.dtype == given.dtype
        np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (shifted, given)))
    with jax.enable_x64(True):
        given = jnp.full((1, 2, 2, 1), 0.1, jnp.float64)  # no float32
        shift = jax.jit(lambda images: SHIFTS[name](images, 0, KEY))
        np.testing.assert_array_equal(shift(given), given)


@each_shift
def test_strict_promotion_and_no_convolution(name: str, strict: None) -> None:
    del strict
    for severity in (3, 3.0, jnp.asarray(3), jnp.asarray(3.0)):
        program = jax.make_jaxpr(SHIFTS[name])(random_images(2, 8, 8, 1), severity, KEY)
        assert "conv_general_dilated" not in str(program)


@each_shift
def test_distance_grows_with_severity(name: str) -> None:
    images = digit_images()
    distance = [
        float(jnp.mean(jnp.abs(COMPILED[name](images, severity, KEY) - images)))
        for severity in (0.0, 1.0, 3.0, 5.0)
    ]
    assert distance == sorted(set(distance))


@pytest.mark.parametrize("name", ["rotation", "blur", "inversion", "pixelation"])
def test_one_vmap_runs_all_severities(name: str) -> None:
    images = digit_images()
    severities = jnp.arange(1, 6)
    together = jax.jit(jax.vmap(SHIFTS[name], in_axes=(None, 0, None)))(images, severities, KEY)
    for severity, shifted in zip(severities, together, strict=True):
        alone = COMPILED[name](images, severity.astype(jnp.float32), KEY)
        np.testing.assert_allclose(alone, shifted, atol=1e-5)


@each_shift
def test_key_is_all_that_is_random(name: str) -> None:
    images = jnp.broadcast_to(digit_images(1), (6, 8, 8, 1))  # one image six times
    shifted = COMPILED[name](images, 3.0, KEY)
    np.testing.assert_array_equal(shifted, COMPILED[name](images, 3.0, KEY))
    other_key = COMPILED[name](images, 3.0, jax.random.key(1))
    if name in ("blur", "contrast", "pixelation"):
        np.testing.assert_array_equal(shifted, other_key)
    else:
        assert not np.array_equal(shifted, other_key)
        assert any(not np.array_equal(shifted[0], image) for image in shifted[1:])


@pytest.mark.parametrize("name", ["contrast", "rotation"])
def test_bfloat16(name: str) -> None:
    images = digit_images().astype(jnp.bfloat16)
    shifted = COMPILED[name](images, 3.0, KEY)
    assert shifted.dtype == jnp.bfloat16
    exact = COMPILED[name](images.astype(jnp.float32), 3.0, KEY)
    np.testing.assert_allclose(shifted.astype(jnp.float32), exact, atol=0.004)


def test_rotation_by_a_known_angle() -> None:
    """A point 10 right of the middle goes to 10 (cos, sin) of 40 degrees, up or down."""
    images = jnp.zeros([16, 31, 31, 1]).at[:, 15, 25].set(1.0)
    shifted = COMPILED["rotation"](images, 5.0, KEY)[..., 0]
    weight = shifted / shifted.sum(axis=(1, 2), keepdims=True)
    y, x = jnp.mgrid[:31, :31] - 15
    rows, columns = (weight * y).sum(axis=(1, 2)), (weight * x).sum(axis=(1, 2))
    angle = np.rad2deg(np.arctan2(rows, columns))
    np.testing.assert_allclose(np.abs(angle), 40, atol=1.5)
    np.testing.assert_allclose(np.hypot(rows, columns), 10, atol=0.3)
    assert {*np.sign(angle)} == {-1, 1}


def test_translation_by_a_known_distance() -> None:
    images = jnp.zeros([4, 41, 41, 1]).at[:, 20, 20].set(1.0)
    shifted = COMPILED["translation"](images, 5.0, KEY)[..., 0]
    y, x = jnp.mgrid[:41, :41] - 20
    rows, columns = (shifted * y).sum(axis=(1, 2)), (shifted * x).sum(axis=(1, 2))
    np.testing.assert_allclose(np.hypot(rows, columns), 0.2 * 41, atol=0.05)


def test_blur_spreads_by_its_standard_deviation() -> None:
    image = jnp.zeros([1, 65, 65, 1]).at[0, 32, 32].set(1.0)
    blurred = COMPILED["blur"](image, 4.0, KEY)[0, ..., 0]
    offset = jnp.arange(65) - 32
    assert jnp.sum(blurred) == pytest.approx(1, abs=1e-5)
    variance = jnp.sum(blurred * offset[:, None] ** 2)
    assert variance == pytest.approx(0.12**2 * 65 * 4, rel=1e-3)


def test_pixelation_averages_blocks() -> None:
    """Blocks of exactly 2 at size 64: 1 + 0.035 * 8 * severity = 2."""
    images = random_images(1, 64, 64, 2)
    severity = 1 / (0.035 * 8)
    blocks = images.reshape(1, 32, 2, 32, 2, 2).mean(axis=(2, 4))
    expected = jnp.repeat(jnp.repeat(blocks, 2, axis=1), 2, axis=2)
    shifted = COMPILED["pixelation"](images, severity, KEY)
    np.testing.assert_allclose(shifted, expected, atol=1e-6)


def test_noise_has_its_standard_deviation() -> None:
    images = jnp.full([4, 64, 64, 1], 0.5)
    shifted = COMPILED["noise"](images, 2.0, KEY)
    assert jnp.std(shifted) == pytest.approx(0.08, rel=0.03)
    assert jnp.mean(shifted) == pytest.approx(0.5, abs=0.005)


def test_contrast_keeps_the_mean() -> None:
    images = random_images(2, 8, 8, 3)
    shifted = COMPILED["contrast"](images, 5.0, KEY)
    axes = (1, 2)
    np.testing.assert_allclose(shifted.mean(axes), images.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(shifted.std(axes), 0.2 * images.std(axes), rtol=1e-4)


def test_inversion_inverts_its_share() -> None:
    images = random_images(8, 32, 32, 1)
    shifted = COMPILED["inversion"](images, 5.0, KEY)
    inverted = shifted == 1 - images
    assert jnp.all(inverted | (shifted == images))
    np.testing.assert_allclose(inverted.mean(axis=(1, 2, 3)), 0.3, atol=0.03)


@pytest.mark.parametrize(("text", "severity"), [("contrast:3", 3), ("contrast:0.75", 0.75)])
def test_parse_shift(text: str, severity: float) -> None:
    images = digit_images()
    expected = SHIFTS["contrast"](images, severity, KEY)
    np.testing.assert_array_equal(parse_shift(text)(images, KEY), expected)


@each_shift
def test_parse_shift_finds_every_name(name: str) -> None:
    def program(corrupt: Callable[[jax.Array, jax.Array], jax.Array]) -> str:
        return str(jax.make_jaxpr(corrupt)(random_images(2, 8, 8, 1), KEY))

    expected = program(lambda images, key: SHIFTS[name](images, 3.0, key))
    assert program(parse_shift(f"{name}:3")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotatoin:3", "unknown shift 'rotatoin'; did you mean 'rotation'?"),
        ("zzz:3", "unknown shift 'zzz'; names: rotation, blur"),
        ("", "unknown shift ''"),
        ("blur", "severity from 0 to 5, got 'blur'"),
        ("blur:", "severity from 0 to 5, got 'blur:'"),
        ("blur:hard", "severity from 0 to 5, got 'blur:hard'"),
        ("blur:6", "severity from 0 to 5, got 'blur:6'"),
        ("blur:-1", "severity from 0 to 5, got 'blur:-1'"),
        ("blur:nan", "severity from 0 to 5, got 'blur:nan'"),
        ("blur:1:2", "severity from 0 to 5, got 'blur:1:2'"),
    ],
)
def test_parse_shift_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_shift(text)


@pytest.mark.parametrize(
    ("images", "severity", "message"),
    [
        (np.zeros([8, 8, 1], np.float32), 1, "images must be floats.*shape \\(8, 8, 1\\)"),
        (np.zeros([1, 8, 8, 1], np.uint8), 1, "images must be floats.*uint8"),
        (np.zeros([1, 8, 8, 1], np.float32), 6, "severity must be from 0 to 5, got 6"),
        (np.zeros([1, 8, 8, 1], np.float32), -0.5, "severity must be from 0 to 5, got -0.5"),
        (np.zeros([1, 8, 8, 1], np.float32), np.nan, "severity must be from 0 to 5, got nan"),
        (np.zeros([1, 8, 8, 1], np.float32), np.ones(2), "severity must be one number"),
    ],
)
def test_wrong_arguments(images: np.ndarray, severity: float, message: str) -> None:
    for shift in SHIFTS.values():
        with pytest.raises(ValueError, match=message):
            shift(images, severity, KEY)
