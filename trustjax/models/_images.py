"""The images that all classifiers take."""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError


def unit_range(images: jax.Array) -> jax.Array:
    """Floats as they are, uint8 images of 0..255 as float32 in [0, 1].

    Networks are trained on images in [0, 1] (`trustjax.data.Batches`), and data sets hold uint8.
    Raises ValueError for other integers and bools, whose range is not known.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise FieldError("images", "be floats in [0, 1], or uint8 0..255", images.dtype)
    return images
