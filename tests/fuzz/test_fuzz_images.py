"""Damaged image files: exact pixels, or a DataError of one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from guard import fuzz
from mutating import damaged
from PIL import Image

from trustjax.data import DataError
from trustjax.data.decoding import FORMATS, decode_image, pillow_warnings_as_errors

pytestmark = pytest.mark.slow


def images() -> list[bytes]:
    """Of every format several modes and options, with the metadata of an orientation."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (7, 9, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for format in FORMATS:
        for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK"):
            image = Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else mode).convert(mode)
            for options in (
                {},
                {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {},
                {"save_all": True, "append_images": [image.copy()]} if format != "JPEG" else {},
                {"transparency": 3} if format in ("PNG", "GIF") and mode == "P" else {},
                {"compression": "tiff_lzw"} if format == "TIFF" else {},
                {"progressive": True, "quality": 30} if format == "JPEG" else {},
            ):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, format, **options)
                except (OSError, KeyError, ValueError):  # a mode or frames that it has not
                    continue
                found.append(buffer.getvalue())
    return [*found, b"P6 2 1 255 abcdef", b"P3 2 1 1000 1 2 3 4 5 6", b"P1 2 2 0 1 1 0"]


def with_right_checksums(content: bytes) -> bytes:
    """A damaged PNG whose chunks are taken for whole."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = images()

    def attempt(seed: int) -> None:
        random = np.random.default_rng(seed)
        content = whole[random.integers(len(whole))]
        if random.integers(20):
            content = damaged(random, content)
        if content.startswith(b"\x89PNG") and random.integers(2):
            content = with_right_checksums(content)
        pixels = decode_image("row 1", content)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] in (1, 3)
        assert pixels.size

    with pillow_warnings_as_errors():
        fuzz("images", tmp_path, attempt, (DataError,))
