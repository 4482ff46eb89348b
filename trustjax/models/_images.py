"""The range of the images that all classifiers take."""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError


def unit_range(images: jax.Array) -> jax.Array:
    """Converts uint8 images of 0..255 to float32 in [0, 1], and keeps floats as they are.

    Networks are trained on images in [0, 1] (`trustjax.data.Batches`), and data sets hold uint8.
    Raises ValueError for other integers and for bools, whose range is unknown.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise FieldError("images", "be floats in [0, 1], or uint8 0..255", images.dtype)
    return images
