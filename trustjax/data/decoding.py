"""Decodes an image file, such as JPEG or PNG, to 8-bit pixels, or says what would be lost."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trustjax._checks import InputError
from trustjax._files import one_line

if TYPE_CHECKING:
    from PIL import Image

# The formats of Pillow that data sets use. Others run programs (EPS), hold an image in several
# sizes (ICO), or become 8 bits silently (AVIF, JPEG 2000).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's modes that become 8-bit grey or colour without loss. Others (alpha, 16 bits, CMYK) raise.
_LOSSLESS_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}

# Whether Pillow reads more bits or channels than it keeps, by the arguments of its decoder: the
# layout in the file, such as "RGB;16B" or "RGBX", and for PPM the largest value.
_REDUCES: dict[str, Callable[..., bool]] = {
    "PNG": lambda layout: ";16" in layout,
    "TIFF": lambda layout, *_: ";16" in layout or "X" in layout,
    "PPM": lambda layout, largest=255: largest > 255,
}


class DataError(InputError):
    """Data that cannot be used. The message names the file, and the row and column if known."""


@contextmanager
def pillow_warnings_as_errors() -> Iterator[None]:
    """A context in which Pillow's warnings are errors.

    Pillow only warns of damaged metadata, which may hold the orientation. Warning filters belong to
    the process, not to a thread, so this context surrounds the threads that decode.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        yield


def decode_image(source: str, encoded: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of one image file, uint8 [height, width, 1 or 3], upright.

    The orientation in the metadata is applied. It is an error if anything would be lost.

    Args:
      source: Where the image is from, for messages.
      encoded: The content of a file in one of the `FORMATS`.

    Raises:
      DataError: The bytes cannot be decoded; the image has no pixels, or more than Pillow's
        MAX_IMAGE_PIXELS; it has several frames or pages; its mode has alpha, more than 8 bits, or
        is neither grey nor RGB; Pillow would drop bits or channels; or pixels are transparent or
        beyond the palette.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            problem = _loss(image)
            if problem is None:
                image.info.pop("transparency", None)  # all opaque, and `convert` warns of it
                ImageOps.exif_transpose(image, in_place=True)
                target = _LOSSLESS_MODES[image.mode]
                pixels = np.asarray(image if image.mode == target else image.convert(target))
    except UnidentifiedImageError as error:
        raise DataError(
            f"{source}: cannot decode the image: not one of {', '.join(FORMATS)}, or damaged"
        ) from error
    except Exception as error:  # Pillow's readers raise errors of many types on corrupt bytes
        raise DataError(f"{source}: cannot decode the image: {one_line(error)}") from error
    if problem is not None:
        raise DataError(f"{source}: {problem}")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _loss(image: "Image.Image") -> str | None:
    """What decoding an opened image would lose, or None."""
    from PIL import Image

    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        return f"image of {width} x {height} pixels, more than Pillow's MAX_IMAGE_PIXELS = {limit}"
    if getattr(image, "is_animated", False):
        return "image of several frames or pages; save the one that is meant by itself"
    if image.mode not in _LOSSLESS_MODES:
        return f"image mode {image.mode}; allowed: {', '.join(_LOSSLESS_MODES)}"
    area = 0
    tiles: Any = image.tile  # type: ignore[attr-defined]
    for _, (left, top, right, bottom), _, arguments in tiles:
        area += (right - left) * (bottom - top)
        layout = arguments if isinstance(arguments, tuple) else (arguments,)
        if image.format in _REDUCES and _REDUCES[image.format](*layout):
            return "image of more than 8 bits or more than 3 channels; convert it to 8-bit RGB"
    if 0 < area < width * height:  # a frame of a GIF, or a TIFF that lacks strips; WebP has none
        return f"image of {width} x {height} pixels that has data for only {area} of them"
    if image.mode == "P" and np.asarray(image).max() >= len(image.getpalette() or ()) // 3:
        return "image with pixels beyond its palette"
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return "image with transparent pixels; put it on a background first"
    return None
