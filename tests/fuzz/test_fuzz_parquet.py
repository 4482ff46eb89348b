"""Damaged and odd parquet files: a whole ImageDataset, or a DataError of one line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from guard import fuzz
from mutating import Random, damaged, edited
from PIL import Image
from pyarrow import parquet

from trustjax.data import DataError, hugging_face

pytestmark = pytest.mark.slow

FEATURES = {
    "img": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
}


def png(seed: int, size: tuple[int, int] = (4, 5)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [png(seed) for seed in range(6)]


def table(random: Random) -> Any:
    """A table of which a column, a value or the metadata may be of any odd kind."""
    images: list[Any] = list(GOOD)
    labels: list[Any] = [0, 1, 2, 0, 1, 2]
    kind: Any = random.choice([0] * 6 + list(range(1, 8)))
    if kind == 1:
        images[random.integers(6)] = [None, b"", png(0, (5, 4)), b"GIF89a"][random.integers(4)]
    elif kind == 2:
        labels[random.integers(6)] = [None, -1, 3, 2**62][random.integers(4)]
    column = pa.array(images, pa.binary())
    if random.integers(2):
        column = pa.StructArray.from_arrays([column, pa.nulls(6, pa.string())], ["bytes", "path"])
    label_column = pa.array(labels, pa.int64())
    odd = [
        pa.array(["x"] * 6), pa.array([0.5] * 6), pa.array([[1]] * 6), pa.nulls(6),
        pa.array([True] * 6), pa.array([{"a": 1}] * 6), pa.array(images, pa.large_binary()),
        pa.array([b"0123"] * 6, pa.binary(4)), pa.array(labels).dictionary_encode(),
    ]  # fmt: skip
    if kind == 3:
        column = odd[random.integers(len(odd))]
    elif kind == 4:
        label_column = odd[random.integers(len(odd))]
    names = [["img", "label"], ["image", "label"], ["img", "img"], ["", "label"], ["a.b", "label"]]
    chosen = names[random.integers(len(names))] if kind == 5 else names[0]
    made = pa.Table.from_arrays([column, label_column], chosen)
    features: Any = {"info": {"features": FEATURES}}
    if kind == 6:
        features = edited(random, features)
    if random.integers(3):
        text = json.dumps(features).encode()
        text = damaged(random, text) if kind == 7 else text
        made = made.replace_schema_metadata({b"huggingface": text})
    return made


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"

    def attempt(seed: int) -> None:
        random = np.random.default_rng(seed)
        buffer = io.BytesIO()
        parquet.write_table(
            table(random),
            buffer,
            compression=str(random.choice(["none", "snappy", "gzip", "zstd"])),
            use_dictionary=bool(random.integers(2)),
            row_group_size=int(random.choice([1, 4, 100])),
            data_page_version=str(random.choice(["1.0", "2.0"])),
            write_page_checksum=bool(random.integers(2)),
        )
        content = buffer.getvalue()
        if random.integers(3):
            footer = int.from_bytes(content[-8:-4], "little") + 8
            cut = len(content) - footer if random.integers(2) else 0
            content = content[:cut] + damaged(random, content[cut:])
        file.write_bytes(content)
        dataset = hugging_face(tmp_path)
        assert dataset.images.dtype == np.uint8
        assert dataset.images.ndim == 4
        assert len(dataset.images) == len(dataset.labels) > 0
        assert dataset.labels.dtype == np.int32
        assert 0 <= dataset.labels.min() <= dataset.labels.max() < dataset.num_classes

    fuzz("parquet", tmp_path, attempt, (DataError,))
