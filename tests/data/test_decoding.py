"""Image files of every format: what is read exactly, what is refused rather than flattened."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trustjax.data import DataError
from trustjax.data.decoding import decode_image, pillow_warnings_as_errors

random = np.random.default_rng(0)
COLOUR = random.integers(0, 256, (4, 6, 3), np.uint8)
GREY = COLOUR[..., 0]
# Large patches of even colour, which JPEG keeps within a few grey levels.
PATCHES = np.kron(random.integers(0, 256, (2, 3, 1), np.uint8), np.ones((16, 16, 3), np.uint8))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(color_type: int, depth: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow writes no 16-bit colour. `rows` are the bytes of each row."""
    height, width = rows.shape[:2]

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def read(encoded: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode_image("row 3", encoded)


def palette(transparency: Any = None) -> Image.Image:
    """Four colours, each used by some pixel."""
    image = Image.fromarray((np.arange(24).reshape(4, 6) % 4).astype(np.uint8), "L")
    image = image.convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


# What is read


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
def test_exact_formats(format: str, pixels: np.ndarray) -> None:
    found = read(saved(Image.fromarray(pixels), format, lossless=True))
    if format == "WEBP":  # which has no grey
        pixels = np.broadcast_to(pixels.reshape(4, 6, -1), (4, 6, 3))
    np.testing.assert_array_equal(found.squeeze(), pixels)


def test_jpeg_and_gif() -> None:
    found = read(saved(Image.fromarray(PATCHES), "JPEG", quality=95))
    np.testing.assert_allclose(found, PATCHES, atol=3)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    expected = colours[np.arange(24).reshape(4, 6) % 4]
    np.testing.assert_array_equal(read(saved(palette(), "GIF")), expected)
    np.testing.assert_array_equal(read(saved(palette(), "PNG")), expected)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_tiff_compressions(compression: str) -> None:
    encoded = saved(Image.fromarray(COLOUR), "TIFF", compression=compression)
    np.testing.assert_array_equal(read(encoded), COLOUR)


def test_plain_and_short_pnm() -> None:
    np.testing.assert_array_equal(read(b"P2 2 1 255 7 200").ravel(), [7, 200])
    np.testing.assert_array_equal(read(b"P2 2 1 15 0 15").ravel(), [0, 255])
    np.testing.assert_array_equal(read(b"P5 2 1 3 \0\1").ravel(), [0, 85])
    np.testing.assert_array_equal(read(b"P1 2 1 0 1").ravel(), [255, 0])


# Positions of the numbered pixels of [[0, 1, 2], [3, 4, 5]] after each of EXIF's orientations.
ORIENTED = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_orientation(format: str, orientation: int) -> None:
    """Of JPEG the blocks of 16 x 16 pixels are compared, as each is about even."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = 16 if format == "JPEG" else 1
    numbers = np.kron(40 * np.arange(6, dtype=np.uint8).reshape(2, 3), np.ones((block, block)))
    image = Image.fromarray(numbers.astype(np.uint8)).convert("RGB")
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    found = read(saved(image, format, exif=exif, **options))
    expected = 40.0 * np.kron(ORIENTED[orientation], np.ones((block, block)))
    np.testing.assert_allclose(found[..., 0], expected, atol=3 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_orientations_that_do_not_exist(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(Image.fromarray(COLOUR), "PNG", exif=exif)
    np.testing.assert_array_equal(read(encoded), COLOUR)


@pytest.mark.parametrize(
    "encoded",
    [
        saved(palette(bytes([255, 255, 255, 255])), "PNG"),
        png(2, 8, COLOUR, (b"tRNS", bytes([0, 1, 0, 2, 0, 3]))),
        png(0, 8, np.full((2, 2), 7, np.uint8), (b"tRNS", bytes([0, 9]))),
    ],
    ids=["palette", "colour", "grey"],
)
def test_transparency_that_no_pixel_has(encoded: bytes) -> None:
    assert read(encoded).dtype == np.uint8


# What is refused

several = {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]}
wide = random.integers(0, 256, (4, 6, 6), np.uint8)  # two bytes a channel
TRANSPARENT = {
    "palette with an alpha each": saved(palette(bytes([255, 128, 255, 255])), "PNG"),
    "palette with one transparent index": saved(palette(2), "PNG"),
    "gif": saved(palette(2), "GIF"),
    "grey": png(0, 8, GREY, (b"tRNS", bytes([0, GREY[1, 1]]))),
    "colour": png(2, 8, COLOUR, (b"tRNS", struct.pack(">3H", *COLOUR[0, 0]))),
    "1 bit": png(0, 1, np.full((2, 1), 0b10000000, np.uint8), (b"tRNS", bytes([0, 1]))),
}


@pytest.mark.parametrize("encoded", TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparency_outside_the_mode(encoded: bytes) -> None:
    with pytest.raises(DataError, match=r"^row 3: image with transparent pixels"):
        read(encoded)


MORE_BITS = {
    "png": png(2, 16, wide),
    "ppm": b"P6 4 2 65535 " + bytes(48),
    "ppm of 9 bits": b"P6 4 2 256 " + bytes(48),
    "plain ppm": b"P3 1 1 1000 1 2 3",
}


@pytest.mark.parametrize("encoded", MORE_BITS.values(), ids=MORE_BITS)
def test_16_bit_colour(encoded: bytes) -> None:
    with pytest.raises(DataError, match=r"^row 3: image of more than 8 bits"):
        read(encoded)


def tiff(samples: int, bits: int, extra: bool) -> bytes:
    """An uncompressed TIFF of 2 x 1 pixels, written by hand."""
    entries = [
        (256, 3, 1, 2), (257, 3, 1, 1), (258, 3, samples, 200), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 220), (277, 3, 1, samples), (278, 3, 1, 1),
        (279, 4, 1, 2 * samples * bits // 8), *([(338, 3, 1, 0)] if extra else []),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    content = b"II*\0" + struct.pack("<I", 8) + directory
    content = content.ljust(200, b"\0") + struct.pack(f"<{samples}H", *[bits] * samples)
    return content.ljust(220, b"\0") + bytes(2 * samples * bits // 8)


def test_tiff_of_more_bits_or_channels() -> None:
    assert read(tiff(3, 8, extra=False)).shape == (1, 2, 3)
    for encoded in (tiff(3, 16, extra=False), tiff(4, 8, extra=True)):
        with pytest.raises(DataError, match="more than 8 bits or more than 3 channels"):
            read(encoded)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_several_frames(format: str) -> None:
    with pytest.raises(DataError, match=r"^row 3: image of several frames or pages"):
        read(saved(Image.fromarray(COLOUR), format, **several))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("I;16", "PNG"), ("I", "TIFF"),
     ("F", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("I;16", "TIFF"),
     ("I", "PPM"), ("F", "PPM")],
)  # fmt: skip
def test_other_modes(mode: str, format: str) -> None:
    image = Image.new(mode, (4, 4))
    with pytest.raises(DataError, match=r"^row 3: image mode .*; allowed: 1, L, P, RGB"):
        read(saved(image, format))


def test_frame_smaller_than_the_gif() -> None:
    encoded = bytearray(saved(palette(), "GIF"))
    encoded[6:8] = struct.pack("<H", 12)  # the width of the screen
    with pytest.raises(DataError, match="12 x 4 pixels that has data for only 24 of them"):
        read(bytes(encoded))


def test_pixels_beyond_the_palette() -> None:
    """Pillow makes them black."""
    colours = (b"PLTE", bytes([1, 2, 3, 4, 5, 6]))
    inside = read(png(3, 8, np.array([[0, 1]], np.uint8), colours))
    np.testing.assert_array_equal(inside, [[[1, 2, 3], [4, 5, 6]]])
    with pytest.raises(DataError, match=r"^row 3: image with pixels beyond its palette"):
        read(png(3, 8, np.array([[0, 2]], np.uint8), colours))


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above the limit and raises an error of its own above twice of it."""
    rows = np.zeros((20, 20), np.uint8)
    for limit in (399, 150):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pillow_warnings_as_errors(), pytest.raises(DataError, match=r"^row 3: .*pixels"):
            read(png(0, 8, rows))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert read(png(0, 8, rows)).shape == (20, 20, 1)


@pytest.mark.parametrize(
    "encoded",
    [png(0, 8, np.zeros((0, 4), np.uint8)), png(0, 8, np.zeros((4, 0), np.uint8)),
     b"P5 0 4 255 ", b"P5 4 0 255 ", b"", b"\0", b"%!PS-Adobe-3.0 EPSF-3.0\n"],
)  # fmt: skip
def test_no_pixels_or_no_image(encoded: bytes) -> None:
    with pytest.raises(DataError, match=r"^row 3: cannot decode the image: not one of BMP, GIF"):
        read(encoded)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_truncated_anywhere(format: str) -> None:
    """The pixels are whole or the file is refused; a lost trailer does not matter."""
    encoded = saved(Image.fromarray(PATCHES), format)
    whole = read(encoded)
    refusals = []
    for length in range(0, len(encoded) - 1, max(1, len(encoded) // 80)):
        try:
            with pillow_warnings_as_errors():
                found = decode_image("row 3", encoded[:length])
        except DataError as error:
            refusals.append(str(error))
        else:
            np.testing.assert_array_equal(found, whole)
    assert len(refusals) > 60
    assert all(each.startswith("row 3: ") and "\n" not in each for each in refusals)


def test_damaged_metadata_is_not_passed_over() -> None:
    """The orientation may stand in it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description that is longer than its entry"
    encoded = saved(Image.fromarray(COLOUR), "PNG", exif=exif.tobytes()[:40])
    with pillow_warnings_as_errors(), pytest.raises(DataError, match=r"^row 3: cannot decode"):
        decode_image("row 3", encoded)


def test_warnings_of_others_are_let_through(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="mine"), pillow_warnings_as_errors():
        warnings.warn("mine", stacklevel=1)
