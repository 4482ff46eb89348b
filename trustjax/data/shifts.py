"""Distribution shifts of images: changes that a model's training set did not show.

A shift is a pure function `shift(images, severity, key) -> images` on float images [batch, height,
width, channels] in [0, 1]; it keeps shape and dtype. The severity is a number from 0 (the images
themselves) over 1 (mild) to 5 (hard, but people still recognise them), and may be fractional and
traced. The key makes random choices for every image; shifts without any ignore it. All shifts are
matrix products and gathers, as XLA on CPU runs convolutions inside a scan very slowly.

Blur and pixelation grow with the square root of the image size, as small images put more content
into a pixel; translation is relative to the image. The idea of severities is from Hendrycks and
Dietterich 2019, arXiv:1903.12261; the strengths here are other ones, chosen to suit 8x8 as well as
224x224.
"""

import difflib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError

Shift = Callable[[jax.Array, float | jax.Array, jax.Array], jax.Array]

MAX_SEVERITY = 5


def _shift(function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Shift:
    """Adds checks of the arguments; computes in float32, and clips and casts the result."""

    @functools.wraps(function)
    def checked(images: jax.Array, severity: float | jax.Array, key: jax.Array) -> jax.Array:
        images = jnp.asarray(images)
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise FieldError(
                "images",
                "be floats in [0, 1] of shape [batch, height, width, channels]",
                f"{images.dtype} of shape {images.shape}",
            )
        if jnp.ndim(severity) != 0:
            raise FieldError("severity", "be one number", f"shape {jnp.shape(severity)}")
        if not isinstance(severity, jax.core.Tracer) and not 0 <= float(severity) <= MAX_SEVERITY:
            raise FieldError("severity", f"be from 0 to {MAX_SEVERITY}", severity)
        strength = jnp.asarray(severity).astype(jnp.float32)
        shifted = function(images.astype(jnp.float32), strength, key)
        shifted = jnp.clip(shifted, 0, 1).astype(images.dtype)  # rounding may leave [0, 1]
        return jnp.where(strength == 0, images, shifted)

    return checked


@_shift
def rotation(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Rotates each image by 8 degrees times severity, left or right at random, on black."""
    side = jax.random.rademacher(key, images.shape[:1], jnp.float32)
    angle = math.radians(8) * severity * side
    y, x = _centred_grid(images)

    def turn(image: jax.Array, angle: jax.Array) -> jax.Array:
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return _resample(image, y * cos - x * sin, y * sin + x * cos)

    return jax.vmap(turn)(images, angle)


@_shift
def translation(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by 4 % of its size times severity, in a random direction."""
    angle = jax.random.uniform(key, images.shape[:1], jnp.float32, maxval=2 * jnp.pi)
    distance = 0.04 * severity
    y, x = _centred_grid(images)
    height, width = images.shape[1:3]

    def move(image: jax.Array, angle: jax.Array) -> jax.Array:
        return _resample(
            image,
            y + distance * height * jnp.sin(angle),
            x + distance * width * jnp.cos(angle),
        )

    return jax.vmap(move)(images, angle)


@_shift
def blur(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Gaussian blur of standard deviation 0.12 sqrt(size severity) pixels."""
    del key

    def weights(size: int) -> jax.Array:
        sigma = jnp.maximum(0.12 * jnp.sqrt(size * severity), 1e-6)  # at 1e-6 the identity
        position = jnp.arange(size, dtype=jnp.float32)
        return jax.nn.softmax(-(((position[:, None] - position[None]) / sigma) ** 2) / 2, axis=-1)

    return _mix_pixels(images, weights)


@_shift
def pixelation(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Replaces blocks of 1 + 0.035 sqrt(size) severity pixels a side by their mean."""
    del key

    def weights(size: int) -> jax.Array:
        block = 1 + 0.035 * math.sqrt(size) * severity
        cell = jnp.floor((jnp.arange(size, dtype=jnp.float32) + 0.5) / block)
        same_cell = jnp.equal(cell[:, None], cell[None]).astype(jnp.float32)
        return same_cell / same_cell.sum(axis=-1, keepdims=True)

    return _mix_pixels(images, weights)


@_shift
def noise(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Adds Gaussian noise of standard deviation 0.04 times severity, clipped to [0, 1]."""
    return images + 0.04 * severity * jax.random.normal(key, images.shape, jnp.float32)


@_shift
def contrast(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each channel towards its mean, to 1 - 0.16 severity of its contrast."""
    del key
    mean = images.mean(axis=(1, 2), keepdims=True)
    return images + 0.16 * severity * (mean - images)


@_shift
def inversion(images: jax.Array, severity: jax.Array, key: jax.Array) -> jax.Array:
    """Inverts (x to 1 - x) 0.06 severity of each image, on one side of a line of random angle."""
    angle = jax.random.uniform(key, images.shape[:1], jnp.float32, maxval=2 * jnp.pi)
    y, x = _centred_grid(images)

    def invert(image: jax.Array, angle: jax.Array) -> jax.Array:
        position = y * jnp.sin(angle) + x * jnp.cos(angle)
        inverted = position < jnp.quantile(position, 0.06 * severity)
        return jnp.where(inverted[..., None], 1 - image, image)

    return jax.vmap(invert)(images, angle)


SHIFTS: dict[str, Shift] = {
    "rotation": rotation,
    "blur": blur,
    "noise": noise,
    "contrast": contrast,
    "inversion": inversion,
    "pixelation": pixelation,
    "translation": translation,
}


def parse_shift(text: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The shift that a text `name:severity` describes, as a function `(images, key) -> images`.

    Raises ValueError for an unknown name, with the closest one, or a severity outside 0..5.

    >>> corrupt = parse_shift("rotation:3")
    """
    name, _, number = text.partition(":")
    if name not in SHIFTS:
        closest = difflib.get_close_matches(name, SHIFTS, n=1)
        hint = f"did you mean {closest[0]!r}? " if closest else ""
        raise ValueError(f"unknown shift {name!r}; {hint}names: {', '.join(SHIFTS)}")
    try:
        severity = float(number)
    except ValueError:
        severity = math.nan
    if not 0 <= severity <= MAX_SEVERITY:
        raise ValueError(
            f"a shift is name:severity with severity from 0 to {MAX_SEVERITY}, got {text!r}"
        )
    shift = SHIFTS[name]
    return lambda images, key: shift(images, severity, key)


def _centred_grid(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixel coordinates y, x, float32 [height, width], zero in the middle of the image."""
    height, width = images.shape[1:3]
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2,
        jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2,
        indexing="ij",
    )
    return y, x


def _resample(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Bilinear interpolation of one image at centred coordinates; black outside the image."""
    height, width, _ = image.shape
    resample_channel = functools.partial(
        jax.scipy.ndimage.map_coordinates,
        coordinates=[y + (height - 1) / 2, x + (width - 1) / 2],
        order=1,
        mode="constant",
    )
    resampled: jax.Array = jax.vmap(resample_channel, in_axes=-1, out_axes=-1)(image)
    return resampled


def _mix_pixels(images: jax.Array, weights: Callable[[int], jax.Array]) -> jax.Array:
    """Weighted means of rows, then of columns; `weights(size)` is [size, size], rows sum to 1."""
    height, width = images.shape[1:3]
    return jnp.einsum(
        "yi,xj,bijc->byxc", weights(height), weights(width), images, precision="highest"
    )
